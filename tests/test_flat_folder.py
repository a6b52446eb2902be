"""A folder of pictures without labels, from the first command to the last."""

import json

import numpy as np
import pytest
from PIL import Image
from runs import assert_equal_tensors, assert_refused, load, read_metrics

import evaluate
import train_student
from helper.records import best_record, read_record
from report import curves
from report.table import main as report


@pytest.fixture
def photos(tmp_path):
    """60 pictures of noise in some folders."""
    rng = np.random.default_rng(0)
    for i in range(60):
        path = tmp_path / "photos" / ("", "a", "a/deep")[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(path)
    return tmp_path / "photos"


@pytest.fixture
def distil(photos, tiny_clip, tmp_path):
    """Run train_student.py on these pictures with these options besides; gives the run's folder."""

    def run(*options, save_dir=tmp_path / "save", places=(photos,)):
        argv = ["--dataset", "folder", "--data_dir", *places, "--image_size", 32, "--clip_mode", tiny_clip]
        argv += ["--model_s", "resnet8", "--batch_size", 16, "--epochs", 3, "--device", "cpu", "--amp", "off"]
        train_student.main([*map(str, argv), "--save_dir", str(save_dir), *map(str, options)])
        return max((save_dir / "student_model").iterdir(), key=lambda folder: folder.stat().st_mtime_ns)

    return run


def test_pictures_alone_become_a_student_that_is_evaluated(distil, capsys):
    run = distil()
    told = capsys.readouterr().out
    for line in ("--labels 0: ", "-r 0: ", "--joint teacher: ", "--holdout 0.1: "):
        assert told.count(f"\n{line}") + told.startswith(line) == 1
    options, history = read_record(run)
    assert (options["labels"], options["gamma"], options["joint"], options["holdout"]) == (0, 0, "teacher", 0.1)
    assert [record["test_acc"] for record in history] == [None] * 3
    losses = [record["heldout_loss"] for record in history]
    assert best_record(history)["heldout_loss"] == min(losses) == load(run / "resnet8_best.pth")["heldout_loss"]
    assert all(0 <= record["heldout_knn"] <= 100 and record["heldout_cka"] > 0 for record in history)
    assert len(load(run / "resnet8_best.pth")["layer"]["fit_dim_Net.weight"]) == 16  # the encoder's own dimension

    evaluate.main([str(run), "--device", "cpu"])
    found = json.loads((run / "evaluation.json").read_text())
    assert found["accuracy"]["folder-photos@32px"]["resnet8_best"] == {}
    assert found["agreement"]["folder-photos@32px"]["resnet8_best"]["student"]["cka"] > 0
    graphs = found["graphs"]["folder-photos@32px"]["resnet8_best"]["student"]
    assert graphs["same_class"] is None and graphs["other_classes"] > 0

    capsys.readouterr()
    report([str(run)])
    printed = capsys.readouterr().out
    assert "neighbours" in printed and f"{best_record(history)['heldout_knn']:.2f}" in printed
    assert curves.plot_runs([run]).is_file()


def test_a_probe_is_measured_now_and_then_and_is_that_of_evaluation(distil, tiny_dataset, capsys):
    run = distil("--probe", "tiny", "--probe_freq", 2)
    found = [record.get("probe_acc") for record in read_metrics(run)]
    assert found[0] is None and None not in found[1:]
    evaluate.main([str(run), "--checkpoint", "last", "--probe", "tiny", "--device", "cpu", "--no_teacher"])
    (about,) = json.loads((run / "evaluation.json").read_text())["transfer"].values()
    assert about["resnet8_last"]["student"]["knn_20"] == pytest.approx(found[-1])
    plain = distil("--name", "plain")
    assert_equal_tensors(load(run / "resnet8_last.pth")["model"], load(plain / "resnet8_last.pth")["model"])


def test_a_run_stops_when_it_no_longer_gets_better(distil, capsys):
    run = distil("--epochs", 30, "--patience", 1, "--learning_rate", 0.5)
    history = read_metrics(run)
    assert len(history) == best_record(history)["epoch"] + 1 < 30
    assert load(run / "resnet8_last.pth")["epoch"] == len(history)
    before = (run / "metrics.jsonl").read_bytes()
    assert distil("--epochs", 30, "--patience", 1, "--learning_rate", 0.5) == run
    assert (run / "metrics.jsonl").read_bytes() == before
    assert "--patience 1: stopped after epoch" in capsys.readouterr().out


def test_folders_given_one_by_one_are_the_same_pictures(distil, photos, tmp_path, capsys):
    whole = distil()
    assert f"{photos} holds no train/CLASS/" in capsys.readouterr().out
    places = sorted(photos.iterdir())
    parts = distil("--name", "parts", places=places, save_dir=tmp_path / "other")
    assert f"{places[-1]} hold no train/CLASS/" in capsys.readouterr().out
    assert read_metrics(parts) == read_metrics(whole)
    assert_equal_tensors(load(parts / "resnet8_last.pth")["model"], load(whole / "resnet8_last.pth")["model"])


def test_a_picture_that_vanished_is_another_data_set(distil, photos, capsys):
    run = distil("--name", "mine")
    (photos / "0.png").unlink()
    before = (run / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        distil("--name", "mine", "--epochs", 4)
    assert stopped.value.code == 2
    assert_refused(capsys, 2, "holds a run with dataset_sha256", "use the same options and files")
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_folder_without_a_picture_writes_nothing(distil, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as stopped:
        distil(places=[tmp_path / "empty"], save_dir=tmp_path / "none")
    assert stopped.value.code == 2
    assert_refused(capsys, 2, "no picture in it, at any depth")
    assert not list((tmp_path / "none").glob("student_model/*"))
