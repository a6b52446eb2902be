"""Rows of one shape in a file, in chunks with a checksum each in a file beside them.

A chunk is written in one piece, by whom and in whatever order: only one that is on disk whole matches its checksum.
"""

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from errors import writing


class Chunk(NamedTuple):
    """Rows ``start`` to ``end`` of the file, and the place of their checksum in the other.

    ``about`` is where the checksum begins: a hash of what else has to be as it was, beside the rows.
    """

    number: int
    start: int
    end: int
    about: int = 0


class ChunkFile:
    """A file of rows and one of CRC-32s.

    Args:
        rows: path of the rows.
        checksums: path of the checksums, a uint32 per chunk.
        dtype: of the rows.
        shape: of one row.
    """

    def __init__(self, rows: Path, checksums: Path, dtype: type, shape: tuple[int, ...]):
        self.rows, self.checksums, self.dtype, self.shape = rows, checksums, np.dtype(dtype), shape
        self.row_bytes = self.dtype.itemsize * int(np.prod(shape))

    def missing(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """Those that are not there whole."""
        try:
            known = np.fromfile(self.checksums, dtype=np.uint32)
            rows = np.memmap(self.rows, dtype=np.uint8, mode="r")
        except (FileNotFoundError, ValueError):  # not there yet, or empty
            return list(chunks)

        def whole(chunk: Chunk) -> bool:
            start, end = chunk.start * self.row_bytes, chunk.end * self.row_bytes
            if chunk.number >= len(known) or not known[chunk.number] or end > len(rows):
                return False  # what was never written is not read: it may be terabytes
            return _checksum(rows[start:end], chunk.about) == known[chunk.number]

        return [chunk for chunk in chunks if not whole(chunk)]

    def make_room(self, chunks: int, rows: int) -> None:
        """For so many chunks and rows; what is there stays.

        Raises:
            WriteError: the disk has no room for them.
        """
        for path, size in ((self.rows, self.row_bytes * rows), (self.checksums, 4 * chunks)):
            with writing(path), open(path, "ab") as file:
                if file.tell() < size:
                    # Reserved, not only named: a full disk is an error here, and a crash when met in a mapped page.
                    getattr(os, "posix_fallocate", _truncate)(file.fileno(), 0, size)

    def write(self, chunk: Chunk, rows: np.ndarray) -> None:
        """The rows of a chunk and its checksum; there is room for them."""
        data = np.ascontiguousarray(rows, self.dtype)
        for path, start, written in (
            (self.rows, chunk.start * self.row_bytes, data),
            (self.checksums, 4 * chunk.number, np.array([_checksum(data, chunk.about)])),
        ):
            with writing(path), open(path, "r+b", buffering=0) as file:
                file.seek(start)
                view = memoryview(written).cast("B")
                while view:
                    view = view[file.write(view) :]

    def flush(self) -> None:
        """Until what was written is on the disk."""
        for path in (self.rows, self.checksums):
            with writing(path), open(path, "rb") as file:
                os.fsync(file.fileno())

    def map(self, start: int, end: int) -> Tensor:
        """Rows ``start`` to ``end``, mapped into memory."""
        # Mapped copy-on-write: torch has no read-only tensors, and nobody writes to it.
        rows = np.memmap(self.rows, dtype=self.dtype, mode="c", shape=(end, *self.shape))
        return torch.from_numpy(rows)[start:]


def _checksum(rows: np.ndarray, about: int) -> np.uint32:
    # Zero stands for a chunk that is not there.
    return np.uint32(zlib.crc32(rows, about) or 1)


def _truncate(descriptor: int, _offset: int, size: int) -> None:
    os.truncate(descriptor, size)  # macOS has no posix_fallocate
