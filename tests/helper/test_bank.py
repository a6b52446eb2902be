import contextlib
import json
import multiprocessing
import os
import shutil
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import noise_dataset, snapshot
from dataset import ImageDataset, Split
from dataset.loader import Loader
from dataset.views import CLIP_NORMALIZATION, CropViews, ResizedCropViews, crop_resize_flip, normalize, view_order
from helper import bank as bank_module
from helper.bank import CHUNK, EmbeddingBank, OnTheFly, open_bank
from models.clip_teacher import ImageEncoder
from models.encoders import FrozenEncoder

CPU = torch.device("cpu")
NUM_VIEWS, TEST_VIEW = 162, 80
FORK = multiprocessing.get_context("fork")
FILES = ["embeddings.fp16", "crc32.u32", "bank.json"]


class Encoder(FrozenEncoder):
    """A random projection of the pixels in a frozen encoder's place; counts what it encodes.

    Args:
        die_after: raises once it has encoded so many chunks.
        gain: of every embedding.
    """

    name, sha256, resolution, dim = "linear", "0" * 64, 16, 6
    normalization = CLIP_NORMALIZATION

    def __init__(self, die_after: int | None = None, gain: float = 1.0):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(3 * self.resolution**2, self.dim, generator=generator) * gain / 10
        self.die_after = die_after
        self.sizes: list[int] = []

    def forward(self, image: Tensor) -> Tensor:
        if len(self.sizes) == self.die_after:
            raise KeyboardInterrupt
        self.sizes.append(len(image))
        return image.flatten(1) @ self.weight


@pytest.fixture(scope="module")
def dataset():
    return noise_dataset()


def build(root: Path, dataset, encoder=None, num_views: int = 1, precision: str = "fp32") -> EmbeddingBank:
    return open_bank(root, dataset, encoder or Encoder(), num_views, precision, CPU)


def folder_of(root: Path) -> Path:
    (folder,) = root.iterdir()
    return folder


def content(root: Path) -> dict[str, bytes]:
    return {name: (folder_of(root) / name).read_bytes() for name in FILES}


@pytest.mark.parametrize("num_views", [1, 4])
def test_look_ups_equal_direct_encoding(tmp_path, dataset, num_views):
    bank, encoder = build(tmp_path, dataset, num_views=num_views), Encoder()
    index = torch.randperm(300, generator=torch.Generator().manual_seed(0))[:90]
    order = torch.from_numpy(view_order(index.numpy(), num_views)).long()
    for j in range(num_views):
        pixels = crop_resize_flip(dataset.train.images[index], order[:, j], 16)
        found = bank("train", index, order[:, j])
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, encoder(normalize(pixels, CLIP_NORMALIZATION)), rtol=2**-10, atol=1e-4)
    index, view = torch.tensor([69, 0, 33, 33]), torch.full((4,), TEST_VIEW)
    expected = encoder(normalize(crop_resize_flip(dataset.test.images[index], view, 16), CLIP_NORMALIZATION))
    torch.testing.assert_close(bank("test", index, view), expected, rtol=2**-10, atol=1e-4)


def test_it_equals_encoding_on_the_fly_with_a_clip_up_to_fp16(tmp_path, dataset, tiny_clip):
    encoder = ImageEncoder(str(tiny_clip), "unused")
    bank, fly = build(tmp_path, dataset, encoder, num_views=2), OnTheFly(dataset, encoder, CPU)
    loader = Loader(dataset.train, "train", 64, CPU, training=True, teacher_views=2)
    for batch in loader.epoch(1):
        expected = fly("train", batch.index, batch.teacher_view)
        found = bank("train", batch.index, batch.teacher_view)
        torch.testing.assert_close(found, expected, rtol=2**-10, atol=1e-5)
    batch = next(Loader(dataset.test, "test", 70, CPU).epoch())
    expected = fly("test", batch.index, batch.teacher_view)
    torch.testing.assert_close(bank("test", batch.index, batch.teacher_view), expected, rtol=2**-10, atol=1e-5)


@pytest.fixture(scope="module")
def few() -> ImageDataset:
    whole = noise_dataset()
    train, test = (Split(split.images[:20], split.targets[:20]) for split in (whole.train, whole.test))
    return ImageDataset("few", whole.classes, train, test)


@pytest.fixture(scope="module")
def all_views(tmp_path_factory, few) -> EmbeddingBank:
    return build(tmp_path_factory.mktemp("bank"), few, num_views=NUM_VIEWS)


def test_a_whole_bank_has_all_views_of_all_images(all_views, few):
    index, view = torch.arange(20).repeat_interleave(NUM_VIEWS), torch.arange(NUM_VIEWS).repeat(20)
    expected = OnTheFly(few, Encoder(), CPU)("train", index, view)
    torch.testing.assert_close(all_views("train", index, view), expected, rtol=2**-10, atol=1e-4)


