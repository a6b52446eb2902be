"""Images in one folder a class: ``train/CLASS/**``, ``test/CLASS/**`` or ``val/CLASS/**``, and ``unlabelled/**``."""

import os
from pathlib import Path

import torch

from errors import InputError

from . import folder_name
from .files import ImageFile, is_image, list_images, open_images, shown
from .images import ImageDataset, Split, told_apart
from .splits import holdout_rows
from .views import CropViews, ResizedCropViews

# Pictures of up to this size have the views of small pictures, larger ones those of photographs.
_SMALL = 96


def load_folder(
    data_dir: str,
    image_size: int,
    save_dir: str,
    max_bad_images: int = 0,
    holdout: float | None = None,
    exact_decode: bool = False,
) -> ImageDataset:
    """The images of a folder, as ImageNet's usual layout has them.

    Classes are the folders in train/, by name. Images in unlabelled/, if there are any, join the training split with
    target -1. The test split is test/, or val/ where there is no test/ with classes in it. Files without an image's
    extension are passed over, and one line says so; hidden files are passed over silently.

    Args:
        data_dir: the folder.
        image_size: height and width of what the student sees.
        save_dir, max_bad_images, exact_decode: see ``open_images``.
        holdout: if there is neither test/ nor val/, this share of each class of the training split becomes the test
            split.

    Raises:
        InputError: the folders are not as described, or have the wrong classes; see also ``open_images``.
        OSError: the folder cannot be read; see also ``open_images``.
    """
    root, name = Path(data_dir), folder_name(data_dir, image_size)
    if not root.is_dir():
        raise InputError(f"--data_dir {data_dir}: no such folder")
    _check_outside(root, "train")
    others: list[str] = []
    train = _classes(root, "train", others)
    test_folder = next((folder for folder in ("test", "val") if _class_folders(root, folder)), None)
    test = {} if test_folder is None else _classes(root, test_folder, others)
    unlabelled = []
    if (root / "unlabelled").is_dir():
        unlabelled, ignored = list_images(root, "unlabelled")
        others += ignored
    if others:
        some = ", ".join(map(shown, others[:3])) + (", ..." if len(others) > 3 else "")
        print(f"{root}: passed over {len(others)} files that have no image's extension: {some}")

    if not train and not unlabelled:
        raise InputError(f"{root} holds no train/CLASS/ with images in it, as --dataset folder needs")
    classes = list(train or test)
    for folder in classes if train else ():
        if not train[folder]:
            raise InputError(f"{root / 'train' / shown(folder)} holds no image: delete it, or fill it")
    if unknown := [folder for folder in test if folder not in classes]:
        raise InputError(f"{root / test_folder / shown(unknown[0])} is a class that train/ does not have")

    targets = [target for target, folder in enumerate(classes) for _ in train.get(folder, ())]
    files = [file for images in train.values() for file in images]
    test_targets = [target for target, folder in enumerate(classes) for _ in test.get(folder, ())]
    test_files = [file for folder in classes for file in test.get(folder, ())]
    if not test_files and holdout is not None and files:
        kept, held = holdout_rows(torch.tensor(targets), holdout)
        test_files, test_targets = ([every[row] for row in held] for every in (files, targets))
        files, targets = ([every[row] for row in kept] for every in (files, targets))
    else:
        holdout = None
    if not test_files:
        raise InputError(
            f"{root} holds no image in test/CLASS/ or val/CLASS/ to test on: add some, or take a share of train/ with "
            "--holdout F"
        )
    files, targets = files + unlabelled, targets + [-1] * len(unlabelled)

    side = stored_side(image_size)
    views = (CropViews if image_size <= _SMALL else ResizedCropViews)(image_size)
    splits, sha256 = open_images(name, root, (files, test_files), side, save_dir, max_bad_images, exact_decode)
    train_split, test_split = (
        Split(split.images, torch.tensor(every)[split.files], mapped=True)
        for split, every in zip(splits, (targets, test_targets), strict=True)
    )
    if train:
        counts = torch.bincount(train_split.targets[train_split.targets >= 0], minlength=len(classes))
        if not counts.all():
            empty = classes[int(counts.argmin())]
            raise InputError(f"no image in {root / 'train' / shown(empty)} can be decoded: repair them, or delete it")
    names = told_apart(class_names(root / "classes.txt", classes), [shown(folder) for folder in classes])
    return ImageDataset(name, names, train_split, test_split, views=views, sha256=sha256, holdout=holdout)


def stored_side(image_size: int) -> int:
    """Height and width in pixels of the stored images.

    Photographs are stored larger than the student sees them, as in ImageNet's usual evaluation: 256 pixels for 224.
    """
    return image_size if image_size <= _SMALL else round(image_size * 8 / 7)


def _check_outside(root: Path, split: str) -> None:
    """Raise an InputError where images lie outside of the classes' folders."""
    if (root / split).is_dir():
        for entry in os.scandir(root / split):
            if entry.is_file() and is_image(entry.name):
                raise InputError(
                    f"{root / split}/ holds an image outside of its classes' folders, {shown(entry.name)}: put images "
                    "into train/CLASS/, or those without a label into unlabelled/"
                )


def _class_folders(root: Path, split: str) -> list[str]:
    folder = root / split
    if not folder.is_dir():
        return []
    found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    for name in found:
        _check_name(folder, name)
    return found


def _check_name(folder: Path, name: str) -> None:
    """Raise an InputError where a file of names, one a line, could not hold the name of a class's folder."""
    fault = "a line break" if "\n" in name or "\r" in name else None
    try:
        name.encode()
    except UnicodeEncodeError:
        fault = "bytes that are not UTF-8"
    if fault:
        raise InputError(f"{folder / shown(name)}: the folder's name holds {fault}: rename it")


def _classes(root: Path, split: str, others: list[str]) -> dict[str, list[ImageFile]]:
    """The images of each class of a split; names of other files are added to ``others``."""
    found = {}
    for folder in _class_folders(root, split):
        found[folder], ignored = list_images(root, f"{split}/{folder}")
        others += ignored
    return found


def class_names(path: Path, folders: list[str]) -> list[str]:
    """The classes' names: from a file, if there is one, else from their folders, with spaces for '_'.

    The file has a name a line in the order of the folders, or lines 'FOLDER NAME', which may name more folders.

    Raises:
        InputError: the file has neither.
    """
    if not path.exists():
        return [folder.replace("_", " ") for folder in folders]
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not text in UTF-8") from error
    named = {}
    for line in lines:
        starts = [folder for folder in folders if line.startswith((f"{folder} ", f"{folder}\t"))]
        if starts:
            folder = max(starts, key=len)
            named[folder] = line[len(folder) :].strip()
    if len(named) == len(folders):
        return [named[folder] for folder in folders]
    if len(lines) != len(folders):
        raise InputError(
            f"{path} has {len(lines)} lines for {len(folders)} classes: give a name a line in the order of their "
            "folders, or lines FOLDER NAME for all of them"
        )
    return lines
