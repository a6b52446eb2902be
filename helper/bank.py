"""The frozen teacher's embeddings of every view that training draws, computed once and kept on disk."""

import contextlib
import functools
import hashlib
import itertools
import json
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from dataset import ImageDataset
from dataset.augment import mixed
from dataset.chunks import Chunk, ChunkFile
from dataset.loader import on_device, read, take
from dataset.views import CIFAR_VIEWS, Views, normalize
from errors import InputError
from models.encoders import FrozenEncoder

from . import checkpoint, distributed

# Rows of a chunk, which is whole or missing. The size is part of the bank's key.
CHUNK = 128

# Chunks that are encoded at once: one is too little for a GPU. A row's last bits may depend on its neighbours, so the
# borders between launches depend on row numbers alone, and a launch with a missing chunk is encoded as a whole.
LAUNCH = {"cpu": 1, "cuda": 8}


def encode_view(
    encoder: FrozenEncoder, views: Views, images: Tensor, index: Tensor, view: Tensor, mix: Tensor | None = None
) -> Tensor:
    """The frozen encoder's embeddings (B, dim) of one view of each image (B, 3, H, W) uint8 of rows ``index`` (B,).

    Args:
        mix: the shares by which the views are mixed, see ``mixed``.
    """
    pixels = views.teacher(images, index, view, encoder.resolution, encoder.interpolation, encoder.antialias)
    image = normalize(pixels, encoder.normalization)
    return encoder(image if mix is None else mixed(image, mix))


class OnTheFly:
    """Encodes each view on demand, as the paper's release does."""

    def __init__(self, dataset: ImageDataset, encoder: FrozenEncoder, device: torch.device):
        self.encoder = encoder
        self.device = device
        self.views = dataset.views
        splits = {"train": dataset.train, "test": dataset.test}
        self.images = {name: on_device(split.images, device) for name, split in splits.items()}
        # Images that do not fit on the GPU stay on the host.
        self.lookup_device = self.images["train"].device

    def __call__(self, split: str, index: Tensor, view: Tensor, mix: Tensor | None = None) -> Tensor:
        """Embeddings (B, dim) float32 of the rows ``index`` (B,) of a split, seen in ``view`` (B,).

        Args:
            mix: see ``encode_view``.
        """
        stored = take(self.images[split], index, self.device)
        return encode_view(self.encoder, self.views, stored, index.to(self.device), view.to(self.device), mix)


class EmbeddingBank:
    """Looks embeddings up in a bank; it is called as ``OnTheFly`` is.

    The file begins with the test split's one view. The whole training split follows, once for each of the first N
    views. A bank of more views thus begins with every smaller one.
    """

    def __init__(
        self,
        rows: Tensor,
        num_train: int,
        num_test: int,
        num_views: int,
        device: torch.device,
        views: Views = CIFAR_VIEWS,
    ):
        self.rows = rows
        self.num_train = num_train
        self.num_test = num_test
        self.device = device
        # Look-ups are done here; rows that stay on the host are copied to the GPU from pinned memory.
        self.lookup_device = rows.device
        self.order = views.order(num_train, num_views, self.lookup_device) if num_views > 1 else None

    def __call__(self, split: str, index: Tensor, view: Tensor) -> Tensor:
        """Embeddings (B, dim) float32 of the rows ``index`` (B,) of a split, seen in ``view`` (B,).

        Give both on ``lookup_device``: nothing then waits for a GPU.
        """
        row, view = index.to(self.lookup_device), view.to(self.lookup_device)
        if split == "train":
            place = 0 if self.order is None else (self.order[row] == view[:, None]).int().argmax(dim=1)
            row = row + (self.num_test + place * self.num_train)
        found = self.rows[row]
        if found.device.type != self.device.type:  # "cuda" is not equal to "cuda:0"
            found = found.pin_memory().to(self.device, non_blocking=True)
        return found.float()


