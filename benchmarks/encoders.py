"""Images per second of frozen encoders, against their bare networks: ``python -m benchmarks.encoders``.

Weights are random; their values do not change the speed.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from benchmarks.common import machine, median_seconds, print_table
from dataset.views import CIFAR_VIEWS
from helper.bank import CHUNK, encode_view
from helper.encoder import load_encoder
from helper.exits import exit_on_bad_input
from helper.parser import positive, positive_int
from helper.runtime import resolve_amp, resolve_device, teacher_precision
from models.library import library_network
from models.names import parse_name


def write_random_weights(name: str, folder: Path) -> str:
    """The name followed by ``=PATH``; the path is a new file of random weights."""
    parsed = parse_name(name)
    if parsed.library == "open_clip":
        import open_clip

        net = open_clip.create_model(parsed.name)
    elif parsed.library == "timm":
        import timm

        net = timm.create_model(parsed.name)
    else:
        net = library_network(parsed).net
    path = folder / f"{parsed.short}.pth"
    torch.save(net.state_dict(), path)
    return f"{name}={path}"


def compare(name: str, resolution: int | None, batch: int, budget: float, device: str, amp: str) -> list[str]:
    """One row: the encoder, its input, its precision; images per second of bank, network alone, bare network; ratio."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_random_weights(name, Path(folder))
        encoder, bare = (load_encoder(path, folder, device, mode, resolution) for mode in (amp, "off"))
    # The bare network is as the library gives it: float32, in the memory format that it was built in.
    bare.net.to(memory_format=torch.contiguous_format)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8, generator=generator).to(device)
    view = torch.randint(0, 162, (batch,), generator=generator).to(device)
    pixels = torch.randn(batch, 3, encoder.resolution, encoder.resolution, generator=generator).to(device)

    with torch.no_grad():
        seconds = median_seconds(
            [
                lambda: encode_view(encoder, CIFAR_VIEWS, images, view, view),
                lambda: encoder(pixels),
                lambda: bare.net(pixels),
            ],
            budget,
            device,
        )
    rates = [batch / second for second in seconds]
    precision = teacher_precision(device, amp, encoder.published)
    about = [name, f"{encoder.resolution}", precision + (", channels_last" if encoder.channels_last else "")]
    return [*about, *(f"{rate:.1f}" for rate in rates), f"{rates[0] / rates[2]:.2f}"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split(":")[0] + ".", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    networks = ["timm:tf_efficientnet_lite0", "open_clip:ViT-B-32", "torchvision:resnet50"]
    parser.add_argument("--names", nargs="+", default=networks, help="networks of the libraries")
    parser.add_argument("--resolution", type=positive_int, help="size of their input in pixels; if unset, their own")
    parser.add_argument("--batch", type=positive_int, default=CHUNK, help="images at a time")
    parser.add_argument("--seconds", type=positive, default=20, help="time to spend on each")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu", help="what to compute on")
    args = parser.parse_args(argv)
    with exit_on_bad_input("benchmarks.encoders"):
        device = resolve_device(args.device)
        amp = resolve_amp("auto", device)
        print(f"{machine(device)}; batches of {args.batch}\n", flush=True)
        header = ("encoder", "pixels", "precision", "bank, images/s", "its network", "bare network", "bank to bare")
        rows = (compare(name, args.resolution, args.batch, args.seconds, device, amp) for name in args.names)
        print_table(header, rows)


if __name__ == "__main__":
    main()
