"""Files of embeddings, written row by row: .npz, .csv and .parquet."""

import contextlib
import csv
import importlib.util
import io
import itertools
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from errors import InputError
from helper import checkpoint

# Paths, or rows of a table, that are written at a time.
_AT_ONCE = 4096


class Csv:
    """A line for each picture: its path, then its embedding's numbers, e0 and so on, exact in float32."""

    def __init__(self, file: BinaryIO):
        # The names' own bytes, though they be no UTF-8.
        self.text = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="", write_through=True)
        self.writer = csv.writer(self.text, lineterminator="\n")
        self.begun = False

    def add(self, paths: list[str], embeddings: np.ndarray) -> None:
        """Add rows: the paths and the embeddings (B, D) float32."""
        if not self.begun:
            self.writer.writerow(["path", *(f"e{column}" for column in range(embeddings.shape[1]))])
            self.begun = True
        self.writer.writerows([path, *map("{:.9g}".format, row)] for path, row in zip(paths, embeddings, strict=True))

    def close(self) -> None:
        self.text.detach()


class Npz:
    """An archive of NumPy's: ``paths`` (N,), of strings, and ``embeddings`` (N, D) float32.

    The number of rows and the longest path are known at the end alone. Both arrays therefore wait in files beside it.
    """

    def __init__(self, file: BinaryIO):
        self.file, self.rows, self.longest, self.width = file, 0, 1, 0
        folder = Path(file.name).parent
        self.paths, self.embeddings = (tempfile.TemporaryFile(dir=folder) for _ in range(2))  # noqa: SIM115

    def add(self, paths: list[str], embeddings: np.ndarray) -> None:
        """See ``Csv``."""
        self.rows, self.width = self.rows + len(paths), embeddings.shape[1]
        self.longest = max(self.longest, *map(len, paths))
        self.paths.write("".join(f"{path}\0" for path in paths).encode(errors="surrogatepass"))
        self.embeddings.write(np.ascontiguousarray(embeddings, "<f4"))

    def close(self) -> None:
        with self.paths, self.embeddings, zipfile.ZipFile(self.file, "w") as archive:
            with _array(archive, "paths", f"<U{self.longest}", (self.rows,)) as array:
                paths = _read_paths(self.paths)
                while block := list(itertools.islice(paths, _AT_ONCE)):
                    array.write(np.array(block, f"<U{self.longest}"))
            with _array(archive, "embeddings", "<f4", (self.rows, self.width)) as array:
                self.embeddings.seek(0)
                shutil.copyfileobj(self.embeddings, array, 1 << 20)


def _array(archive: zipfile.ZipFile, name: str, dtype: str, shape: tuple[int, ...]) -> BinaryIO:
    """Begin an array in an archive of NumPy's; its content is written next."""
    file = archive.open(f"{name}.npy", "w", force_zip64=True)
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file


def _read_paths(file: BinaryIO) -> Iterator[str]:
    """Paths that end in a zero byte each, as no path holds one."""
    file.seek(0)
    rest = b""
    while block := file.read(1 << 20):
        *whole, rest = (rest + block).split(b"\0")
        for path in whole:
            yield path.decode(errors="surrogatepass")


class Parquet:
    """A table of two columns: ``path``, and ``embedding``, a list of D float32."""

    def __init__(self, file: BinaryIO):
        self.file, self.writer = file, None
        self.paths: list[str] = []
        self.embeddings: list[np.ndarray] = []

    def add(self, paths: list[str], embeddings: np.ndarray) -> None:
        """See ``Csv``; bytes of a path that are no UTF-8 are written as escapes."""
        self.paths += [path.encode(errors="surrogateescape").decode(errors="backslashreplace") for path in paths]
        self.embeddings.append(embeddings)
        if len(self.paths) >= _AT_ONCE:
            self._write()

    def _write(self) -> None:
        import pyarrow
        import pyarrow.parquet

        rows = np.concatenate(self.embeddings).astype(np.float32)
        lists = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(rows.reshape(-1)), rows.shape[1])
        table = pyarrow.table({"path": self.paths, "embedding": lists})
        if self.writer is None:
            self.writer = pyarrow.parquet.ParquetWriter(self.file, table.schema)
        self.writer.write_table(table)
        self.paths, self.embeddings = [], []

    def close(self) -> None:
        if self.paths:
            self._write()
        self.writer.close()


def check_table(path: Path, force: bool) -> None:
    """Raise an InputError where a file of embeddings cannot be made, or would be overwritten without ``force``."""
    if path.exists() and not force:
        raise InputError(f"{path} is there already: use --force to overwrite it, or another --out")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise InputError(f"--out {path}: no file can be made there, as {path.absolute().parent} is no folder")
    if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise InputError(f"--out {path} needs pyarrow, which is not installed: pip install pyarrow, or write .npz")


@contextlib.contextmanager
def open_table(path: Path) -> Iterator[Csv | Npz | Parquet]:
    """A file of embeddings to add rows to: .npz, .csv or .parquet. At the end of the block it is whole.

    Raises:
        WriteError: the file cannot be written; it keeps its old content.
    """
    with checkpoint.replacing(path) as file:
        table = {".npz": Npz, ".csv": Csv, ".parquet": Parquet}[path.suffix](file)
        yield table
        table.close()
