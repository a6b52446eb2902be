"""One's own pictures: a folder with ``train/CLASS/**``, ``test/CLASS/**`` and ``unlabelled/**``; any folder; a list."""

import hashlib
from pathlib import Path

import torch

from errors import InputError

from . import folder_name
from .files import open_images
from .images import ImageDataset, Split, told_apart
from .listing import list_pictures, shown
from .splits import holdout_rows
from .views import SMALL, views_of_size

# The name of the only class of a data set without labels: a student's classifier needs one.
UNLABELLED = "unlabelled"


def load_folder(
    data_dir: str | list[str],
    image_size: int,
    save_dir: str,
    max_bad_images: int = 0,
    holdout: float | None = None,
    exact_decode: bool = False,
    data_list: str | None = None,
) -> ImageDataset:
    """One's own pictures: a folder as ImageNet's usual layout has it, any folder, or a list.

    In a folder with train/ or unlabelled/ the classes are the folders in train/, by name. Images in unlabelled/, if
    there are any, join the training split with target -1. The test split is test/, or val/ where there is no test/
    with classes in it. Every picture below any other folder has target -1. Files without an image's extension are
    passed over, and one line says so; hidden files are passed over silently. Where nothing has a label, there is one
    class, ``UNLABELLED``, which no picture has.

    Args:
        data_dir: the folder, or several folders and files that are one data set.
        image_size: height and width of what the student sees.
        save_dir, max_bad_images, exact_decode: see ``open_images``.
        holdout: if there is nothing to test on, this share of each class of the training split becomes the test split;
            without any label, this share of all pictures.
        data_list: a list of the pictures in the folder's place, see ``read_list``.

    Raises:
        InputError: the folders or the list are not as described, or have the wrong classes; see also ``open_images``.
        OSError: a folder cannot be read; see also ``open_images``.
    """
    listing = list_pictures(data_dir, data_list)
    root, classes = listing.root, listing.classes
    files, targets, test_files, test_targets = listing.train, listing.targets, listing.test, listing.test_targets
    if not test_files and holdout is not None:
        labels = torch.tensor(targets)
        if len(files) < 2:
            raise InputError(f"{root} holds a single image, so none can be held out: add some")
        kept, held = holdout_rows(labels if (labels >= 0).any() else torch.zeros_like(labels), holdout)
        test_files, test_targets = ([every[row] for row in held] for every in (files, targets))
        files, targets = ([every[row] for row in kept] for every in (files, targets))
    else:
        holdout = None
    if not test_files:
        raise InputError(
            f"{root} holds no image in test/CLASS/ or val/CLASS/ to test on: add some, or take a share of the training "
            "images with --holdout F"
        )

    name = folder_name(data_dir if data_list is None else Path(data_list).stem, image_size)
    views = views_of_size(image_size)
    side = stored_side(image_size)
    splits, sha256 = open_images(name, root, (files, test_files), side, save_dir, max_bad_images, exact_decode)
    train_split, test_split = (
        Split(split.images, torch.tensor(every)[split.files], mapped=True)
        for split, every in zip(splits, (targets, test_targets), strict=True)
    )
    if any(target >= 0 for target in targets):
        counts = torch.bincount(train_split.targets[train_split.targets >= 0], minlength=len(classes))
        if not counts.all():
            empty = shown(classes[int(counts.argmin())])
            where = root / "train" / empty if listing.splits == "folders" else f"the class {empty}"
            raise InputError(f"no image in {where} can be decoded: repair them, or delete it")
    if listing.splits == "folders" and classes:
        names = told_apart(class_names(root / "classes.txt", classes), [shown(folder) for folder in classes])
    else:
        names = classes or [UNLABELLED]
    if listing.splits == "list":  # folders' names are part of the files' names, which the fingerprint stands for
        labels = (names, train_split.targets.tolist(), test_split.targets.tolist())
        sha256 = hashlib.sha256(repr((sha256, labels)).encode()).hexdigest()
    return ImageDataset(name, names, train_split, test_split, views=views, sha256=sha256, holdout=holdout)


def stored_side(image_size: int) -> int:
    """Height and width in pixels of the stored images.

    Photographs are stored larger than the student sees them, as in ImageNet's usual evaluation: 256 pixels for 224.
    """
    return image_size if image_size <= SMALL else round(image_size * 8 / 7)


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
