"""Image files as one file of squares: all cores decode it once, later runs map it."""

import contextlib
import errno
import fcntl
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
import threading
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
from torch import Tensor
from tqdm import tqdm

from errors import InputError, WriteError, writing

from .chunks import Chunk, ChunkFile
from .decode import RESAMPLING, SCALED, BadImage, read_square
from .listing import ImageFile, shown

# Images that one process decodes at a time; part of the key.
CHUNK = 64


class Squares(NamedTuple):
    """The images of one split, and the number of each image's file.

    images: (N, 3, side, side) uint8 in channels_last memory format, mapped.
    files: (N,) int64.
    """

    images: Tensor
    files: Tensor


def open_images(
    name: str,
    root: Path,
    splits: Sequence[Sequence[ImageFile]],
    side: int,
    save_dir: str,
    max_bad: int = 0,
    exact: bool = False,
) -> tuple[list[Squares], str]:
    """Decode the images that are not there yet; returns each split's images and a fingerprint of all.

    The images lie in ``SAVE/images/NAME_KEY/``; the key stands for the files' names, sizes and times, for the side and
    for the resampling. Processes and runs that want the same images share the work: each decodes with all its cores
    what no other is decoding, and waits for the rest. An interrupted run goes on, and a damaged chunk is decoded again.

    Args:
        name: the data set's name.
        root: the folder that the files' names begin in.
        splits: the files of each split.
        side: height and width in pixels; see ``read_square``.
        save_dir: folder of all results.
        max_bad: files that cannot be decoded are left out, up to so many.
        exact: decode large JPEGs at their full size too, see ``read_square``.

    Raises:
        InputError: more files cannot be decoded, or none of a split can.
        WriteError: there is no room for the images, or their file cannot be written.
        OSError: the images' folder cannot be made, or a file cannot be read.
    """
    about = {"side": side, "resampling": RESAMPLING if exact else SCALED, "chunk": CHUNK}
    key = hashlib.sha256(json.dumps([about, splits]).encode()).hexdigest()
    folder = Path(save_dir) / "images" / f"{name}_{key[:12]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot write to {folder} ({error.strerror}); choose another --save_dir") from error
    store = _Store(folder, root, [[file.name for file in split] for split in splits], side, exact)
    described = folder / "images.json"
    if store.state() is None or _recorded(described) != store.state():
        store.fill()
        about |= {"root": str(root.absolute()), "files": [len(split) for split in splits], "pillow": PIL.__version__}
        with writing(described):
            described.write_text(json.dumps(about | {"checked": store.state()}, indent=1) + "\n")
    bad = store.bad()
    if bad:
        told = ", ".join(f"{shown(store.names[split][file])} ({why})" for (split, file), why in list(bad.items())[:5])
        told += f" and {len(bad) - 5} more, listed in {store.bad_path}" if len(bad) > 5 else ""
        if len(bad) > max_bad:
            raise InputError(
                f"{len(bad)} of the images in {root} cannot be decoded: {told}; repair or delete them, or leave them "
                f"out with --max_bad_images {len(bad)}"
            )
        print(f"left out of {root}, since they cannot be decoded: {told}")
    squares = store.squares()
    for split, files in zip(squares, splits, strict=True):
        if not len(split.files):
            raise InputError(f"none of the images in {root} that belong with {shown(files[0].name)} can be decoded")
    return squares, store.fingerprint()


