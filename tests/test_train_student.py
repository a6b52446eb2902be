"""train_student.py as its users run it, on a tiny CLIP and a tiny data set."""

import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dataset
import train_teacher
from dataset import ImageDataset, Split
from dataset.loader import Loader, keep_labels
from dataset.views import ResizedCropViews, view_order
from distiller_zoo import EGA, DistillKL
from helper import bank as bank_module
from helper.bank import encode_view
from helper.plots import plot_runs
from helper.report import read_run, table
from helper.run import Run
from models import create_student
from models.clip_teacher import ImageEncoder
from models.heads import TeacNet

ROOT = Path(__file__).parent.parent


def read_metrics(folder: Path, timed: bool = False) -> list[dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clock = () if timed else ("seconds", "images_per_second")
    return [{k: v for k, v in record.items() if k not in clock} for record in records]


def read_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    tb_folder = folder.parent.parent / "student_tensorboards" / folder.name
    events = EventAccumulator(str(tb_folder), purge_orphaned_data=False).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def assert_equal_tensors(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_ega_writes_what_the_readme_says(train):
    folder = train("--epochs", 2)
    assert {"options.json", "metrics.jsonl", "resnet8_best.pth", "resnet8_last.pth", "resume.pth"} <= {
        path.name for path in folder.iterdir()
    }
    assert folder.name == ("Sresnet8_Ttiny_clip_f8_tiny_ega_r1_a0_b1_node0.8_edge0.24_batchsize16_seed0_trial1")
    records = read_metrics(folder, timed=True)
    assert [record["epoch"] for record in records] == [1, 2]
    named = {"epoch", "lr", "train_loss", "train_acc", "test_loss", "test_acc", "test_acc_top5", "teacher_acc"}
    named |= {"seconds", "images_per_second", "loss_cls", "loss_distill", "loss_node", "loss_edge", "loss_teacher"}
    for record in records:
        assert set(record) == named
        assert record["train_loss"] == pytest.approx(record["loss_cls"] + record["loss_distill"], rel=1e-5)
        assert record["loss_distill"] == pytest.approx(record["loss_node"] + record["loss_edge"], rel=1e-5)
    events = read_events(folder)
    assert set(events) == named - {"epoch"}
    assert events["train_loss"] == [(r["epoch"], pytest.approx(r["train_loss"])) for r in records]
    options = json.loads((folder / "options.json").read_text())
    assert options["amp"] == "off" and options["teacher_views"] == 1 and len(options["clip_sha256"]) == 64


@pytest.mark.parametrize("distill", ["none", "kd", "ega"])
def test_a_method_takes_steps(train, distill):
    before = train("--epochs", 1, "--max_steps", 1, "--distill", distill, "--trial", "one")
    after = train("--epochs", 1, "--max_steps", 3, "--distill", distill, "--trial", "three")
    weights = [load(folder / "resnet8_last.pth") for folder in (before, after)]
    for key in ("model", "layer"):
        names = [name for name, value in weights[0][key].items() if value.is_floating_point()]
        assert any(not torch.equal(weights[0][key][name], weights[1][key][name]) for name in names)


def reference_epoch(opt_lr: float, tiny_dataset, tiny_clip, method: str) -> tuple[dict, dict]:
    """One epoch written down step by step, with two backward passes and plain SGD, from the same start."""
    encoder = ImageEncoder(str(tiny_clip), "")
    torch.manual_seed(0)
    head = TeacNet(encoder.dim, 8, 5)
    torch.manual_seed(0)
    student = create_student("resnet8", 8, 5).train()
    settings = {"momentum": 0.9, "weight_decay": 5e-4}
    optimizers = [
        torch.optim.SGD(student.parameters(), opt_lr, **settings),
        torch.optim.SGD(head.parameters(), 0.01, **settings),
    ]
    loader = Loader(tiny_dataset.train, "train", 16, torch.device("cpu"), training=True, teacher_views=3)
    for batch in loader.epoch(1):
        images = tiny_dataset.train.images[batch.index]
        f_t, logit_t = head(
            encode_view(encoder, tiny_dataset.views, images, batch.index, batch.teacher_view).half().float()
        )
        out = student(batch.image)
        loss = torch.nn.functional.cross_entropy(out.logits, batch.target)
        if method == "ega":
            loss = loss + EGA(0.8, 0.24)(out.embedding, f_t.detach())
        else:
            loss = 0.1 * loss + 0.9 * DistillKL(4)(out.logits, logit_t.detach())
        for optimizer, value in zip(
            optimizers, (loss, torch.nn.functional.cross_entropy(logit_t, batch.target)), strict=True
        ):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    return student.backbone.state_dict(), head.state_dict()


@pytest.mark.parametrize("method", ["ega", "kd"])
def test_an_epoch_equals_the_papers_steps_written_out(train, tiny_dataset, tiny_clip, method):
    folder = train("--epochs", 1, "--distill", method, "--teacher_views", 3, "--learning_rate", 0.02)
    student, head = reference_epoch(0.02, tiny_dataset, tiny_clip, method)
    last = load(folder / "resnet8_last.pth")
    for name, value in student.items():
        torch.testing.assert_close(last["model"][name], value, rtol=1e-3, atol=2e-4)
    for name, value in head.items():
        torch.testing.assert_close(last["teacher_layer"][name], value, rtol=1e-4, atol=1e-5)


def test_a_larger_weight_of_distillation_leaves_the_teachers_head_alone(train):
    heads = [
        load(train("--epochs", 1, "-b", b, "-a", a) / "resnet8_last.pth")["teacher_layer"]
        for a, b in ((0, 1), (1, 100))
    ]
    assert_equal_tensors(*heads)


def test_seed_decides_everything(train, tmp_path):
    a = train("--epochs", 1, "--seed", 3)
    b = train("--epochs", 1, "--seed", 3, save_dir=tmp_path / "again")
    c = train("--epochs", 1, "--seed", 4)
    assert read_metrics(a) == read_metrics(b) != read_metrics(c)


def test_embeddings_on_the_fly_equal_the_banks(train):
    # The bank rounds to fp16; the views drawn are the same ones.
    options = ["--epochs", 1, "--max_steps", 2, "--views", "shared"]
    runs = [train(*options, "--teacher_views", views, "--trial", views) for views in ("all", "0")]
    losses = [read_metrics(run)[0]["loss_distill"] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def test_holdout_chooses_the_best_epoch(train):
    folder = train("--epochs", 3, "--holdout", 0.2)
    records = read_metrics(folder)
    best = max(records, key=lambda record: record["val_acc"])
    assert load(folder / "resnet8_best.pth")["epoch"] == best["epoch"]


def test_learning_rate_decays_after_its_epochs(train):
    folder = train("--epochs", 4, "--max_steps", 1, "--lr_decay_epochs", "1,3", "--learning_rate", 0.1)
    assert [record["lr"] for record in read_metrics(folder)] == pytest.approx([0.1, 0.01, 0.01, 0.001])


# ---- few labels, or none


@pytest.fixture
def encoders(tiny_clip, tmp_path, monkeypatch) -> dict[str, str]:
    """A tiny frozen encoder of every maker by its name, and the width of its embedding."""
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "timm.pth")
    small = {"layers": 1, "width": 64, "head_width": 32, "image_size": 32, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 20, "width": 32, "heads": 2, "layers": 1}
    config = {"embed_dim": 24, "vision_cfg": small, "text_cfg": text}
    (tmp_path / "tiny_open_clip.json").write_text(json.dumps(config))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", open_clip.factory._MODEL_CONFIGS.copy())
    open_clip.add_model_config(tmp_path / "tiny_open_clip.json")
    torch.save(open_clip.create_model("tiny_open_clip").state_dict(), tmp_path / "open_clip.pth")
    return {
        "openai": (str(tiny_clip), 16),
        "timm": (f"timm:test_vit={tmp_path / 'timm.pth'}", 64),
        "open_clip": (f"open_clip:tiny_open_clip={tmp_path / 'open_clip.pth'}", 24),
    }


@pytest.mark.parametrize("views", ["0", "1"])
@pytest.mark.parametrize("maker", ["openai", "timm", "open_clip"])
def test_without_labels_the_student_learns_the_encoders_own_space(train, encoders, capsys, maker, views):
    name, dim = encoders[maker]
    options = ["--joint", "teacher", "--labels", 0, "-r", 0, "-b", 1, "--teacher_resolution", 32, "--epochs", 2]
    folder = train("--clip_mode", name, "--teacher_views", views, *options, joint=True)
    assert "_jointteacher_tiny_labels0_ega_" in folder.name
    assert f"2 epochs without labels, which measure no accuracy, in {folder}" in capsys.readouterr().out
    for record in read_metrics(folder):
        assert (record["test_loss"], record["test_acc"], record["test_acc_top5"]) == (None, None, None)
        assert not {"teacher_acc", "train_acc", "loss_cls", "loss_teacher"} & record.keys()
        assert record["train_loss"] == pytest.approx(record["loss_node"] + record["loss_edge"], rel=1e-5)
    best = load(folder / "resnet8_best.pth")
    assert best["epoch"] == 2
    assert best["layer"]["fit_dim_Net.weight"].shape == (dim, 64)
    assert "teacher_layer" not in best


def test_nothing_of_a_run_without_labels_depends_on_them(train, tiny_dataset, tmp_path, monkeypatch):
    options = ["--joint", "teacher", "--labels", 0, "-r", 0, "--epochs", 2]
    folder = train(*options, joint=True)
    targets = tiny_dataset.train.targets
    shuffled = replace(tiny_dataset, train=replace(tiny_dataset.train, targets=targets.flip(0)))
    monkeypatch.setitem(dataset.DATASETS, "tiny", lambda data_dir: shuffled)
    again = train(*options, save_dir=tmp_path / "again", joint=True)
    assert read_metrics(folder) == read_metrics(again)
    assert_equal_tensors(load(folder / "resnet8_last.pth")["model"], load(again / "resnet8_last.pth")["model"])


def test_a_run_without_labels_is_told_of_and_drawn(train):
    folder = train("--joint", "teacher", "--labels", 0, "-r", 0, "--epochs", 2, joint=True)
    assert "resnet8: EGA" in table([read_run(folder)])
    assert plot_runs([folder]).is_file()


def reference_few_labels(tiny_dataset, tiny_clip, joint: bool) -> dict:
    """An epoch with a fifth of the labels written down: the classification of those rows alone."""
    encoder = ImageEncoder(str(tiny_clip), "")
    torch.manual_seed(0)
    head = TeacNet(encoder.dim, 8, 5)
    torch.manual_seed(0)
    student = create_student("resnet8", encoder.dim if joint else 8, 5).train()
    settings = {"momentum": 0.9, "weight_decay": 5e-4}
    optimizers = [
        torch.optim.SGD(student.parameters(), 0.02, **settings),
        torch.optim.SGD(head.parameters(), 0.01, **settings),
    ]
    known = keep_labels(tiny_dataset.train.targets, 0.2) >= 0
    assert known.sum() == 15
    loader = Loader(tiny_dataset.train, "train", 4, torch.device("cpu"), training=True, teacher_views=1)
    empty = 0
    for batch in loader.epoch(1):
        images = tiny_dataset.train.images[batch.index]
        x = encode_view(encoder, tiny_dataset.views, images, batch.index, batch.teacher_view).half().float()
        f_t, logit_t = head(x)
        out, rows = student(batch.image), known[batch.index]
        loss, loss_t = EGA(0.8, 0.24)(out.embedding, x if joint else f_t.detach()), 0 * logit_t.sum()
        empty += not rows.any()
        if rows.any():
            loss = loss + F.cross_entropy(out.logits[rows], batch.target[rows])
            loss_t = F.cross_entropy(logit_t[rows], batch.target[rows])
        else:
            loss = loss + 0 * out.logits.sum()
        for optimizer, value in zip(optimizers, (loss, loss_t), strict=True):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    assert empty  # a batch without any label
    return student.state_dict() | {f"teacher.{name}": value for name, value in head.state_dict().items()}


@pytest.mark.parametrize("joint", [False, True])
def test_few_labels_equal_the_steps_written_out(train, tiny_dataset, tiny_clip, joint):
    options = ["--epochs", 1, "--labels", 0.2, "--learning_rate", 0.02, "--batch_size", 4, "--teacher_views", 1]
    folder = train(*options, *(["--joint", "teacher"] if joint else []), joint=joint)
    last = load(folder / "resnet8_last.pth")
    found = {f"backbone.{name}": value for name, value in last["model"].items()}
    found |= {f"head.{name}": value for name, value in last["layer"].items()}
    found |= {f"teacher.{name}": value for name, value in last.get("teacher_layer", {}).items()}
    expected = reference_few_labels(tiny_dataset, tiny_clip, joint)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=2e-4)


def test_without_labels_a_frozen_head_or_a_cnn_teaches_the_classes(train, tmp_path):
    head = train("--epochs", 1, script=train_teacher) / "tiny_clip_last.pth"
    cnn = train("--model", "resnet14", "--epochs", 1, script=train_teacher) / "resnet14_last.pth"
    for teacher in (head, cnn):
        options = ["--distill", "kd", "-r", 0, "-a", 1, "--labels", 0, "--path_t", teacher, "--epochs", 1]
        (record,) = read_metrics(train(*options, save_dir=tmp_path / teacher.stem))
        assert record["test_acc"] is not None
        assert "teacher_acc" in record
        assert "train_acc" not in record


def test_student_and_teacher_share_one_of_the_banks_views(train, tiny_dataset, monkeypatch):
    seen = []
    lookup = bank_module.EmbeddingBank.__call__

    def looked_up(bank, split, index, view):
        seen.extend(zip(index.tolist(), view.tolist(), strict=True) if split == "train" else [])
        return lookup(bank, split, index, view)

    monkeypatch.setattr(bank_module.EmbeddingBank, "__call__", looked_up)
    folder = train("--epochs", 3, "--views", "shared", "--teacher_views", 2)
    first = view_order(np.arange(70), 2)
    assert len(seen) == 3 * 70
    assert all(view in first[row] for row, view in seen)
    assert len(read_metrics(folder)) == 3


# ---- resuming

CHILD = """
import sys
sys.path.insert(0, {root!r})
from tests.conftest import make_dataset
import dataset, train_student
dataset.DATASETS["tiny"] = lambda data_dir: make_dataset()
train_student.main(sys.argv[1:])
"""


def start_child(arguments: list[str], code: str = CHILD, **kwargs) -> subprocess.Popen:
    command = [sys.executable, "-W", "ignore", "-c", code.replace("{root!r}", repr(str(ROOT))), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, **kwargs)


def test_killed_and_resumed_ends_bit_identical(train, tiny_clip, tmp_path):
    whole = train("--epochs", 4, "--teacher_views", 2, save_dir=tmp_path / "whole")

    save_dir = tmp_path / "killed"
    arguments = f"--dataset tiny --save_dir {save_dir} --device cpu --amp off --batch_size 16 --feature_dim 8".split()
    arguments += f"--clip_mode {tiny_clip} --model_s resnet8 --epochs 4 --teacher_views 2".split()
    child = start_child(arguments)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and child.poll() is None:
        lines = [path.read_text().count("\n") for path in save_dir.glob("student_model/*/metrics.jsonl")]
        if lines and lines[0] >= 1:
            child.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    assert child.wait() == -signal.SIGKILL
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


DIES = CHILD.replace(
    "train_student.main",
    """
import os, signal
from helper import checkpoint
save, saves = checkpoint.save, []
def save_and_die(state, path):
    save(state, path)
    saves.append(path) if path.name == "resume.pth" else None
    if len(saves) == {saves}:
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save = save_and_die
train_student.main""",
)


@pytest.mark.parametrize(
    ("options", "saves", "epoch", "steps"),
    [
        (["--distill", "crd", "--nce_k", "20", "--feat_dim", "8"], 2, 1, 4),
        (["--labels", "0.2", "--holdout", "0.2", "--optimizer", "adamw"], 3, 2, 2),
    ],
)
def test_killed_inside_an_epoch_and_resumed_ends_bit_identical(
    train, tiny_clip, tmp_path, capsys, options, saves, epoch, steps
):
    """Saved after every second of five or four steps, but for the last, and after each epoch."""
    options = [*options, "--epochs", "2", "--teacher_views", "2", "--save_steps", "2"]
    whole = train(*options, save_dir=tmp_path / "whole")

    save_dir = tmp_path / "killed"
    arguments = f"--dataset tiny --save_dir {save_dir} --device cpu --amp off --batch_size 16 --feature_dim 8".split()
    arguments += [f"--clip_mode={tiny_clip}", "--model_s", "resnet8", *options]
    assert start_child(arguments, DIES.replace("{saves}", str(saves))).wait() == -signal.SIGKILL
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
    assert "error: --teacher_views all: a photograph has views without end; use a number" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train("--teacher_views", 163)
    assert "error: --teacher_views 163: an image of 32 pixels has 162 views; use all" in capsys.readouterr().err


def test_saving_inside_an_epoch_changes_nothing_and_may_begin_later(train, tmp_path):
    plain = train("--epochs", 2)
    train("--epochs", 1, save_dir=tmp_path / "saved")
    saved = train("--epochs", 2, "--save_steps", 1, save_dir=tmp_path / "saved")
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


def test_more_epochs_continue_a_finished_run(train, tmp_path):
    longer = train("--epochs", 3, save_dir=tmp_path / "at_once")
    train("--epochs", 1)
    continued = train("--epochs", 3)
    assert read_metrics(longer) == read_metrics(continued)
    assert_equal_tensors(load(longer / "resnet8_last.pth")["model"], load(continued / "resnet8_last.pth")["model"])


# ---- images in a folder


def write_photos(root: Path, *folders: str, count: int = 6) -> Path:
    """So many images in each folder, in its own colour, under noise."""
    rng = np.random.default_rng(0)
    for number, folder in enumerate(folders):
        (root / folder).mkdir(parents=True)
        for i in range(count):
            colour = rng.integers(40 * number, 40 * number + 60, (48, 40, 3), dtype=np.uint8)
            Image.fromarray(colour).save(root / folder / f"{i}.jpg")
    return root


def test_a_folder_of_images_teaches_a_student(train, tmp_path, capsys):
    classes = ("red hair", "Löwe", "x")
    root = write_photos(tmp_path / "my photos", *(f"train/{name}" for name in classes), "test/x", "unlabelled/deep")
    options = ["--dataset", "folder", "--data_dir", root, "--image_size", 32, "--epochs", 2]
    folder = train(*options)
    assert "_folder-my-photos@32px_" in folder.name
    recorded = json.loads((folder / "options.json").read_text())
    assert recorded["image_size"] == 32 and len(recorded["dataset_sha256"]) == 64
    assert [record["loss_cls"] > 0 and "test_acc" in record for record in read_metrics(folder)] == [True, True]
    assert plot_runs([folder]).is_file()
    # The data set is known by its content: it may move.
    moved = tmp_path / "elsewhere" / "my photos"
    moved.parent.mkdir()
    root.rename(moved)
    options[3] = moved
    assert train(*options, "--epochs", 3) == folder
    Image.new("RGB", (9, 9)).save(moved / "train" / "x" / "more.jpg")
    with pytest.raises(SystemExit):  # and not change
        train(*options, "--epochs", 4)
    assert_refused(capsys, 2, "dataset_sha256")


def test_a_folder_without_test_images_is_tested_on_what_is_held_out(train, tmp_path, capsys):
    root = write_photos(tmp_path / "photos", "train/a", "train/b", count=8)
    options = ["--dataset", "folder", "--data_dir", root, "--image_size", 32, "--epochs", 1]
    with pytest.raises(SystemExit):
        train(*options)
    assert_refused(capsys, 2, "no image in test/CLASS/ or val/CLASS/", "--holdout F")
    head = train(*options, "--holdout", 0.25, script=train_teacher)
    folder = train(*options, "--holdout", 0.25, "--path_t", head / "tiny_clip_last.pth")
    (record,) = read_metrics(folder)
    assert "val_acc" not in record and record["test_acc"] in (0, 25, 50, 75, 100)
    assert json.loads((folder / "options.json").read_text())["holdout"] == 0.25


def test_photographs_are_seen_in_random_resized_crops(train, tmp_path):
    root = write_photos(tmp_path / "photos", "train/a", "train/b", "val/a", "val/b", count=4)
    options = ["--dataset", "folder", "--data_dir", root, "--image_size", 100, "--epochs", 1, "--teacher_views", 2]
    (record,) = read_metrics(train(*options))
    assert 0 <= record["test_acc"] <= 100
    (images,) = (tmp_path / "save" / "images").glob("*/images.u8")
    assert images.stat().st_size == 16 * 114 * 114 * 3


# ---- bad input


def assert_refused(capsys, code: int, *words: str):
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if "error:" in line]
    assert len(errors) == 1 and lines[-1] == errors[0]
    for word in words:
        assert word in errors[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--clip_mode", "no/such/file.pt"], ["no/such/file.pt", "ViT-B/32"]),
        (["--path_t", "no/such/head.pth"], ["no/such/head.pth"]),
        (["--resume", "no/such/resume.pth"], ["no/such/resume.pth"]),
        (["--holdout", "0.001"], ["--holdout"]),
        (["--amp", "fp16"], ["--amp fp16"]),
    ],
)
def test_bad_input_is_refused_in_one_line(train, capsys, options, words):
    with pytest.raises(SystemExit) as exit_:
        train(*options)
    assert exit_.value.code == 2
    assert_refused(capsys, 2, *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused(train, capsys):
    with pytest.raises(SystemExit) as exit_:
        train("--device", "cuda")
    assert exit_.value.code == 2
    assert_refused(capsys, 2, "--device cuda")


def test_a_save_folder_that_cannot_be_written_is_refused(train, capsys, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(SystemExit) as exit_:
        train("--epochs", 1, save_dir=tmp_path / "file" / "save")
    assert exit_.value.code == 2
    assert_refused(capsys, 2, "--save_dir")


@pytest.mark.parametrize("change", [["--weight_decay", "0.1"], ["--teacher_views", "2"], ["--kd_T", "2"]])
def test_a_run_with_other_options_is_not_resumed(train, capsys, change):
    folder = train("--epochs", 1)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(SystemExit) as exit_:
        train("--epochs", 2, *change)
    assert exit_.value.code == 2
    assert_refused(capsys, 2, change[0].lstrip("-"))
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_corrupt_resume_file_is_refused_and_kept(train, capsys):
    resume = train("--epochs", 1) / "resume.pth"
    resume.write_bytes(resume.read_bytes()[:1000])
    with pytest.raises(SystemExit) as exit_:
        train("--epochs", 2)
    assert exit_.value.code == 2
    assert_refused(capsys, 2, "resume.pth")
    assert len(resume.read_bytes()) == 1000


def test_a_loss_that_is_not_finite_stops_with_code_3(train, capsys):
    folder = train("--epochs", 1)
    good = (folder / "resume.pth").read_bytes()
    state = load(folder / "resume.pth")
    state["state"]["student"]["head.fit_dim_Net.weight"].fill_(float("inf"))
    torch.save(state, folder / "resume.pth")
    broken = (folder / "resume.pth").read_bytes()
    best = (folder / "resnet8_best.pth").read_bytes()
    with pytest.raises(SystemExit) as exit_:
        train("--epochs", 2)
    assert exit_.value.code == 3
    assert_refused(capsys, 3, "cls", "step 1")
    assert (folder / "resume.pth").read_bytes() == broken != good
    assert (folder / "resnet8_best.pth").read_bytes() == best
    assert len(read_metrics(folder)) == 1


# ---- the teacher's head, trained first


def test_a_head_is_handed_over_frozen(train, tiny_clip):
    teacher = train("--epochs", 2, script=train_teacher)
    head = load(teacher / "tiny_clip_best.pth")
    folder = train("--epochs", 1, "--path_t", teacher / "tiny_clip_best.pth", "--trial", "seq")
    last = load(folder / "resnet8_last.pth")
    assert_equal_tensors(last["teacher_layer"], head["model"])
    (record,) = read_metrics(folder)
    assert record["teacher_acc"] == pytest.approx(head["test_acc"])
    assert "loss_teacher" not in record


def test_a_head_of_another_shape_or_clip_is_refused(train, capsys, tmp_path):
    path = train("--epochs", 1, script=train_teacher) / "tiny_clip_best.pth"
    with pytest.raises(SystemExit) as exit_:
        train("--epochs", 1, "--path_t", path, "--feature_dim", 4)
    assert exit_.value.code == 2
    assert_refused(capsys, 2, "shape", "--feature_dim")

    head = load(path)
    torch.save(head | {"clip_sha256": "0" * 64}, tmp_path / "other.pth")
    with pytest.raises(SystemExit) as exit_:
        train("--epochs", 1, "--path_t", tmp_path / "other.pth")
    assert exit_.value.code == 2
    assert_refused(capsys, 2, "another CLIP")


def test_train_teacher_resumes(train, tmp_path):
    whole = train("--epochs", 3, script=train_teacher, save_dir=tmp_path / "whole")
    train("--epochs", 1, script=train_teacher)
    resumed = train("--epochs", 3, script=train_teacher)
    assert read_metrics(whole) == read_metrics(resumed)
    assert_equal_tensors(load(whole / "tiny_clip_last.pth")["model"], load(resumed / "tiny_clip_last.pth")["model"])


def test_runs_share_one_bank(train, tiny_clip, tmp_path, monkeypatch):
    train("--epochs", 1)
    renamed = tmp_path / "renamed.pt"
    renamed.write_bytes(tiny_clip.read_bytes())
    encoded = []
    monkeypatch.setattr(bank_module, "encode_view", lambda *args: encoded.append(args))
    train("--epochs", 1, "--distill", "kd", "--seed", 5)
    train("--epochs", 1, script=train_teacher)
    train("--epochs", 1, "--clip_mode", renamed)
    assert not encoded


@pytest.mark.parametrize(
    ("batch_size", "said"), [(23, "has 1 of --batch_size 23, too few for batch norm: try 20"), (20, "")]
)
def test_a_last_step_on_too_few_images_is_told(train, capsys, batch_size, said):
    train("--distill", "none", "--epochs", 1, "--batch_size", batch_size)
    out = capsys.readouterr().out
    assert said in out and ("too few" in out) == bool(said)
