"""train_student.py with teachers and students of timm, open_clip and torchvision, by name and local weights."""

import json
import re
from argparse import Namespace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from runs import assert_equal_tensors, assert_refused, load, read_metrics

import dataset.loader
import evaluate
import train_teacher
from dataset.views import CIFAR100_NORMALIZATION, CLIP_NORMALIZATION, normalize
from deploy.model_card import model_config
from evaluation import load_student
from evaluation.student import open_student
from helper.teacher import CnnTeacher
from models import create_model
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


HALF = ((0.5,) * 3,) * 2


@pytest.fixture
def half(tmp_path) -> Path:
    """Weights of timm:test_resnet, which wants a mean and a std of 0.5."""
    path = tmp_path / "half.pth"
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet", num_classes=0).state_dict(), path)
    return path


def options_of(folder: Path) -> dict:
    return json.loads((folder / "options.json").read_text())


@pytest.mark.parametrize("start", ["init_s", "path", "pretrained_s"])
def test_a_pretrained_student_sees_images_as_its_weights_do(train, half, start, monkeypatch):
    create, seen = timm.create_model, set()

    def downloaded(name: str, pretrained: bool = False, **options):
        net = create(name, **options)
        if pretrained:
            net.load_state_dict(torch.load(half), strict=False)
        return net

    def spy(pixels, normalization):
        seen.add(normalization)
        return normalize(pixels, normalization)

    monkeypatch.setattr(timm, "create_model", downloaded if start == "pretrained_s" else create)
    monkeypatch.setattr(dataset.loader, "normalize", spy)
    given = {
        "init_s": ("timm:test_resnet", "--init_s", half),
        "path": (f"timm:test_resnet={half}",),
        "pretrained_s": ("timm:test_resnet", "--pretrained_s"),
    }
    options = ("--distill", "none", "--epochs", 1, "--model_s")
    folder = train(*options, *given[start])
    (path,) = folder.glob("*_last.pth")
    assert seen == {HALF}
    assert options_of(folder)["normalization"] == [[0.5] * 3, [0.5] * 3]
    assert load(path)["normalization"] == HALF
    evaluate.main([str(folder), "--device", "cpu", "--checkpoint", "last"])
    (answer,) = json.loads((folder / "evaluation.json").read_text())["accuracy"]["tiny"].values()
    assert answer["student"]["top1"] == read_metrics(folder)[-1]["test_acc"]
    assert seen == {HALF}
    _, transform, _ = load_student(folder)
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    expected = torch.from_numpy(picture / 127.5 - 1).permute(2, 0, 1).float()
    torch.testing.assert_close(transform(Image.fromarray(picture)), expected)
    assert model_config(open_student(folder), "onnx", "x.onnx", False)["input"]["mean"] == [0.5] * 3


def test_a_student_of_this_project_goes_on_with_the_images_that_it_had(train, half):
    options = ("--distill", "none", "--epochs", 1, "--model_s", "timm:test_resnet")
    first = train(*options)
    assert options_of(first)["normalization"] == [list(values) for values in CLIP_NORMALIZATION]
    (path,) = first.glob("*_last.pth")
    second = train(*options, "--init_s", path)
    assert options_of(second)["normalization"] == options_of(first)["normalization"]
    third = train(*options[:-1], f"timm:test_resnet={path}")
    assert options_of(third)["normalization"] == options_of(first)["normalization"]


def test_a_cnn_sees_its_own_images_whatever_its_student_sees(train, half):
    cnn = train("--epochs", 2, "--model", "resnet14", script=train_teacher) / "resnet14_last.pth"
    options = ("--distill", "kd", "--epochs", 1, "--path_t", cnn, "--model_s", "timm:test_resnet")
    runs = [train(*options), train(*options, "--init_s", half)]
    assert [options_of(run)["normalization"][1][0] for run in runs] == [CIFAR100_NORMALIZATION[1][0], 0.5]
    answers = []
    for run in runs:
        evaluate.main([str(run), "--device", "cpu"])
        (answer,) = json.loads((run / "evaluation.json").read_text())["accuracy"]["tiny"].values()
        answers.append(answer["teacher"])
    assert answers[0].pop("per_class") == answers[1].pop("per_class")
    assert answers[0] == pytest.approx(answers[1], rel=1e-4)
    backbone = create_model("resnet14", 5)
    backbone.load_state_dict(load(cnn)["model"])
    pixels = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    expected = CnnTeacher(backbone, None, "off").features(normalize(pixels, CIFAR100_NORMALIZATION))
    found = CnnTeacher(backbone, None, "off", given=HALF).features(normalize(pixels, HALF))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_cnn_of_another_project_sees_images_as_its_library_s_weights_do(train, tiny_dataset, tmp_path):
    cnn = timm.create_model("test_resnet", num_classes=5).eval()
    told = {"arch": "test_resnet", "args": Namespace(model="test_resnet")}
    torch.save(told | {"state_dict": cnn.state_dict()}, tmp_path / "model_best.pth.tar")
    options = ("--distill", "kd", "--epochs", 1, "--path_t", tmp_path / "model_best.pth.tar")
    folder = train(*options)
    evaluate.main([str(folder), str(tmp_path / "model_best.pth.tar"), "--dataset", "tiny", "--device", "cpu"])
    (answer,) = json.loads((folder / "evaluation.json").read_text())["accuracy"]["tiny"].values()
    with torch.no_grad():
        logits = cnn(normalize(tiny_dataset.test.images, HALF))
    expected = F.cross_entropy(logits, tiny_dataset.test.targets)
    assert answer["teacher"]["cross_entropy"] == pytest.approx(float(expected), rel=1e-4)


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
