"""Turn 8-bit images and view numbers into pixels.

A data set says which views its images have: small pictures have ``CropViews``, photographs ``ResizedCropViews``.
Both turn the same (image, number) into the same pixels, whatever the device, the batch or the process.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .resize import mirror, resize, resize_boxes

# (mean, std) per channel of pixels in [0, 1]: CLIP's own, and RepDistiller's for CIFAR-100.
CLIP_NORMALIZATION = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
CIFAR100_NORMALIZATION = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))

Normalization = tuple[tuple[float, ...], tuple[float, ...]]

_CPU = torch.device("cpu")


def normalization_of(clip: bool) -> Normalization:
    """Mean and std of the images of a network from scratch: CLIP's under the paper's protocol, else RepDistiller's."""
    return CLIP_NORMALIZATION if clip else CIFAR100_NORMALIZATION


# The constants of splitmix64 (Steele et al., OOPSLA 2014), as signed numbers.
_GAMMA, _MIX_1, _MIX_2 = (x - 2**64 for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _splitmix64(state: Tensor) -> Tensor:
    """The generator's outputs after ``state`` steps, 64 random bits each, int64: alike on every machine and release."""

    def shifted(x: Tensor, bits: int) -> Tensor:  # filled with zeros, where >> repeats the sign
        return (x >> bits) & ((1 << (64 - bits)) - 1)

    x = state * _GAMMA
    x = (x ^ shifted(x, 30)) * _MIX_1
    x = (x ^ shifted(x, 27)) * _MIX_2
    return x ^ shifted(x, 31)


def uniforms(index: Tensor, number: Tensor, count: int) -> Tensor:
    """Uniform random numbers (B, count) in [0, 1), float64, by (row of the image, number); see ``ResizedCropViews``.

    Args:
        index: (B,) int64, row numbers of the images.
        number: (B,) int64.
    """
    state = _splitmix64(_splitmix64(index + 1) + number)
    step = torch.arange(1, count + 1, device=number.device)
    # The upper 32 of each 64 bits, so that products with a number of pixels are exact.
    return ((_splitmix64(state[:, None] + step) >> 32) & 0xFFFFFFFF).double() * 2.0**-32


def view_order(index: np.ndarray, num_views: int, padding: int = 4) -> np.ndarray:
    """The first ``num_views`` crops of each image in its own fixed order, the image itself first.

    The order depends on the image's row number alone, so that banks of teacher embeddings nest.

    Args:
        index: row numbers, (N,).
        num_views: 1 up to all views; a padding of 4 pixels gives 162.
        padding: pixels on each side.

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
    rows_at_once = 2**22 // count  # all keys together, some 10**8, would take gigabytes
    for start in range(0, len(index), rows_at_once):
        rows = torch.from_numpy(np.asarray(index[start : start + rows_at_once], dtype=np.int64))
        # The keys are sorted as numbers without a sign.
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
        padding: pixels on each side.

    Returns:
        (B, C, H, W) uint8, in channels_last memory format.
    """
    return _crop(images, view, view % 2, padding)


def crop_resize_flip(
    images: Tensor, view: Tensor, size: int, interpolation: str = "bicubic", antialias: bool = True, padding: int = 4
) -> Tensor:
    """The teacher's view of each image: zero-padded crop, resize, then flip.

    The whole crop is resized. The evaluation transforms of timm and torchvision first enlarge by 1 / crop_pct and cut
    the border off. This is not reproduced, since a view is a crop already. With crop_pct 1 the pixels are the same.

    Args:
        images: (B, C, H, W) uint8.
        view: (B,) integers, see ``CropViews``.
        size: the teacher's input resolution in pixels.
        interpolation, antialias: see ``resize``.
        padding: pixels on each side.

    Returns:
        (B, C, size, size) uint8.
    """
    resized = resize(_crop(images, view, None, padding), size, interpolation, antialias)
    return mirror(resized, view % 2)


@dataclass(frozen=True)
class CropViews:
    """The views of small pictures: crops of the picture, padded by an eighth of its size, and their mirror images.

    A view is the crop's offset and a flip: ``view = (dy * (2p + 1) + dx) * 2 + flip`` with a padding of p pixels. At 32
    pixels p is 4, which makes the paper's 162 views; view 80, in the middle, is the image itself.

    Attributes:
        size: height and width of the pictures, and of the student's images, in pixels.
    """

    size: int

    @property
    def padding(self) -> int:
        """Pixels on each side."""
        return self.size // 8

    @property
    def count(self) -> int:
        """The number of an image's views."""
        return 2 * (2 * self.padding + 1) ** 2

    @property
    def test(self) -> int:
        """The view for tests, which is the image itself."""
        return self.count // 2 - 1

    @property
    def facts(self) -> dict:
        """The facts, beside the stored image, that a view depends on."""
        return {}

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """``count`` views, uniform among all, (count,) int64."""
        return torch.randint(self.count, (count,), generator=generator)

    def order(self, rows: int, num_views: int, device: torch.device = _CPU) -> Tensor:
        """The first views of each image, (rows, num_views) integers, the test view first."""
        return torch.from_numpy(view_order(np.arange(rows), num_views, self.padding)).to(device)

    def student(self, images: Tensor, index: Tensor, view: Tensor) -> Tensor:
        """The student's views.

        Args:
            images: (B, C, H, W) uint8, the stored images.
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
        """The teacher's views at its own resolution ``size``; see ``student`` and ``crop_resize_flip``."""
        return crop_resize_flip(images, view, size, interpolation, antialias, self.padding)


@dataclass(frozen=True)
class ResizedCropViews:
    """The views of photographs, which are stored as squares larger than the student's images.

    View 0, the test view, is the centre. View n is the n-th random resized crop and flip of its image. Its distribution
    is that of torchvision's ``RandomResizedCrop`` and ``RandomHorizontalFlip`` by default (Szegedy et al., CVPR 2015).
    The generator's state is a function of (row of the image, n), so that a view can be named and met again.

    Attributes:
        size: height and width of the student's images, in pixels.
        least: the smallest share of a picture's area that a crop takes.
    """

    size: int
    least: float = 0.08

    # There are endlessly many, but for the numbers that loaders draw from.
    count = None
    test = 0

    _RATIO, _ATTEMPTS = (3 / 4, 4 / 3), 10

    @property
    def numbers(self) -> int:
        """The random numbers that a box takes."""
        return 2 * self._ATTEMPTS + 3

    @property
    def facts(self) -> dict:
        """The facts, beside the stored image, that a view depends on."""
        return {"views": f"resized crops for {self.size} pixels"}

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """``count`` views, (count,) int64; none is likely ever to be drawn again."""
        return torch.randint(1, 2**31, (count,), generator=generator)

    def order(self, rows: int, num_views: int, device: torch.device = _CPU) -> Tensor:
        """The first views of each image, (rows, num_views) integers: the same numbers for all images."""
        return torch.arange(num_views, device=device).expand(rows, num_views)

    def boxes(self, index: Tensor, view: Tensor, stored: int) -> tuple[Tensor, Tensor]:
        """The boxes of views in their images, which are squares of ``stored`` pixels.

        Args:
            index: (B,) int64, row numbers of the images.
            view: (B,) int64.

        Returns:
            (B, 4) int64, top, left, height and width; (B,) int64, 1 where the box is mirrored.
        """
        uniform = uniforms(index, view, self.numbers)
        scale, ratio, (top, left, flip) = (*uniform[:, :-3].chunk(2, dim=1), uniform[:, -3:].T)
        low, high = self.least, 1.0
        area = stored**2 * (low + (high - low) * scale)
        low, high = map(math.log, self._RATIO)
        ratio = torch.exp(low + (high - low) * ratio)  # float64's last bit decides no box
        height, width = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
        fits = (height <= stored) & (width <= stored)
        first = fits.int().argmax(dim=1, keepdim=True)
        # Where no attempt fits, torchvision takes all of a square picture.
        height, width = (torch.where(fits.any(1), x.gather(1, first)[:, 0], stored).long() for x in (height, width))
        top, left = (top * (stored - height + 1)).long(), (left * (stored - width + 1)).long()
        drawn, border = view != self.test, (stored - self.size) // 2
        centre = (border, border, self.size, self.size)
        box = [torch.where(drawn, x, x0) for x, x0 in zip((top, left, height, width), centre, strict=True)]
        return torch.stack(box, dim=1), (drawn & (flip < 0.5)).long()

    def student(self, images: Tensor, index: Tensor, view: Tensor) -> Tensor:
        """The student's views, bilinear; see ``CropViews``."""
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
        """The teacher's views at its own resolution ``size``, straight from the stored image; see ``resize_boxes``."""
        return resize_boxes(images, *self.boxes(index, view, images.shape[-1]), size, interpolation, antialias)


@dataclass(frozen=True)
class SeenAt:
    """The test views of a data set, resized to what the student was trained for, ``size`` pixels."""

    views: CropViews | ResizedCropViews
    size: int

    @property
    def count(self) -> int | None:
        return self.views.count

    @property
    def test(self) -> int:
        return self.views.test

    def student(self, images: Tensor, index: Tensor, view: Tensor) -> Tensor:
        """See ``CropViews``."""
        return resize(self.views.student(images, index, view), self.size)


Views = CropViews | ResizedCropViews

# The views of CIFAR, and of the paper.
CIFAR_VIEWS = CropViews(32)

# Pictures of up to this size have the views of small pictures, larger ones those of photographs.
SMALL = 96


def views_of_size(size: int) -> Views:
    """The views of a data set's images by their height and width in pixels."""
    return (CropViews if size <= SMALL else ResizedCropViews)(size)


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
    # On a CPU, row by row is three times as fast as pixel by pixel.
    mean, std = _channels(normalization, width, pixels.device)
    x = pixels.permute(0, 2, 3, 1).flatten(2).float().div_(255).sub_(mean).div_(std)
    return x.view(batch, height, width, channels).permute(0, 3, 1, 2)
