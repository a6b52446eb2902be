import dataclasses
import json
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from processes import forked

import pretrain_clip
from dataset import DATASETS, Split
from dataset.views import CLIP_NORMALIZATION, normalize
from helper.contrastive import ContrastiveStep, caption_tokens
from helper.logger import Logger
from models.clip_teacher import ImageEncoder, load_clip

VIT = ["--vision_layers", "1", "--vision_width", "64", "--vision_patch", "16"]
RESNET = ["--vision_layers", "1,1,1,1", "--vision_width", "8"]
TINY = ["--text_layers", "1", "--embed_dim", "16", "--dataset", "tiny", "--batch_size", "16"]
CPU = ["--device", "cpu", "--amp", "off"]


def train(save_dir: Path, *more) -> Path:
    """Run pretrain_clip.py in this process; the run's folder."""
    pretrain_clip.main([*TINY, *CPU, "--save_dir", str(save_dir), *map(str, more)])
    (folder,) = (save_dir / "clip").iterdir()
    return folder


def read_metrics(folder: Path) -> list[dict]:
    """The records, less what measures time."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("seconds", "images_per_second")} for r in records]


def assert_equal_clips(one: Path, other: Path) -> None:
    one, other = (torch.load(folder / "clip.pt", weights_only=True) for folder in (one, other))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("vision", [VIT, RESNET, [*VIT, "--resolution", 48]], ids=["vit", "resnet", "vit at 48"])
def test_the_result_loads_like_any_clip(tiny_dataset, tmp_path, vision):
    folder = train(tmp_path, *vision, "--epochs", 5, "--learning_rate", 3e-3)
    assert {path.name for path in folder.iterdir()} >= {"clip.pt", "metrics.jsonl", "options.json", "resume.pth"}
    metrics = read_metrics(folder)
    assert [record["epoch"] for record in metrics] == list(range(1, 6))
    assert metrics[-1]["train_loss"] < metrics[0]["train_loss"]

    # Its accuracy, by OpenAI's own forward pass on what another program would load.
    model = load_clip(folder / "clip.pt")
    assert model.visual.conv1.weight.dtype == torch.float16
    resolution = 48 if "--resolution" in vision else 32
    assert model.visual.input_resolution == resolution
    encoder = ImageEncoder(str(folder / "clip.pt"), "")
    assert (encoder.dim, encoder.resolution, encoder.name) == (16, resolution, "clip")
    if resolution == 32:
        image = normalize(tiny_dataset.test.images, CLIP_NORMALIZATION)
        embedding = encoder(image)
        assert embedding.norm(dim=1).mean() == pytest.approx(10, rel=0.01)
        tokens = caption_tokens(tiny_dataset.classes)
        text = F.normalize(model.float().encode_text(tokens.flatten(0, 1)), dim=1).view(5, tokens.shape[1], 16).mean(1)
        predicted = (embedding @ F.normalize(text, dim=1).T).argmax(dim=1)
        accuracy = 100 * (predicted == tiny_dataset.test.targets).float().mean().item()
        assert accuracy == pytest.approx(metrics[-1]["zero_shot_acc"], abs=5.1)  # fp16 may move one of 20 images


def train_and_die(owner: type, name: str, left: int, save_dir: Path, arguments: list[str]) -> None:
    """Train in a process that kills itself once it has called a method so often."""
    original, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(name)
        if len(calls) > left:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, counted)
    train(save_dir, *arguments)


@pytest.mark.parametrize(
    ("options", "where", "steps"),
    # Five steps an epoch: in the middle of the second one, two of them saved; and with it saved but not yet logged.
    [([*VIT, "--save_steps", "2"], (ContrastiveStep, "_backward", 8), 2), (RESNET, (Logger, "append", 1), 0)],
    ids=["in a step", "before the log"],
)
def test_killed_and_resumed_ends_bit_identical(tiny_dataset, tmp_path, options, where, steps):
    arguments = [*options, "--epochs", "3", "--seed", "4"]
    whole = train(tmp_path / "whole", *arguments)
    assert forked(train_and_die, *where, tmp_path / "killed", arguments) == -signal.SIGKILL
    (folder,) = (tmp_path / "killed" / "clip").iterdir()
    assert torch.load(folder / "resume.pth").get("steps", 0) == steps
    resumed = train(tmp_path / "killed", *arguments)
    assert_equal_clips(whole, resumed)
    assert read_metrics(whole) == read_metrics(resumed)
    assert len(read_metrics(resumed)) == 3


def test_a_finished_run_prints_its_result_and_trains_no_more(tiny_dataset, tmp_path, capsys):
    folder = train(tmp_path, *VIT, "--epochs", 1)
    before = (folder / "clip.pt").read_bytes(), (folder / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    train(tmp_path, *VIT, "--epochs", 1)
    out = capsys.readouterr().out
    assert "zero-shot accuracy" in out
    assert "Epoch" not in out
    assert before == ((folder / "clip.pt").read_bytes(), (folder / "metrics.jsonl").read_bytes())


def test_images_without_a_label_have_no_caption(tiny_dataset, tmp_path, monkeypatch):
    def metrics(name: str, rows: int) -> list[dict]:
        targets = tiny_dataset.train.targets.clone()
        targets[50:] = -1
        split = Split(tiny_dataset.train.images[:rows], targets[:rows])
        monkeypatch.setitem(DATASETS, "tiny", lambda data_dir: dataclasses.replace(tiny_dataset, train=split))
        return read_metrics(train(tmp_path / name, *VIT, "--epochs", 1))

    assert metrics("with them", 70) == metrics("without", 50)


def test_max_steps_and_eval_freq(tiny_dataset, tmp_path):
    folder = train(tmp_path, *VIT, "--epochs", 3, "--max_steps", 1, "--eval_freq", 2, "--micro_batch", 5)
    metrics = read_metrics(folder)
    assert ["zero_shot_acc" in record for record in metrics] == [False, True, True]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--vision_layers", "1,2"], "1,2"),
        (["--vision_layers", "0"], "0"),
        (["--vision_layers", "two"], "two"),
        (["--vision_layers", "2", "--vision_width", "64"], "--vision_patch"),
        (["--vision_layers", "2", "--vision_width", "64", "--vision_patch", "5"], "--resolution 32"),
        (["--vision_layers", "2", "--vision_width", "60", "--vision_patch", "4"], "multiple of 64"),
        ([*RESNET, "--vision_patch", "4"], "--vision_patch"),
        ([*RESNET, "--vision_width", "7"], "even"),
        ([*RESNET, "--resolution", "40"], "multiple of 32"),
        (["--text_width", "100"], "multiple of 64"),
        (["--batch_size", "1"], "--batch_size"),
        (["--warmup", "2"], "--warmup"),
        (["--micro_batch", "0"], "--micro_batch"),
        (["--learning_rate", "nan"], "--learning_rate"),
        (["--dataset", "cifar1000"], "cifar100"),
    ],
)
def test_bad_input(tiny_dataset, tmp_path, capsys, arguments, word):
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, *arguments)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert word in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [["--batch_size", 23], ["--micro_batch", 5]], ids=str)
def test_a_single_last_image_joins_the_others(tiny_dataset, tmp_path, options):
    """70 images in batches of 23 leave one, and a batch of 16 in chunks of 5 too."""
    train(tmp_path, *RESNET, "--epochs", 1, *options)


def test_single_images_for_batch_norm_are_refused(tiny_dataset, tmp_path, capsys):
    """More pixels or a ViT can take them."""
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, *RESNET, "--epochs", 1, "--micro_batch", 1)
    assert stop.value.code == 2
    assert "batch norm" in capsys.readouterr().err
    train(tmp_path / "other", *VIT, "--epochs", 1, "--max_steps", 1, "--micro_batch", 1)


def test_other_options_do_not_resume(tiny_dataset, tmp_path, capsys):
    train(tmp_path, *VIT, "--epochs", 1, "--name", "run")
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, *VIT, "--epochs", 2, "--learning_rate", 1, "--name", "run")
    assert stop.value.code == 2
    assert "learning_rate" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run(tiny_dataset, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, *VIT, "--epochs", 2, "--learning_rate", 1e30)
    assert stop.value.code == 3
    assert "train_loss" in capsys.readouterr().err
    assert not list(tmp_path.rglob("clip.pt"))
