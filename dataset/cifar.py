"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009) from the published archives."""

import pickle
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from .archives import Archive, fetch
from .images import ImageDataset, Split


class Cifar(NamedTuple):
    """A published archive, and the content of its files.

    archive: the archive; its files are pickles.
    train, test: names of the files of each split.
    meta: name of the file with the classes' names.
    key: the label's name in the files, 'fine_label'.
    """

    archive: Archive
    train: list[str]
    test: list[str]
    meta: str
    key: str


# torchvision.datasets knows the same names and checksums, but takes longer to import than these files to read.
CIFAR10 = Cifar(
    Archive(
        title="CIFAR-10",
        url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        filename="cifar-10-python.tar.gz",
        md5="c58f30108f718f92721af3b95e74349a",
        folder="cifar-10-batches-py",
        files=[
            ("data_batch_1", "c99cafc152244af753f735de768cd75f"),
            ("data_batch_2", "d4bba439e000b95fd0a9bffe97cbabec"),
            ("data_batch_3", "54ebc095f3ab1f0389bbae665268c751"),
            ("data_batch_4", "634d18415352ddfa80567beed471001a"),
            ("data_batch_5", "482c414d41f54cd18b22e5b47cb7c3cb"),
            ("test_batch", "40351d587109b95175f43aff81a1287e"),
            ("batches.meta", "5ff9c542aee3614f3951f8cda6e48888"),
        ],
    ),
    [f"data_batch_{number}" for number in range(1, 6)],
    ["test_batch"],
    "batches.meta",
    "label",
)

CIFAR100 = Cifar(
    Archive(
        title="CIFAR-100",
        url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        filename="cifar-100-python.tar.gz",
        md5="eb9058c3a382ffc7106e4002c42a8d85",
        folder="cifar-100-python",
        files=[
            ("train", "16019d7e3df5f24257cddd939b257f8d"),
            ("test", "f0ef6b0ae62326f3e7ffdfab6717acfc"),
            ("meta", "7973b15100ade9c7d40fb424638fde48"),
        ],
    ),
    ["train"],
    ["test"],
    "meta",
    "fine_label",
)


def load_cifar10(data_dir: str) -> ImageDataset:
    """50 000 training and 10 000 test images of 32 x 32 pixels in 10 classes; downloaded when missing.

    Raises:
        OSError: see ``fetch``.
    """
    return _load("cifar10", CIFAR10, data_dir)


def load_cifar100(data_dir: str) -> ImageDataset:
    """50 000 training and 10 000 test images of 32 x 32 pixels in 100 classes; downloaded when missing.

    Raises:
        OSError: see ``fetch``.
    """
    return _load("cifar100", CIFAR100, data_dir)


def _load(name: str, cifar: Cifar, data_dir: str) -> ImageDataset:
    folder = fetch(cifar.archive, Path(data_dir))
    classes = [label.decode().replace("_", " ") for label in _read(folder / cifar.meta)[f"{cifar.key}_names".encode()]]
    return ImageDataset(name, classes, *(_split(folder, cifar, names) for names in (cifar.train, cifar.test)))


def _read(path: Path) -> dict[bytes, list | np.ndarray]:
    """The content of a file of the archive; ``fetch`` has just checked its md5."""
    with open(path, "rb") as file:
        return pickle.load(file, encoding="bytes")  # as text, each byte of the pixels would be decoded and encoded


def _split(folder: Path, cifar: Cifar, names: list[str]) -> Split:
    parts = [_read(folder / name) for name in names]
    pixels = [part[b"data"] for part in parts]
    images = np.concatenate(pixels) if len(pixels) > 1 else pixels[0]
    targets = [target for part in parts for target in part[f"{cifar.key}s".encode()]]
    return Split(torch.from_numpy(images).view(-1, 3, 32, 32), torch.tensor(targets))
