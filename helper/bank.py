"""The frozen teacher's embeddings of every view that training draws, computed once and kept on disk."""

import contextlib
import hashlib
import json
import os
import zlib
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from dataset import ImageDataset, Split
from dataset.views import NUM_VIEWS, TEST_VIEW, crop_resize_flip, normalize, view_order
from models.encoders import FrozenEncoder

from . import checkpoint, distributed

# Images per encoding. A row's last bits may depend on its neighbours in the batch, so the borders between
# chunks depend on row numbers alone, and the size is part of the bank's key.
CHUNK = 128


def encode_view(encoder: FrozenEncoder, images: Tensor, view: Tensor) -> Tensor:
    """The frozen encoder's embeddings (B, dim) of one view of each image (B, 3, H, W) uint8."""
    pixels = crop_resize_flip(images, view, encoder.resolution, encoder.interpolation, encoder.antialias)
    return encoder(normalize(pixels, encoder.normalization))


class OnTheFly:
    """Encodes each view when it is asked for, as the paper's release does."""

    def __init__(self, dataset: ImageDataset, encoder: FrozenEncoder, device: torch.device):
        self.encoder = encoder
        self.images = {"train": dataset.train.images.to(device), "test": dataset.test.images.to(device)}

    def __call__(self, split: str, index: Tensor, view: Tensor) -> Tensor:
        """Embeddings (B, dim) float32 of the rows ``index`` (B,) of a split, seen in ``view`` (B,)."""
        return encode_view(self.encoder, self.images[split][index], view)


class EmbeddingBank:
    """Looks embeddings up in a bank; called as ``OnTheFly`` is.

    Row order in the file: the test split's one view, then for each of the N views of ``view_order`` the whole
    training split. A bank of more views thus begins with every smaller one.
    """

    def __init__(self, rows: Tensor, num_train: int, num_test: int, num_views: int, device: torch.device):
        self.rows = rows
        self.num_train = num_train
        self.num_test = num_test
        self.device = device
        # Where the looking up is done; rows that stay on the host are copied to the GPU from pinned memory.
        self.lookup_device = rows.device
        self.slot = None
        if num_views > 1:
            order = torch.from_numpy(view_order(np.arange(num_train), num_views)).long()
            slot = torch.zeros(num_train, NUM_VIEWS, dtype=torch.uint8)
            slot.scatter_(1, order, torch.arange(num_views, dtype=torch.uint8).expand(num_train, -1))
            self.slot = slot.to(self.lookup_device)

    def __call__(self, split: str, index: Tensor, view: Tensor) -> Tensor:
        """Embeddings (B, dim) float32 of the rows ``index`` (B,) of a split, seen in ``view`` (B,).

        Both are best given on ``lookup_device``: nothing then waits for a GPU.
        """
        row, view = index.to(self.lookup_device), view.to(self.lookup_device)
        if split == "train":
            slot = 0 if self.slot is None else self.slot[row, view].long()
            row = row + (self.num_test + slot * self.num_train)
        found = self.rows[row]
        if found.device != self.device:
            found = found.pin_memory().to(self.device, non_blocking=True)
        return found.float()


def open_bank(
    root: Path, dataset: ImageDataset, encoder: FrozenEncoder, num_views: int, precision: str, device: torch.device
) -> EmbeddingBank:
    """Open the bank of a teacher on a data set, first encoding what it lacks.

    Every chunk of the file has a checksum beside it: one that was half written, cut off or changed does not
    match and is encoded again. Runs that want the same bank wait for one another; the processes of one run encode
    it together.

    Args:
        root: the folder of all banks.
        encoder: the frozen encoder, on ``device``; see ``models.encoders.FrozenEncoder``.
        num_views: views per training image, 1 to 162.
        precision: the encoder's, part of the key.

    Raises:
        ValueError: the folder holds another bank, or the encoder gives embeddings that fp16 cannot hold.
        OSError: the folder cannot be written.
    """
    key = {"clip": encoder.name, "dataset": dataset.name, "dataset_sha256": dataset.fingerprint()}
    key |= encoder.facts | {"precision": precision, "chunk": CHUNK}
    # The CLIP's name is for people: the same weights under another name or path share the bank.
    identity = {name: value for name, value in key.items() if name != "clip"}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    folder = root / f"{dataset.name}_{digest}"
    first = distributed.rank() == 0
    if first:
        with checkpoint.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        _describe(folder, identity, key)
    chunks = _chunks(dataset, num_views)
    files = _BankFiles(folder, encoder.dim)
    if distributed.from_first(first and files.missing(chunks)):
        lock = FileLock(folder / "lock")
        _acquire(lock, folder)
        try:
            missing = files.missing(chunks) if first else []
            if first and missing:  # another run may have built it meanwhile
                files.make_room(len(chunks), chunks[-1][2])
            mine = distributed.from_first(missing)[distributed.rank() :: distributed.count()]
            _build(files, mine, dataset, encoder, num_views, device)
            distributed.wait()
        finally:
            lock.release()
    rows = files.map(chunks[-1][2])
    return EmbeddingBank(_place(rows, device), len(dataset.train), len(dataset.test), num_views, device)


def _acquire(lock: FileLock, folder: Path) -> None:
    """Lock for all processes, in the first of them."""
    patience = 0.0
    while True:
        if distributed.rank() == 0:
            with checkpoint.writing(folder), contextlib.suppress(Timeout):
                lock.acquire(timeout=patience)
        if distributed.from_first(lock.is_locked):
            return
        if not patience:
            print(f"another run is encoding into {folder}: waiting for it", flush=True)
        patience = 60.0  # in turns, so that the others' waiting for the first does not time out