@pytest.mark.parametrize(("num_views", "shared"), [(1, False), (3, False), (NUM_VIEWS, False), (NUM_VIEWS, True)])
def test_every_view_that_a_loader_draws_is_found(tmp_path, few, all_views, num_views, shared):
    bank = all_views if num_views == NUM_VIEWS else build(tmp_path, few, num_views=num_views)
    fly = OnTheFly(few, Encoder(), CPU)
    loader = Loader(few.train, "train", 20, CPU, training=True, teacher_views=num_views, shared=shared)
    for epoch in range(1, 6):
        batch = next(loader.epoch(epoch))
        expected = fly("train", batch.index, batch.teacher_view)
        torch.testing.assert_close(bank("train", batch.index, batch.teacher_view), expected, rtol=2**-10, atol=1e-4)
    if num_views > 1:  # and a wrong view would be seen
        assert not torch.allclose(fly("train", batch.index, torch.full((20,), TEST_VIEW)), expected, rtol=0.1)


def sized(size: int, views) -> ImageDataset:
    """Ten training and four test images of noise."""

    def split(count: int) -> Split:
        images = np.random.default_rng(count).integers(0, 256, (count, 3, size, size), dtype=np.uint8)
        return Split(torch.from_numpy(images), torch.arange(count) % 2)

    return ImageDataset("sized", ["a", "b"], split(10), split(4), views=views)


@pytest.mark.parametrize(
    ("size", "views", "num_views"),
    [(64, CropViews(64), 300), (37, ResizedCropViews(32), 300)],
)
def test_banks_of_other_views_hold_every_view_that_a_loader_draws(tmp_path, size, views, num_views):
    made, encoder = sized(size, views), Encoder()
    bank, fly = build(tmp_path, made, encoder, num_views), OnTheFly(made, encoder, CPU)
    loader = Loader(made.train, "train", 10, CPU, training=True, teacher_views=num_views, views=views)
    seen = set()
    for epoch in range(1, 31):
        (batch,) = loader.epoch(epoch)
        expected = fly("train", batch.index, batch.teacher_view)
        torch.testing.assert_close(bank("train", batch.index, batch.teacher_view), expected, rtol=2**-10, atol=1e-4)
        seen |= set(bank.order[batch.index].long().eq(batch.teacher_view[:, None]).nonzero()[:, 1].tolist())
    assert max(seen) > 255
    batch = next(Loader(made.test, "test", 4, CPU, views=views).epoch())
    expected = fly("test", batch.index, batch.teacher_view)
    torch.testing.assert_close(bank("test", batch.index, batch.teacher_view), expected, rtol=2**-10, atol=1e-4)


def test_banks_of_photographs_grow_and_are_told_apart_by_what_a_student_sees(tmp_path):
    first, second = Encoder(), Encoder()
    build(tmp_path, sized(37, ResizedCropViews(32)), first, 2)
    build(tmp_path, sized(37, ResizedCropViews(32)), second, 5)
    assert (sum(first.sizes), sum(second.sizes)) == (4 + 20, 30)
    build(tmp_path, sized(37, ResizedCropViews(31)), num_views=2)
    build(tmp_path, sized(37, CropViews(37)), num_views=2)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_larger_bank_begins_with_the_smaller_and_encodes_the_rest_only(tmp_path, dataset):
    first, second, fresh = Encoder(), Encoder(), Encoder()
    build(tmp_path / "grown", dataset, first, 1)
    small = content(tmp_path / "grown")
    build(tmp_path / "grown", dataset, second, 4)
    large = content(tmp_path / "grown")
    assert (sum(first.sizes), sum(second.sizes)) == (70 + 300, 3 * 300)
    assert large["embeddings.fp16"].startswith(small["embeddings.fp16"])
    assert large["crc32.u32"].startswith(small["crc32.u32"])
    assert len(large["embeddings.fp16"]) == 2 * 6 * (70 + 4 * 300)
    build(tmp_path / "at_once", dataset, fresh, 4)
    assert content(tmp_path / "at_once") == large


def test_a_bank_that_is_there_is_not_built_again_nor_written_to(tmp_path, dataset):
    build(tmp_path, dataset, num_views=3)
    before, times = snapshot(tmp_path), {p: p.stat().st_mtime_ns for p in folder_of(tmp_path).iterdir()}
    for num_views in (3, 1, 2):
        again = Encoder()
        build(tmp_path, dataset, again, num_views)
        assert again.sizes == []
    assert snapshot(tmp_path) == before
    assert {p: p.stat().st_mtime_ns for p in folder_of(tmp_path).iterdir()} == times


