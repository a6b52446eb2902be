"""Some rows of a tensor of images, given by number: a part of a data set without copying a pixel."""

from dataclasses import dataclass

import torch
from torch import Tensor


def channels_last(images: Tensor) -> bool:
    """Whether images (N, C, H, W) lie in memory pixel by pixel."""
    return images.is_contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Rows:
    """Some rows of images. The images stay where they are; indexing copies the pixels of the asked rows alone.

    Attributes:
        images: (M, 3, H, W) uint8.
        numbers: (N,) int64, on the same device: row ``i`` is row ``numbers[i]`` of the images.
    """

    images: Tensor
    numbers: Tensor

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """A copy of some rows' images, in the memory format of all images."""
        return gather(self.images, self.numbers[index])

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), *self.images.shape[1:]))

    @property
    def device(self) -> torch.device:
        return self.images.device


def some_rows(images: Tensor | Rows, numbers: Tensor) -> Rows:
    """Some rows (N,) of images, or of rows of images."""
    if isinstance(images, Rows):
        return Rows(images.images, images.numbers[numbers])
    return Rows(images, numbers)


def gather(images: Tensor, index: Tensor) -> Tensor:
    """Rows (B,) of images (N, C, H, W) on the same device, in the memory format of all images."""
    if not channels_last(images):
        return images.index_select(0, index)
    return images.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
