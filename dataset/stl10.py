"""STL-10 (Coates, Ng and Lee, AISTATS 2011) from the published binary files."""

import hashlib
from pathlib import Path

import numpy as np
import torch

from .archives import Archive, fetch
from .images import ImageDataset, Split
from .views import CropViews

SIZE = 96


def load_stl10(data_dir: str) -> ImageDataset:
    """5 000 training images with and 100 000 without a label, 8 000 test images, of 96 x 96 pixels in 10 classes.

    The files are downloaded when missing. The images without a label follow the others in the training split. All
    images are held in memory, 3 GB.

    Raises:
        OSError: see ``fetch``.
    """
    from torchvision.datasets import STL10 as stl  # here, as other data sets need no torchvision

    files = [*stl.train_list, *stl.test_list]
    folder = fetch(Archive("STL-10", stl.url, stl.filename, stl.tgz_md5, stl.base_folder, files), Path(data_dir))
    (train, _), (labels, _), (unlabelled, _) = stl.train_list
    (test, _), (test_labels, _) = stl.test_list
    targets = _targets(folder / labels)
    images = _images(folder / train, folder / unlabelled)
    targets = torch.cat([targets, torch.full((len(images) - len(targets),), -1)])
    return ImageDataset(
        "stl10",
        (folder / stl.class_names_file).read_text().split(),
        Split(images, targets),
        Split(_images(folder / test), _targets(folder / test_labels)),
        views=CropViews(SIZE),
        # The md5s have just been checked, so their hash will do: reading 3 GB once is enough.
        sha256=hashlib.sha256(repr(files).encode()).hexdigest(),
    )


def _images(*paths: Path) -> torch.Tensor:
    """The images of several files, one file after the other, (N, 3, SIZE, SIZE)."""
    files = [np.memmap(path, dtype=np.uint8, mode="r").reshape(-1, 3, SIZE, SIZE) for path in paths]
    images = np.empty((sum(map(len, files)), 3, SIZE, SIZE), dtype=np.uint8)
    start = 0
    for file in files:
        # The file stores each image column by column.
        np.copyto(images[start : start + len(file)], file.swapaxes(2, 3))
        start += len(file)
    return torch.from_numpy(images)


def _targets(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.fromfile(path, dtype=np.uint8).astype(np.int64) - 1)
