"""Turn 8-bit images and view numbers into pixels.

A view of an image padded by 4 pixels is a crop offset (9 x 9) and a flip (2):
``view = (dy * 9 + dx) * 2 + flip``, 162 in all. View 80, centred and unflipped, is the image itself.
"""

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PADDING = 4
OFFSETS = 2 * PADDING + 1
NUM_VIEWS = OFFSETS * OFFSETS * 2
TEST_VIEW = (PADDING * OFFSETS + PADDING) * 2

# (mean, std) per channel of pixels in [0, 1]: CLIP's own, and RepDistiller's for CIFAR-100.
CLIP_NORMALIZATION = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
CIFAR100_NORMALIZATION = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))

# Pillow keeps bicubic weights as integers of this many fractional bits.
_FRACTION_BITS = 22


def view_order(index: np.ndarray, num_views: int) -> np.ndarray:
    """The first ``num_views`` views of each image in its own fixed order, view 80 first.

    The order depends on the image's row number alone, so that banks of teacher embeddings nest.

    Args:
        index: row numbers, (N,).
        num_views: 1 to 162.

    Returns:
        (N, num_views) uint8.
    """
    if not 1 <= num_views <= NUM_VIEWS:
        raise ValueError(f"an image has 1 to {NUM_VIEWS} views, not {num_views}")
    index = np.asarray(index, dtype=np.uint64)
    if num_views == 1:
        return np.full((len(index), 1), TEST_VIEW, dtype=np.uint8)
    # splitmix64 (Steele et al., OOPSLA 2014) of (row, view): the same on every machine and release.
    key = index[:, None] * np.uint64(NUM_VIEWS) + np.arange(1, NUM_VIEWS + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        key = key * np.uint64(0x9E3779B97F4A7C15)
        key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    key = key ^ (key >> np.uint64(31))
    key[:, TEST_VIEW] = 0
    return np.argsort(key, axis=1, kind="stable")[:, :num_views].astype(np.uint8)


def _crop(images: Tensor, view: Tensor, flip: Tensor | None) -> Tensor:
    """Crop each image of (B, C, H, W) at its view's offset; mirror where ``flip`` (B,) is 1."""
    batch, _, height, width = images.shape
    padded = F.pad(images, (PADDING,) * 4)
    offset = torch.div(view, 2, rounding_mode="floor")
    dy, dx = torch.div(offset, OFFSETS, rounding_mode="floor"), offset % OFFSETS
    row = torch.arange(height, device=images.device)
    column = torch.arange(width, device=images.device).expand(batch, width)
    if flip is not None:
        column = torch.where(flip.bool()[:, None], width - 1 - column, column)
    return padded[
        torch.arange(batch, device=images.device)[:, None, None],
        :,
        (row + dy[:, None])[:, :, None],
        (column + dx[:, None])[:, None, :],
    ].permute(0, 3, 1, 2)


def crop_flip(images: Tensor, view: Tensor) -> Tensor:
    """A view of each image at its own size: zero-padded crop, then flip.

    Args:
        images: (B, C, H, W) uint8.
        view: (B,) integers in 0 ... 161.

    Returns:
        (B, C, H, W) uint8, in channels_last memory format.
    """
    return _crop(images, view, view % 2)


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


@functools.lru_cache(maxsize=16)
def _weights(size_in: int, size_out: int, interpolation: str) -> Tensor:
    """Pillow's fixed-point weights of one axis as a dense (size_out, size_in) float64 matrix of integers."""
    kernel, reach = _KERNELS[interpolation]
    scale = size_in / size_out
    stretch = max(scale, 1.0)
    weights = torch.zeros(size_out, size_in, dtype=torch.float64)
    for out in range(size_out):
        centre = (out + 0.5) * scale
        first = max(int(centre - reach * stretch + 0.5), 0)
        last = min(int(centre + reach * stretch + 0.5), size_in)
        taps = [kernel((i - centre + 0.5) / stretch) for i in range(first, last)]
        total = sum(taps)
        for i, tap in enumerate(taps, start=first):
            # Pillow rounds halves away from zero, as C's cast of x +- 0.5 does.
            fixed = tap / total * 2**_FRACTION_BITS
            weights[out, i] = math.trunc(fixed + math.copysign(0.5, fixed))
    return weights


def _round_to_8_bits(x: Tensor) -> Tensor:
    return x.add_(2 ** (_FRACTION_BITS - 1)).mul_(2.0**-_FRACTION_BITS).floor_().clamp_(0, 255)


def resize(images: Tensor, size: int, interpolation: str = "bicubic", antialias: bool = True) -> Tensor:
    """Resize to a square, bit for bit as Pillow's ``Image.resize((size, size), interpolation)`` does a square.

    Pillow sums integers, horizontally first, and rounds to 8 bits after each pass. Products and sums of
    those integers stay below 2**53, so float64 matrix products give them exactly, on any device. Pictures that are
    narrower than ``size`` and higher, newer releases of Pillow resize vertically first.

    Args:
        images: (B, C, H, W) uint8.
        size: height and width of the result.
        interpolation: one of ``INTERPOLATIONS``.
        antialias: average when shrinking, as Pillow always does. Without it, bilinear and bicubic are those of
            torchvision's transforms of tensors, which differ from Pillow's when enlarging too.

    Returns:
        (B, C, size, size) uint8.

    Raises:
        ValueError: an unknown interpolation, or one that torch has without antialiasing alone.
    """
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"unknown interpolation {interpolation!r}; known: {', '.join(INTERPOLATIONS)}")
    height, width = images.shape[-2:]
    if (height, width) == (size, size):
        return images
    with torch.autocast(images.device.type, enabled=False):
        if not antialias:
            if interpolation not in ("bilinear", "bicubic"):
                raise ValueError(f"{interpolation} without antialiasing: there is bilinear and bicubic alone")
            x = F.interpolate(images.float(), (size, size), mode=interpolation, align_corners=False)
            return x.round_().clamp_(0, 255).to(torch.uint8)
        x = images.double()
        if width != size:
            x = _round_to_8_bits(x @ _weights(width, size, interpolation).to(images.device).T)
        if height != size:
            x = _round_to_8_bits(_weights(height, size, interpolation).to(images.device) @ x)
        return x.to(torch.uint8)