def _describe(folder: Path, identity: dict, key: dict) -> None:
    """Write what the bank depends on into bank.json; where it is there, check that it is the same."""
    described = folder / "bank.json"
    if not described.exists():
        checkpoint.write_json(key, described)
    try:
        found = json.loads(described.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{described} is corrupt: delete {folder} and run again") from error
    if not isinstance(found, dict) or {k: v for k, v in found.items() if k != "clip"} != identity:
        raise ValueError(f"{folder} holds the bank of another teacher: delete it and run again")


def _place(rows: Tensor, device: torch.device) -> Tensor:
    """On the GPU when it takes less than half of its free memory, else mapped from the file into the host's."""
    if device.type == "cuda" and rows.nbytes < torch.cuda.mem_get_info(device)[0] // 2:
        return rows.to(device)
    return rows


def _chunks(dataset: ImageDataset, num_views: int) -> list[tuple[int, int, int]]:
    """(section, first row, end row) in the file of every chunk; section 0 is the test split, j the view j - 1."""
    chunks, start = [], 0
    for section in range(num_views + 1):
        end = start + len(dataset.test if section == 0 else dataset.train)
        chunks += [(section, row, min(row + CHUNK, end)) for row in range(start, end, CHUNK)]
        start = end
    return chunks


class _BankFiles:
    """embeddings.fp16, the rows; crc32.u32, a checksum per chunk."""

    def __init__(self, folder: Path, dim: int):
        self.dim = dim
        self._rows, self._checksums = folder / "embeddings.fp16", folder / "crc32.u32"

    def writing(self) -> contextlib.AbstractContextManager:
        """What fails in it raises a WriteError."""
        return checkpoint.writing(self._rows)

    def missing(self, chunks: list[tuple[int, int, int]]) -> list[int]:
        """Numbers of the chunks that are not there whole."""
        try:
            checksums = np.fromfile(self._checksums, dtype=np.uint32)
            row_bytes = 2 * self.dim
            rows = np.memmap(self._rows, dtype=np.uint8, mode="r")
        except (FileNotFoundError, ValueError):  # not there yet, or empty
            return list(range(len(chunks)))
        return [
            number
            for number, (_, start, end) in enumerate(chunks)
            if number >= len(checksums)
            or end * row_bytes > len(rows)
            or zlib.crc32(rows[start * row_bytes : end * row_bytes]) != checksums[number]
        ]

    def make_room(self, chunks: int, rows: int) -> None:
        """For so many chunks and rows; what is there stays."""
        for path, size in ((self._rows, 2 * self.dim * rows), (self._checksums, 4 * chunks)):
            with checkpoint.writing(path), open(path, "ab") as file:
                if file.tell() < size:
                    # Reserved, not only named: a full disk is an error here, and a crash when met in a mapped page.
                    getattr(os, "posix_fallocate", _truncate)(file.fileno(), 0, size)

    def map_to_write(self, chunks: int, rows: int) -> tuple[np.memmap, np.memmap]:
        """Rows (rows, dim) fp16 and checksums (chunks,), mapped for writing; there is room for them."""
        with self.writing():
            return (
                np.memmap(self._rows, dtype=np.float16, mode="r+", shape=(rows, self.dim)),
                np.memmap(self._checksums, dtype=np.uint32, mode="r+", shape=(chunks,)),
            )

    def map(self, rows: int) -> Tensor:
        """The first ``rows`` rows, (rows, dim) fp16, mapped into memory."""
        # Mapped copy-on-write: torch has no read-only tensors, and nobody writes to it.
        return torch.from_numpy(np.memmap(self._rows, dtype=np.float16, mode="c", shape=(rows, self.dim)))


def _truncate(descriptor: int, _offset: int, size: int) -> None:
    os.truncate(descriptor, size)  # macOS has no posix_fallocate


def _build(
    files: _BankFiles,
    missing: list[int],
    dataset: ImageDataset,
    encoder: FrozenEncoder,
    num_views: int,
    device: torch.device,
) -> None:
    if not missing:
        return
    chunks = _chunks(dataset, num_views)
    rows, checksums = files.map_to_write(len(chunks), chunks[-1][2])
    order = view_order(np.arange(len(dataset.train)), num_views)
    quiet = distributed.rank() > 0
    shown = {"unit": "chunk", "smoothing": 0.05, "mininterval": 1, "disable": quiet}
    with tqdm(missing, "teacher's embeddings", **shown) as numbers:  # whose line ends where it is interrupted
        for number in numbers:
            section, start, end = chunks[number]
            split: Split = dataset.test if section == 0 else dataset.train
            offset = 0 if section == 0 else len(dataset.test) + (section - 1) * len(dataset.train)
            inside = slice(start - offset, end - offset)
            view = np.full(end - start, TEST_VIEW) if section == 0 else order[inside, section - 1]
            embedding = encode_view(
                encoder, split.images[inside].to(device), torch.from_numpy(view.astype(np.int64)).to(device)
            )
            encoded = embedding.half().cpu().numpy()
            if not np.isfinite(encoded).all():
                raise ValueError(f"the teacher {encoder.name} gives embeddings that are not finite in fp16")
            # In any order: only a chunk that is on disk whole matches its checksum.
            rows[start:end] = encoded
            checksums[number] = zlib.crc32(encoded.tobytes())
    with files.writing():
        rows.flush()
        checksums.flush()
