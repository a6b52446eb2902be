"""Runs of train_student.py that are interrupted and go on."""

import gc
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import FORK, forked
from runs import assert_equal_tensors, load, read_events, read_metrics

import dataset
import train_teacher
from dataset import ImageDataset, Split
from dataset.views import ResizedCropViews
from helper import checkpoint
from helper.run import Run


def test_killed_and_resumed_ends_bit_identical(train, tmp_path):
    whole = train("--epochs", 4, "--teacher_views", 2, save_dir=tmp_path / "whole")

    save_dir = tmp_path / "killed"
    child = FORK.Process(target=train, args=("--epochs", 4, "--teacher_views", 2), kwargs={"save_dir": save_dir})
    child.start()
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and child.is_alive():
        lines = [path.read_text().count("\n") for path in save_dir.glob("student_model/*/metrics.jsonl")]
        if lines and lines[0] >= 1:
            child.kill()
            break
        time.sleep(0.005)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    (killed,) = (save_dir / "student_model").iterdir()
    assert 1 <= len(read_metrics(killed)) < 4

    assert train("--epochs", 4, "--teacher_views", 2, save_dir=save_dir) == killed
    for name in ("resnet8_last.pth", "resnet8_best.pth"):
        for key in ("model", "layer", "teacher_layer"):
            assert_equal_tensors(load(whole / name)[key], load(killed / name)[key])
    assert read_metrics(whole) == read_metrics(killed)
    events = read_events(killed)
    for tag, values in read_events(whole).items():
        assert [step for step, _ in events[tag]] == [1, 2, 3, 4]
        assert tag in ("seconds", "images_per_second") or events[tag] == values
    assert not list(killed.glob("*.tmp"))


def train_and_die(train: Callable[..., Path], saves: int, *options, save_dir: Path) -> None:
    """Train in a process that kills itself once it has written so many checkpoints."""
    save, paths = checkpoint.save, []

    def save_and_die(state: dict, path: Path) -> None:
        save(state, path)
        if path.name == "resume.pth":
            paths.append(path)
        if len(paths) == saves:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save = save_and_die
    train(*options, save_dir=save_dir)


@pytest.mark.parametrize(
    ("options", "saves", "epoch", "steps"),
    [
        (["--distill", "crd", "--nce_k", "20", "--feat_dim", "8"], 2, 1, 4),
        (["--labels", "0.2", "--holdout", "0.2", "--optimizer", "adamw"], 2, 2, 2),
    ],
)
def test_killed_inside_an_epoch_and_resumed_ends_bit_identical(train, tmp_path, capsys, options, saves, epoch, steps):
    """Saved after every second of five or four steps, but for the last; the first epoch's end is too soon after."""
    options = [*options, "--epochs", "2", "--teacher_views", "2", "--save_steps", "2"]
    whole = train(*options, save_dir=tmp_path / "whole")

    save_dir = tmp_path / "killed"
    assert forked(train_and_die, train, saves, *options, save_dir=save_dir) == -signal.SIGKILL
    capsys.readouterr()
    killed = train(*options, save_dir=save_dir)
    assert f"resuming {killed} after step {steps} of epoch {epoch}\n" in capsys.readouterr().out
    for name in ("resnet8_last.pth", "resnet8_best.pth"):
        for key in ("model", "layer", "teacher_layer"):
            assert_equal_tensors(load(whole / name)[key], load(killed / name)[key])
    assert read_metrics(whole) == read_metrics(killed)
    assert not list(killed.glob("*.tmp"))