def open_bank(
    root: Path, dataset: ImageDataset, encoder: FrozenEncoder, num_views: int, precision: str, device: torch.device
) -> EmbeddingBank:
    """Open the bank of a teacher on a data set, first encoding what it lacks.

    Every chunk of the file has a checksum beside it. A chunk that was half written, cut off or changed does not
    match and is encoded again. Runs that want the same bank wait for one another; the processes of one run encode
    it together.

    Args:
        root: the folder of all banks.
        encoder: the frozen encoder, on ``device``; see ``models.encoders.FrozenEncoder``.
        num_views: views per training image.
        precision: the encoder's precision, part of the key.

    Raises:
        InputError: the folder holds another bank, or the encoder gives embeddings that fp16 cannot hold.
        OSError: the folder cannot be written.
    """
    key = {"clip": encoder.name, "dataset": dataset.name, "dataset_sha256": dataset.fingerprint()}
    key |= dataset.views.facts | encoder.facts | {"precision": precision, "chunk": CHUNK}
    # The encoder's name is for people: the same weights under another name or path share the bank.
    identity = {name: value for name, value in key.items() if name != "clip"}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    folder = root / f"{dataset.name}_{digest}"
    distributed.check_alike(identity)
    distributed.in_first(functools.partial(_describe, folder, identity, key))
    distributed.check_shared(folder, _short_lock(folder))
    first = distributed.rank() == 0
    chunks = chunks_of(dataset, num_views)
    files = ChunkFile(folder / "embeddings.fp16", folder / "crc32.u32", np.float16, (encoder.dim,))
    if distributed.from_first(first and files.missing(chunks)):
        lock = FileLock(folder / "lock")
        _acquire(lock, folder)
        try:
            missing = files.missing(chunks) if first else []
            if first and missing:  # another run may have built it meanwhile
                files.make_room(len(chunks), chunks[-1].end)
            missing = set(distributed.from_first(missing))
            launches = [launch for launch in launches_of(chunks, dataset, device) if not missing.isdisjoint(launch)]
            mine = launches[distributed.rank() :: distributed.count()]
            _build(files, mine, missing, dataset, encoder, num_views, device)
            distributed.wait()
            if any(distributed.collect(distributed.count() > 1 and bool(files.missing(chunks)))):
                distributed.refuse(
                    f"{folder} lost what several machines wrote into it: let one of them encode it first"
                )
        finally:
            lock.release()
    rows = files.map(0, chunks[-1].end)
    sizes = (len(dataset.train), len(dataset.test), num_views)
    return EmbeddingBank(_place(rows, device), *sizes, device, dataset.views)


def _acquire(lock: FileLock, folder: Path) -> None:
    """Take the lock in the first process, for all of them."""
    patience = 0.0
    while True:
        if distributed.rank() == 0:
            with checkpoint.writing(folder), contextlib.suppress(Timeout):
                lock.acquire(timeout=patience)
        if distributed.from_first(lock.is_locked):
            return
        if not patience:
            print(f"another run is encoding into {folder}: waiting for it", flush=True)
        patience = 60.0  # a minute at a time, so that the others' waiting for the first does not time out


def _short_lock(folder: Path) -> Path:
    """The lock for short work; another run may hold the other lock for as long as it encodes."""
    return folder / "shared.lock"


def _describe(folder: Path, identity: dict, key: dict) -> None:
    """Write what the bank depends on into bank.json; if the file exists, check that it says the same."""
    with checkpoint.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    described = folder / "bank.json"
    if not described.exists():
        with checkpoint.writing(folder), FileLock(_short_lock(folder)):
            for left in folder.glob("*.tmp"):  # left by a run that was killed while it wrote
                left.unlink()
            if not described.exists():
                checkpoint.write_json(key, described)
    try:
        found = json.loads(described.read_text())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{described} is corrupt: delete {folder} and run again") from error
    if not isinstance(found, dict) or {k: v for k, v in found.items() if k != "clip"} != identity:
        raise InputError(f"{folder} holds the bank of another teacher: delete it and run again")


