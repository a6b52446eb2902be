import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dataset.files
from conftest import snapshot
from dataset.decode import read_square
from dataset.files import open_images
from dataset.listing import list_images
from errors import WriteError

SIDE = 8


@pytest.fixture(autouse=True)
def four_to_a_chunk(monkeypatch):
    monkeypatch.setattr(dataset.files, "CHUNK", 4)


@pytest.fixture
def root(tmp_path) -> Path:
    """Ten images in train/ and six in test/."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("test", 6)):
        (tmp_path / "data" / split).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (SIDE + i % 3, SIDE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / split / f"{i}.png")
    return tmp_path / "data"


@pytest.fixture
def decoded(tmp_path, monkeypatch):
    """How many images were decoded so far, in whatever process."""
    log = tmp_path / "decoded"

    def counted(path, side, exact):
        with open(log, "ab") as file:
            file.write(b".")
        return read_square(path, side, exact)

    monkeypatch.setattr(dataset.files, "read_square", counted)
    return lambda: log.stat().st_size if log.exists() else 0


def open_(root: Path, save: Path, side: int = SIDE, max_bad: int = 0):
    splits = [list_images(root, split)[0] for split in ("train", "test")]
    return open_images("few", root, splits, side, str(save), max_bad)


def folder_of(save: Path) -> Path:
    (folder,) = (save / "images").iterdir()
    return folder


def content(save: Path) -> dict[str, bytes]:
    return {name: (folder_of(save) / name).read_bytes() for name in ("images.u8", "crc32.u32")}


def expected(root: Path, split: str, files=None) -> np.ndarray:
    names = [file.name for file in list_images(root, split)[0]]
    names = names if files is None else [names[file] for file in files]
    return np.stack([read_square(root / name, SIDE) for name in names]).transpose(0, 3, 1, 2)


def spoil(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


def test_every_image_is_there_in_the_order_of_the_files(root, tmp_path):
    (train, test), _ = open_(root, tmp_path)
    for split, name, count in ((train, "train", 10), (test, "test", 6)):
        assert split.images.dtype == torch.uint8 and split.images.shape == (count, 3, SIDE, SIDE)
        assert split.images.is_contiguous(memory_format=torch.channels_last)
        assert split.files.tolist() == list(range(count))
        assert np.array_equal(split.images.numpy(), expected(root, name))


def test_they_are_decoded_once(root, tmp_path, decoded):
    open_(root, tmp_path)
    assert decoded() == 16
    before = snapshot(tmp_path / "images")
    (train, _), _ = open_(root, tmp_path)
    assert np.array_equal(train.images.numpy(), expected(root, "train"))
    assert decoded() == 16
    assert snapshot(tmp_path / "images") == before


def test_what_is_unchanged_since_it_was_checked_is_not_read_again(root, tmp_path, monkeypatch):
    open_(root, tmp_path)
    monkeypatch.setattr("dataset.chunks.ChunkFile.missing", lambda *args: pytest.fail("read all of it"))
    open_(root, tmp_path)


@pytest.mark.parametrize(
    ("name", "damage", "images"),
    [
        ("images.u8", lambda b: b[:100] + bytes([b[100] ^ 1]) + b[101:], 4),
        ("images.u8", lambda b: b[:-1], 2),
        ("images.u8", lambda b: b[: 192 * 5], 12),
        ("images.u8", lambda b: b"", 16),
        ("images.u8", lambda b: bytes(len(b)), 16),
        ("images.u8", None, 16),
        ("crc32.u32", lambda b: b[:9] + bytes([b[9] ^ 1]) + b[10:], 2),
        ("crc32.u32", lambda b: b[:-1], 2),
        ("crc32.u32", lambda b: bytes(len(b)), 16),
        ("crc32.u32", None, 16),
        ("images.json", lambda b: b[:50], 0),
        ("images.json", lambda b: b"[]", 0),
        ("images.json", None, 0),
    ],
)
def test_what_is_damaged_or_gone_is_decoded_again(root, tmp_path, decoded, name, damage, images):
    open_(root, tmp_path)
    whole, before = content(tmp_path), decoded()
    path = folder_of(tmp_path) / name
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    (train, _), _ = open_(root, tmp_path)
    assert decoded() - before == images
    assert content(tmp_path) == whole
    assert np.array_equal(train.images.numpy(), expected(root, "train"))


def fork(function, *args) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    return process


def wait_until(true) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("after", [1, 6])
def test_a_build_that_was_killed_goes_on(root, tmp_path, decoded, monkeypatch, after):
    open_(root, tmp_path / "whole")
    before = decoded()
    counted = dataset.files.read_square

    def until_killed(path, side, exact):
        square = counted(path, side, exact)
        while decoded() >= before + after and os.getppid() == multiprocessing.parent_process().pid:
            time.sleep(0.01)
        return square

    with monkeypatch.context() as patch:
        patch.setattr(dataset.files, "read_square", until_killed)
        process = fork(open_, root, tmp_path / "killed")
        wait_until(lambda: decoded() >= before + after)
        os.kill(process.pid, signal.SIGKILL)  # its own workers notice that it is gone
        process.join()
        wait_until(lambda: not is_locked(folder_of(tmp_path / "killed") / "lock"))
    assert decoded() - before < 16
    open_(root, tmp_path / "killed")
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def is_locked(path: Path) -> bool:
    with open(path, "ab") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_many_processes_decode_each_image_once(root, tmp_path, decoded, monkeypatch):
    counted = dataset.files.read_square

    def slow(path, side, exact):
        time.sleep(0.02)
        return counted(path, side, exact)

    monkeypatch.setattr(dataset.files, "read_square", slow)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")

    def one_of_them(rank: int) -> None:
        os.environ["RANK"] = str(rank)
        (train, test), _ = open_(root, tmp_path)
        assert np.array_equal(train.images.numpy(), expected(root, "train"))
        assert np.array_equal(test.images.numpy(), expected(root, "test"))

    processes = [fork(one_of_them, rank) for rank in range(3)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert decoded() == 16


@pytest.mark.parametrize("spoilt", [{0}, {9}, {3, 4, 8}, {0, 1, 2, 3, 6}, {5, 6, 7, 8, 9}, set(range(9))])
def test_bad_images_are_left_out_and_the_last_ones_take_their_rows(root, tmp_path, spoilt):
    for i in spoilt:
        spoil(root / "train" / f"{i}.png")
    (train, test), fingerprint = open_(root, tmp_path, max_bad=len(spoilt))
    assert sorted(train.files.tolist()) == sorted(set(range(10)) - spoilt)
    assert len(train.images) == len(train.files) == 10 - len(spoilt)
    good = 10 - len(spoilt)
    assert all(file == row for row, file in enumerate(train.files.tolist()) if row not in spoilt and row < good)
    assert np.array_equal(train.images.numpy(), expected(root, "train", train.files))
    assert np.array_equal(test.images.numpy(), expected(root, "test"))
    # The rows and the fingerprint do not depend on which process met which file first.
    shutil.rmtree(tmp_path / "images")
    (again, _), other = open_(root, tmp_path, max_bad=len(spoilt))
    assert torch.equal(again.files, train.files) and torch.equal(again.images, train.images) and other == fingerprint


def test_too_many_bad_images_end_it_by_name_and_may_be_left_out_then(root, tmp_path, decoded, capsys):
    spoil(root / "train" / "2.png")
    (root / "test" / "4.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"2 of the images.*train/2.png \(.*truncated.*test/4.png.*max_bad_images 2"):
        open_(root, tmp_path, max_bad=1)
    before = decoded()
    (train, test), _ = open_(root, tmp_path, max_bad=2)
    assert decoded() == before
    assert (len(train.images), len(test.images)) == (9, 5)
    out = capsys.readouterr().out
    assert "train/2.png" in out and "test/4.png" in out and out.count("\n") == 1
    with pytest.raises(ValueError, match="max_bad_images 2"):
        open_(root, tmp_path)
    listed = [json.loads(line) for line in (folder_of(tmp_path) / "bad.jsonl").read_text().splitlines() if line]
    names = [entry["name"] for entry in listed]  # in the order in which the processes met them
    assert sorted(names) == ["test/4.png", "train/2.png"]


def test_a_split_without_a_good_image_ends_it(root, tmp_path):
    for i in range(6):
        spoil(root / "test" / f"{i}.png")
    with pytest.raises(ValueError, match="none of the images.*test/0.png can be decoded"):
        open_(root, tmp_path, max_bad=6)


def test_a_list_of_bad_images_that_was_cut_off_or_lost_is_made_again(root, tmp_path):
    spoil(root / "train" / "2.png")
    (train, _), fingerprint = open_(root, tmp_path, max_bad=1)
    path = folder_of(tmp_path) / "bad.jsonl"
    for damage in (lambda: path.write_bytes(path.read_bytes()[:-20]), path.unlink):
        damage()
        (again, _), other = open_(root, tmp_path, max_bad=1)
        assert torch.equal(again.images, train.images) and other == fingerprint


@pytest.mark.parametrize("change", ["time", "size", "name", "more", "side", "split"])
def test_what_it_depends_on_is_in_its_key(root, tmp_path, decoded, change):
    open_(root, tmp_path)
    path = root / "train" / "0.png"
    if change == "time":
        os.utime(path, ns=(0, 0))
    elif change == "size":
        about = path.stat()
        path.write_bytes(path.read_bytes() + b"\0")
        os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    elif change == "name":
        path.rename(root / "train" / "zero.png")
    elif change == "more":
        shutil.copy(path, root / "train" / "more.png")
    elif change == "split":
        path.rename(root / "test" / "0b.png")
    open_(root, tmp_path, side=9 if change == "side" else SIDE)
    assert len(list((tmp_path / "images").iterdir())) == 2


def test_the_fingerprint_follows_names_and_pixels_and_not_times_or_places(root, tmp_path):
    _, fingerprint = open_(root, tmp_path)
    moved = tmp_path / "elsewhere"
    shutil.copytree(root, moved, copy_function=shutil.copyfile)
    assert open_(moved, tmp_path / "other")[1] == fingerprint
    Image.open(moved / "train" / "0.png").rotate(90).save(moved / "train" / "0.png")
    assert open_(moved, tmp_path / "other")[1] != fingerprint
    (root / "train" / "0.png").rename(root / "train" / "00.png")
    assert open_(root, tmp_path / "other")[1] != fingerprint


@pytest.mark.parametrize("when", ["before", "while reserving"])
def test_a_full_disk_is_said_before_anything_is_decoded(root, tmp_path, decoded, monkeypatch, when):
    if when == "before":
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        told = "needs 0.0 GiB more.*are free.*No space.*choose another --save_dir"
    else:
        monkeypatch.setattr(os, "posix_fallocate", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left")))
        told = "cannot write .*images.u8 .*No space left.*free some space"
    with pytest.raises(WriteError, match=told):
        open_(root, tmp_path)
    assert decoded() == 0
    monkeypatch.undo()
    monkeypatch.setattr(dataset.files, "CHUNK", 4)
    open_(root, tmp_path)


def test_a_file_that_vanishes_ends_it_in_one_line(root, tmp_path):
    splits = [list_images(root, split)[0] for split in ("train", "test")]
    (root / "train" / "7.png").unlink()
    with pytest.raises(OSError, match="cannot decode the images: .*7.png"):
        open_images("few", root, splits, SIDE, str(tmp_path))


def test_a_process_that_dies_ends_it_in_one_line(root, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset.files, "read_square", lambda *args: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(OSError, match="ended with exit code -9; is there enough memory"):
        open_(root, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_comes_in_a_fork_is_not_lost(root, tmp_path, number):
    armed = [number]

    def once() -> None:
        if armed:
            os.kill(os.getpid(), armed.pop())

    def handler(number, frame):
        raise KeyboardInterrupt

    os.register_at_fork(after_in_parent=once)  # for good, but it is harmless once it is not armed
    before = signal.signal(number, handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            open_(root, tmp_path)
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)
    assert not multiprocessing.active_children()
    (train, _), _ = open_(root, tmp_path)
    assert np.array_equal(train.images.numpy(), expected(root, "train"))


def test_a_place_that_cannot_be_written_is_an_error_of_the_input(root, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="choose another --save_dir"):
        open_(root, tmp_path / "file")


def test_listing_passes_over_what_is_hidden_and_follows_links_but_not_in_circles(tmp_path):
    picture = tmp_path / "elsewhere" / "b.PNG"
    picture.parent.mkdir()
    picture.touch()
    root = tmp_path / "root"
    (root / "train" / "deep" / "deeper").mkdir(parents=True)
    (root / "train" / ".hidden").mkdir()
    for name in ("a b.jpg", "ü.JPEG", ".x.jpg", ".hidden/y.jpg", "deep/deeper/z.webp", "notes.txt", "none"):
        (root / "train" / name).touch()
    (root / "train" / "link").symlink_to(picture.parent)
    (root / "train" / "deep" / "up").symlink_to(root / "train")
    images, others = list_images(root, "train")
    names = ["a b.jpg", "deep/deeper/z.webp", "link/b.PNG", "ü.JPEG"]
    assert [file.name for file in images] == [f"train/{name}" for name in names]
    assert others == ["train/none", "train/notes.txt"]


def test_a_link_to_nothing_is_an_error_that_names_it(root):
    (root / "train" / "gone.png").symlink_to(root / "nowhere.png")
    with pytest.raises(FileNotFoundError, match="gone.png"):
        list_images(root, "train")


def test_names_that_are_no_text_are_decoded_and_reported(root, tmp_path, capsys):
    shutil.copy(root / "train" / "0.png", os.fsencode(root) + b"/train/\xff.png")
    (Path(os.fsdecode(os.fsencode(root) + b"/train/\xfe.png"))).write_bytes(b"no image")
    (train, _), _ = open_(root, tmp_path, max_bad=1)
    assert len(train.images) == 11
    assert "\\udcfe.png" in capsys.readouterr().out
