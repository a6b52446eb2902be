import hashlib
import io
import pickle
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets
from torchvision.datasets import utils

from conftest import snapshot
from dataset import DATASETS, archives, cifar, load_dataset
from dataset.cifar import load_cifar100

REAL = Path(__file__).parents[2] / "data"
NAME = "cifar-100-python"


class Archive:
    """A CIFAR of a few images in the published format, put in the published one's place."""

    def __init__(self, monkeypatch, name: str = "CIFAR100", url: str = ""):
        self.monkeypatch, self.name, published = monkeypatch, name, getattr(cifar, name)
        self.folder, self.filename, key = published.archive.folder, published.archive.filename, published.key
        rng = np.random.default_rng(0)
        self.pixels = {part: rng.integers(0, 256, (n, 3072), dtype=np.uint8) for part, n in (("train", 7), ("test", 3))}
        self.labels = {"train": [5, 1, 99, 0, 1, 2, 50], "test": [7, 0, 99]}
        self.files = {
            "train": self._pickled(key, "train", slice(0, 4)),
            "train_2": self._pickled(key, "train", slice(4, 7)),
            "test": self._pickled(key, "test", slice(0, 3)),
            "meta": pickle.dumps({f"{key}_names".encode(): [f"class_{i}".encode() for i in range(100)]}),
        }
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as tar:
            for file, content in self.files.items():
                entry = tarfile.TarInfo(f"{self.folder}/{file}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
        self.bytes = packed.getvalue()
        files = [(file, hashlib.md5(content).hexdigest()) for file, content in self.files.items()]
        about = published.archive._replace(md5=hashlib.md5(self.bytes).hexdigest(), files=files)
        self.cifar = published._replace(archive=about, train=["train", "train_2"], test=["test"], meta="meta")
        self.downloads_from(url)

    def downloads_from(self, url: str) -> None:
        about = self.cifar.archive._replace(url=url)
        self.monkeypatch.setattr(cifar, self.name, self.cifar._replace(archive=about))

    def _pickled(self, key: str, part: str, rows: slice) -> bytes:
        # The published files are Python 2's, in which every string is one of bytes.
        return pickle.dumps({b"data": self.pixels[part][rows], f"{key}s".encode(): self.labels[part][rows]})

    def extract(self, root: Path) -> Path:
        (root / self.folder).mkdir(parents=True)
        for name, content in self.files.items():
            (root / self.folder / name).write_bytes(content)
        return root / self.folder

    def check(self, dataset) -> None:
        for part, split in (("train", dataset.train), ("test", dataset.test)):
            assert split.images.dtype == torch.uint8
            assert split.images.is_contiguous()
            # The file holds an image as its red, then its green, then its blue plane, row by row.
            assert np.array_equal(split.images.numpy().reshape(-1, 3072), self.pixels[part])
            assert split.targets.tolist() == self.labels[part]
        assert dataset.classes == [f"class {i}" for i in range(100)]


@pytest.fixture
def archive(monkeypatch, dead_url) -> Archive:
    """Without a network, until a test gives it one."""
    archive = Archive(monkeypatch)
    archive.downloads_from(f"{dead_url}/{archive.filename}")
    return archive


@pytest.fixture
def served(archive, web_server) -> Path:
    """The folder from which the archive is downloaded."""
    folder, url = web_server
    (folder / archive.filename).write_bytes(archive.bytes)
    archive.downloads_from(f"{url}/{archive.filename}")
    return folder


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_names_and_checksums_are_those_that_torchvision_knows(name):
    own, known = getattr(cifar, name), getattr(datasets, name)
    archive = own.archive
    assert (archive.url, archive.filename, archive.md5) == (known.url, known.filename, known.tgz_md5)
    assert archive.folder == known.base_folder
    lists = [*known.train_list, *known.test_list, [known.meta["filename"], known.meta["md5"]]]
    assert [list(file) for file in archive.files] == lists
    assert own.train + own.test + [own.meta] == [file for file, _ in lists]
    assert f"{own.key}_names" == known.meta["key"]


def leftovers(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()} - {f".{NAME}.lock"}


def test_extracted_files_are_read_without_a_network(archive, tmp_path):
    archive.extract(tmp_path)
    archive.check(load_dataset("cifar100", str(tmp_path)))
    assert leftovers(tmp_path) == {NAME}


def test_cifar_10_is_read_and_downloaded_likewise(monkeypatch, web_server, tmp_path):
    archive = Archive(monkeypatch, "CIFAR10")
    folder, url = web_server
    (folder / archive.filename).write_bytes(archive.bytes)
    archive.downloads_from(f"{url}/{archive.filename}")
    for _ in range(2):
        dataset = load_dataset("cifar10", str(tmp_path))
        archive.check(dataset)
        assert dataset.name == "cifar10"
        (folder / archive.filename).unlink(missing_ok=True)
    assert {path.name for path in tmp_path.iterdir() if path.name[0] != "."} == {"cifar-10-batches-py"} | {folder.name}


def test_extracted_files_are_read_from_a_folder_that_cannot_be_written(archive, tmp_path, monkeypatch):
    archive.extract(tmp_path)
    monkeypatch.setattr(Path, "mkdir", lambda *a, **k: pytest.fail("wrote"))
    archive.check(load_cifar100(str(tmp_path)))


def test_an_archive_that_lies_there_is_extracted_without_a_network_and_kept(archive, tmp_path):
    (tmp_path / archive.filename).write_bytes(archive.bytes)
    archive.check(load_cifar100(str(tmp_path)))
    assert leftovers(tmp_path) == {NAME, archive.filename}
    assert (tmp_path / archive.filename).read_bytes() == archive.bytes


def test_a_missing_one_is_downloaded_once(archive, served, tmp_path, dead_url):
    root = tmp_path / "new" / "data"
    archive.check(load_cifar100(str(root)))
    assert leftovers(root) == {NAME}
    archive.downloads_from(dead_url)
    archive.check(load_cifar100(str(root)))


def test_missing_without_a_network_says_what_to_do_and_leaves_nothing(archive, tmp_path):
    with pytest.raises(OSError, match=f"could not be downloaded.*put {archive.filename} there"):
        load_cifar100(str(tmp_path / "data"))
    assert leftovers(tmp_path / "data") == set()


def test_a_corrupt_archive_is_refused_and_kept(archive, served, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    (root / archive.filename).write_bytes(archive.bytes[:-1])
    before = snapshot(root)
    with pytest.raises(OSError, match=f"{archive.filename} is corrupt.*delete it"):
        load_cifar100(str(root))
    assert snapshot(root) == before


@pytest.mark.parametrize("name", ["train_2", "test", "meta"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_a_corrupt_extracted_file_is_refused_and_kept(archive, served, tmp_path, name, damage):
    root = tmp_path / "data"
    path = archive.extract(root) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content if damage == "flipped" else content[:-1])
    before = snapshot(root)
    with pytest.raises(OSError, match=f"{name} is missing or corrupt.*delete"):
        load_cifar100(str(root))
    assert snapshot(root) == before


def test_a_download_of_another_content_is_refused_and_leaves_nothing(archive, served, tmp_path):
    (served / archive.filename).write_bytes(archive.bytes[: len(archive.bytes) // 2])
    with pytest.raises(OSError, match="could not be downloaded"):
        load_cifar100(str(tmp_path / "data"))
    assert leftovers(tmp_path / "data") == set()


def test_an_interrupted_download_is_begun_again(archive, served, tmp_path, monkeypatch):
    root = tmp_path / "data"
    fetch = utils.download_and_extract_archive

    def interrupted(url, download_root, **options):
        fetch(url, download_root, **options)
        (Path(download_root) / NAME / "test").unlink()  # as far as it got
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(utils, "download_and_extract_archive", interrupted)
        for method in ("cleanup", "_cleanup"):  # who is killed does not clean up
            patch.setattr(tempfile.TemporaryDirectory, method, lambda *args, **options: None)
        with pytest.raises(KeyboardInterrupt):
            load_cifar100(str(root))
    assert len(leftovers(root)) == 1
    assert not (root / NAME).exists()
    archive.check(load_cifar100(str(root)))


def test_a_run_that_waited_for_anothers_download_does_not_begin_its_own(archive, tmp_path, monkeypatch):
    class Waited:
        def __init__(self, path):
            pass

        def __enter__(self):
            archive.extract(tmp_path)

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(archives, "FileLock", Waited)
    archive.check(load_cifar100(str(tmp_path)))


def test_a_connection_that_breaks_off_leaves_nothing(archive, served, tmp_path, monkeypatch):
    root = tmp_path / "data"

    def half(handler, source, target):
        target.write(source.read(len(archive.bytes) // 2))

    with monkeypatch.context() as patch:
        patch.setattr("http.server.SimpleHTTPRequestHandler.copyfile", half)
        with pytest.raises(OSError, match="could not be downloaded"):
            load_cifar100(str(root))
    assert leftovers(root) == set()
    archive.check(load_cifar100(str(root)))


def test_a_folder_that_cannot_be_made_is_an_error_of_the_input(archive, served, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        load_cifar100(str(tmp_path / "file" / "data"))
    assert (tmp_path / "file").read_text() == "in the way"


def test_an_unknown_data_set_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown data set 'cifar11'.*" + ".*".join(DATASETS)):
        load_dataset("cifar11", "data")


def test_the_fingerprint_follows_the_pixels(archive, tmp_path):
    archive.extract(tmp_path)
    dataset = load_cifar100(str(tmp_path))
    fingerprint = dataset.fingerprint()
    assert load_cifar100(str(tmp_path)).fingerprint() == fingerprint
    other = load_cifar100(str(tmp_path))
    other.test.images[-1, -1, -1, -1] ^= 1
    assert other.fingerprint() != fingerprint


@pytest.mark.skipif(not (REAL / NAME / "meta").exists(), reason="the real CIFAR-100 is not in data/")
def test_the_real_one():
    dataset = load_cifar100(str(REAL))
    assert dataset.train.images.shape == (50_000, 3, 32, 32)
    assert dataset.test.images.shape == (10_000, 3, 32, 32)
    assert torch.bincount(dataset.train.targets).tolist() == [500] * 100
    assert torch.bincount(dataset.test.targets).tolist() == [100] * 100
    assert dataset.classes[:2] + dataset.classes[-1:] == ["apple", "aquarium fish", "worm"]
    assert dataset.classes[dataset.train.targets[0]] == "cattle"
    # The channels' statistics that everybody normalises CIFAR-100 with.
    mean = dataset.train.images.double().mean(dim=(0, 2, 3)) / 255
    torch.testing.assert_close(mean, torch.tensor([0.5071, 0.4867, 0.4408]).double(), rtol=0, atol=3e-4)
