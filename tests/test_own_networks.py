"""Runs with networks of one's own, FILE.py:FUNCTION: trained, resumed, evaluated, exported, used."""

import json
import shutil

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from runs import assert_equal_tensors, assert_refused, load, read_metrics

import evaluate
import export
import train_student
import train_teacher
from evaluation import load_student
from helper import exits
from models.resnet import resnet14

NETS = """
import torch
from torch import nn


class Tiny(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(16, 24, 3, 2, 1), nn.BatchNorm2d(24), nn.ReLU())
        self.fc = nn.Linear(24, num_classes)

    def forward(self, x):
        return self.fc(self.last(self.body(self.stem(x))).mean((2, 3)))


class Colours(nn.Module):
    resolution = 16

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, 4)

    def forward(self, x):
        return self.patches(x).mean((2, 3))
"""


@pytest.fixture
def nets(tmp_path):
    (tmp_path / "nets.py").write_text(NETS)
    return tmp_path / "nets.py"


@pytest.fixture
def own(train, nets):
    """Train a student from a teacher of that file."""
    names = ["--model_s", f"{nets}:Tiny", "--clip_mode", f"{nets}:Colours"]
    return lambda *options, **others: train(*names, *options, **others)


def test_a_run_is_evaluated_exported_and_used_after_the_file_has_changed(own, nets, tmp_path, capsys):
    folder = own("--epochs", 1)
    assert folder.name.startswith("nets-Tiny_nets-Colours_tiny_ega_")
    assert (folder / "student.py").read_text() == (folder / "teacher.py").read_text() == NETS
    pictures, image = tmp_path / "pictures", Image.new("RGB", (32, 32), "red")
    pictures.mkdir()
    image.save(pictures / "red.png")
    nets.write_text("raise SystemExit('the run has its own copy')")
    net, transform, classes = load_student(folder)
    evaluate.main([str(folder), "--device", "cpu"])
    told = json.loads((folder / "evaluation.json").read_text())["accuracy"]["tiny"]["nets-Tiny_best"]
    assert told["student"]["top1"] == read_metrics(folder)[0]["test_acc"] and told["teacher"]["top1"] is not None
    evaluate.main([str(folder), "--device", "cpu", "--embed", str(pictures), "--teacher", "--out", f"{tmp_path}/x.npz"])
    assert np.load(tmp_path / "x.npz")["embeddings"].shape == (1, 8)
    export.main([str(folder), "--out", str(tmp_path / "out")])
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    logits, _ = session.run(None, {"image": transform(image)[None].numpy()})
    np.testing.assert_allclose(logits, net(transform(image)[None]).detach(), atol=1e-4)
    assert len(classes) == 5 and "nets-Tiny" in (tmp_path / "out" / "README.md").read_text()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        export.main([str(folder), "--format", "safetensors"])
    assert_refused(capsys, 2, "use --format onnx")

    (folder / "student.py").write_text(NETS + "\n")
    for script in (evaluate, export):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            script.main([str(folder), "--device", "cpu"][: None if script is evaluate else 1])
        assert_refused(capsys, 2, "student.py", "has changed since the run")
    (folder / "student.py").unlink()
    with pytest.raises(ValueError, match="student.py, the code of .*nets.py:Tiny, is missing"):
        load_student(folder)


