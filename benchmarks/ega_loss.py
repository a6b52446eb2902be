"""Time and memory of EGA, forward and backward, against the direct formula: ``python -m benchmarks.ega_loss``."""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.common import available_memory, machine, median_seconds, peak_memory, print_table, three_digits
from benchmarks.release_recipe import direct_ega
from distiller_zoo import EGA
from helper.options import number, positive, positive_int
from helper.runtime import resolve_device
from helper.util import exit_on_bad_input

# The direct formula holds about so many matrices of 2B x 2B at a time.
_DIRECT_MATRICES = 7


def compare(batch: int, dim: int, budget: float, device: str) -> list[str]:
    """One row: batch, ms of both, ratio, MiB of both; a dash where the direct formula does not fit in memory."""
    generator = torch.Generator().manual_seed(0)
    f_t = torch.randn(batch, dim, generator=generator)
    # As in training, the student is neither unrelated to the teacher nor near it, and alone gets a gradient.
    f_s = (f_t + torch.randn(batch, dim, generator=generator)).to(device).requires_grad_()
    f_t = f_t.to(device)

    def step(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(f_s, f_t), f_s)

    ours, direct = step(EGA()), step(direct_ega)
    if _DIRECT_MATRICES * 4 * (2 * batch) ** 2 > 0.9 * available_memory(device):
        (seconds,) = median_seconds([ours], budget, device)
        memory = peak_memory(ours, device) / 2**20
        return [f"{batch}", "-", three_digits(1e3 * seconds), "-", "-", three_digits(memory)]
    seconds, seconds_direct = median_seconds([ours, direct], budget, device)
    memory, memory_direct = (peak_memory(function, device) / 2**20 for function in (ours, direct))
    return [
        f"{batch}",
        three_digits(1e3 * seconds_direct),
        three_digits(1e3 * seconds),
        f"{seconds_direct / seconds:.1f}",
        three_digits(memory_direct),
        three_digits(memory),
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split(":")[0] + ".", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--min_batch", type=positive_int, default=64, help="smallest batch")
    parser.add_argument("--max_batch", type=positive_int, default=8192, help="largest batch; doubled up to it")
    parser.add_argument("--feature_dim", type=number(int, 2), default=256, help="dimension of the joint space")
    parser.add_argument("--seconds", type=positive, default=3, help="time to spend on each batch size")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu", help="what to compute on")
    args = parser.parse_args(argv)
    with exit_on_bad_input("benchmarks.ega_loss"):
        device = resolve_device(args.device)

    print(f"{machine(device)}; D = {args.feature_dim}, float32, forward and backward\n")
    sizes = []
    while (batch := args.min_batch << len(sizes)) <= args.max_batch:
        sizes.append(batch)
    header = ("batch", "direct, ms", "EGA, ms", "times faster", "direct, peak MiB", "EGA, peak MiB")
    print_table(header, (compare(batch, args.feature_dim, args.seconds, device) for batch in sizes))


if __name__ == "__main__":
    main()
