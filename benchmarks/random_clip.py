"""Write a CLIP with random weights, of a published size and in the published format.

It serves for trials of speed, and of the whole path where the published weights cannot be had. Such a teacher teaches
nothing: ``python -m benchmarks.random_clip CLIP/ViT-B-32-random.pt``.
"""

import argparse
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

# embed_dim, image_resolution, vision_layers, vision_width, vision_patch_size, context_length, vocab_size,
# transformer_width, transformer_heads, transformer_layers (Radford et al., 2021, tables 19 and 20)
SIZES = {
    "ViT-B/32": (512, 224, 12, 768, 32, 77, 49408, 512, 8, 12),
    "ViT-B/16": (512, 224, 12, 768, 16, 77, 49408, 512, 8, 12),
    "RN50": (1024, 224, (3, 4, 6, 3), 64, None, 77, 49408, 512, 8, 12),
    "RN101": (512, 224, (3, 4, 23, 3), 64, None, 77, 49408, 512, 8, 12),
}


class _Archive(nn.Module):
    """A CLIP's modules, parameters and the three numbers that the published archives hold."""

    def __init__(self, model: nn.Module, resolution: int):
        super().__init__()
        for name, child in model.named_children():
            setattr(self, name, child)
        for name, parameter in model.named_parameters(recurse=False):
            setattr(self, name, parameter)
        numbers = {"input_resolution": resolution, "context_length": 77, "vocab_size": model.vocab_size}
        for name, value in numbers.items():
            self.register_buffer(name, torch.tensor(value))

    def forward(self, image: Tensor) -> Tensor:
        return self.visual(image)


def write_archive(path: Path, sizes: tuple, seed: int = 0) -> None:
    """Write a CLIP of the given sizes as a TorchScript archive, its weights in fp16 as in the published ones."""
    from clip.model import CLIP, convert_weights  # here, so that what needs no such file needs no clip

    torch.manual_seed(seed)
    model = CLIP(*sizes).eval()
    archive = _Archive(model, sizes[1])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the format is the published one, however old
        traced = torch.jit.trace(archive, torch.zeros(1, 3, sizes[1], sizes[1]), check_trace=False)
        convert_weights(model)  # after tracing: not every fp16 operation runs on a CPU
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.jit.save(traced, str(path))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="the file to write")
    parser.add_argument("--size", choices=tuple(SIZES), default="ViT-B/32", help="published size (default: ViT-B/32)")
    args = parser.parse_args(argv)
    write_archive(args.path, SIZES[args.size])
    print(f"wrote {args.path}: {args.size} with random weights")


if __name__ == "__main__":
    main()
