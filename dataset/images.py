"""A data set: splits of uint8 images in memory, and the names of their classes."""

import dataclasses
import difflib
import functools
import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from errors import InputError

from .rows import Rows, some_rows
from .views import CIFAR_VIEWS, Views


@dataclass(frozen=True)
class Split:
    """Images and their classes.

    Attributes:
        images: (N, 3, H, W) uint8 on the CPU, a tensor or some rows of one. Photographs are fastest in channels_last
            memory format.
        targets: (N,) int64; -1 for an image without a label.
        mapped: the images lie in a mapped file, so that reading them may take a while.
    """

    images: Tensor | Rows
    targets: Tensor
    mapped: bool = False

    def __len__(self) -> int:
        return len(self.targets)

    def select(self, rows: Tensor) -> "Split":
        """Some rows of the split; the images are not copied."""
        if len(rows) == len(self):
            return self
        return Split(some_rows(self.images, rows), self.targets[rows], self.mapped)


def told_apart(names: list[str], keys: list[str]) -> list[str]:
    """The names of classes; names that repeat get their key in brackets: 'crane (crane_bird)'.

    Args:
        keys: a different key for each class, such as its folder.
    """
    while repeated := {name for name, count in Counter(names).items() if count > 1}:
        names = [f"{name} ({key})" if name in repeated else name for name, key in zip(names, keys, strict=True)]
    return names


@dataclass(frozen=True)
class ImageDataset:
    """A data set's splits and class names, in the order of the targets.

    Names tell classes apart, so none repeats; see ``told_apart``. A data set with more captioned images than its
    training split has ``draw_captioned``, which makes the images that ``pretrain_clip.py`` trains on; nothing else
    calls it. ``views`` says which views the images have, and turns them into pixels. ``sha256`` is the fingerprint,
    where it is known without reading all pixels. ``holdout`` is the share of the training images that became the test
    split, where the data set had no test images.
    """

    name: str
    classes: list[str]
    train: Split
    test: Split
    draw_captioned: Callable[[], Split] | None = None
    views: Views = CIFAR_VIEWS
    sha256: str | None = None
    holdout: float | None = None

    def __post_init__(self):
        if repeated := [name for name, count in Counter(self.classes).items() if count > 1]:
            raise InputError(f"{self.name} has several classes of one name: {', '.join(map(repr, repeated))}")

    def captioned(self) -> Split:
        """The images for contrastive pre-training: the training split, unless the data set has more."""
        return self.train if self.draw_captioned is None else self.draw_captioned()

    def fingerprint(self) -> str:
        """SHA-256 of the pixels of the training and the test split, or of their checksums."""
        return self._sha256_of_pixels if self.sha256 is None else self.sha256

    @functools.cached_property
    def _sha256_of_pixels(self) -> str:
        digest = hashlib.sha256()
        for split in (self.train, self.test):
            digest.update(repr(tuple(split.images.shape)).encode())
            for start in range(0, len(split), 1000):  # a mapped file is not read all at once
                digest.update(split.images[start : start + 1000].contiguous().numpy())
        return digest.hexdigest()

    def select(self, train: Tensor, test: Tensor) -> "ImageDataset":
        """A data set of some rows of the splits, in ascending order; the images are not copied.

        A fingerprint that is known without reading the pixels is combined with the rows to a new one.
        """
        parts = {"train": self.train.select(train), "test": self.test.select(test)}
        if parts["train"] is self.train and parts["test"] is self.test:
            return self
        sha256 = self.sha256
        if sha256 is not None:
            digest = hashlib.sha256(sha256.encode())
            for rows in (train, test):
                digest.update(f"{len(rows)} rows".encode() + rows.numpy().tobytes())
            sha256 = digest.hexdigest()
        return dataclasses.replace(self, **parts, draw_captioned=None, sha256=sha256)

    def without(self, names: list[str]) -> "ImageDataset":
        """The data set without the images of some classes; those that stay keep their order.

        Raises:
            InputError: the data set has no such class, or fewer than two would stay.
        """
        if unknown := [name for name in names if name not in self.classes]:
            close = difflib.get_close_matches(unknown[0], self.classes, n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
            raise InputError(f"{self.name} has no class {', '.join(map(repr, unknown))}{hint}")
        kept = [target for target, name in enumerate(self.classes) if name not in names]
        if len(kept) < 2:
            raise InputError(
                f"without {len(names)} of its {len(self.classes)} classes {self.name} has nothing to learn"
            )
        new = torch.full((len(self.classes) + 1,), -1)  # the last entry is for targets of -1
        new[kept] = torch.arange(len(kept))

        def rows(split: Split) -> Tensor:
            return ((new[split.targets] >= 0) | (split.targets < 0)).nonzero().flatten()

        left = self.select(rows(self.train), rows(self.test))
        train, test = (dataclasses.replace(split, targets=new[split.targets]) for split in (left.train, left.test))
        classes = [self.classes[target] for target in kept]
        return dataclasses.replace(left, classes=classes, train=train, test=test, draw_captioned=None)
