"""Resize whole pictures, and boxes in them, bit for bit as Pillow does."""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# Pillow keeps bicubic weights as integers of this many fractional bits.
_FRACTION_BITS = 22


def _sinc(x: float) -> float:
    return math.sin(math.pi * x) / (math.pi * x) if x else 1.0


def _cubic(x: float) -> float:
    """Keys' bicubic kernel with a = -0.5."""
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    if x < 2:
        return ((-0.5 * x + 2.5) * x - 4) * x + 2
    return 0.0


# Pillow's kernels and how far they reach, in pixels of the larger picture.
_KERNELS: dict[str, tuple[Callable[[float], float], float]] = {
    "box": (lambda x: float(-0.5 < x <= 0.5), 0.5),
    "bilinear": (lambda x: max(1 - abs(x), 0.0), 1.0),
    "hamming": (lambda x: _sinc(x) * (0.54 + 0.46 * math.cos(math.pi * x)) if abs(x) < 1 else 0.0, 1.0),
    "bicubic": (_cubic, 2.0),
    "lanczos": (lambda x: _sinc(x) * _sinc(x / 3) if -3 <= x < 3 else 0.0, 3.0),
}
INTERPOLATIONS = tuple(_KERNELS)


def _shares(size_in: int, size_out: int, interpolation: str) -> list[tuple[int, list[float]]]:
    """For each pixel of the result, the first of the picture's pixels that it mixes, and the shares from there on."""
    kernel, reach = _KERNELS[interpolation]
    scale = size_in / size_out
    stretch = max(scale, 1.0)
    shares = []
    for out in range(size_out):
        centre = (out + 0.5) * scale
        first = max(int(centre - reach * stretch + 0.5), 0)
        last = min(int(centre + reach * stretch + 0.5), size_in)
        taps = [kernel((i - centre + 0.5) / stretch) for i in range(first, last)]
        total = sum(taps)
        shares.append((first, [tap / total for tap in taps]))
    return shares


def _fixed_point(shares: list[tuple[int, list[float]]], size_in: int, bits: int) -> Tensor:
    """Shares as a dense (size_out, size_in) float64 matrix of integers, with ``bits`` fractional bits."""
    weights = torch.zeros(len(shares), size_in, dtype=torch.float64)
    for row, (first, taps) in zip(weights.numpy(), shares, strict=True):
        # Pillow rounds halves away from zero, as C's cast of x +- 0.5 does.
        row[first : first + len(taps)] = [math.trunc(tap * 2**bits + math.copysign(0.5, tap)) for tap in taps]
    return weights


@functools.lru_cache(maxsize=16)
def _weights(size_in: int, size_out: int, interpolation: str, device: torch.device) -> Tensor:
    """Pillow's fixed-point weights of one axis as a dense (size_out, size_in) float64 matrix of integers."""
    return _fixed_point(_shares(size_in, size_out, interpolation), size_in, _FRACTION_BITS).to(device)


def _round_to_8_bits(x: Tensor, unit: float | Tensor = 2.0**-_FRACTION_BITS) -> Tensor:
    return x.mul_(unit).add_(0.5).floor_().clamp_(0, 255)


def resize(images: Tensor, size: int, interpolation: str = "bicubic", antialias: bool = True) -> Tensor:
    """Resize to a square, bit for bit as Pillow's ``Image.resize((size, size), interpolation)`` does a square.

    Pillow sums integers, horizontally first, and rounds to 8 bits after each pass. Products and sums of those integers
    stay below 2**53, so that float64 matrix products give them exactly, on any device. Newer releases of Pillow resize
    vertically first where a picture is narrower than ``size`` and higher.

    Args:
        images: (B, C, H, W) uint8.
        size: height and width of the result.
        interpolation: one of ``INTERPOLATIONS``.
        antialias: average when shrinking, as Pillow always does. Without it, bilinear and bicubic are those of
            torchvision's transforms of tensors; these differ from Pillow's when enlarging too.

    Returns:
        (B, C, size, size) uint8.

    Raises:
        ValueError: the interpolation is unknown, or torch lacks it without antialiasing.
    """
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"unknown interpolation {interpolation!r}; known: {', '.join(INTERPOLATIONS)}")
    height, width = images.shape[-2:]
    if (height, width) == (size, size):
        return images
    with torch.autocast(images.device.type, enabled=False):
        if not antialias:
            if interpolation not in ("bilinear", "bicubic"):
                raise ValueError(f"{interpolation} without antialiasing: only bilinear and bicubic exist")
            x = F.interpolate(images.float(), (size, size), mode=interpolation, align_corners=False)
            return x.round_().clamp_(0, 255).to(torch.uint8)
        x = images.double()
        if width != size:
            x = _round_to_8_bits(x @ _weights(width, size, interpolation, x.device).T)
        if height != size:
            x = _round_to_8_bits(_weights(height, size, interpolation, x.device) @ x)
        return x.to(torch.uint8)