def crop_resize_flip(
    images: Tensor, view: Tensor, size: int, interpolation: str = "bicubic", antialias: bool = True
) -> Tensor:
    """The teacher's view of each image: zero-padded crop, resize, then flip.

    The whole crop is resized. The evaluation transforms of timm and torchvision first enlarge by 1 / crop_pct and cut
    the border off; that is not reproduced, since a view is a crop already. With crop_pct 1 theirs are the same pixels.

    Args:
        images: (B, C, H, W) uint8.
        view: (B,) integers in 0 ... 161.
        size: the teacher's input resolution in pixels.
        interpolation, antialias: see ``resize``.

    Returns:
        (B, C, size, size) uint8.
    """
    resized = resize(_crop(images, view, None), size, interpolation, antialias)
    return torch.where((view % 2).bool()[:, None, None, None], resized.flip(-1), resized)


@functools.lru_cache(maxsize=16)
def _channels(normalization: tuple, device: torch.device) -> tuple[Tensor, ...]:
    """Mean and std as (C, 1, 1), copied to the device once."""
    return tuple(torch.tensor(values, device=device).view(-1, 1, 1) for values in normalization)


def normalize(pixels: Tensor, normalization: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    """Scale 8-bit pixels (B, C, H, W) to [0, 1], subtract the channels' mean, divide by their std; float32."""
    mean, std = _channels(normalization, pixels.device)
    return pixels.float().div_(255).sub_(mean).div_(std)
