"""train_student.py as its users run it, on a tiny CLIP and a tiny data set."""

import gc
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import assert_equal_tensors, assert_refused, load, read_events, read_metrics

import train_student
import train_teacher
from conftest import snapshot
from dataset.loader import Loader
from distiller_zoo import EGA, DistillKL
from helper import bank as bank_module
from helper.bank import encode_view
from models import create_model, create_student
from models.clip_teacher import ImageEncoder
from models.heads import TeacNet
from models.weights import sha256_of
from report.curves import plot_runs


def test_ega_writes_what_the_readme_says(train):
    folder = train("--epochs", 2)
    assert {"options.json", "metrics.jsonl", "resnet8_best.pth", "resnet8_last.pth", "resume.pth"} <= {
        path.name for path in folder.iterdir()
    }
    assert folder.name[:-6] == "resnet8_tiny_clip_tiny_ega_seed0_trial1_"
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


@pytest.mark.parametrize(
    ("script", "best"), [(train_student, "resnet8_best.pth"), (train_teacher, "tiny_clip_best.pth")]
)
def test_holdout_chooses_the_best_epoch(train, script, best):
    folder = train("--epochs", 3, "--holdout", 0.2, script=script)
    records = read_metrics(folder)
    chosen = max(records, key=lambda record: record["val_acc"])
    assert load(folder / best)["epoch"] == chosen["epoch"]


def test_learning_rate_decays_after_its_epochs(train):
    folder = train("--epochs", 4, "--max_steps", 1, "--lr_decay_epochs", "1,3", "--learning_rate", 0.1)
    assert [record["lr"] for record in read_metrics(folder)] == pytest.approx([0.1, 0.01, 0.01, 0.001])


@pytest.mark.parametrize(
    ("batch_size", "said"), [(34, "has 2 of --batch_size 34, too few for batch norm: try 28"), (23, ""), (20, "")]
)
def test_a_last_step_on_too_few_images_is_told(train, capsys, batch_size, said):
    train("--distill", "none", "--epochs", 1, "--batch_size", batch_size)
    out = capsys.readouterr().out
    assert said in out and ("too few" in out) == bool(said)


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
    assert "_folder-my-photos_" in folder.name
    recorded = json.loads((folder / "options.json").read_text())
    assert recorded["image_size"] == 32 and len(recorded["dataset_sha256"]) == 64
    assert [record["loss_cls"] > 0 and "test_acc" in record for record in read_metrics(folder)] == [True, True]
    assert plot_runs([folder]).is_file()
    # The data set is known by its content: it may move.
    moved = tmp_path / "elsewhere" / "my photos"
    moved.parent.mkdir()
    root.rename(moved)
    options[3] = moved
    assert train(*options, "--epochs", 3, "--name", folder.name) == folder
    Image.new("RGB", (9, 9)).save(moved / "train" / "x" / "more.jpg")
    with pytest.raises(SystemExit):  # and not change
        train(*options, "--epochs", 4, "--name", folder.name)
    assert_refused(capsys, 2, "dataset_sha256")
    assert train(*options) != folder


def test_a_folder_without_test_images_is_tested_on_what_is_held_out(train, tmp_path, capsys):
    root = write_photos(tmp_path / "photos", "train/a", "train/b", count=8)
    options = ["--dataset", "folder", "--data_dir", root, "--image_size", 32, "--epochs", 1]
    train(*options, "--max_steps", 1)
    assert "--holdout 0.1" in capsys.readouterr().out
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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--clip_mode", "no/such/file.pt"], ["no/such/file.pt", "ViT-B/32"]),
        (["--path_t", "no/such/head.pth"], ["no/such/head.pth"]),
        (["--resume", "no/such/resume.pth"], ["no/such/resume.pth"]),
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
    folder = train("--epochs", 1, "--name", "run")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(SystemExit) as exit_:
        train("--epochs", 2, *change, "--name", "run")
    assert exit_.value.code == 2
    assert_refused(capsys, 2, change[0].lstrip("-"))
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_corrupt_resume_file_is_refused_and_kept(train, capsys):
    resume = train("--epochs", 2) / "resume.pth"
    resume.write_bytes(resume.read_bytes()[:1000])
    with pytest.raises(SystemExit) as exit_:
        train("--epochs", 2)
    assert exit_.value.code == 2
    assert_refused(capsys, 2, "resume.pth")
    assert len(resume.read_bytes()) == 1000


