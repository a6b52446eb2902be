"""What is cheap to look at is looked at first: bad input is refused before an image is decoded or encoded."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import assert_refused

import pretrain_clip
import train_student
import train_teacher
from benchmarks.random_clip import write_archive
from conftest import TINY_VIT, make_dataset
from dataset import DATASETS, Split, files, load_dataset, stl10, student_size, tinyimagenet
from helper import bank, encoder
from helper.checkpoint import load
from models import create_model

LIBRARY = "torchvision:shufflenet_v2_x0_5"


@pytest.fixture
def no_encoding(monkeypatch):
    monkeypatch.setattr(bank, "encode_view", lambda *args: pytest.fail("an embedding was encoded"))


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Path:
    """A folder of images that must not be decoded."""
    for name in ("train/a/1.png", "train/b/2.png", "test/a/3.png", "test/b/4.png"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)
    monkeypatch.setattr(files._Store, "fill", lambda store: pytest.fail("images were decoded"))
    return tmp_path / "photos"


@pytest.fixture
def bad(tmp_path) -> dict[str, Path]:
    """Files that are not what they are given for."""
    torch.save({"model": {"a": torch.ones(2)}, "clip_sha256": "0" * 64}, tmp_path / "head.pth")
    torch.save(create_model("vgg8", 5).state_dict(), tmp_path / "vgg8.pth")
    torch.save({"a": torch.ones(2)}, tmp_path / "weights.pth")
    return {name: tmp_path / f"{name}.pth" for name in ("nowhere", "head", "vgg8", "weights")}


BAD_STUDENTS = {
    "no weights": (["--init_s", "{nowhere}"], "no such file of weights"),
    "weights of another network": (["--init_s", "{vgg8}"], "give weights of this network"),
    "no encoder": (["--clip_mode", "{nowhere}"], "neither a file nor a published CLIP"),
    "weights of no CLIP": (["--clip_mode", "{weights}"], "not a CLIP in OpenAI's format"),
    "weights of no such library's network": (["--clip_mode", f"{LIBRARY}={{weights}}"], "does not fit"),
    "a resolution that the encoder cannot take": (["--teacher_resolution", "48"], "takes 32 pixels alone"),
    "a head of another encoder": (["--path_t", "{head}"], "was trained on another encoder"),
    "no teacher": (["--path_t", "{nowhere}"], "no such file"),
    "no run to go on with": (["--resume", "{nowhere}"], "no such file"),
    "a precision that the device lacks": (["--amp", "fp16"], "needs --device cuda"),
    "batch norm over processes on a CPU": (["--sync_bn"], "needs --device cuda"),
    "more views than there are": (["--teacher_views", "500"], "has 162 views"),
    "a recording on a CPU": (["--graph", "on"], "needs --device cuda"),
}


def refused(capsys, script, argv: list, words: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        script.main([str(word) for word in argv])
    assert exit_.value.code == 2
    assert_refused(capsys, 2, words)


@pytest.mark.parametrize(("options", "words"), BAD_STUDENTS.values(), ids=BAD_STUDENTS)
def test_nothing_is_decoded_for_a_student_s_networks_that_are_refused(
    photos, bad, tiny_clip, capsys, tmp_path, options, words
):
    where = ["--dataset", "folder", "--data_dir", photos, "--image_size", 32, "--save_dir", tmp_path / "save"]
    base = [*where, "--clip_mode", tiny_clip, "--model_s", "resnet8", "--device", "cpu"]
    refused(capsys, train_student, [*base, *(word.format(**bad) for word in options)], words)


def test_nothing_is_decoded_for_a_student_that_cannot_take_the_size(photos, tiny_clip, capsys, tmp_path):
    where = ["--dataset", "folder", "--data_dir", photos, "--image_size", 32, "--save_dir", tmp_path / "save"]
    refused(
        capsys,
        train_student,
        [*where, "--clip_mode", tiny_clip, "--model_s", "torchvision:alexnet", "--device", "cpu"],
        "cannot take images of 32 pixels",
    )


@pytest.mark.parametrize("script", [train_student, train_teacher, pretrain_clip])
def test_nothing_is_decoded_for_a_gpu_that_is_not_there(script, photos, tiny_clip, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    where = ["--dataset", "folder", "--data_dir", photos, "--image_size", 32, "--save_dir", tmp_path / "save"]
    teacher = {train_student: ["--clip_mode", tiny_clip], train_teacher: ["--model", tiny_clip], pretrain_clip: []}
    refused(capsys, script, [*where, "--device", "cuda", *teacher[script]], "PyTorch finds no CUDA GPU here")
    assert not (tmp_path / "save").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "{nowhere}"], "neither a file nor a published CLIP"),
        (["--model", f"{LIBRARY}={{weights}}", "--clip_tn", 1], "does not fit"),
        (["--model", "resnet9"], "--model resnet9: no CNN"),
        (["--model", "torchvision:alexnet", "--clip_tn", 0], "cannot take images of 32 pixels"),
    ],
)
def test_nothing_is_decoded_for_a_teacher_that_is_refused(photos, bad, capsys, tmp_path, options, words):
    where = ["--dataset", "folder", "--data_dir", photos, "--image_size", 32, "--save_dir", tmp_path / "save"]
    argv = [*where, "--device", "cpu", *(str(word).format(**bad) for word in options)]
    refused(capsys, train_teacher, argv, words)


@pytest.mark.parametrize(("options", "words"), BAD_STUDENTS.values(), ids=BAD_STUDENTS)
def test_nothing_is_encoded_for_a_student_s_networks_that_are_refused(no_encoding, bad, train, capsys, options, words):
    with pytest.raises(SystemExit) as exit_:
        train(*(word.format(**bad) for word in options))
    assert exit_.value.code == 2
    assert_refused(capsys, 2, words)


def test_nothing_is_encoded_for_a_method_that_does_not_fit(no_encoding, train, capsys, monkeypatch):
    made = make_dataset()
    one_class = Split(made.train.images, torch.zeros_like(made.train.targets))
    monkeypatch.setitem(DATASETS, "tiny", lambda data_dir: dataclasses.replace(made, train=one_class))
    with pytest.raises(SystemExit) as exit_:
        train("--distill", "crd", "--nce_k", 4)
    assert exit_.value.code == 2
    assert_refused(capsys, 2, "crd has no negatives")


def test_nothing_is_encoded_for_a_head_of_other_classes(train, capsys, monkeypatch):
    head = train("--epochs", 1, script=train_teacher) / "tiny_clip_best.pth"
    state = load(head)
    state["model"] = {name: x if "fit" in name else x[:2] for name, x in state["model"].items()}
    torch.save(state, head)
    monkeypatch.setattr(bank, "open_bank", lambda *args: pytest.fail("the bank was opened"))
    with pytest.raises(SystemExit) as exit_:
        train("--path_t", head)
    assert exit_.value.code == 2
    assert_refused(capsys, 2, "has another shape")


def test_nothing_is_encoded_for_a_run_that_goes_on_with_other_weights(train, tmp_path, capsys, monkeypatch):
    path = tmp_path / "own.pt"
    write_archive(path, TINY_VIT, seed=1)
    train("--epochs", 1, "--clip_mode", path, "--name", "own")
    write_archive(path, TINY_VIT, seed=2)
    monkeypatch.setattr(bank, "encode_view", lambda *args: pytest.fail("an embedding was encoded"))
    with pytest.raises(SystemExit) as exit_:
        train("--epochs", 2, "--clip_mode", path, "--name", "own")
    assert exit_.value.code == 2
    assert_refused(capsys, 2, "clip_sha256")


def test_a_refused_run_leaves_no_folder(bad, train, capsys, tmp_path):
    for options in (["--resume", bad["weights"]], ["--teacher_views", 500]):
        with pytest.raises(SystemExit) as exit_:
            train(*options)
        assert exit_.value.code == 2
        assert list(tmp_path.rglob("student_*/*")) == []


def test_a_folder_of_classes_that_is_no_data_set_is_told(photos, capsys, tmp_path):
    where = ["--dataset", "folder", "--data_dir", photos / "train", "--image_size", 32, "--save_dir", tmp_path / "save"]
    with pytest.raises(SystemExit):
        train_student.main([str(word) for word in (*where, "--distill", "none")])
    printed = capsys.readouterr()
    assert f"{photos / 'train'} holds no train/CLASS/, so no picture has a label" in printed.out
    assert "as no picture has a label: nothing would be trained" in printed.err


def test_a_whole_bank_needs_no_network(train, tiny_clip, monkeypatch):
    train("--epochs", 1)
    monkeypatch.setattr(encoder, "create_encoder", lambda *args, **options: pytest.fail("a network was built"))
    train("--epochs", 1, "--seed", 5)
    train("--epochs", 1, script=train_teacher)


def test_facts_that_were_kept_are_those_of_the_network(tiny_clip, tmp_path):
    where = (str(tiny_clip), "unused", None, str(tmp_path))
    first, second = encoder.encoder_facts(*where), encoder.encoder_facts(*where)
    built = encoder.load_encoder(str(tiny_clip), "unused", "cpu", "off")
    known = encoder.KnownEncoder(second, lambda: built)
    for name in encoder._KEPT:
        assert getattr(known, name) == getattr(encoder.KnownEncoder(first, lambda: built), name)
        assert getattr(known, name) == getattr(built, name), name
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(known(image), built(image))


def test_facts_follow_the_content_of_the_file_and_a_damaged_note_is_written_anew(tmp_path):
    path = tmp_path / "own.pt"
    facts = []
    for seed in (1, 2):
        write_archive(path, TINY_VIT, seed=seed)
        facts.append(encoder.encoder_facts(str(path), "unused", None, str(tmp_path)))
    assert facts[0]["sha256"] != facts[1]["sha256"]
    assert facts[0]["facts"]["clip_sha256"] == facts[0]["sha256"]
    notes = list((tmp_path / "teacher_bank" / "encoders").iterdir())
    assert len(notes) == 2
    for note in notes:
        note.write_text(note.read_text().replace('"dim": 16', '"dim": 17'))
    assert encoder.encoder_facts(str(path), "unused", None, str(tmp_path)) == facts[1]


def test_the_size_that_is_known_before_is_the_images_own():
    assert student_size("shapes", None) == load_dataset("shapes", "unused").views.size
    assert student_size("stl10", None) == stl10.SIZE
    assert student_size("tinyimagenet", None) == tinyimagenet.SIZE
    assert student_size("folder", 8) == 8