def _place(rows: Tensor, device: torch.device) -> Tensor:
    """The rows on the GPU if they take less than half of its free memory, else as they are mapped from the file."""
    if device.type == "cuda" and rows.nbytes < torch.cuda.mem_get_info(device)[0] // 2:
        return rows.to(device)
    return rows


def chunks_of(dataset: ImageDataset, num_views: int) -> list[Chunk]:
    """All chunks of the file: the test split's, then those of each view of the training split."""
    chunks, start = [], 0
    for rows in [len(dataset.test)] + [len(dataset.train)] * num_views:
        end = start + rows
        chunks += [(row, min(row + CHUNK, end)) for row in range(start, end, CHUNK)]
        start = end
    return [Chunk(number, *rows) for number, rows in enumerate(chunks)]


def _place_of(chunk: Chunk, dataset: ImageDataset) -> tuple[int | None, int]:
    """The number of the view that a chunk shows, None for the test split, and its first row in its split."""
    num_test = len(dataset.test)
    return (None, chunk.start) if chunk.start < num_test else divmod(chunk.start - num_test, len(dataset.train))


def launches_of(chunks: list[Chunk], dataset: ImageDataset, device: torch.device) -> list[list[Chunk]]:
    """The chunks that are encoded at once."""

    def launch(chunk: Chunk) -> tuple:
        view, start = _place_of(chunk, dataset)
        return view, start // (CHUNK * LAUNCH[device.type])

    return [list(group) for _, group in itertools.groupby(chunks, launch)]


def encoded(
    launches: list[list[Chunk]], dataset: ImageDataset, encoder: FrozenEncoder, num_views: int, device: torch.device
) -> Iterator[tuple[list[Chunk], np.ndarray]]:
    """Each launch and its embeddings (rows, dim) in fp16; a GPU is given the next launch before one is waited for."""
    views = dataset.views
    train, test = (on_device(split.images, device) for split in (dataset.train, dataset.test))
    order = views.order(len(dataset.train), num_views, device)

    def begin(launch: list[Chunk]) -> tuple[Tensor, torch.cuda.Event | None]:
        number, start = _place_of(launch[0], dataset)
        stored = test if number is None else train
        part = slice(start, start + launch[-1].end - launch[0].start)
        index = torch.arange(part.start, part.stop, device=device)
        view = torch.full_like(index, views.test) if number is None else order[part, number].long()
        far = stored.device.type != device.type
        seen = read(stored, torch.arange(part.start, part.stop), device) if far else stored[part]
        embedding = encode_view(encoder, views, seen, index, view).half()
        if device.type == "cpu":
            return embedding, None
        done, copied = torch.empty(embedding.shape, dtype=torch.half, pin_memory=True), torch.cuda.Event()
        done.copy_(embedding, non_blocking=True)
        copied.record()
        return done, copied

    begun = deque()
    for launch in itertools.chain(launches, [None]):
        if launch is not None:
            begun.append((launch, *begin(launch)))
        while begun and (len(begun) > 1 or launch is None or device.type == "cpu"):
            before, embedding, copied = begun.popleft()
            if copied is not None:
                copied.synchronize()
            yield before, embedding.numpy()


def _build(
    files: ChunkFile,
    launches: list[list[Chunk]],
    missing: set[Chunk],
    dataset: ImageDataset,
    encoder: FrozenEncoder,
    num_views: int,
    device: torch.device,
) -> None:
    if not launches:
        return
    quiet = distributed.rank() > 0
    total = sum(chunk in missing for launch in launches for chunk in launch)
    shown = {"unit": "chunk", "smoothing": 0.05, "mininterval": 1, "disable": quiet}
    with tqdm(desc="teacher's embeddings", total=total, **shown) as bar:  # ends its line if it is interrupted
        for launch, embeddings in encoded(launches, dataset, encoder, num_views, device):
            if not np.isfinite(embeddings).all():
                raise InputError(f"the teacher {encoder.name} gives embeddings that are not finite in fp16")
            for chunk in launch:
                if chunk in missing:
                    files.write(chunk, embeddings[chunk.start - launch[0].start : chunk.end - launch[0].start])
                    bar.update()
    files.flush()