def test_a_loss_that_is_not_finite_stops_with_code_3(train, capsys):
    folder = train("--epochs", 1, "--name", "run")
    good = (folder / "resume.pth").read_bytes()
    state = load(folder / "resume.pth")
    state["state"]["student"]["head.fit_dim_Net.weight"].fill_(float("inf"))
    torch.save(state, folder / "resume.pth")
    broken = (folder / "resume.pth").read_bytes()
    best = (folder / "resnet8_best.pth").read_bytes()
    with pytest.raises(SystemExit) as exit_:
        train("--epochs", 2, "--name", "run")
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
    assert_refused(capsys, 2, "another encoder")


def test_train_teacher_resumes(train, tmp_path):
    whole = train("--epochs", 3, script=train_teacher, save_dir=tmp_path / "whole")
    train("--epochs", 1, "--name", "run", script=train_teacher)
    resumed = train("--epochs", 3, "--name", "run", script=train_teacher)
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


def test_a_finished_run_is_not_handed_out_for_other_files(train, tiny_clip, tmp_path, capsys):
    """Each finished run is printed for the files that it was trained with, and for no others."""
    options = ["--epochs", 1, "--max_steps", 1]
    files = {}
    for name in ("a", "b"):
        torch.manual_seed(ord(name))
        torch.save(create_model("resnet8", 0).state_dict(), tmp_path / f"{name}.pth")
        files[name] = ["--init_s", tmp_path / f"{name}.pth"]
    runs = [train(*options, *words) for words in ([], files["a"], files["b"])]
    assert len(set(runs)) == 3
    moved = (tmp_path / "a.pth").rename(tmp_path / "moved.pth")
    before = snapshot(tmp_path / "save")
    assert train(*options, "--init_s", moved) in runs  # a file is known by its content
    assert snapshot(tmp_path / "save") == before
    for words in (["--init_s", "/nonexistent.pth"], ["--clip_mode", "timm:resnet10t=/nonexistent.pth"]):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            train(*options, *words)
        assert_refused(capsys, 2, "/nonexistent.pth", "no such file")
    # Under a name of one's own the files are compared.
    train(*options, *files["b"], "--name", "run")
    for words in ([], ["--init_s", moved]):
        capsys.readouterr()
        gc.collect()  # a refused run, which holds its folder's lock
        with pytest.raises(SystemExit):
            train(*options, *words, "--name", "run")
        assert_refused(capsys, 2, "init_sha256", "another --name")


def test_a_finished_run_is_not_handed_out_for_another_encoder_of_the_same_name(train, clip_archives, tmp_path):
    options = ["--epochs", 1, "--max_steps", 1, "--clip_mode", tmp_path / "clip.pt"]
    runs = []
    for path in clip_archives.values():
        shutil.copy(path, tmp_path / "clip.pt")
        runs.append(train(*options))
    assert runs[0] != runs[1]
    hashes = [json.loads((run / "options.json").read_text())["clip_sha256"] for run in runs]
    assert hashes == [sha256_of(path) for path in clip_archives.values()]


def test_a_finished_run_is_not_handed_out_for_another_folder_of_the_same_name(train, tmp_path):
    runs = []
    for number, place in enumerate(("one", "other")):
        root = write_photos(tmp_path / place / "photos", "train/x", "train/y", "test/x")
        Image.new("RGB", (40, 40), (99 * number, 0, 0)).save(root / "train" / "x" / "more.png")
        runs.append(train("--dataset", "folder", "--data_dir", root, "--image_size", 32, "--epochs", 1))
    assert runs[0] != runs[1]
    assert runs[0].name[:-6] == runs[1].name[:-6]


def test_the_commands_it_ends_with_are_quoted_for_a_shell(train, tmp_path, capsys):
    folder = train("--distill", "none", "--epochs", 1, save_dir=tmp_path / "my runs")
    commands = dict(re.findall(r"^(evaluate|export) it: +python (.*)$", capsys.readouterr().out, re.MULTILINE))
    assert shlex.split(commands["evaluate"]) == ["evaluate.py", str(folder)]
    assert shlex.split(commands["export"]) == ["export.py", str(folder), "--format", "onnx"]
