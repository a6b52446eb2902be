"""Data sets as uint8 tensors in memory. A new one is one file and one row of ``DATASETS``."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .views import CIFAR_VIEWS, Views


@dataclass(frozen=True)
class Split:
    """Images and their classes.

    Attributes:
        images: (N, 3, H, W) uint8 on the CPU. Photographs are fastest in channels_last memory format.
        targets: (N,) int64; -1 for an image without a label.
        mapped: the images lie in a file that is mapped into memory, so that reading them may take a while.
    """

    images: Tensor
    targets: Tensor
    mapped: bool = False

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True)
class ImageDataset:
    """A data set's splits and class names, in the order of the targets.

    ``draw_captioned`` makes the images that ``pretrain_clip.py`` trains on, for a data set that has more of
    them than the training split; it is called where they are needed and nowhere else. ``views`` says which views
    its images have, and turns them into pixels.
    """

    name: str
    classes: list[str]
    train: Split
    test: Split
    draw_captioned: Callable[[], Split] | None = None
    views: Views = CIFAR_VIEWS

    def captioned(self) -> Split:
        """The images for contrastive pre-training: the training split, unless the data set has more."""
        return self.train if self.draw_captioned is None else self.draw_captioned()

    def fingerprint(self) -> str:
        """SHA-256 of the pixels of the training and the test split."""
        digest = hashlib.sha256()
        for split in (self.train, self.test):
            digest.update(repr(tuple(split.images.shape)).encode())
            for images in split.images.split(1000):  # of a file that is mapped, not all at once
                digest.update(images.contiguous().numpy())
        return digest.hexdigest()


from .cifar100 import load_cifar100  # noqa: E402  (the loaders need the classes above)
from .shapes import load_shapes  # noqa: E402

DATASETS = {"cifar100": load_cifar100, "shapes": load_shapes}


def load_dataset(name: str, data_dir: str) -> ImageDataset:
    """Load a data set by name.

    Raises:
        ValueError: for an unknown name.
        OSError: where its files are missing or corrupt.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(DATASETS)}")
    return DATASETS[name](data_dir)
