"""CIFAR-100 (Krizhevsky, 2009) through torchvision's archive."""

import os
import shutil
import tempfile
from pathlib import Path

import torch
from filelock import FileLock
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

from . import ImageDataset, Split

_CIFAR100 = datasets.CIFAR100


def load_cifar100(data_dir: str) -> ImageDataset:
    """50 000 training and 10 000 test images of 32 x 32 pixels in 100 classes; downloaded when missing.

    Raises:
        OSError: when a file is corrupt, or missing and not to be downloaded. Nothing is overwritten.
    """
    _fetch(Path(data_dir))
    train, test = (_CIFAR100(data_dir, train=train, download=False) for train in (True, False))
    classes = [name.replace("_", " ") for name in train.classes]
    return ImageDataset("cifar100", classes, _split(train), _split(test))


def _split(archive: datasets.CIFAR100) -> Split:
    images = torch.from_numpy(archive.data).permute(0, 3, 1, 2).contiguous()
    return Split(images, torch.tensor(archive.targets))


def _fetch(root: Path) -> None:
    """Make sure that the extracted files are there and whole, downloading them if nothing is."""
    folder, archive = root / _CIFAR100.base_folder, root / _CIFAR100.filename
    files = [*_CIFAR100.train_list, *_CIFAR100.test_list, (_CIFAR100.meta["filename"], _CIFAR100.meta["md5"])]

    def whole() -> bool:
        if not folder.exists():
            return False
        for name, md5 in files:
            if not check_integrity(str(folder / name), md5):
                raise OSError(f"{folder / name} is missing or corrupt (its md5 differs): delete {folder} and run again")
        return True

    if whole():
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".cifar100.lock"):
            if whole():  # another run fetched it meanwhile
                return
            if archive.exists() and not check_integrity(str(archive), _CIFAR100.tgz_md5):
                raise OSError(f"{archive} is corrupt (its md5 differs): delete it and run again")
            # Into a folder of its own first, so that an interrupted download is never taken for the data.
            with tempfile.TemporaryDirectory(dir=root, prefix=".cifar100-") as temporary:
                if archive.exists():
                    os.link(archive, Path(temporary) / archive.name)
                try:
                    _CIFAR100(temporary, download=True)
                except Exception as error:
                    raise OSError(
                        f"CIFAR-100 is not in {root} and could not be downloaded ({error}); "
                        f"with no network, put {_CIFAR100.filename} there"
                    ) from error
                shutil.move(Path(temporary) / folder.name, folder)
    except PermissionError as error:
        raise OSError(f"cannot write to {root}: {error.strerror}; choose another --data_dir") from error
