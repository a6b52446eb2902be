"""Data sets as uint8 tensors in memory. A new one is one file and one row of ``DATASETS``.

Command lines need the names without torch: a data set's file is imported when it is loaded.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from errors import InputError

if TYPE_CHECKING:
    from .images import ImageDataset


def __getattr__(name: str):
    if name in ("ImageDataset", "Split"):
        return getattr(importlib.import_module(".images", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _loader(file: str, name: str) -> Callable[..., ImageDataset]:
    """A function of one of these files; the call imports the file."""
    return lambda *args, **options: getattr(importlib.import_module(f".{file}", __name__), name)(*args, **options)


DATASETS = {
    "cifar100": _loader("cifar", "load_cifar100"),
    "cifar10": _loader("cifar", "load_cifar10"),
    "stl10": _loader("stl10", "load_stl10"),
    "shapes": _loader("shapes", "load_shapes"),
}

# These are decoded once from image files, into the folder of all results.
FROM_FILES = {
    "tinyimagenet": _loader("tinyimagenet", "load_tinyimagenet"),
    "folder": _loader("folder", "load_folder"),
}


# Options of data sets that are image files; other data sets leave them alone.
FILE_OPTIONS = ("image_size", "max_bad_images", "holdout", "exact_decode", "data_list")


def check_image_size(name: str, image_size: int | None) -> None:
    """Raise an InputError where ``folder`` is given no size, or another data set is given one."""
    if name == "folder" and image_size is None:
        raise InputError("--dataset folder needs --image_size R, the size that the images are resized to")
    if name != "folder" and image_size is not None:
        raise InputError(f"--image_size {image_size}: the images of {name} have their own size; leave it out")


# A student's images have this height and width in pixels, where it is known before the images are there.
_SIZES = {"cifar100": 32, "cifar10": 32, "stl10": 96, "shapes": 32, "tinyimagenet": 64}


def student_size(name: str, image_size: int | None) -> int | None:
    """Height and width of a student's images, by a data set's name; None where only the images tell.

    Args:
        image_size: the size that is given for ``folder``.
    """
    return image_size if name == "folder" else _SIZES.get(name)


def folder_name(data_dir: str | list[str], image_size: int) -> str:
    """The name of a folder of images as a data set: the last part of the folder's path, and the images' size.

    Several folders are called by the first, and how many more there are.
    """
    first, *more = [data_dir] if isinstance(data_dir, str) else data_dir
    own = Path(os.path.abspath(first)).name + (f"-and-{len(more)}-more" if more else "")
    return f"folder-{''.join(c if c.isalnum() or c in '-_.' else '-' for c in own)}@{image_size}px"


def open_dataset(options: dict) -> ImageDataset:
    """The data set that a run's options name, without the classes that they leave out.

    Args:
        options: the command line's, or those that a run recorded.

    Raises:
        InputError, OSError: see ``load_dataset`` and ``ImageDataset.without``.
    """
    known = {name: options[name] for name in FILE_OPTIONS if name in options}
    dataset = load_dataset(options["dataset"], options["data_dir"], save_dir=options["save_dir"], **known)
    return dataset.without(options["leave_out"]) if options.get("leave_out") else dataset


def load_dataset(
    name: str,
    data_dir: str | list[str],
    *,
    image_size: int | None = None,
    save_dir: str = "./save",
    max_bad_images: int = 0,
    holdout: float | None = None,
    exact_decode: bool = False,
    data_list: str | None = None,
) -> ImageDataset:
    """Load a data set by name.

    Args:
        name: a key of ``DATASETS`` or ``FROM_FILES``.
        data_dir: the folder that it lies in, or is downloaded to; see also ``load_folder``.
        image_size: see ``load_folder``; no other data set has it.
        save_dir, max_bad_images, exact_decode: see ``open_images``; for data sets that are image files.
        holdout, data_list: see ``load_folder``.

    Raises:
        InputError: the name is unknown, or the data set's files are not as described.
        OSError: its files are missing or corrupt, or there is no room for the decoded images.
    """
    if name not in DATASETS and name not in FROM_FILES:
        raise InputError(f"unknown data set {name!r}; known: {', '.join([*DATASETS, *FROM_FILES])}")
    check_image_size(name, image_size)
    if name == "folder":
        return FROM_FILES[name](data_dir, image_size, save_dir, max_bad_images, holdout, exact_decode, data_list)
    if name in FROM_FILES:
        return FROM_FILES[name](data_dir, save_dir, max_bad_images, exact_decode)
    return DATASETS[name](data_dir)
