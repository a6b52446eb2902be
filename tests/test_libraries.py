"""train_student.py with teachers and students of timm, open_clip and torchvision, by name and local weights."""

import json
import re

import open_clip
import pytest
import timm
import torch
import torchvision
from runs import assert_equal_tensors, assert_refused, load, read_metrics

import train_teacher
from models.weights import sha256_of

STUDENT = "timm:test_efficientnet"


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, str]:
    """Frozen encoders of three libraries with random weights, by path."""
    folder = tmp_path_factory.mktemp("weights")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
    }
    (folder / "tiny-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "tiny-clip.json")
    torch.manual_seed(0)
    nets = {
        "timm:test_vit": timm.create_model("test_vit"),
        "open_clip:tiny-clip": open_clip.create_model("tiny-clip"),
        "torchvision:shufflenet_v2_x0_5": torchvision.models.shufflenet_v2_x0_5(),
    }
    for name, net in nets.items():
        torch.save(net.state_dict(), folder / f"{name.replace(':', '-')}.pth")
    return {name.partition(":")[0]: f"{name}={folder / name.replace(':', '-')}.pth" for name in nets}


@pytest.mark.parametrize(
    ("library", "resolution", "student", "name"),
    [
        ("timm", 32, "timm:test_efficientnet", "test_efficientnet_test_vit_tiny_ega"),
        ("open_clip", 48, "resnet8", "resnet8_tiny-clip_tiny_ega"),
        ("torchvision", 32, "torchvision:mobilenet_v3_small", "mobilenet_v3_small_shufflenet"),
    ],
)
def test_a_run_of_any_library_goes_on_and_tells_its_weights(
    train, weights, tmp_path, library, resolution, student, name
):
    options = ("--clip_mode", weights[library], "--teacher_resolution", resolution, "--model_s", student)
    whole = train("--epochs", 2, *options, save_dir=tmp_path / "whole")
    assert whole.name.startswith(name)
    train("--epochs", 1, *options, "--name", "run")
    resumed = train("--epochs", 2, *options, "--name", "run")
    assert read_metrics(whole) == read_metrics(resumed)
    stem = student.replace(":", "-")
    assert_equal_tensors(load(whole / f"{stem}_last.pth")["model"], load(resumed / f"{stem}_last.pth")["model"])
    recorded = json.loads((resumed / "options.json").read_text())
    assert recorded["clip_sha256"] == sha256_of(weights[library].partition("=")[2])


def test_embeddings_on_the_fly_equal_the_banks(train, weights):
    options = ("--epochs", 1, "--max_steps", 2, "--clip_mode", weights["timm"], "--teacher_resolution", 32)
    runs = [train(*options, "--views", "shared", "--teacher_views", n, "--trial", n) for n in ("all", "0")]
    losses = [read_metrics(run)[0]["loss_distill"] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)  # the bank is in fp16


def test_a_head_on_a_librarys_encoder_is_handed_over(train, weights):
    sized = ("--teacher_resolution", 32)
    teacher = train("--epochs", 1, "--model", weights["timm"], *sized, script=train_teacher)
    (head,) = teacher.glob("*_best.pth")
    student = train("--epochs", 1, "--clip_mode", weights["timm"], *sized, "--path_t", head)
    assert_equal_tensors(load(student / "resnet8_last.pth")["teacher_layer"], load(head)["model"])


def test_a_student_starts_from_given_weights(train, tmp_path, capsys):
    given = timm.create_model("test_efficientnet", num_classes=9)
    path = tmp_path / "given.pth"
    torch.save(given.state_dict(), path)
    options = ("--distill", "none", "--epochs", 1, "--learning_rate", 1e-12, "--model_s", STUDENT)
    folder = train(*options, "--init_s", path)
    assert "left out" in capsys.readouterr().out
    found = load(*folder.glob("*_last.pth"))["model"]
    for name, x in given.named_parameters():
        if not name.startswith("classifier."):
            torch.testing.assert_close(found[f"net.{name}"], x)
    torch.save({name: x + 1 for name, x in given.state_dict().items()}, path)
    assert train(*options, "--init_s", path) != folder


def test_maps_of_a_cnn_teach_another_librarys_student(train, capsys):
    cnn = train("--epochs", 1, "--model", "timm:test_resnet", "--clip_tn", 0, script=train_teacher)
    (path,) = cnn.glob("*_best.pth")
    students = {"attention": STUDENT, "hint": STUDENT, "reviewkd": STUDENT, "ofd": "torchvision:mobilenet_v2"}
    for method, student in students.items():
        folder = train("--epochs", 1, "--max_steps", 2, "--distill", method, "--path_t", path, "--model_s", student)
        assert read_metrics(folder)[0]["loss_distill"] > 0
    folder = train("--epochs", 1, "--distill", "ega", "--path_t", path, "--model_s", STUDENT)
    assert read_metrics(folder)[0]["loss_edge"] > 0
    with pytest.raises(SystemExit) as exit_:
        train("--epochs", 1, "--distill", "ofd", "--path_t", path, "--model_s", STUDENT)
    assert exit_.value.code == 2
    assert_refused(capsys, 2, "activation that cannot be taken apart")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--model_s", "torchvision:inception_v3"), "32 pixels .*set --student_resolution"),
        (("--model_s", "timm:resnet1"), "unknown network of timm"),
        (("--model_s", "torchvision:squeezenet1_0"), "no linear classifier"),
        (("--model_s", "open_clip:ViT-B-32"), "unknown model"),
        (("--clip_mode", "timm:test_vit=nowhere.pth"), "no such file"),
        (("--clip_mode", "{timm}", "--teacher_resolution", 33), "33 pixels"),
        (("--clip_mode", "{open_clip}", "--path_t", "nowhere.pth"), "no such file"),
        (("--model_s", "resnet8", "--pretrained_s"), "pretrained_s"),
        (("--model_s", STUDENT, "--init_s", "nowhere.pth"), "nowhere.pth"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(train, weights, capsys, tmp_path, options, words):
    with pytest.raises(SystemExit) as exit_:
        train("--epochs", 1, *[str(option).format(**weights) for option in options])
    assert exit_.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert re.search(words, lines[-1])
    assert not list((tmp_path / "save").rglob("*.pth"))