def _recorded(path: Path) -> list | None:
    """The state of the files when they were last checked."""
    try:
        return json.loads(path.read_text())["checked"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


class _Store:
    """The file of squares, with room for every image of each split, one split after the other.

    bad.jsonl has a line for each bad file that is known. A split's last good files take the rows of the bad ones, so
    that the good ones come first and few of them move. A chunk's checksum begins with the names of its files. A chunk
    that was written before a bad file was known, and would now hold other files, thus counts as missing.
    """

    def __init__(self, folder: Path, root: Path, names: list[list[str]], side: int, exact: bool):
        self.folder, self.root, self.names, self.side, self.exact = folder, root, names, side, exact
        self.bad_path = folder / "bad.jsonl"
        self.files = ChunkFile(folder / "images.u8", folder / "crc32.u32", np.uint8, (side, side, 3))
        lengths = [len(split) for split in names]
        self.first_rows = np.cumsum([0, *lengths])
        self.first_chunks = np.cumsum([0, *(-(-length // CHUNK) for length in lengths)])

    def bad(self) -> dict[tuple[int, int], str]:
        """The known bad files: split and number of each, and the reason."""
        found = {}
        lines = self.bad_path.read_text().splitlines() if self.bad_path.exists() else []
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that was cut off
                entry = json.loads(line)
                found[entry["split"], entry["file"]] = entry["error"]
        return dict(sorted(found.items()))

    def rows(self, split: int, bad: Sequence[tuple[int, int]]) -> np.ndarray:
        """The number of the file in each row of a split."""
        count, bad = len(self.names[split]), [file for other, file in bad if other == split]
        good = count - len(bad)
        rows = np.arange(good)
        rows[[file for file in bad if file < good]] = np.setdiff1d(np.arange(good, count), bad)
        return rows

    def chunk(self, number: int, rows: list[np.ndarray]) -> tuple[Chunk, list[tuple[int, int]]]:
        """A chunk, and split and number of the file in each of its rows."""
        split = int(np.searchsorted(self.first_chunks, number, "right")) - 1
        start = (number - int(self.first_chunks[split])) * CHUNK
        files = rows[split][start : start + CHUNK].tolist()
        about = zlib.crc32(b"\0".join(os.fsencode(self.names[split][file]) for file in files))
        start += int(self.first_rows[split])
        return Chunk(number, start, start + len(files), about), [(split, file) for file in files]

    def chunks(self) -> list[Chunk]:
        """All chunks, given the bad files that are known."""
        bad = list(self.bad())
        rows = [self.rows(split, bad) for split in range(len(self.names))]
        chunks = (self.chunk(number, rows)[0] for number in range(int(self.first_chunks[-1])))
        return [chunk for chunk in chunks if chunk.start < chunk.end]

    def squares(self) -> list[Squares]:
        bad, squares = list(self.bad()), []
        for split, first in enumerate(self.first_rows[:-1].tolist()):
            files = torch.from_numpy(self.rows(split, bad))
            images = self.files.map(first, first + len(files)).permute(0, 3, 1, 2)
            squares.append(Squares(images, files))
        return squares

    def fingerprint(self) -> str:
        """SHA-256 of the checksums, which depend on the names and the pixels."""
        known = np.fromfile(self.files.checksums, np.uint32)
        chunks = self.chunks()
        spans = [(chunk.start, chunk.end) for chunk in chunks]
        digest = hashlib.sha256(repr((self.side, spans)).encode())
        digest.update(known[[chunk.number for chunk in chunks]].tobytes())
        return digest.hexdigest()

    def state(self) -> list | None:
        """Bytes and time of each file, which stay until somebody writes to it. None where there is no file."""
        paths = [path for path in (self.files.rows, self.files.checksums, self.bad_path) if path.exists()]
        return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths] or None

    def fill(self) -> None:
        """Decode what is missing, together with other processes that do."""
        wait = False
        while missing := self.files.missing(self.chunks()):
            self._make_room()
            self._decode_all(missing, wait)
            wait = True  # for what others were decoding
        self.files.flush()

    def _make_room(self) -> None:
        rows, chunks = int(self.first_rows[-1]), int(self.first_chunks[-1])
        paths = [path for path in (self.files.rows, self.files.checksums) if path.exists()]
        needed = rows * self.files.row_bytes + 4 * chunks - sum(512 * path.stat().st_blocks for path in paths)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise WriteError(
                f"{self.folder} needs {needed / 2**30:.1f} GiB more for the decoded images, and {free / 2**30:.1f} GiB "
                f"are free ({os.strerror(errno.ENOSPC)}): choose another --save_dir, or a smaller --image_size"
            )
        self.files.make_room(chunks, rows)

    def _decode_all(self, missing: list[Chunk], wait: bool) -> None:
        """Decode chunks in as many processes as there are cores for this one."""
        ends = [0, *np.cumsum([chunk.end - chunk.start for chunk in missing]).tolist()]
        # Workers are forked, as torch's own data loaders are: a fresh process would have to import everything again.
        context = multiprocessing.get_context("fork")
        taken, failures, stopped = context.Value("q", 0), context.SimpleQueue(), []
        work = (self, [chunk.number for chunk in missing], taken, failures, wait, stopped)
        workers = [context.Process(target=_work, args=work, daemon=True) for _ in range(min(_cores(), len(missing)))]
        quiet = os.environ.get("RANK", "0") != "0"  # only torchrun's first process shows progress
        try:
            with _signals_wait(stopped):
                for worker in workers:
                    worker.start()
            with tqdm(total=ends[-1], desc="decoding images", unit="image", mininterval=1, disable=quiet) as bar:
                while running := [worker.sentinel for worker in workers if worker.exitcode is None]:
                    if any(worker.exitcode for worker in workers):
                        break
                    multiprocessing.connection.wait(running, timeout=0.5)
                    done = min(taken.value, len(missing)) - len(running)  # or a few more
                    bar.update(max(ends[max(done, 0)] - bar.n, 0))
                code = next((worker.exitcode for worker in workers if worker.exitcode), None)
                bar.update(ends[-1] - bar.n if code is None else 0)
            if code is not None:
                why = f"a process that decodes them ended with exit code {code}; is there enough memory?"
                kind, why = (OSError, why) if failures.empty() else failures.get()
                raise kind(f"cannot decode the images: {why}")
        finally:
            for worker in workers:
                if worker.pid is not None:  # it was started
                    worker.terminate()
                    worker.join()

    def decode(self, number: int) -> None:
        """Decode a chunk, if it is missing; the caller holds its lock."""
        while True:
            bad = self.bad()
            rows = [self.rows(split, list(bad)) for split in range(len(self.names))]
            chunk, files = self.chunk(number, rows)
            if not files or not self.files.missing([chunk]):
                return
            squares, found = np.empty((len(files), self.side, self.side, 3), np.uint8), []
            for row, (split, file) in zip(squares, files, strict=True):
                name = self.names[split][file]
                try:
                    row[:] = read_square(self.root / name, self.side, self.exact)
                except BadImage as error:
                    found.append({"split": split, "file": file, "name": name, "error": str(error)})
            if not found:
                self.files.write(chunk, squares)
                return
            lines = "".join("\n" + json.dumps(entry) for entry in found)  # a line that was cut off before ends here
            with writing(self.bad_path), open(self.bad_path, "ab", buffering=0) as log:
                log.write(lines.encode() + b"\n")
                os.fsync(log.fileno())

    @contextlib.contextmanager
    def lock(self, number: int, wait: bool) -> Iterator[bool]:
        """Whether this process alone has the chunk; the system frees the lock when the process dies."""
        with open(self.folder / "lock", "ab") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, number)
            except (BlockingIOError, PermissionError):
                yield False
            else:
                yield True


def _cores() -> int:
    """The number of cores that this process may run on; torchrun's processes on a machine share them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


@contextlib.contextmanager
def _signals_wait(came: list[int]) -> Iterator[None]:
    """A context that Ctrl-C and SIGTERM wait for: Python drops what a handler raises in a fork.

    Args:
        came: a list that gets the numbers of the signals that came.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread handles signals
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number in came:
        signal.raise_signal(number)


def _work(store: _Store, numbers: list[int], taken, failures, wait: bool, stopped: list[int]) -> None:
    """Decode chunks until none is left, the process that started this one is gone, or a signal came meanwhile."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process().pid
    try:
        while os.getppid() == parent and not stopped:
            with taken.get_lock():
                place = taken.value
                taken.value += 1
            if place >= len(numbers):
                return
            with store.lock(numbers[place], wait) as mine:
                if mine:
                    store.decode(numbers[place])
    except WriteError as error:
        failures.put((WriteError, str(error)))
        sys.exit(1)
    except Exception as error:
        failures.put((OSError, " ".join(f"{type(error).__name__}: {error}".split())))
        sys.exit(1)
