"""The pictures of one's own data set: their names, labels and splits. No picture is opened here."""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from errors import InputError

from .decode import EXTENSIONS


class ImageFile(NamedTuple):
    """An image file: its name below the data set's folder, bytes, and time of the last change in ns."""

    name: str
    size: int
    time: int


class Listing(NamedTuple):
    """The pictures of a data set, before any is decoded.

    root: the folder that the files' names begin in.
    classes: each class's folder or label, in the order of the targets; empty where nothing has a label.
    train, test: the files of each split.
    targets, test_targets: the class of each file; -1 for one without a label.
    splits: 'folders' where folders name classes and splits; 'list' where a file does; 'flat' where nothing does.
    """

    root: Path
    classes: list[str]
    train: list[ImageFile]
    targets: list[int]
    test: list[ImageFile]
    test_targets: list[int]
    splits: str


def shown(name: str) -> str:
    """A file's name in one line that can be printed anywhere."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def is_image(name: str) -> bool:
    """Whether a file's name is an image's: it is not hidden, and has the extension of a format that Pillow reads."""
    return not os.path.basename(name).startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS


def list_images(root: Path, folder: str) -> tuple[list[ImageFile], list[str]]:
    """The image files in a folder below ``root`` and in all folders in it, by name; and the names of other files.

    Hidden files are left out of both.

    Args:
        folder: its name below ``root``; an empty text for ``root`` itself.
    """
    images, others = [], []

    def scan(below: str, above: tuple[tuple[int, int], ...]) -> None:
        with os.scandir(root / below) as entries:
            for entry in entries:
                name = os.path.join(below, entry.name)
                if entry.name.startswith("."):
                    continue
                about = entry.stat()
                if entry.is_dir():
                    place = (about.st_dev, about.st_ino)
                    if place not in above:  # else it is a link to a folder that it lies in
                        scan(name, (*above, place))
                elif is_image(name):
                    images.append(ImageFile(name, about.st_size, about.st_mtime_ns))
                else:
                    others.append(name)

    about = os.stat(root / folder)
    scan(folder, ((about.st_dev, about.st_ino),))
    return sorted(images), sorted(others)


def has_splits(data_dir: str | Sequence[str]) -> bool:
    """Whether the folders' names say which pictures are trained on: one folder with train/ or unlabelled/ in it.

    Raises:
        InputError: there is no such folder.
    """
    for path in _paths(data_dir):
        if not os.path.exists(path):
            raise InputError(f"--data_dir {shown(path)}: no such folder")
    if not isinstance(data_dir, str):
        return False
    return any((Path(data_dir) / split).is_dir() for split in ("train", "unlabelled"))


def known_splits(data_dir: str | Sequence[str], data_list: str | None = None) -> tuple[bool, bool]:
    """Whether any training picture has a label, and whether there are classes to test on, as far as names tell.

    Args:
        data_dir, data_list: see ``list_pictures``.

    Raises:
        InputError: no such folder or list, or they are not as described.
    """
    if data_list is not None:
        return any(label for _, label in read_list(Path(data_list))), False
    if not has_splits(data_dir):
        return False, False
    root = Path(data_dir)
    return bool(_class_folders(root, "train")), any(_class_folders(root, split) for split in ("test", "val"))


def list_pictures(data_dir: str | Sequence[str], data_list: str | None = None) -> Listing:
    """The pictures of a folder, of several folders and files, or of a list.

    Args:
        data_dir: a folder with train/ or unlabelled/ is read as ``dataset.folder`` says. Every picture below any other
            folder, at any depth, has no label; several folders and files are one data set.
        data_list: the path of a list in their place, see ``read_list``.

    Raises:
        InputError: the folders or the list are not as described.
        OSError: a folder cannot be read.
    """
    if data_list is not None:
        return _from_list(Path(data_list))
    if has_splits(data_dir):
        return _from_folders(Path(data_dir))
    return _flat(_paths(data_dir))


def _paths(data_dir: str | Sequence[str]) -> list[str]:
    return [data_dir] if isinstance(data_dir, str) else list(data_dir)


def _flat(paths: list[str]) -> Listing:
    """Every picture below some folders, and some files, without a label."""
    root = Path(os.path.commonpath([os.path.abspath(path) for path in paths]))
    if not root.is_dir():
        root = root.parent
    if len(paths) == 1 and os.path.isdir(paths[0]):
        root = Path(paths[0])
    images, others = set(), []
    for path in paths:
        below = os.path.relpath(path, root)
        if os.path.isdir(path):
            found, ignored = list_images(root, "" if below == "." else below)
            images.update(found)
            others += ignored
        else:
            images.add(_image_file(root, below))
    _tell_others(root, others)
    if not images:
        raise InputError(f"{' '.join(map(shown, paths))}: no picture in it, at any depth")
    files = sorted(images)
    return Listing(root, [], files, [-1] * len(files), [], [], "flat")


def _image_file(root: Path, name: str) -> ImageFile:
    about = os.stat(root / name)
    return ImageFile(name, about.st_size, about.st_mtime_ns)


def read_list(path: Path) -> list[tuple[str, str]]:
    """Names and labels from a list of pictures; the label is empty where there is none.

    A file NAME.csv has the columns ``path`` and ``label``, and others if it likes. Any other file names a picture a
    line, without labels.

    Raises:
        InputError: the list is not there, is no text, lacks a column, is empty, or names a picture twice.
    """
    try:
        text = path.read_text("utf-8-sig")
    except OSError as error:
        raise InputError(f"--data_list {path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--data_list {path} cannot be read as text in UTF-8") from error
    if path.suffix.lower() == ".csv":
        rows = csv.DictReader(io.StringIO(text, newline=""))
        if missing := [name for name in ("path", "label") if name not in (rows.fieldnames or ())]:
            raise InputError(
                f"--data_list {path} has no column {' and no column '.join(missing)}: its first line must be path,label"
            )
        try:
            named = [((row["path"] or "").strip(), (row["label"] or "").strip()) for row in rows]
        except csv.Error as error:
            raise InputError(f"--data_list {path} is no CSV ({error})") from error
        if lost := [label for name, label in named if label and not name]:
            raise InputError(f"--data_list {path} has a row with the label {shown(lost[0])} and no path")
        named = [(name, label) for name, label in named if name]
    else:
        named = [(line.strip(), "") for line in text.split("\n") if line.strip()]
    if not named:
        raise InputError(f"--data_list {path} names no picture")
    seen: set[str] = set()
    for name, _ in named:
        plain = os.path.normpath(name)  # ./a.jpg is a.jpg
        if plain in seen:
            raise InputError(f"--data_list {path} names {shown(name)} twice")
        seen.add(plain)
    return named


def _from_list(path: Path) -> Listing:
    """The pictures that a list names, relative to its own folder; classes in the order of their names."""
    named, files = read_list(path), []
    classes = sorted({label for _, label in named if label})
    for name, _ in named:
        try:
            files.append(_image_file(path.parent, name))
        except OSError as error:
            raise InputError(
                f"--data_list {path} names {shown(name)}, which cannot be read ({error.strerror}): names are relative "
                "to the list's folder"
            ) from error
        if (path.parent / name).is_dir():
            raise InputError(f"--data_list {path} names {shown(name)}, which is a folder: a list names pictures")
    number = {label: target for target, label in enumerate(classes)}
    targets = [number.get(label, -1) for _, label in named]
    return Listing(path.parent, classes, files, targets, [], [], "list")


def _from_folders(root: Path) -> Listing:
    """Classes and splits by their folders."""
    _check_outside(root, "train")
    others: list[str] = []
    train = _classes(root, "train", others)
    test_folder = next((folder for folder in ("test", "val") if _class_folders(root, folder)), None)
    test = {} if test_folder is None else _classes(root, test_folder, others)
    unlabelled = []
    if (root / "unlabelled").is_dir():
        unlabelled, ignored = list_images(root, "unlabelled")
        others += ignored
    _tell_others(root, others)

    if not train and not unlabelled:
        raise InputError(f"{root} holds no train/CLASS/ with images in it, and no image in unlabelled/")
    classes = list(train or test)
    for folder in classes if train else ():
        if not train[folder]:
            raise InputError(f"{root / 'train' / shown(folder)} holds no image: delete it, or fill it")
    if unknown := [folder for folder in test if folder not in classes]:
        raise InputError(f"{root / test_folder / shown(unknown[0])} is a class that train/ does not have")
    files = [file for images in train.values() for file in images]
    targets = [target for target, folder in enumerate(classes) for _ in train.get(folder, ())]
    files, targets = files + unlabelled, targets + [-1] * len(unlabelled)
    test_files = [file for folder in classes for file in test.get(folder, ())]
    test_targets = [target for target, folder in enumerate(classes) for _ in test.get(folder, ())]
    return Listing(root, classes, files, targets, test_files, test_targets, "folders")


def _tell_others(root: Path, others: list[str]) -> None:
    if others:
        some = ", ".join(map(shown, others[:3])) + (", ..." if len(others) > 3 else "")
        print(f"{root}: passed over {len(others)} files that have no image's extension: {some}")


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