def test_borders_between_chunks_depend_on_row_numbers_alone(tmp_path, dataset):
    encoder = Encoder()
    build(tmp_path, dataset, encoder, 2)
    assert CHUNK == 128
    assert encoder.sizes == [70, 128, 128, 44, 128, 128, 44]


class Neighbours(Encoder):
    """An embedding depends on all images that are encoded at once, as its last bits may on a GPU."""

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image) + image.mean()


def test_several_chunks_at_once_have_the_same_bits_whichever_of_them_is_missing(tmp_path, dataset, monkeypatch):
    """As on a GPU; a launch begins and ends with a view."""
    alone, whole = Neighbours(), Neighbours()
    build(tmp_path / "alone", dataset, alone, 2)
    monkeypatch.setitem(bank_module.LAUNCH, "cpu", 2)
    build(tmp_path / "whole", dataset, whole, 2)
    assert whole.sizes == [70, 256, 44, 256, 44]
    assert content(tmp_path / "alone")["bank.json"] == content(tmp_path / "whole")["bank.json"]
    assert content(tmp_path / "alone") != content(tmp_path / "whole")
    before = content(tmp_path / "whole")
    with (folder_of(tmp_path / "whole") / "embeddings.fp16").open("r+b") as file:
        file.seek(2 * 6 * (70 + 128))  # in the second chunk of the first view
        file.write(b"damaged")
    again = Neighbours()
    build(tmp_path / "whole", dataset, again, 2)
    assert again.sizes == [256]
    assert content(tmp_path / "whole") == before


@pytest.mark.parametrize("die_after", [0, 1, 3, 6])
def test_an_interrupted_build_is_finished_bit_for_bit(tmp_path, dataset, die_after):
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "killed", dataset, Encoder(die_after), 2)
    rest = Encoder()
    build(tmp_path / "killed", dataset, rest, 2)
    assert len(rest.sizes) == 7 - die_after
    build(tmp_path / "whole", dataset, num_views=2)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


class SlowEncoder(Encoder):
    """Waits before each chunk, and adds a byte for it to a file, whoever encodes it."""

    def __init__(self, count: Path, pause: float):
        super().__init__()
        self.count, self.pause = count, pause

    def forward(self, image: Tensor) -> Tensor:
        with self.count.open("ab") as file:
            file.write(b".")
        time.sleep(self.pause)
        return super().forward(image)


def slow_build(root: Path, dataset: ImageDataset, count: Path, pause: float, start: Barrier, said: Path) -> None:
    """What a process of its own does."""
    with said.open("w") as file, contextlib.redirect_stdout(file):
        start.wait()
        build(root, dataset, SlowEncoder(count, pause), 2)


def start_slow_build(*args) -> BaseProcess:
    process = FORK.Process(target=slow_build, args=args)
    process.start()
    return process


def test_a_killed_build_is_finished_bit_for_bit(tmp_path, dataset):
    count = tmp_path / "count"
    process = start_slow_build(tmp_path / "killed", dataset, count, 0.3, FORK.Barrier(1), tmp_path / "said")
    while not (count.exists() and count.stat().st_size >= 3):
        assert process.is_alive(), "it ended early"
        time.sleep(0.01)
    process.kill()
    process.join()
    rest = Encoder()
    build(tmp_path / "killed", dataset, rest, 2)
    assert 0 < len(rest.sizes) <= 5
    build(tmp_path / "whole", dataset, num_views=2)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_two_processes_build_it_once(tmp_path, dataset):
    count, root, start = tmp_path / "count", tmp_path / "bank", FORK.Barrier(2)
    processes = [start_slow_build(root, dataset, count, 0.1, start, tmp_path / name) for name in "ab"]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert count.stat().st_size == 7  # chunks: each encoded once
    assert sum("waiting for it" in (tmp_path / name).read_text() for name in "ab") == 1
    again = Encoder()
    build(root, dataset, again, 2)
    assert again.sizes == []


@pytest.mark.parametrize(
    ("name", "damage", "chunks"),
    [
        ("embeddings.fp16", lambda b: b[:-1], 1),
        ("embeddings.fp16", lambda b: b[: 2 * 6 * 200], 2),
        ("embeddings.fp16", lambda b: b"", 4),
        ("embeddings.fp16", lambda b: b[:1000] + bytes([b[1000] ^ 4]) + b[1001:], 1),
        ("crc32.u32", lambda b: b[:-4], 1),
        ("crc32.u32", lambda b: b[:-1], 1),
        ("crc32.u32", lambda b: b"", 4),
        ("crc32.u32", lambda b: b[:5] + bytes([b[5] ^ 1]) + b[6:], 1),
        ("embeddings.fp16", None, 4),
        ("crc32.u32", None, 4),
    ],
)
def test_what_is_truncated_changed_or_gone_is_encoded_again(tmp_path, dataset, name, damage, chunks):
    build(tmp_path, dataset)
    whole = content(tmp_path)
    path = folder_of(tmp_path) / name
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(whole[name]))
    again = Encoder()
    build(tmp_path, dataset, again)
    assert len(again.sizes) == chunks
    assert content(tmp_path) == whole


