"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009) through torchvision's archives."""

from pathlib import Path

import torch
from torchvision import datasets

from .archives import Archive, fetch
from .images import ImageDataset, Split


def load_cifar10(data_dir: str) -> ImageDataset:
    """50 000 training and 10 000 test images of 32 x 32 pixels in 10 classes; downloaded when missing.

    Raises:
        OSError: see ``fetch``.
    """
    return _load("cifar10", "CIFAR-10", datasets.CIFAR10, data_dir)


def load_cifar100(data_dir: str) -> ImageDataset:
    """50 000 training and 10 000 test images of 32 x 32 pixels in 100 classes; downloaded when missing.

    Raises:
        OSError: see ``fetch``.
    """
    return _load("cifar100", "CIFAR-100", datasets.CIFAR100, data_dir)


def _load(name: str, title: str, cifar: type[datasets.CIFAR10], data_dir: str) -> ImageDataset:
    files = [*cifar.train_list, *cifar.test_list, (cifar.meta["filename"], cifar.meta["md5"])]
    fetch(Archive(title, cifar.url, cifar.filename, cifar.tgz_md5, cifar.base_folder, files), Path(data_dir))
    train, test = (cifar(data_dir, train=train, download=False) for train in (True, False))
    classes = [name.replace("_", " ") for name in train.classes]
    return ImageDataset(name, classes, _split(train), _split(test))


def _split(archive: datasets.CIFAR10) -> Split:
    images = torch.from_numpy(archive.data).permute(0, 3, 1, 2).contiguous()
    return Split(images, torch.tensor(archive.targets))
