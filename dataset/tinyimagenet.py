"""Tiny ImageNet (Le and Yang, Stanford CS231n, 2015), from the published archive."""

from collections import Counter
from pathlib import Path

import torch

from errors import InputError

from .archives import Archive, fetch
from .files import open_images
from .images import ImageDataset, Split, told_apart
from .listing import list_images
from .views import CropViews

SIZE = 64

# The archive as published; its many files have no hashes.
ARCHIVE = Archive(
    title="Tiny ImageNet",
    url="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    filename="tiny-imagenet-200.zip",
    md5="90528d7ca1a48142e341f4ef8d21d0de",
    folder="tiny-imagenet-200",
    files=[],
)


def load_tinyimagenet(
    data_dir: str, save_dir: str, max_bad_images: int = 0, exact_decode: bool = False
) -> ImageDataset:
    """100 000 training and 10 000 test images of 64 x 64 pixels in 200 classes; downloaded when missing.

    Classes are ordered by their WordNet numbers. The test split is val/: the labels of test/ were not published.

    Args:
        data_dir: the folder that it lies in, or is downloaded to.
        save_dir, max_bad_images, exact_decode: see ``open_images``.

    Raises:
        InputError: see ``open_images``.
        OSError: the extracted folder is not whole; see also ``fetch`` and ``open_images``.
    """
    root = fetch(ARCHIVE, Path(data_dir))
    try:
        classes = sorted((root / "wnids.txt").read_text().split())
        words = dict(line.split("\t", 1) for line in (root / "words.txt").read_text("utf-8").splitlines())
        names = told_apart(_names([words[wnid] for wnid in classes]), classes)
        lines = [line.split("\t") for line in (root / "val" / "val_annotations.txt").read_text().splitlines()]
        annotations = {f"val/images/{name}": classes.index(wnid) for name, wnid, *_ in lines}
        folders = [list_images(root, f"train/{wnid}/images")[0] for wnid in classes]
        test_files = list_images(root, "val/images")[0]
        if not all(folders) or annotations.keys() != {file.name for file in test_files}:
            raise InputError("images are missing")
    except (OSError, ValueError, KeyError) as error:
        raise OSError(f"{root} is not whole ({error}): delete it and run again") from error
    train_files = [file for folder in folders for file in folder]
    targets = torch.tensor([target for target, folder in enumerate(folders) for _ in folder])
    test_targets = torch.tensor([annotations[file.name] for file in test_files])

    files = (train_files, test_files)
    (train, test), sha256 = open_images("tinyimagenet", root, files, SIZE, save_dir, max_bad_images, exact_decode)
    return ImageDataset(
        "tinyimagenet",
        names,
        Split(train.images, targets[train.files], mapped=True),
        Split(test.images, test_targets[test.files], mapped=True),
        views=CropViews(SIZE),
        sha256=sha256,
    )


def _names(words: list[str]) -> list[str]:
    """Each class's first name; classes that share the first name keep all of theirs."""
    first = [word.split(",")[0] for word in words]
    counts = Counter(first)
    return [name if counts[name] == 1 else word for name, word in zip(first, words, strict=True)]