def mirror(images: Tensor, flip: Tensor) -> Tensor:
    """Mirror the images of (B, C, H, W) where ``flip`` (B,) is 1."""
    return torch.where(flip.bool()[:, None, None, None], images.flip(-1), images)


# torch has kernels of 8-bit pixels for these; they average as Pillow does, with weights of 16 bits.
_NATIVE = ("bilinear", "bicubic")

# Boxes that are resized at once with dense matrices of weights, which are as large as the pictures.
_BOXES_AT_ONCE = 64


def _native_weights(size_in: int, size_out: int, interpolation: str) -> tuple[Tensor, float]:
    """The weights of torch's kernel of 8-bit pixels, see ``_weights``, and the value of one of their units."""
    shares = _shares(size_in, size_out, interpolation)
    largest = max(max(taps) for _, taps in shares)
    bits = next(bits for bits in range(23) if bits == 22 or int(0.5 + largest * 2 ** (bits + 1)) >= 2**15)
    return _fixed_point(shares, size_in, bits), 2.0**-bits


@functools.lru_cache(maxsize=4)
def _box_weights(stored: int, size: int, interpolation: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """``_native_weights`` for every box length up to ``stored``, (stored + 1, size, stored) and (stored + 1,)."""
    table, unit = torch.zeros(stored + 1, size, stored), torch.zeros(stored + 1)
    for length in range(1, stored + 1):
        table[length, :, :length], unit[length] = _native_weights(length, size, interpolation)
    return table.to(device), unit.to(device)


def _resize_boxes_at_once(images: Tensor, boxes: Tensor, size: int, interpolation: str) -> Tensor:
    """Resize each image's box as torch's kernel of 8-bit pixels does, on any device.

    Sums of those weights and pixels fit into float32, unless a picture shrinks to less than a quarter: a value that is
    nearly half-way between two levels may then go to the other one. Many GPUs are slow in float64.
    """
    batch, channels, stored, _ = images.shape
    table, unit = _box_weights(stored, size, interpolation, images.device)
    top, left, height, width = boxes.T
    pixel = torch.arange(stored, device=images.device)
    # A box begins at pixel 0; pixels beyond it weigh nothing.
    rows, columns = ((start[:, None] + pixel).clamp(max=stored - 1) for start in (top, left))
    image = torch.arange(batch, device=images.device)[:, None, None]
    x = images[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 1, 3, 2).float()
    x = _round_to_8_bits(x.flatten(1, 2) @ table[width].mT, unit[width][:, None, None])
    x = _round_to_8_bits(table[height] @ x.view(batch, stored, channels * size), unit[height][:, None, None])
    # The order is rows, channels, columns; it is kept as rows, columns, channels.
    x = x.to(torch.uint8).view(batch, size, channels, size).transpose(2, 3).contiguous()
    return x.permute(0, 3, 1, 2)


def resize_boxes(
    images: Tensor, boxes: Tensor, flip: Tensor, size: int, interpolation: str = "bilinear", antialias: bool = True
) -> Tensor:
    """A box of each image, resized to a square, then mirrored where ``flip`` is 1.

    Bilinear and bicubic are torch's kernels of 8-bit pixels: here and there a level or two away from Pillow's, and four
    times as fast. Other interpolations are Pillow's; see ``resize``.

    Args:
        images: (B, C, S, S) uint8; on a CPU, fastest in channels_last memory format.
        boxes: (B, 4) int64: top, left, height, width.
        flip: (B,) of 0 and 1.
        size: height and width of the result.
        interpolation, antialias: see ``resize``.

    Returns:
        (B, C, size, size) uint8, in channels_last memory format.
    """
    native = antialias and interpolation in _NATIVE
    if native and images.device.type != "cpu":
        with torch.autocast(images.device.type, enabled=False):
            parts = zip(images.split(_BOXES_AT_ONCE), boxes.split(_BOXES_AT_ONCE), strict=True)
            return mirror(torch.cat([_resize_boxes_at_once(*part, size, interpolation) for part in parts]), flip)
    shape = (*images.shape[:2], size, size)
    resized = torch.empty(shape, dtype=torch.uint8, device=images.device, memory_format=torch.channels_last)
    for i, (top, left, height, width, mirrored) in enumerate(torch.cat([boxes, flip[:, None]], dim=1).tolist()):
        box = images[i : i + 1, :, top : top + height, left : left + width]
        if native:
            box = box if box.stride(1) == 1 else box.contiguous(memory_format=torch.channels_last)
            x = F.interpolate(box, (size, size), mode=interpolation, antialias=True, align_corners=False)
        else:
            x = resize(box, size, interpolation, antialias)
        resized[i : i + 1] = x.flip(-1) if mirrored else x
    return resized
