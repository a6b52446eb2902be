"""Turn 8-bit images and view numbers into pixels.

A data set says which views its images have: ``CropViews`` of small pictures, ``ResizedCropViews`` of photographs.
Either turns the same (image, number) into the same pixels, whatever the device, the batch or the process.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# (mean, std) per channel of pixels in [0, 1]: CLIP's own, and RepDistiller's for CIFAR-100.
CLIP_NORMALIZATION = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
CIFAR100_NORMALIZATION = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))

_CPU = torch.device("cpu")

# Pillow keeps bicubic weights as integers of this many fractional bits.
_FRACTION_BITS = 22

# Of splitmix64 (Steele et al., OOPSLA 2014), as signed numbers.
_GAMMA, _MIX_1, _MIX_2 = (x - 2**64 for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _splitmix64(state: Tensor) -> Tensor:
    """The generator's outputs after so many steps, int64, of 64 random bits: the same on every machine and release."""

    def shifted(x: Tensor, bits: int) -> Tensor:  # filled with zeros, where >> repeats the sign
        return (x >> bits) & ((1 << (64 - bits)) - 1)

    x = state * _GAMMA
    x = (x ^ shifted(x, 30)) * _MIX_1
    x = (x ^ shifted(x, 27)) * _MIX_2
    return x ^ shifted(x, 31)


