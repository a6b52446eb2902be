"""Rows of one shape in a file, in chunks; a second file has a checksum for each chunk.

Any process may write a chunk, in any order: only a chunk that is whole on disk matches its checksum.
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
    """Rows ``start`` to ``end`` of the file; ``number`` is the place of their checksum in the other.

    ``about`` is the checksum's start value: a hash of other things that must not change, beside the rows.
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
        dtype: the rows' type.
        shape: the shape of one row.
    """

    def __init__(self, rows: Path, checksums: Path, dtype: type, shape: tuple[int, ...]):
        self.rows, self.checksums, self.dtype, self.shape = rows, checksums, np.dtype(dtype), shape
        self.row_bytes = self.dtype.itemsize * int(np.prod(shape))

    def missing(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """The chunks that are not whole."""
        try:
            known = np.fromfile(self.checksums, dtype=np.uint32)
            rows = np.memmap(self.rows, dtype=np.uint8, mode="r")
        except (FileNotFoundError, ValueError):  # not there yet, or empty
            return list(chunks)

        def whole(chunk: Chunk) -> bool:
            start, end = chunk.start * self.row_bytes, chunk.end * self.row_bytes
            if chunk.number >= len(known) or not known[chunk.number] or end > len(rows):
                return False  # parts that were never written are not read: they may be terabytes
            return _checksum(rows[start:end], chunk.about) == known[chunk.number]

        return [chunk for chunk in chunks if not whole(chunk)]

    def make_room(self, chunks: int, rows: int) -> None:
        """Make room for so many chunks and rows; what is there stays.

        Raises:
            WriteError: the disk has no room for them.
        """
        for path, size in ((self.rows, self.row_bytes * rows), (self.checksums, 4 * chunks)):
            with writing(path), open(path, "ab") as file:
                if file.tell() < size:
                    # The room is reserved: a full disk is an error here, but would be a crash in a mapped page.
                    getattr(os, "posix_fallocate", _truncate)(file.fileno(), 0, size)

    def write(self, chunk: Chunk, rows: np.ndarray) -> None:
        """Write the rows of a chunk and its checksum; ``make_room`` has made room for them."""
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
        """Wait until what was written is on the disk."""
        for path in (self.rows, self.checksums):
            with writing(path), open(path, "rb") as file:
                os.fsync(file.fileno())

    def map(self, start: int, end: int) -> Tensor:
        """Rows ``start`` to ``end``, mapped into memory."""
        # The mapping is copy-on-write, as torch has no read-only tensors; nobody writes to it.
        rows = np.memmap(self.rows, dtype=self.dtype, mode="c", shape=(end, *self.shape))
        return torch.from_numpy(rows)[start:]


def _checksum(rows: np.ndarray, about: int) -> np.uint32:
    # A checksum of zero means that the chunk is not there.
    return np.uint32(zlib.crc32(rows, about) or 1)


def _truncate(descriptor: int, _offset: int, size: int) -> None:
    os.truncate(descriptor, size)  # macOS has no posix_fallocate
