"""Data sets as uint8 tensors in memory. A new one is one file and one row of ``DATASETS``."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Images (N, 3, H, W) uint8 and their classes (N,) int64."""

    images: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True)
class ImageDataset:
    """A data set's splits and class names, in the order of the targets.

    ``draw_captioned`` makes the images that ``pretrain_clip.py`` trains on, for a data set that has more of
    them than the training split; it is called where they are needed and nowhere else.
    """

    name: str
    classes: list[str]
    train: Split
    test: Split
    draw_captioned: Callable[[], Split] | None = None

    def captioned(self) -> Split:
        """The images for contrastive pre-training: the training split, unless the data set has more."""
        return self.train if self.draw_captioned is None else self.draw_captioned()

    def fingerprint(self) -> str:
        """SHA-256 of the pixels of the training and the test split."""
        digest = hashlib.sha256()
        for split in (self.train, self.test):
            digest.update(repr(tuple(split.images.shape)).encode())
            digest.update(split.images.numpy())
        return digest.hexdigest()

    def without(self, names: list[str]) -> "ImageDataset":
        """The data set without the images of some classes; those that stay keep their order.

        Raises:
            ValueError: it has no such class, or fewer than two would stay.
        """
        if unknown := [name for name in names if name not in self.classes]:
            raise ValueError(f"{self.name} has no class {', '.join(map(repr, unknown))}")
        kept = [target for target, name in enumerate(self.classes) if name not in names]
        if len(kept) < 2:
            raise ValueError(
                f"without {len(names)} of its {len(self.classes)} classes {self.name} has nothing to learn"
            )
        new = torch.full((len(self.classes) + 1,), -1)  # the last for targets of -1
        new[kept] = torch.arange(len(kept))

        def part(split: Split) -> Split:
            rows = ((new[split.targets] >= 0) | (split.targets < 0)).nonzero().flatten()
            return Split(split.images[rows], new[split.targets[rows]])

        return ImageDataset(self.name, [self.classes[target] for target in kept], part(self.train), part(self.test))


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