def view_order(index: np.ndarray, num_views: int, padding: int = 4) -> np.ndarray:
    """The first ``num_views`` crops of each image in its own fixed order, the image itself first.

    The order depends on the image's row number alone, so that banks of teacher embeddings nest.

    Args:
        index: row numbers, (N,).
        num_views: 1 to as many as there are, with a padding of 4 pixels 162.
        padding: in pixels.

    Returns:
        (N, num_views) uint8, int16 where there are more than 256.
    """
    count = 2 * (2 * padding + 1) ** 2
    if not 1 <= num_views <= count:
        raise ValueError(f"an image has 1 to {count} views, not {num_views}")
    order = np.empty((len(index), num_views), dtype=np.uint8 if count <= 256 else np.int16)
    if num_views == 1:
        order[:] = count // 2 - 1
        return order
    numbers = torch.arange(1, count + 1)
    rows_at_once = 2**22 // count  # of some 10**8 keys, all together would take gigabytes
    for start in range(0, len(index), rows_at_once):
        rows = torch.from_numpy(np.asarray(index[start : start + rows_at_once], dtype=np.int64))
        # Sorted as numbers without a sign.
        key = _splitmix64(rows[:, None] * count + numbers) ^ -(2**63)
        key[:, count // 2 - 1] = -(2**63)
        order[start : start + rows_at_once] = key.topk(num_views, largest=False).indices
    return order


def _crop(images: Tensor, view: Tensor, flip: Tensor | None, padding: int) -> Tensor:
    """Crop each image of (B, C, H, W) at its view's offset; mirror where ``flip`` (B,) is 1."""
    batch, _, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    offset = torch.div(view, 2, rounding_mode="floor")
    offsets = 2 * padding + 1
    dy, dx = torch.div(offset, offsets, rounding_mode="floor"), offset % offsets
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


def crop_flip(images: Tensor, view: Tensor, padding: int = 4) -> Tensor:
    """A view of each image at its own size: zero-padded crop, then flip.

    Args:
        images: (B, C, H, W) uint8.
        view: (B,) integers, see ``CropViews``.
        padding: in pixels.

    Returns:
        (B, C, H, W) uint8, in channels_last memory format.
    """
    return _crop(images, view, view % 2, padding)


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
    """For each pixel of the result, the first pixel of the picture that it is made of, and the shares from there on."""
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
    """Shares as a dense (size_out, size_in) float64 matrix of integers, with so many fractional bits."""
    weights = torch.zeros(len(shares), size_in, dtype=torch.float64)
    for row, (first, taps) in zip(weights.numpy(), shares, strict=True):
        # Pillow rounds halves away from zero, as C's cast of x +- 0.5 does.
        row[first : first + len(taps)] = [math.trunc(tap * 2**bits + math.copysign(0.5, tap)) for tap in taps]
    return weights


@functools.lru_cache(maxsize=16)
def _weights(size_in: int, size_out: int, interpolation: str) -> Tensor:
    """Pillow's fixed-point weights of one axis as a dense (size_out, size_in) float64 matrix of integers."""
    return _fixed_point(_shares(size_in, size_out, interpolation), size_in, _FRACTION_BITS)


def _round_to_8_bits(x: Tensor, unit: float | Tensor = 2.0**-_FRACTION_BITS) -> Tensor:
    return x.mul_(unit).add_(0.5).floor_().clamp_(0, 255)


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


def _flip(images: Tensor, flip: Tensor) -> Tensor:
    """Mirror those of (B, C, H, W) whose ``flip`` (B,) is 1."""
    return torch.where(flip.bool()[:, None, None, None], images.flip(-1), images)


def crop_resize_flip(
    images: Tensor, view: Tensor, size: int, interpolation: str = "bicubic", antialias: bool = True, padding: int = 4
) -> Tensor:
    """The teacher's view of each image: zero-padded crop, resize, then flip.

    The whole crop is resized. The evaluation transforms of timm and torchvision first enlarge by 1 / crop_pct and cut
    the border off; that is not reproduced, since a view is a crop already. With crop_pct 1 theirs are the same pixels.

    Args:
        images: (B, C, H, W) uint8.
        view: (B,) integers, see ``CropViews``.
        size: the teacher's input resolution in pixels.
        interpolation, antialias: see ``resize``.
        padding: in pixels.

    Returns:
        (B, C, size, size) uint8.
    """
    resized = resize(_crop(images, view, None, padding), size, interpolation, antialias)
    return _flip(resized, view % 2)


# What torch has a kernel of 8-bit pixels for, which averages as Pillow does, with weights of 16 bits.
_NATIVE = ("bilinear", "bicubic")

# Boxes that are resized at once where it takes dense matrices of weights, which are as large as the pictures.
_BOXES_AT_ONCE = 64


def _native_weights(size_in: int, size_out: int, interpolation: str) -> tuple[Tensor, float]:
    """The weights of torch's kernel of 8-bit pixels, see ``_weights``, and what one of their units is worth."""
    shares = _shares(size_in, size_out, interpolation)
    largest = max(max(taps) for _, taps in shares)
    bits = next(bits for bits in range(23) if bits == 22 or int(0.5 + largest * 2 ** (bits + 1)) >= 2**15)
    return _fixed_point(shares, size_in, bits), 2.0**-bits


@functools.lru_cache(maxsize=4)
def _box_weights(stored: int, size: int, interpolation: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """``_native_weights`` of every length of a box up to ``stored``, (stored + 1, size, stored) and (stored + 1,)."""
    table, unit = torch.zeros(stored + 1, size, stored, dtype=torch.float64), torch.zeros(stored + 1).double()
    for length in range(1, stored + 1):
        table[length, :, :length], unit[length] = _native_weights(length, size, interpolation)
    return table.to(device), unit.to(device)


def _resize_boxes_at_once(images: Tensor, boxes: Tensor, size: int, interpolation: str) -> Tensor:
    """What torch's kernel of 8-bit pixels gives of each image's box, bit for bit, on any device."""
    batch, channels, stored, _ = images.shape
    table, unit = _box_weights(stored, size, interpolation, images.device)
    top, left, height, width = boxes.T
    pixel = torch.arange(stored, device=images.device)
    # A box begins at pixel 0; what lies beyond it weighs nothing.
    rows, columns = ((start[:, None] + pixel).clamp(max=stored - 1) for start in (top, left))
    image = torch.arange(batch, device=images.device)[:, None, None]
    x = images[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 1, 3, 2).double()
    x = _round_to_8_bits(x.flatten(1, 2) @ table[width].mT, unit[width][:, None, None])
    x = _round_to_8_bits(table[height] @ x.view(batch, stored, channels * size), unit[height][:, None, None])
    # Rows, channels, columns; kept as rows, columns, channels.
    x = x.to(torch.uint8).view(batch, size, channels, size).transpose(2, 3).contiguous()
    return x.permute(0, 3, 1, 2)


def resize_boxes(
    images: Tensor, boxes: Tensor, flip: Tensor, size: int, interpolation: str = "bilinear", antialias: bool = True
) -> Tensor:
    """A box of each image, resized to a square, then mirrored where ``flip`` is 1.

    Bilinear and bicubic are torch's of 8-bit pixels, a level or two away from Pillow's here and there and four times as
    fast. Others are Pillow's; see ``resize``.

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
            return _flip(torch.cat([_resize_boxes_at_once(*part, size, interpolation) for part in parts]), flip)
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


@dataclass(frozen=True)
class CropViews:
    """The views of small pictures: crops of the picture, padded by an eighth of its size, and their mirror images.

    A view is the crop's offset and a flip: ``view = (dy * (2p + 1) + dx) * 2 + flip`` with a padding of p pixels. At 32
    pixels p is 4, which makes the paper's 162 views; the one in the middle, 80, is the image itself.

    Attributes:
        size: height and width of the pictures, and of what the student sees, in pixels.
    """

    size: int

    @property
    def padding(self) -> int:
        """In pixels."""
        return self.size // 8

    @property
    def count(self) -> int:
        """How many views an image has."""
        return 2 * (2 * self.padding + 1) ** 2

    @property
    def test(self) -> int:
        """The view that is tested on, the image itself."""
        return self.count // 2 - 1

    @property
    def facts(self) -> dict:
        """What a view depends on beside the stored image."""
        return {}

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """So many views, uniform among all, (count,) int64."""
        return torch.randint(self.count, (count,), generator=generator)

    def order(self, rows: int, num_views: int, device: torch.device = _CPU) -> Tensor:
        """The first views of each of so many images, (rows, num_views) integers, the test view first."""
        return torch.from_numpy(view_order(np.arange(rows), num_views, self.padding)).to(device)

    def student(self, images: Tensor, index: Tensor, view: Tensor) -> Tensor:
        """What a student sees.

        Args:
            images: (B, C, H, W) uint8, as they are stored.
            index: (B,) int64, their row numbers in the data set's split.
            view: (B,) int64.

        Returns:
            (B, C, size, size) uint8, in channels_last memory format.
        """
        return crop_flip(images, view, self.padding)

    def teacher(
        self,
        images: Tensor,
        index: Tensor,
        view: Tensor,
        size: int,
        interpolation: str = "bicubic",
        antialias: bool = True,
    ) -> Tensor:
        """What a teacher sees, at its own resolution ``size``; see ``student`` and ``crop_resize_flip``."""
        return crop_resize_flip(images, view, size, interpolation, antialias, self.padding)


@dataclass(frozen=True)
class ResizedCropViews:
    """The views of photographs, stored as squares that are larger than what the student sees.

    View 0, the test view, is the centre. View n is the n-th random resized crop and flip of its image, distributed as
    torchvision's ``RandomResizedCrop`` and ``RandomHorizontalFlip`` are by default (Szegedy et al., CVPR 2015), and
    drawn from a generator whose state is a function of (row of the image, n): it can be named and met again.

    Attributes:
        size: height and width of what the student sees, in pixels.
    """

    size: int

    # Without end, but for the numbers that loaders draw from.
    count = None
    test = 0

    _SCALE, _RATIO, _ATTEMPTS = (0.08, 1.0), (3 / 4, 4 / 3), 10

    @property
    def facts(self) -> dict:
        """What a view depends on beside the stored image."""
        return {"views": f"resized crops for {self.size} pixels"}

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """So many views, none of which is likely ever to be drawn again, (count,) int64."""
        return torch.randint(1, 2**31, (count,), generator=generator)

    def order(self, rows: int, num_views: int, device: torch.device = _CPU) -> Tensor:
        """The first views of each of so many images, (rows, num_views) integers: their numbers, one row for all."""
        return torch.arange(num_views, device=device).expand(rows, num_views)

    def boxes(self, index: Tensor, view: Tensor, stored: int) -> tuple[Tensor, Tensor]:
        """Where views lie in their images, squares of ``stored`` pixels.

        Args:
            index: (B,) int64, row numbers of the images.
            view: (B,) int64.

        Returns:
            (B, 4) int64, top, left, height and width; (B,) int64, 1 where it is mirrored.
        """
        state = _splitmix64(_splitmix64(index + 1) + view)
        step = torch.arange(1, 2 * self._ATTEMPTS + 4, device=view.device)
        # The upper 32 of each 64 bits, so that products with a number of pixels are exact.
        uniform = ((_splitmix64(state[:, None] + step) >> 32) & 0xFFFFFFFF).double() * 2.0**-32
        scale, ratio, (top, left, flip) = (*uniform[:, :-3].chunk(2, dim=1), uniform[:, -3:].T)
        low, high = self._SCALE
        area = stored**2 * (low + (high - low) * scale)
        low, high = map(math.log, self._RATIO)
        ratio = torch.exp(low + (high - low) * ratio)  # in float64, whose last bit decides no box
        height, width = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
        fits = (height <= stored) & (width <= stored)
        first = fits.int().argmax(dim=1, keepdim=True)
        # As torchvision does where no attempt fits, which of a square is all of it.
        height, width = (torch.where(fits.any(1), x.gather(1, first)[:, 0], stored).long() for x in (height, width))
        top, left = (top * (stored - height + 1)).long(), (left * (stored - width + 1)).long()
        drawn, border = view != self.test, (stored - self.size) // 2
        centre = (border, border, self.size, self.size)
        box = [torch.where(drawn, x, x0) for x, x0 in zip((top, left, height, width), centre, strict=True)]
        return torch.stack(box, dim=1), (drawn & (flip < 0.5)).long()

    def student(self, images: Tensor, index: Tensor, view: Tensor) -> Tensor:
        """What a student sees, bilinear; see ``CropViews``."""
        return resize_boxes(images, *self.boxes(index, view, images.shape[-1]), self.size)

    def teacher(
        self,
        images: Tensor,
        index: Tensor,
        view: Tensor,
        size: int,
        interpolation: str = "bicubic",
        antialias: bool = True,
    ) -> Tensor:
        """What a teacher sees, at its own resolution ``size``, straight from the stored image; see ``resize_boxes``."""
        return resize_boxes(images, *self.boxes(index, view, images.shape[-1]), size, interpolation, antialias)


Views = CropViews | ResizedCropViews

# CIFAR's, the paper's.
CIFAR_VIEWS = CropViews(32)


@functools.lru_cache(maxsize=16)
def _channels(normalization: tuple, width: int | None, device: torch.device) -> tuple[Tensor, ...]:
    """Mean and std on the device, as (C, 1, 1), or repeated for each pixel of a row, (width * C,)."""
    channels = [torch.tensor(values, device=device) for values in normalization]
    return tuple(x.view(-1, 1, 1) if width is None else x.repeat(width) for x in channels)


def normalize(pixels: Tensor, normalization: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    """Scale 8-bit pixels (B, C, H, W) to [0, 1], subtract the channels' mean, divide by their std; float32."""
    batch, channels, height, width = pixels.shape
    if not pixels.is_contiguous(memory_format=torch.channels_last):
        mean, std = _channels(normalization, None, pixels.device)
        return pixels.float().div_(255).sub_(mean).div_(std)
    # Row by row, which on a CPU is three times as fast as pixel by pixel.
    mean, std = _channels(normalization, width, pixels.device)
    x = pixels.permute(0, 2, 3, 1).flatten(2).float().div_(255).sub_(mean).div_(std)
    return x.view(batch, height, width, channels).permute(0, 3, 1, 2)