def test_room_that_was_made_but_not_filled_is_no_embedding(tmp_path, dataset):
    """As a build leaves it that was killed before its first chunk: zeros, whose checksum is zero too."""
    build(tmp_path, dataset)
    whole = content(tmp_path)
    for name in FILES[:2]:
        (folder_of(tmp_path) / name).write_bytes(bytes(len(whole[name])))
    again = Encoder()
    build(tmp_path, dataset, again)
    assert len(again.sizes) == 4
    assert content(tmp_path) == whole


@pytest.mark.parametrize("found", ['{"dataset": "noise"}', "{", "", "[]"])
def test_a_foreign_description_is_refused_and_kept(tmp_path, dataset, found):
    build(tmp_path, dataset)
    (folder_of(tmp_path) / "bank.json").write_text(found)
    before, encoder = snapshot(tmp_path), Encoder()
    with pytest.raises(ValueError, match="delete .* and run again|delete it and run again"):
        build(tmp_path, dataset, encoder)
    assert encoder.sizes == []
    assert snapshot(tmp_path) == before


def test_what_a_killed_description_left_is_removed(tmp_path, dataset):
    build(tmp_path, dataset)
    described = folder_of(tmp_path) / "bank.json"
    described.rename(described.with_name("bank.json.123.tmp"))
    encoder = Encoder()
    build(tmp_path, dataset, encoder)
    assert described.exists() and encoder.sizes == []
    assert not list(tmp_path.rglob("*.tmp"))


def test_what_it_depends_on_is_in_its_key(tmp_path, dataset):
    build(tmp_path, dataset)
    key = json.loads((folder_of(tmp_path) / "bank.json").read_text())
    assert key["clip_sha256"] == "0" * 64
    assert key["dataset_sha256"] == dataset.fingerprint()
    assert (key["resolution"], key["precision"], key["chunk"], key["dim"]) == (16, "fp32", 128, 6)
    assert key["normalization"] == [list(values) for values in CLIP_NORMALIZATION]

    other_weights, other_size = Encoder(), Encoder()
    other_weights.sha256 = "1" * 64
    other_size.resolution = 16
    other_data = noise_dataset()
    other_data.train.images[7, 0, 0, 0] ^= 1
    build(tmp_path, dataset, other_weights)
    build(tmp_path, dataset, precision="bf16")
    build(tmp_path, other_data)
    assert len(list(tmp_path.iterdir())) == 4
    build(tmp_path, dataset, other_size)
    assert len(list(tmp_path.iterdir())) == 4


def test_embeddings_that_fp16_cannot_hold_are_refused(tmp_path, dataset):
    with pytest.raises(ValueError, match="linear gives embeddings that are not finite in fp16"):
        build(tmp_path, dataset, Encoder(gain=1e5))
    again = Encoder()
    build(tmp_path, dataset, again)  # none of them was taken for an embedding
    assert len(again.sizes) == 4


def test_a_place_that_cannot_be_written_is_an_error_of_the_input(tmp_path, dataset):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        build(tmp_path / "file" / "bank", dataset)
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_an_error_of_the_input(tmp_path, dataset):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        build(tmp_path / "bank", dataset)


def test_a_bank_that_moved_is_used_where_it_is(tmp_path, dataset):
    build(tmp_path / "here", dataset, num_views=2)
    shutil.move(tmp_path / "here", tmp_path / "there")
    again = Encoder()
    bank = build(tmp_path / "there", dataset, again, 2)
    assert again.sizes == []
    rows = np.fromfile(folder_of(tmp_path / "there") / "embeddings.fp16", np.float16).reshape(-1, 6)
    # The file: the test split, then the training split in each image's first view, then in its second.
    assert np.array_equal(bank("test", torch.tensor([4]), torch.tensor([80])).numpy()[0], rows[4].astype(np.float32))
    view = torch.from_numpy(view_order(np.array([8]), 2).astype(np.int64))
    for j, row in enumerate((70 + 8, 70 + 300 + 8)):
        found = bank("train", torch.tensor([8]), view[:, j]).numpy()[0]
        assert np.array_equal(found, rows[row].astype(np.float32))
