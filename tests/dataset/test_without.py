"""A data set without some of its classes, or of some of its rows: the images stay where they are."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import assert_equal_tensors, load, read_metrics

import dataset
from conftest import make_dataset
from dataset import ImageDataset, Split
from dataset.loader import Loader, on_device, take
from dataset.views import CropViews, ResizedCropViews

CPU = torch.device("cpu")


def copied(data: ImageDataset) -> ImageDataset:
    """The same data set with tensors of its own."""
    parts = {name: Split(split.images[:].clone(), split.targets) for name, split in parts_of(data)}
    return dataclasses.replace(data, **parts, sha256=None)


def parts_of(data: ImageDataset) -> tuple:
    return ("train", data.train), ("test", data.test)


@pytest.fixture
def mapped(tmp_path) -> ImageDataset:
    """``make_dataset()`` in files that are mapped into memory, channels last; some training images have no label."""
    made, parts = make_dataset(), {}
    for name, split in parts_of(made):
        stored = split.images.permute(0, 2, 3, 1).contiguous().numpy()
        stored.tofile(tmp_path / f"{name}.u8")
        file = np.memmap(tmp_path / f"{name}.u8", dtype=np.uint8, mode="c", shape=stored.shape)
        unlabelled = (torch.arange(len(split)) % 7 == 3) & (name == "train")
        targets = torch.where(unlabelled, -1, split.targets)
        parts[name] = Split(torch.from_numpy(file).permute(0, 3, 1, 2), targets, mapped=True)
    return dataclasses.replace(made, **parts, sha256="0" * 64)


def test_the_others_stay_as_they_are():
    made = make_dataset()
    unlabelled = made.train.targets.clone()
    unlabelled[3] = -1
    made = dataclasses.replace(made, train=Split(made.train.images, unlabelled), views=CropViews(40), sha256="0")
    left = made.without(["colour 3", "colour 0"])
    assert left.classes == ["colour 1", "colour 2", "colour 4"]
    assert left.views == made.views
    assert left.fingerprint() not in ("0", made.fingerprint())
    for (_, before), (_, after) in zip(parts_of(made), parts_of(left), strict=True):
        rows = [row for row, target in enumerate(before.targets.tolist()) if target in (1, 2, 4, -1)]
        assert torch.equal(after.images[:], before.images[rows])
        assert (len(after), after.images.shape) == (len(rows), before.images[rows].shape)
        names = [left.classes[target] if target >= 0 else None for target in after.targets]
        assert names == [made.classes[before.targets[row]] if before.targets[row] >= 0 else None for row in rows]


def test_no_image_of_a_file_is_copied(mapped):
    once = mapped.without(["colour 3"])
    twice = once.without(["colour 0"])
    whole = torch.arange(len(twice.test))
    for data in (once, twice, twice.select(torch.arange(5), whole)):
        for (_, split), (_, file) in zip(parts_of(data), parts_of(mapped), strict=True):
            assert split.mapped
            assert split.images.images.data_ptr() == file.images.data_ptr()
            assert on_device(split.images, CPU).images.data_ptr() == file.images.data_ptr()
    both = mapped.without(["colour 0", "colour 3"])
    assert torch.equal(twice.train.images[:], both.train.images[:])
    assert torch.equal(twice.train.targets, both.train.targets)
    assert mapped.select(torch.arange(70), torch.arange(20)) is mapped


@pytest.mark.parametrize("views", [CropViews(32), ResizedCropViews(28)])
@pytest.mark.parametrize("training", [True, False])
def test_batches_are_those_of_a_copy(mapped, views, training):
    left = mapped.without(["colour 1"])
    options = {"training": training, "views": views, "teacher_views": 3}
    loaders = [Loader(data.train, "train", 8, CPU, **options) for data in (left, copied(left))]
    assert [loader.reads_ahead for loader in loaders] == [True, False]
    for a, b in zip(*(loader.epoch(1) for loader in loaders), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))


def test_images_that_are_taken_are_those_of_a_copy_in_its_memory_format(mapped):
    index = torch.tensor([7, 0, 7, 30])
    for data in (mapped, make_dataset()):
        left = data.without(["colour 1"])
        found, wanted = (take(split.images, index, CPU) for split in (left.train, copied(left).train))
        assert torch.equal(found, wanted)
        assert found.stride() == wanted.stride()


def test_the_fingerprint_tells_which_images_are_left(mapped):
    """From the pixels where these are in memory; else from the whole one's and from the rows."""
    left = {name: mapped.without([name]).fingerprint() for name in mapped.classes}
    assert len({mapped.fingerprint(), *left.values()}) == 6
    assert mapped.without(["colour 2"]).fingerprint() == left["colour 2"]
    other = dataclasses.replace(mapped, sha256="1" * 64)
    assert other.without(["colour 2"]).fingerprint() != left["colour 2"]
    rows = torch.arange(10)
    assert mapped.select(rows, rows[:4]).fingerprint() != mapped.select(rows[:4], rows).fingerprint()
    in_memory = make_dataset().without(["colour 2"])
    assert in_memory.fingerprint() == copied(in_memory).fingerprint()


def test_a_run_is_that_of_a_copy(train, mapped, tmp_path, monkeypatch):
    """The bank and the training, which both look images up by their rows."""
    folders = []
    names = tmp_path / "names.txt"
    names.write_text("colour 2\n")
    for data, options in ((mapped, ("--leave_out", names)), (copied(mapped.without(["colour 2"])), ())):
        monkeypatch.setitem(dataset.DATASETS, "tiny", lambda data_dir, data=data: data)
        save_dir = tmp_path / f"save{len(folders)}"
        folders.append(train("--epochs", 2, "--teacher_views", 2, *options, save_dir=save_dir))
        (bank,) = (save_dir / "teacher_bank").glob("tiny_*")
        folders.append(Path(bank))
    run, bank, other, other_bank = folders
    assert read_metrics(run) == read_metrics(other)
    assert (bank / "embeddings.fp16").read_bytes() == (other_bank / "embeddings.fp16").read_bytes()
    for part in ("model", "layer", "teacher_layer"):
        assert_equal_tensors(load(run / "resnet8_last.pth")[part], load(other / "resnet8_last.pth")[part])


def test_a_data_set_with_two_classes_of_one_name_is_refused():
    with pytest.raises(ValueError, match="tiny has several classes of one name: 'colour 1'"):
        dataclasses.replace(make_dataset(), classes=[f"colour {i % 4}" for i in (1, 2, 3, 4, 5)])


def test_what_cannot_be_left_out():
    made = make_dataset()
    with pytest.raises(ValueError, match="tiny has no class 'mauve'"):
        made.without(["mauve"])
    with pytest.raises(ValueError, match="without 4 of its 5 classes tiny has nothing to learn"):
        made.without(made.classes[1:])
