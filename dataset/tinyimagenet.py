"""Tiny ImageNet (Le and Yang, Stanford CS231n, 2015), from the published folder or archive."""

from collections import Counter
from pathlib import Path

import torch

from . import ImageDataset, Split
from .files import list_images, open_images
from .views import CropViews

_FOLDER = "tiny-imagenet-200"
SIZE = 64


def load_tinyimagenet(data_dir: str, save_dir: str, max_bad_images: int = 0) -> ImageDataset:
    """Photographs of 64 x 64 pixels in 200 classes, by their WordNet numbers; tested on val/, which has labels.

    Raises:
        ValueError, OSError: a file is missing, or what ``open_images`` raises.
    """
    root = Path(data_dir) / _FOLDER
    classes = sorted((root / "wnids.txt").read_text().split())
    words = dict(line.split("\t", 1) for line in (root / "words.txt").read_text("utf-8").splitlines())
    files = {name: list_images(root, f"train/{name}")[0] for name in classes}
    train = [file for images in files.values() for file in images]
    targets = [target for target, name in enumerate(classes) for _ in files[name]]

    lines = (root / "val" / "val_annotations.txt").read_text().splitlines()
    wnid = dict(line.split("\t")[:2] for line in lines)
    test = list_images(root, "val/images")[0]
    test_targets = [classes.index(wnid[Path(file.name).name]) for file in test]

    splits, sha256 = open_images("tinyimagenet", root, (train, test), SIZE, save_dir, max_bad_images)
    train_split, test_split = (
        Split(split.images, torch.tensor(every)[split.files], mapped=True)
        for split, every in zip(splits, (targets, test_targets), strict=True)
    )
    names, views = _names(classes, words), CropViews(SIZE)
    return ImageDataset("tinyimagenet", names, train_split, test_split, views=views, sha256=sha256)


def _names(classes: list[str], words: dict[str, str]) -> list[str]:
    """The first of each class's names; all of them where several classes share the first."""
    first = [words[name].split(",")[0] for name in classes]
    counts = Counter(first)
    return [name if counts[name] == 1 else words[number] for name, number in zip(first, classes, strict=True)]
