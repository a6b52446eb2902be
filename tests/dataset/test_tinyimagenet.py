import hashlib
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import snapshot
from dataset import load_dataset, tinyimagenet
from dataset.decode import read_square
from dataset.views import CropViews

REAL = Path(__file__).parents[2] / "data" / "tiny-imagenet-200"

# In an order that is not theirs by number.
WNIDS = {"n3": "crane, a bird", "n1": "goldfish, Carassius auratus", "n2": "crane, a machine"}


@pytest.fixture
def layout(tmp_path) -> Path:
    """A Tiny ImageNet of three classes, two training images of each and four to test on, in the published layout."""
    root, rng = tmp_path / "made" / "tiny-imagenet-200", np.random.default_rng(0)

    def photo(path: Path, mode: str = "RGB") -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).convert(mode).save(path, "JPEG")

    for wnid in WNIDS:
        for i in range(2):
            photo(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", "L" if i else "RGB")
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t9\t9\n")
    lines = []
    for i, wnid in enumerate(("n2", "n3", "n1", "n3")):
        photo(root / "val" / "images" / f"val_{i}.JPEG")
        lines.append(f"val_{i}.JPEG\t{wnid}\t0\t0\t9\t9\n")
    photo(root / "test" / "images" / "test_0.JPEG")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("\n".join(WNIDS))
    (root / "words.txt").write_text("".join(f"{w}\t{name}\n" for w, name in (WNIDS | {"n9": "entity"}).items()))
    return root


def load(root: Path):
    return load_dataset("tinyimagenet", str(root), save_dir=str(root / "save"))


def check(data, layout: Path) -> None:
    assert data.classes == ["goldfish", "crane, a machine", "crane, a bird"]
    assert data.train.targets.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.test.targets.tolist() == [1, 2, 0, 2]
    train = [f"train/n{n}/images/n{n}_{i}.JPEG" for n in (1, 2, 3) for i in range(2)]
    test = [f"val/images/val_{i}.JPEG" for i in range(4)]
    for split, names in ((data.train, train), (data.test, test)):
        expected = np.stack([read_square(layout / name, 64) for name in names])
        assert np.array_equal(split.images.permute(0, 2, 3, 1).numpy(), expected)
        with Image.open(layout / names[1]) as image:  # nothing is resized at 64 pixels
            assert np.array_equal(expected[1], np.asarray(image.convert("RGB")))
    assert data.views == CropViews(64)


@pytest.fixture
def archive(layout, tmp_path, monkeypatch, dead_url) -> Path:
    """The layout as an archive; no network, until a test gives it one."""
    path = tmp_path / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(path, "w") as packed:
        for file in sorted(layout.rglob("*")):
            packed.write(file, file.relative_to(layout.parent))
    publish(monkeypatch, md5=hashlib.md5(path.read_bytes()).hexdigest(), url=f"{dead_url}/{path.name}")
    return path


def publish(monkeypatch, **values) -> None:
    monkeypatch.setattr(tinyimagenet, "ARCHIVE", tinyimagenet.ARCHIVE._replace(**values))


@pytest.fixture
def served(archive, web_server, monkeypatch) -> Path:
    folder, url = web_server
    publish(monkeypatch, url=f"{url}/{archive.name}")
    return Path(shutil.copy(archive, folder))


def leftovers(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()} - {".tiny-imagenet-200.lock", "save"}


def test_the_folder_is_read_without_a_network(layout, archive):
    check(load(layout.parent), layout)


def test_an_archive_that_lies_there_is_extracted_and_kept(layout, archive, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    shutil.copy(archive, root)
    check(load(root), layout)
    assert leftovers(root) == {"tiny-imagenet-200", archive.name}


def test_a_missing_one_is_downloaded_once(layout, served, tmp_path, monkeypatch, dead_url):
    root = tmp_path / "new" / "data"
    check(load(root), layout)
    assert leftovers(root) == {"tiny-imagenet-200"}
    publish(monkeypatch, url=dead_url)
    check(load(root), layout)


def test_missing_without_a_network_says_what_to_do_and_leaves_nothing(archive, tmp_path):
    with pytest.raises(OSError, match=r"could not be downloaded.*put tiny-imagenet-200.zip there"):
        load(tmp_path / "data")
    assert leftovers(tmp_path / "data") == set()


def test_a_download_of_another_content_is_refused_and_leaves_nothing(served, tmp_path):
    served.write_bytes(served.read_bytes()[:-1])
    with pytest.raises(OSError, match="could not be downloaded"):
        load(tmp_path / "data")
    assert leftovers(tmp_path / "data") == set()


def test_a_corrupt_archive_is_refused_and_kept(served, archive, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    (root / archive.name).write_bytes(archive.read_bytes()[:-1])
    before = snapshot(root)
    with pytest.raises(OSError, match=r"tiny-imagenet-200.zip is corrupt.*delete it"):
        load(root)
    assert snapshot(root) == before


@pytest.mark.parametrize(
    "name",
    ["wnids.txt", "words.txt", "val/val_annotations.txt", "val/images/val_1.JPEG", "train/n2", "train/n2/images"],
)
def test_what_is_not_whole_is_refused_and_kept(layout, served, name):
    path = layout / name
    if name == "train/n2/images":
        for image in path.iterdir():
            image.unlink()
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    before = snapshot(layout.parent)
    with pytest.raises(OSError, match="tiny-imagenet-200 is not whole .*: delete it and run again"):
        load(layout.parent)
    assert snapshot(layout.parent) == before


def test_annotations_without_their_numbers_are_refused(layout):
    for text in ("val_0.JPEG\n", "val_0.JPEG\tn9\t0\t0\t9\t9\n"):
        (layout / "val" / "val_annotations.txt").write_text(text)
        with pytest.raises(OSError, match="is not whole"):
            load(layout.parent)


@pytest.mark.skipif(not REAL.exists(), reason="the real Tiny ImageNet is not in data/")
def test_the_real_one_reads_the_same_as_a_folder(tmp_path):
    """Three of its classes."""
    classes = sorted((REAL / "wnids.txt").read_text().split())[:3]
    root, folder = tmp_path / "tiny-imagenet-200", tmp_path / "folder"
    (root / "train").mkdir(parents=True)
    (root / "val" / "images").mkdir(parents=True)
    (folder / "train").mkdir(parents=True)
    shutil.copy(REAL / "words.txt", root)
    (root / "wnids.txt").write_text("\n".join(reversed(classes)))
    for wnid in classes:
        (root / "train" / wnid).symlink_to(REAL / "train" / wnid)
        (folder / "train" / wnid).symlink_to(REAL / "train" / wnid)
        (folder / "val" / wnid).mkdir(parents=True)
    annotations = (REAL / "val" / "val_annotations.txt").read_text().splitlines(keepends=True)
    annotations = [line for line in annotations if line.split("\t")[1] in classes]
    (root / "val" / "val_annotations.txt").write_text("".join(annotations))
    for line in annotations:
        name, wnid = line.split("\t")[:2]
        for link in (root / "val" / "images" / name, folder / "val" / wnid / name):
            link.symlink_to(REAL / "val" / "images" / name)
    data = load(tmp_path)
    other = load_dataset("folder", str(folder), image_size=64, save_dir=str(tmp_path / "save"))
    assert data.classes == ["goldfish", "European fire salamander", "bullfrog"]
    assert torch.equal(data.train.images, other.train.images) and torch.equal(data.train.targets, other.train.targets)
    order = torch.argsort(data.test.targets, stable=True)
    assert torch.equal(data.test.images[order], other.test.images)
    assert torch.equal(data.test.targets[order], other.test.targets)
    for split in (other.train, other.test):
        assert torch.bincount(split.targets).tolist() == [len(split) // 3] * 3
