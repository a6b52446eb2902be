"""The embeddings of all pictures below a folder, in a file."""

import functools
import heapq
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dataset.decode import BadImage, read_square
from dataset.listing import is_image, shown
from dataset.loader import Batch
from dataset.views import CropViews, ResizedCropViews, normalize
from errors import InputError
from helper.bank import encode_view
from helper.teacher import CnnTeacher, cnn_normalization
from models.encoders import FrozenEncoder

from .embedding_files import check_table, open_table
from .student import TrainedStudent, open_student
from .teacher import open_teacher_network

_BATCH = 64

# Names of a folder's entries that are held in memory at a time; those of a million pictures would take 100 MB.
_NAMES = 1 << 16


def pictures_below(folder: Path) -> Iterator[Path]:
    """The pictures below a folder, by their names' extensions, in the order of their paths.

    Hidden files and folders are left out. Memory does not grow with the number of pictures.
    """

    def walk(folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
        for name in _names(folder):
            path = folder / name
            if path.is_dir():
                about = path.stat()
                place = (about.st_dev, about.st_ino)
                if place not in above:  # else it is a link to a folder that it lies in
                    yield from walk(path, (*above, place))
            elif is_image(name) and path.is_file():
                yield path

    about = folder.stat()
    return walk(folder, ((about.st_dev, about.st_ino),))


def _names(folder: Path) -> Iterator[str]:
    """The names in a folder in order, without hidden ones; each pass over it finds the next ``_NAMES``."""
    last = ""
    while True:
        with os.scandir(folder) as entries:
            names = (entry.name for entry in entries if entry.name > last and not entry.name.startswith("."))
            block = heapq.nsmallest(_NAMES, names)
        yield from block
        if len(block) < _NAMES:
            return
        last = block[-1]


def count_pictures(folder: Path, flag: str) -> int:
    """The number of pictures below a folder.

    Raises:
        InputError: the folder is missing, or holds none.
    """
    if not folder.is_dir():
        raise InputError(f"{flag} {folder} is not a folder")
    count = sum(1 for _ in pictures_below(folder))
    if not count:
        raise InputError(f"{flag} {folder} holds no images")
    return count


def embed_pictures(
    paths: Iterable[Path], read: Callable[[Path], np.ndarray], embed: Callable[[Tensor], Tensor], device: str
) -> Iterator[tuple[list[Path], Tensor]]:
    """Embed pictures batch by batch: the files of a batch that can be read, and their embeddings (B, D), on the CPU.

    A line names each file that cannot be read as a picture. All cores decode the next batch while one is embedded.

    Args:
        paths: the files.
        read: reads a file as a square (S, S, 3) uint8, see ``reader``.
        embed: turns pixels (B, 3, S, S) uint8 into embeddings.
        device: 'cpu' or 'cuda'.
    """
    paths, skipped = iter(paths), 0

    def try_to_read(path: Path) -> np.ndarray | None:
        try:
            return read(path)
        except (BadImage, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            tqdm.write(f"skipped {shown(str(path))}: {reason}")
            return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def begin() -> tuple[list[Path], list]:
            batch = list(itertools.islice(paths, _BATCH))
            return batch, [pool.submit(try_to_read, path) for path in batch]

        following = begin()
        while following[0]:
            (batch, reading), following = following, begin()
            images = [future.result() for future in reading]
            found = [path for path, image in zip(batch, images, strict=True) if image is not None]
            skipped += len(batch) - len(found)
            if found:
                pixels = np.stack([image for image in images if image is not None])
                with torch.no_grad():
                    yield found, embed(torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device)).float().cpu()
    if skipped:
        print(f"skipped {skipped} files that cannot be read as images")


def reader(student: TrainedStudent) -> Callable[[Path], np.ndarray]:
    """A function that reads a picture as a student's run did, see ``read_square``."""
    return functools.partial(read_square, side=student.stored_size, exact=bool(student.run.option("exact_decode")))


def student_embed(student: TrainedStudent, device: str) -> Callable[[Tensor], Tensor]:
    """A function from stored pixels (B, 3, S, S) uint8 to a student's embeddings, as in its run's test pass."""
    network, views = student.network.to(device, memory_format=torch.channels_last), _views(student)

    def embed(stored: Tensor) -> Tensor:
        image = views.student(stored, *_test_views(stored, views))
        return network(normalize(image, student.normalization)).embedding

    return embed


def teacher_embed(student: TrainedStudent, device: str) -> Callable[[Tensor], Tensor]:
    """The same function for the teacher of a run: its embeddings in the joint space, where it has a head.

    Raises:
        InputError, OSError: see ``open_teacher_network``.
    """
    network, head = open_teacher_network(student.run, student.state, len(student.classes), device)
    views, head = _views(student), None if head is None else head.to(device)
    if isinstance(network, FrozenEncoder):

        def embed(stored: Tensor) -> Tensor:
            x = encode_view(network, views, stored, *_test_views(stored, views))
            return x if head is None else head(x)[0]

        return embed
    seen = cnn_normalization(student.run.options["path_t"], network.backbone), student.normalization
    cnn = CnnTeacher(network.backbone, head, "off", False, network.resolution, *seen).to(device)

    def embed_with_cnn(stored: Tensor) -> Tensor:
        index, view = _test_views(stored, views)
        image = normalize(views.student(stored, index, view), student.normalization)
        return cnn("test", Batch(index, index, image, view)).embedding

    return embed_with_cnn


def _views(student: TrainedStudent) -> CropViews | ResizedCropViews:
    return (CropViews if student.stored_size == student.image_size else ResizedCropViews)(student.image_size)


def _test_views(stored: Tensor, views: CropViews | ResizedCropViews) -> tuple[Tensor, Tensor]:
    """A batch's row numbers and its test views; the test view is the same for every row."""
    index = torch.arange(len(stored), device=stored.device)
    return index, torch.full_like(index, views.test)


def embed_folder(opt, device: str) -> str:
    """Write the embeddings of all pictures below a folder, see ``open_table``; returns a line that says so.

    The file is whole or not there. Memory does not grow with the number of pictures.

    Args:
        opt: ``runs`` with the one run, ``checkpoint``; ``embed``, the folder; ``out``, the file; ``teacher``, whether
            the teacher's embeddings are asked for; ``force``.
        device: 'cpu' or 'cuda'.

    Raises:
        InputError: no finished run; a folder without a readable picture; a file that would be overwritten, or of an
            unknown kind.
        OSError: a file cannot be read or written.
    """
    out = Path(opt.out)
    check_table(out, opt.force)
    student = open_student(opt.runs[0], opt.checkpoint)
    count = count_pictures(Path(opt.embed), "--embed")
    embed = (teacher_embed if opt.teacher else student_embed)(student, device)
    paths, total = tqdm(pictures_below(Path(opt.embed)), "embedding", count, unit="image"), 0
    with open_table(out) as table:
        for found, embeddings in embed_pictures(paths, reader(student), embed, device):
            table.add([str(path) for path in found], embeddings.numpy())
            total += len(found)
        if not total:
            raise InputError(f"--embed {opt.embed}: none of its images can be read")
    side = "teacher" if opt.teacher else "student"
    return f"wrote {total} embeddings of the {side}, of {embeddings.shape[1]} numbers each, to {out}"
