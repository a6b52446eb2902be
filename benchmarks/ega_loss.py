"""Time and memory of EGA, forward and backward, against the direct formula: ``python -m benchmarks.ega_loss``.

With ``--accuracy`` it prints EGA's error in float32 against the direct formula in float64.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import available_memory, machine, median_seconds, peak_memory, print_table, three_digits
from benchmarks.release_recipe import direct_ega
from distiller_zoo import EGA, ega_terms
from helper.exits import exit_on_bad_input
from helper.parser import number, positive, positive_int
from helper.runtime import resolve_device

# Matrices of 2B x 2B that the direct formula holds at a time, about.
_DIRECT_MATRICES = 7


def compare(batch: int, dim: int, budget: float, device: str) -> list[str]:
    """One row: batch, ms of both, ratio, MiB of both; a dash where the direct formula does not fit in memory."""
    generator = torch.Generator().manual_seed(0)
    f_t = torch.randn(batch, dim, generator=generator)
    # As in training, the student is neither unrelated to the teacher nor near it; only the student gets a gradient.
    f_s = (f_t + torch.randn(batch, dim, generator=generator)).to(device).requires_grad_()
    f_t = f_t.to(device)

    def step(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(f_s, f_t), f_s)

    ours, direct = step(EGA()), step(direct_ega)
    if _DIRECT_MATRICES * 4 * (2 * batch) ** 2 > 0.9 * available_memory(device):
        (seconds,) = median_seconds([ours], budget, device, warm=True)
        memory = peak_memory(ours, device) / 2**20
        return [f"{batch}", "-", three_digits(1e3 * seconds), "-", "-", three_digits(memory)]
    seconds, seconds_direct = median_seconds([ours, direct], budget, device, warm=True)
    memory, memory_direct = (peak_memory(function, device) / 2**20 for function in (ours, direct))
    return [
        f"{batch}",
        three_digits(1e3 * seconds_direct),
        three_digits(1e3 * seconds),
        f"{seconds_direct / seconds:.1f}",
        three_digits(memory_direct),
        three_digits(memory),
    ]


# Rows of the direct formula's matrices that are held at a time in float64.
_ROWS = 1024


def exact_terms(f_s: Tensor, f_t: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Node and edge loss and the gradient of each at the student, by the direct formula in float64.

    The B x B matrices are made some rows at a time, so that any B fits into memory.
    """
    f_s = f_s.double().requires_grad_()
    z_s, z_t = (F.normalize(f - f.mean(dim=1, keepdim=True)) for f in (f_s, f_t.double()))
    s, index = z_s.detach(), torch.arange(len(f_s), device=f_s.device)
    squares = torch.zeros(2, dtype=s.dtype, device=s.device)
    grad_node, grad_edge = torch.zeros(2, *s.shape, dtype=s.dtype, device=s.device)
    for rows in index.split(_ROWS):
        node = z_t[rows] @ s.T
        node[torch.arange(len(rows), device=rows.device), rows] -= 1
        edge = z_t[rows] @ z_t.T - s[rows] @ s.T
        squares += torch.stack([node.square().sum(), edge.square().sum()])
        grad_node += node.T @ z_t[rows]
        grad_edge[rows] = -2 * edge @ s
    values = squares.sqrt()
    return [
        (value, torch.autograd.grad(z_s, f_s, grad / value, retain_graph=True)[0])
        for value, grad in zip(values, (grad_node, grad_edge), strict=True)
    ]


def error(batch: int, dim: int, noise: float | None, device: str) -> float:
    """The largest relative error, in norm, of EGA's two terms and of their gradients.

    Args:
        noise: added to the teacher to make the student, in standard deviations; None for an unrelated student.
    """
    generator = torch.Generator().manual_seed(batch)
    f_t, other = torch.randn(2, batch, dim, generator=generator).to(device)
    f_s = (other if noise is None else f_t + noise * other).requires_grad_()
    errors = []
    for value, (expected, expected_grad) in zip(ega_terms(f_s, f_t), exact_terms(f_s.detach(), f_t), strict=True):
        (grad,) = torch.autograd.grad(value, f_s, retain_graph=True)
        errors += [
            abs(value.detach().double() - expected) / expected,
            (grad - expected_grad).norm() / expected_grad.norm(),
        ]
    return max(float(x) for x in errors)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split(":")[0] + ".", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--min_batch", type=positive_int, default=64, help="smallest batch")
    parser.add_argument("--max_batch", type=positive_int, default=8192, help="largest batch; batches double up to it")
    parser.add_argument("--feature_dim", type=number(int, 2), default=256, help="dimension of the joint space")
    parser.add_argument("--seconds", type=positive, default=3, help="time to spend on each batch size")
    parser.add_argument("--accuracy", action="store_true", help="print errors instead of times")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu", help="what to compute on")
    args = parser.parse_args(argv)
    with exit_on_bad_input("benchmarks.ega_loss"):
        device = resolve_device(args.device)

    print(f"{machine(device)}; D = {args.feature_dim}, float32, forward and backward\n", flush=True)
    sizes = []
    while (batch := args.min_batch << len(sizes)) <= args.max_batch:
        sizes.append(batch)
    if args.accuracy:
        students = {"unrelated": None, "100 % of noise": 1.0, "10 %": 0.1, "0.5 %": 0.005}
        rows = (
            [f"{batch}", *(f"{error(batch, args.feature_dim, noise, device):.1e}" for noise in students.values())]
            for batch in sizes
        )
        print_table(("batch", *students), rows)
        return
    header = ("batch", "direct, ms", "EGA, ms", "times faster", "direct, peak MiB", "EGA, peak MiB")
    print_table(header, (compare(batch, args.feature_dim, args.seconds, device) for batch in sizes))


if __name__ == "__main__":
    main()
