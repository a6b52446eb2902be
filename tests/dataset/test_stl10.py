import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from runs import read_metrics
from torchvision import datasets

import train_student
import train_teacher
from dataset import load_dataset

STL = datasets.STL10
CLASSES = ["airplane", "bird", "car"]


class Files:
    """The published binary files, of 12 labelled, 20 unlabelled and 6 test images."""

    def __init__(self):
        rng = np.random.default_rng(0)
        # Larger than their noise, so that a class can be learned: (N, rows, columns, colours).
        self.targets = {"train": np.arange(12) % 3, "test": np.arange(6) % 3}
        level = {"train": 60 + 60 * self.targets["train"], "test": 60 + 60 * self.targets["test"]}
        level["unlabeled"] = rng.integers(60, 190, 20)
        noise = {name: rng.integers(-50, 50, (len(x), 96, 96, 3)) for name, x in level.items()}
        self.images = {name: (x[:, None, None, None] + noise[name]).astype(np.uint8) for name, x in level.items()}
        # Colour by colour, and each colour column by column; classes are counted from 1.
        self.content = {f"{name}_X.bin": x.transpose(0, 3, 2, 1).tobytes() for name, x in self.images.items()}
        self.content |= {f"{name}_y.bin": (x + 1).astype(np.uint8).tobytes() for name, x in self.targets.items()}
        self.md5 = {name: hashlib.md5(x).hexdigest() for name, x in self.content.items()}
        self.content["class_names.txt"] = "\n".join(CLASSES).encode() + b"\n"

    def packed(self) -> bytes:
        """The archive."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1) as tar:
            for name, content in self.content.items():
                entry = tarfile.TarInfo(f"{STL.base_folder}/{name}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
        return packed.getvalue()


@pytest.fixture
def files(monkeypatch) -> Files:
    files = Files()
    monkeypatch.setattr(STL, "train_list", [[name, files.md5[name]] for name, _ in STL.train_list])
    monkeypatch.setattr(STL, "test_list", [[name, files.md5[name]] for name, _ in STL.test_list])
    return files


@pytest.fixture
def data_dir(files, tmp_path) -> Path:
    (tmp_path / "data" / STL.base_folder).mkdir(parents=True)
    for name, content in files.content.items():
        (tmp_path / "data" / STL.base_folder / name).write_bytes(content)
    return tmp_path / "data"


def pixels(split) -> np.ndarray:
    return split.images.permute(0, 2, 3, 1).numpy()


def test_files_are_read_as_torchvision_reads_them(files, data_dir):
    dataset = load_dataset("stl10", str(data_dir))
    for part, split in (("train+unlabeled", dataset.train), ("test", dataset.test)):
        reference = STL(str(data_dir), part)
        assert np.array_equal(pixels(split), np.stack([np.asarray(image) for image, _ in reference]))
        assert split.targets.tolist() == [target for _, target in reference]
        assert split.images.is_contiguous()
    assert np.array_equal(pixels(dataset.test), files.images["test"])
    assert dataset.train.targets.tolist() == [*files.targets["train"], *[-1] * 20]
    assert dataset.classes == CLASSES
    assert (dataset.views.size, dataset.views.count) == (96, 1250)


def test_a_missing_one_is_downloaded(files, tmp_path, web_server, monkeypatch):
    folder, url = web_server
    packed = files.packed()
    (folder / STL.filename).write_bytes(packed)
    monkeypatch.setattr(STL, "url", f"{url}/{STL.filename}")
    monkeypatch.setattr(STL, "tgz_md5", hashlib.md5(packed).hexdigest())
    assert np.array_equal(pixels(load_dataset("stl10", str(tmp_path / "data")).test), files.images["test"])


def test_another_content_has_another_fingerprint(files, data_dir, monkeypatch):
    fingerprint = load_dataset("stl10", str(data_dir)).fingerprint()
    assert load_dataset("stl10", str(data_dir)).fingerprint() == fingerprint
    content = files.content["unlabeled_X.bin"][:-1] + b"\0"
    path = data_dir / STL.base_folder / "unlabeled_X.bin"
    path.write_bytes(content)
    with pytest.raises(OSError, match=r"unlabeled_X.bin is missing or corrupt.*delete"):
        load_dataset("stl10", str(data_dir))
    changed = {"unlabeled_X.bin": hashlib.md5(content).hexdigest()}
    monkeypatch.setattr(STL, "train_list", [[name, changed.get(name, md5)] for name, md5 in STL.train_list])
    assert load_dataset("stl10", str(data_dir)).fingerprint() != fingerprint


@pytest.fixture
def run(data_dir, tiny_clip, tmp_path):
    def run(*options, script=train_student):
        base = f"--dataset stl10 --data_dir {data_dir} --save_dir {tmp_path / 'save'} --device cpu --amp off"
        base = [*base.split(), "--epochs", "1", "--batch_size", "8", "--feature_dim", "8"]
        named = (
            ["--clip_mode", tiny_clip, "--model_s", "resnet8"] if script is train_student else ["--model", tiny_clip]
        )
        script.main([*base, *map(str, [*named, *options])])
        kind = "student_model" if script is train_student else "models"
        (folder,) = (tmp_path / "save" / kind).iterdir()
        return read_metrics(folder)[-1]

    return run


def test_images_without_a_label_are_distilled_in_the_same_batches(run, capsys):
    assert run("--distill", "ega", "--teacher_views", "2", "--holdout", "0.25")["loss_distill"] > 0
    # 9 with a label, 3 of 12 being held out, and 20 without.
    assert "4 steps of 8 an epoch" in capsys.readouterr().out


def test_a_student_alone_and_a_head_learn_from_labels_alone(run, capsys):
    assert "test_acc" in run("--distill", "none", "--labels", "0.5")
    assert "1 steps of 8 an epoch" in capsys.readouterr().out
    assert "train_acc" in run(script=train_teacher)


def test_a_method_that_needs_the_class_of_every_image_says_so(run, capsys):
    with pytest.raises(SystemExit):
        run("--distill", "nce")
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "--distill nce needs the class of every image, but only a share of 0.375 has a label: use one of" in said
    assert "--labels 1" not in said  # would change nothing