def test_a_run_is_resumed_bit_for_bit_and_refuses_another_file(own, train, nets, tmp_path, capsys, monkeypatch):
    whole = own("--epochs", 2, "--name", "whole")
    with monkeypatch.context() as patch:
        patch.setattr("helper.run.Run.finish", lambda *_: pytest.fail("killed"))
        patch.setattr(exits, "save_asked", lambda step: False)
        with pytest.raises(pytest.fail.Exception):
            own("--epochs", 1, "--name", "killed")
    moved = tmp_path / "elsewhere" / "nets.py"
    moved.parent.mkdir()
    shutil.move(nets, moved)
    names = ["--model_s", f"{moved}:Tiny", "--clip_mode", f"{moved}:Colours"]
    killed = train(*names, "--epochs", 2, "--name", "killed")
    assert read_metrics(killed) == read_metrics(whole)
    assert_equal_tensors(load(killed / "nets-Tiny_last.pth")["model"], load(whole / "nets-Tiny_last.pth")["model"])
    moved.write_text(NETS + "# changed\n")
    capsys.readouterr()
    for options in (names, ["--model_s", "resnet8", *names[2:]], [*names[:2], "--clip_mode", f"{moved}:Colours"]):
        with pytest.raises(SystemExit):
            train(*options, "--epochs", 3, "--name", "whole")
        assert_refused(capsys, 2, "holds a run with", "another --name")
    assert train(*names, "--epochs", 1) != train(*names, "--epochs", 1, "--seed", 1)
    named = {path.name for path in killed.parent.iterdir()}
    moved.write_text(NETS + "# changed again\n")
    assert train(*names, "--epochs", 1).name not in named  # other code makes another run


def test_a_method_that_needs_maps(train, nets, tmp_path):
    torch.save({"model": resnet14(num_classes=5).state_dict(), "arch": "resnet14"}, tmp_path / "resnet14.pth")
    options = ["--path_t", tmp_path / "resnet14.pth", "--model_s", f"{nets}:Tiny", "--epochs", 1]
    folder = train("--distill", "hint", *options)
    assert (folder / "student.py").exists() and not (folder / "teacher.py").exists()
    net, transform, _ = load_student(folder)
    assert net(transform(Image.new("RGB", (40, 50)))[None]).shape == (1, 5)


def test_a_head_is_trained_on_an_encoder_of_one_s_own(train, nets):
    head = train("--model", f"{nets}:Colours", "--epochs", 1, script=train_teacher)
    folder = train("--clip_mode", f"{nets}:Colours", "--path_t", head / "nets-Colours_best.pth", "--epochs", 1)
    assert (folder / "teacher.py").exists() and not (folder / "student.py").exists()


def test_bad_input_ends_in_one_line_and_writes_nothing(own, train, nets, tmp_path, capsys):
    folder = own("--epochs", 1)
    before = sorted(tmp_path.rglob("*"))
    for words, options in (
        ("has no function Tinny; it has Tiny, Colours", ["--model_s", f"{nets}:Tinny"]),
        ("no such file", ["--model_s", tmp_path / "other.py:Tiny"]),
        ("embeddings", ["--clip_mode", f"{nets}:Colors"]),
        ("no such file of weights", ["--clip_mode", f"{nets}:Colours={tmp_path / 'nowhere.pth'}"]),
        ("give its weights to a frozen encoder", ["--path_t", folder / "nets-Tiny_best.pth"]),
        ("--pretrained_s", ["--model_s", f"{nets}:Tiny", "--pretrained_s"]),
        ("--init_s", ["--model_s", f"{nets}:Tiny={folder / 'nets-Tiny_best.pth'}"]),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            own("--epochs", 1, "--name", "bad", *options)
        assert stopped.value.code == 2
        assert_refused(capsys, 2, words if words != "embeddings" else "has no function Colors")
        assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(SystemExit):
        train_student.main(["--model_s", str(nets), "--save_dir", str(tmp_path)])
    assert_refused(capsys, 2, "FILE.py:FUNCTION")
    with pytest.raises(SystemExit):
        train_teacher.main(["--model", f"{nets}:Tiny", "--clip_tn", "0", "--save_dir", str(tmp_path)])
    assert_refused(capsys, 2, "leave --clip_tn at 1")
    with pytest.raises(SystemExit):
        evaluate.main([str(folder / "nets-Tiny_best.pth"), "--dataset", "tiny"])
    assert_refused(capsys, 2, "a network of one's own")
