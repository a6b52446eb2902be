"""Images per second of a folder's file of squares, against torchvision's ImageFolder: ``python -m benchmarks.data``.

With ``--mapped`` it measures the memory that reading a large file takes, and its share of the time of a step.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18

from benchmarks.common import cores, machine, print_table
from dataset import Split, load_dataset
from dataset.chunks import Chunk, ChunkFile
from dataset.loader import Loader
from dataset.views import CLIP_NORMALIZATION, CropViews, ResizedCropViews
from helper.exits import exit_on_bad_input
from helper.parser import positive, positive_int
from helper.runtime import keep_freed_memory

CPU = torch.device("cpu")

# Images per write.
_AT_ONCE = 64


def write_photos(root: Path, images: int, size: tuple[int, int] = (400, 300), classes: int = 10) -> None:
    """Write JPEGs with shapes of every size and some noise, as photographs have, a tenth of them in each class."""
    rng = np.random.default_rng(0)
    for number in range(images):
        picture = np.zeros((size[1], size[0], 3), np.float32)
        for grid in (4, 16, 64):
            noise = Image.fromarray(rng.integers(0, 256, (grid, grid, 3), dtype=np.uint8))
            picture += np.asarray(noise.resize(size, Image.Resampling.BICUBIC), np.float32) / grid**0.7
        picture += rng.normal(0, 1, picture.shape)
        folder = root / ("train" if number else "test") / f"class {number % classes}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.clip(picture * 255 / picture.max(), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=90)


def image_folder(root: Path, size: int, batch: int, workers: int) -> DataLoader:
    """torchvision's way to random views of the same distribution as ours, in float32 and normalised."""
    if size <= 96:
        views = [
            transforms.Resize(size, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.RandomCrop(size, padding=CropViews(size).padding),
        ]
    else:
        views = [transforms.RandomResizedCrop(size, interpolation=transforms.InterpolationMode.BICUBIC)]
    views += [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(*CLIP_NORMALIZATION)]
    folder = ImageFolder(str(root / "train"), transforms.Compose(views))
    return DataLoader(folder, batch, shuffle=True, num_workers=workers)


def processor_seconds() -> float:
    """Processor time of all threads of this process, and of its children that have ended."""
    children = os.times()
    return time.process_time() + children.children_user + children.children_system


def compare(root: Path, save: Path, size: int, batch: int, workers: int, budget: float) -> list[str]:
    """One row: pixels; images per second of a core, theirs and ours; ratio; decoding, in epochs of theirs.

    Seconds are a core's, so that other work on the machine does not change them.
    """
    start = processor_seconds()
    data = load_dataset("folder", str(root), image_size=size, save_dir=str(save))
    decoding = processor_seconds() - start
    ours = Loader(data.train, "train", batch, CPU, training=True, views=data.views)
    theirs = image_folder(root, size, batch, workers)
    sides = (lambda: [None for _ in theirs], lambda: [None for _ in ours.epoch(1)])
    times, begin = ([], []), time.perf_counter()
    while len(times[0]) < 4 or time.perf_counter() - begin < budget:
        for side, spent in zip(sides, times, strict=True):
            start = processor_seconds()
            side()
            spent.append(processor_seconds() - start)
    medians = [statistics.median(spent[1:]) for spent in times]  # the first call does not count
    rates = (f"{len(data.train) / seconds:.0f}" for seconds in medians)
    return [f"{size}", *rates, f"{medians[0] / medians[1]:.1f}", f"{decoding / medians[0]:.1f}"]


def own_memory() -> int:
    """Bytes of this process's own memory, without mapped files, which the system can take back."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def mapped_split(folder: Path, views: CropViews | ResizedCropViews, side: int, gib: float) -> Split:
    """A mapped file of ``gib`` GiB of noise; none of it is in memory any more."""
    file = ChunkFile(folder / "images.u8", folder / "crc32.u32", np.uint8, (side, side, 3))
    count = int(gib * 2**30) // file.row_bytes
    starts = range(0, count, _AT_ONCE)
    file.make_room(len(starts), count)
    noise = np.random.default_rng(0).integers(0, 256, (_AT_ONCE, side, side, 3), dtype=np.uint8)
    for number, start in enumerate(starts):
        chunk = Chunk(number, start, min(start + _AT_ONCE, count))
        file.write(chunk, noise[: chunk.end - chunk.start])
    file.flush()
    with open(file.rows, "rb") as rows:
        os.posix_fadvise(rows.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return Split(file.map(0, count).permute(0, 3, 1, 2), torch.arange(count) % 10, mapped=True)


def read_mapped(folder: Path, size: int, gib: float, batch: int, steps: int) -> list[str]:
    """One row: pixels; GiB; own GiB before and at most while all is read; ms of a step; its share that waits."""
    small = size <= 96
    views = (CropViews if small else ResizedCropViews)(size)
    before = own_memory()
    split = mapped_split(folder, views, size if small else round(size * 8 / 7), gib)
    loader = Loader(split, "train", batch, CPU, training=True, views=views, max_steps=steps)
    model = resnet18(num_classes=10).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    start = time.perf_counter()
    for made in loader.epoch(1):
        F.cross_entropy(model(made.image), made.target).backward()
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - start
    del model, optimizer
    most = before
    for _ in Loader(split, "train", batch, CPU, training=True, views=views).epoch(2):
        most = max(most, own_memory())
    memory = (f"{value / 2**30:.2f}" for value in (split.images.nbytes, before, most))
    return [f"{size}", *memory, f"{1000 * seconds / steps:.0f}", f"{loader.waited / seconds:.2%}"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split(":")[0] + ".", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--size", type=positive_int, nargs="+", default=[64, 224], help="pixels of the student's images"
    )
    parser.add_argument("--images", type=positive_int, default=5000, help="JPEGs of 400 x 300 pixels, made on the spot")
    parser.add_argument("--batch", type=positive_int, default=64, help="samples at a time")
    parser.add_argument("--workers", type=positive_int, default=cores(), help="of the DataLoader")
    parser.add_argument("--seconds", type=positive, default=60, help="time to spend on each size")
    parser.add_argument("--mapped", action="store_true", help="read a large file in place of the comparison")
    parser.add_argument("--gib", type=positive, default=4, help="--mapped: size of the file")
    parser.add_argument("--steps", type=positive_int, default=30, help="--mapped: steps of a resnet18 that are timed")
    parser.add_argument("--dir", help="folder for the files, which are removed at the end; if unset, the system's")
    args = parser.parse_args(argv)
    with exit_on_bad_input("benchmarks.data"):
        keep_freed_memory()
        torch.set_num_threads(1)  # many threads would spin while they wait for one another, which would count
        print(f"{machine()}; batches of {args.batch}\n", flush=True)
        if args.mapped:
            header = ("pixels", "file, GiB", "own memory before, GiB", "at most, GiB", "step, ms", "waits for data")
            print_table(
                header, (in_folder(args.dir, read_mapped, size, args.gib, args.batch, args.steps) for size in args.size)
            )
            return
        with tempfile.TemporaryDirectory(dir=args.dir) as folder:
            root, save = Path(folder) / "photos", Path(folder) / "save"
            write_photos(root, args.images)
            header = ("pixels", "ImageFolder, images/s a core", "this project", "times faster", "decoding, epochs")
            rows = (compare(root, save, size, args.batch, args.workers, args.seconds) for size in args.size)
            print_table(header, rows)


def in_folder(place: str | None, function: Callable[..., list[str]], *args) -> list[str]:
    """Call a function with a temporary folder, and return its result."""
    with tempfile.TemporaryDirectory(dir=place) as folder:
        return function(Path(folder), *args)


if __name__ == "__main__":
    main()
