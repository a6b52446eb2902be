"""train_student.py with few labels or none, and with views that student and teacher share."""

import json
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from runs import assert_equal_tensors, load, read_metrics

import dataset
import train_teacher
from dataset.loader import Loader
from dataset.splits import keep_labels
from dataset.views import view_order
from distiller_zoo import EGA
from helper import bank as bank_module
from helper.bank import encode_view
from helper.records import best_record, read_run
from models import create_student
from models.clip_teacher import ImageEncoder
from models.heads import TeacNet
from report.curves import plot_runs
from report.table import run_table


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
    options = read_run(folder).options
    assert (options["joint"], options["labels"]) == ("teacher", 0)
    epoch = best_record(read_metrics(folder))["epoch"]
    assert f"nearest neighbours as the teacher's (epoch {epoch}), in {folder}" in capsys.readouterr().out
    for record in read_metrics(folder):
        assert (record["test_loss"], record["test_acc"], record["test_acc_top5"]) == (None, None, None)
        assert not {"teacher_acc", "train_acc", "loss_cls", "loss_teacher"} & record.keys()
        assert record["train_loss"] == pytest.approx(record["loss_node"] + record["loss_edge"], rel=1e-5)
    best = load(folder / "resnet8_best.pth")
    assert best["epoch"] == epoch
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
    assert "resnet8: EGA" in run_table([read_run(folder)])
    assert plot_runs([folder]).is_file()


def reference_few_labels(tiny_dataset, tiny_clip, joint: bool) -> dict:
    """An epoch with a fifth of the labels written down: those rows' part of each batch's classification."""
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
    known = keep_labels(tiny_dataset.train.targets, 0.2, tiny_dataset.classes) >= 0
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
            count = len(batch.target)
            loss = loss + F.cross_entropy(out.logits[rows], batch.target[rows], reduction="sum") / count
            loss_t = F.cross_entropy(logit_t[rows], batch.target[rows], reduction="sum") / count
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