def stop_inside(monkeypatch, epoch: int, train: Callable[[], object]) -> None:
    """Interrupt training after what it first saves inside an epoch."""
    with monkeypatch.context() as patch:
        saved = Run.save_inside

        def save_and_stop(run, steps, state):
            saved(run, steps, state)
            if run.first_epoch == epoch:
                raise KeyboardInterrupt

        patch.setattr(Run, "save_inside", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train()
    gc.collect()  # the run, which holds its folder's lock


def photographs(folder: Path, mapped: bool) -> ImageDataset:
    """Squares of 37 pixels, of which a student sees 32, in two files, or read from them."""

    def split(name: str, count: int) -> Split:
        path, shape = folder / name, (count, 37, 37, 3)
        if not path.exists():
            np.random.default_rng(count).integers(0, 256, shape, dtype=np.uint8).tofile(path)
        images = np.memmap(path, dtype=np.uint8, mode="c", shape=shape)
        images = torch.from_numpy(images if mapped else images.copy()).permute(0, 3, 1, 2)
        return Split(images, torch.arange(count) % 5, mapped)

    classes = ["a", "b", "c", "d", "e"]
    return ImageDataset("photos", classes, split("train", 70), split("test", 12), views=ResizedCropViews(32))


@pytest.mark.parametrize(
    "options", [["--teacher_views", 3, "--holdout", 0.2], ["--teacher_views", 0, "--views", "shared"]]
)
def test_photographs_in_a_file_train_as_in_memory_and_resume_inside_an_epoch(train, tmp_path, monkeypatch, options):
    options = ["--dataset", "photos", "--epochs", 2, "--save_steps", 2, *options]
    monkeypatch.setitem(dataset.DATASETS, "photos", lambda data_dir: photographs(tmp_path, mapped=False))
    whole = train(*options, save_dir=tmp_path / "whole")
    assert any(record["loss_distill"] > 0 for record in read_metrics(whole))

    monkeypatch.setitem(dataset.DATASETS, "photos", lambda data_dir: photographs(tmp_path, mapped=True))
    stop_inside(monkeypatch, 1, lambda: train(*options))
    resumed = train(*options)
    assert read_metrics(resumed) == read_metrics(whole)
    for key in ("model", "layer", "teacher_layer"):
        assert_equal_tensors(load(resumed / "resnet8_last.pth")[key], load(whole / "resnet8_last.pth")[key])


def test_photographs_have_views_without_end(train, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(dataset.DATASETS, "photos", lambda data_dir: photographs(tmp_path, mapped=True))
    with pytest.raises(SystemExit) as stopped:
        train("--dataset", "photos", "--teacher_views", "all")
    assert stopped.value.code == 2
    assert "error: --teacher_views all: a photograph has endlessly many views; use a number" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train("--teacher_views", 163)
    assert "error: --teacher_views 163: an image of 32 pixels has 162 views; use all" in capsys.readouterr().err


def test_saving_inside_an_epoch_changes_nothing_and_may_begin_later(train, tmp_path):
    plain = train("--epochs", 2)
    train("--epochs", 1, "--name", "saved")
    saved = train("--epochs", 2, "--save_steps", 1, "--name", "saved")
    assert read_metrics(plain) == read_metrics(saved)
    assert_equal_tensors(load(plain / "resnet8_last.pth")["model"], load(saved / "resnet8_last.pth")["model"])


def test_a_first_stage_goes_on_inside_an_epoch(train, tmp_path, monkeypatch):
    train("--model", "resnet14", "--epochs", 1, script=train_teacher)
    (cnn,) = tmp_path.glob("save/models/*/resnet14_last.pth")
    options = ["--distill", "fsp", "--path_t", cnn, "--learning_rate", 0.001, "--init_epochs", 2, "--epochs", 1]
    options += ["--save_steps", 2]
    whole = train(*options, save_dir=tmp_path / "whole")
    stop_inside(monkeypatch, 2, lambda: train(*options))
    resumed = train(*options)
    assert_equal_tensors(load(whole / "resnet8_last.pth")["model"], load(resumed / "resnet8_last.pth")["model"])
    assert read_metrics(whole / "init") == read_metrics(resumed / "init")


def test_a_finished_run_prints_its_result_and_trains_no_more(train, capsys):
    folder = train("--epochs", 1)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    capsys.readouterr()
    train("--epochs", 1)
    assert "best accuracy" in capsys.readouterr().out
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_more_epochs_continue_a_finished_run(train):
    longer = train("--epochs", 3)
    short = train("--epochs", 1)
    assert short != longer
    before = read_metrics(short)
    copied = train("--epochs", 3, "--seed", 0, "--resume", short / "resume.pth", save_dir=short.parents[1] / "copied")
    assert copied.name == longer.name
    assert read_metrics(short) == before
    continued = train("--epochs", 3, "--name", short.name)
    assert continued == short
    for other in (copied, continued):
        assert read_metrics(longer) == read_metrics(other)
        assert_equal_tensors(load(longer / "resnet8_last.pth")["model"], load(other / "resnet8_last.pth")["model"])
