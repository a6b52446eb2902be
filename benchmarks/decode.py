"""Large JPEGs decoded at libjpeg's own scale, against their full size: ``python -m benchmarks.decode [PICTURES]``.

It prints images per second of a core, and by how many levels of 256 the squares differ.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.common import machine, print_table
from benchmarks.data import write_photos
from dataset.decode import read_square
from dataset.folder import stored_side
from helper.exits import exit_on_bad_input
from helper.parser import positive_int

_EXTENSIONS = {".jpg", ".jpeg"}


def compare(files: list[Path], size: int, turns: int) -> list[str]:
    """One row: pixels; pictures; images per second of a core, exact and scaled; ratio; differences in levels.

    Seconds are a core's, so that other work on the machine does not change them. Pictures that are too small to be
    scaled count in neither.
    """
    side = stored_side(size)
    files = [path for path in files if min(_size(path)) >= 4 * side]
    if not files:
        return [f"{size}", "0", *["–"] * 6]
    rates, pictures = ([], []), [[], []]
    for _ in range(turns):
        for place, exact in enumerate((True, False)):
            start = time.process_time()
            pictures[place] = [read_square(path, side, exact) for path in files]
            rates[place].append(len(files) / (time.process_time() - start))
    levels = np.abs(np.subtract(*(np.stack(squares).astype(np.int16) for squares in pictures)))
    medians = [statistics.median(each) for each in rates]
    differences = [f"{levels.mean():.2f}", f"{np.percentile(levels, 99.9):.0f}", f"{levels.max()}"]
    speeds = [*(f"{rate:.1f}" for rate in medians), f"{medians[1] / medians[0]:.1f}"]
    return [f"{size}", f"{len(files)}", *speeds, *differences]


def _size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split(":")[0] + ".", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("pictures", nargs="?", help="a folder of JPEGs; if left out, some are made on the spot")
    parser.add_argument(
        "--size", type=positive_int, nargs="+", default=[64, 224], help="pixels of the student's images"
    )
    parser.add_argument("--images", type=positive_int, default=8, help="JPEGs of 4000 x 3000 pixels that are made")
    parser.add_argument("--turns", type=positive_int, default=3, help="times that each side decodes all pictures")
    args = parser.parse_args(argv)
    with exit_on_bad_input("benchmarks.decode"), tempfile.TemporaryDirectory() as made:
        if args.pictures is None:
            write_photos(Path(made), args.images, (4000, 3000))
        files = sorted(path for path in Path(args.pictures or made).rglob("*") if path.suffix.lower() in _EXTENSIONS)
        print(f"{machine()}\n", flush=True)
        header = ("pixels", "pictures", "full size, images/s a core", "scaled", "times faster")
        header += ("levels apart, mean", "99.9 %", "at most")
        print_table(header, (compare(files, size, args.turns) for size in args.size))


if __name__ == "__main__":
    main()
