"""What the student's view alone goes through, and the mixing of two images.

All of it happens on the device, and every random number is a function of (row of the image, a number), as a view is.
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .resize import resize_boxes
from .views import ResizedCropViews, Views, uniforms

# From RGB to YIQ (NTSC, 1953): luma, and two axes of colour.
_YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))

# The share of the images that jitter changes, and the largest turn of the hue for a jitter of 1, in turns, both as in
# SimCLR (Chen et al., ICML 2020, appendix A).
_JITTERED, _HUE = 0.8, 0.25

# The standard deviations of the blur, in pixels of an image of 224 (SimCLR).
_SIGMAS, _SIGMA_SIZE = (0.1, 2.0), 224

# Random numbers of a crop, which come first, and of the rest.
_OF_CROP, _OF_COLOURS = ResizedCropViews(1).numbers, 8


@functools.lru_cache(maxsize=8)
def _yiq(device: torch.device) -> tuple[Tensor, Tensor]:
    """The matrix from RGB to YIQ, and its inverse; a step that is captured must find them on its device."""
    matrix = torch.tensor(_YIQ, dtype=torch.float64)
    return matrix.to(device), matrix.inverse().to(device)


@dataclass(frozen=True)
class Augment:
    """What happens to the student's view.

    Attributes:
        crops: whether it is cropped at all; otherwise it is the test view.
        crop_scale: the crop is a random resized one with at least this share of the picture's area, see
            ``ResizedCropViews``; 0 for the data set's own views.
        color_jitter: strength of the change of brightness, contrast, saturation and hue, in [0, 1].
        gray: share of the images that lose their colour.
        blur: share of the images that are blurred.
    """

    crops: bool = True
    crop_scale: float = 0.0
    color_jitter: float = 0.0
    gray: float = 0.0
    blur: float = 0.0

    @property
    def recolours(self) -> bool:
        """Whether ``recolour`` changes anything."""
        return bool(self.color_jitter or self.gray or self.blur)

    @property
    def numbered(self) -> bool:
        """Whether each sample needs a number of its own, beside its view's."""
        return bool(self.crop_scale) or self.recolours

    def crop(self, views: Views, images: Tensor, index: Tensor, view: Tensor, number: Tensor | None) -> Tensor:
        """The student's crops (B, C, size, size) uint8.

        Args:
            images, index, view: see ``CropViews.student``.
            number: (B,) int64 from 1 on; None where no number is needed.
        """
        if self.crop_scale:
            boxes = ResizedCropViews(views.size, self.crop_scale).boxes(index, number, images.shape[-1])
            return resize_boxes(images, *boxes, views.size)
        return views.student(images, index, view if self.crops else torch.full_like(view, views.test))

    def recolour(self, pixels: Tensor, index: Tensor, number: Tensor) -> Tensor:
        """Change colours and sharpness of (B, 3, H, W) uint8, each image by its own (row, number).

        The same pixels come out in every batch and process. Another kind of device may round one to the next level.
        """
        drawn = uniforms(index, number, _OF_CROP + _OF_COLOURS)[:, _OF_CROP:].T
        x = pixels.float().contiguous()  # channel by channel is faster than pixel by pixel here
        if self.color_jitter or self.gray:
            x = self._jitter(pixels, x, drawn)
        if self.blur:
            x = self._blur(x, drawn[6], drawn[7])
        return x.round_().clamp_(0, 255).to(torch.uint8, memory_format=torch.channels_last)

    def _jitter(self, pixels: Tensor, x: Tensor, drawn: Tensor) -> Tensor:
        """Brightness, contrast, saturation, hue, gray: together a matrix and an offset for each image."""
        strength = torch.where(drawn[4] < _JITTERED, self.color_jitter, 0.0)
        brightness, contrast, saturation = (1 + strength * (2 * u - 1) for u in drawn[:3])
        saturation = torch.where(drawn[5] < self.gray, 0.0, saturation)
        turn = 2 * math.pi * _HUE * strength * (2 * drawn[3] - 1)
        yiq, inverse = _yiq(x.device)
        # In YIQ the hue is an angle, the saturation a length, and grey stays grey.
        colours = torch.zeros(len(x), 3, 3, dtype=torch.float64, device=x.device)
        colours[:, 0, 0] = 1
        colours[:, 1, 1] = colours[:, 2, 2] = saturation * turn.cos()
        colours[:, 2, 1] = saturation * turn.sin()
        colours[:, 1, 2] = -colours[:, 2, 1]
        matrix = (inverse @ colours @ yiq) * (brightness * contrast)[:, None, None]
        # The sum is of integers, so that the order of the pixels does not matter.
        mean = pixels.sum(dim=(2, 3), dtype=torch.int64).double() @ yiq[0] / pixels[0, 0].numel()
        offset = (1 - contrast) * brightness * mean
        matrix, offset = matrix.float()[..., None, None], offset.float()[:, None, None]
        out = torch.empty_like(x)
        for c in range(3):
            channel = torch.mul(x[:, 0], matrix[:, c, 0], out=out[:, c]).add_(offset)
            channel.addcmul_(x[:, 1], matrix[:, c, 1]).addcmul_(x[:, 2], matrix[:, c, 2])
        return out.clamp_(0, 255)

    def _blur(self, x: Tensor, chosen: Tensor, drawn: Tensor) -> Tensor:
        """A Gaussian blur, of another width for each image."""
        low, high = (sigma * x.shape[-1] / _SIGMA_SIZE for sigma in _SIGMAS)
        reach = min(math.ceil(3 * high), x.shape[-1] - 1)
        place = torch.arange(-reach, reach + 1, device=x.device)
        taps = torch.exp(-((place / (low + (high - low) * drawn)[:, None]) ** 2) / 2)
        taps = torch.where((chosen < self.blur)[:, None], taps / taps.sum(dim=1, keepdim=True), (place == 0).double())
        taps = taps.float().T[..., None, None, None]
        for dim in (-1, -2):
            padded = F.pad(x, (reach, reach, 0, 0) if dim == -1 else (0, 0, reach, reach), mode="reflect")
            length, x = x.shape[dim], torch.zeros_like(x)
            for i, tap in enumerate(taps):
                x.addcmul_(padded.narrow(dim, i, length), tap)
        return x


def mixed(x: Tensor, share: Tensor) -> Tensor:
    """Samples (B, ...) mixed with one another (Zhang et al., ICLR 2018): the first with the last, and so on.

    Args:
        share: (B,) the share of each sample's own values.
    """
    share = share.view(-1, *[1] * (x.dim() - 1))
    return share * x + (1 - share) * x.flip(0)
