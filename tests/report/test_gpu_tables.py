"""Tables of what a GPU was measured at, from numbers that are made up."""

import json

import pytest

from errors import InputError
from report.gpu import aims, main, report, runs_table


def test_a_loss_that_is_far_from_the_cpus_is_seen():
    results = {
        "on the CPU": {"losses": [2.0, 4.0], "captured": False},
        "off": {"losses": [2.0, 4.001], "captured": False},
        "bf16, captured": {"losses": [2.0, 4.001], "captured": True},
        "fp16": {"losses": [2.0, 9.0], "captured": False},
        "bf16": {"error": "it broke"},
    }
    assert runs_table(results)[1:] == [
        ("off", "no", "0.00025", "NO"),
        ("bf16, captured", "yes", "0.00025", "yes"),
        ("fp16", "no", "0", "yes"),
    ]


def test_aims_are_met_missed_or_not_measured():
    speed = {
        "captured": {"images/s": 50_000},
        "compiled and captured": {"images/s": 60_000},
        "the release's recipe": {"images/s": 3_000},
        "8 side by side": {"images/s": 150_000},
        "two epochs": {"seconds_of_epochs": [9.0, 0.5]},
    }
    found = {row[0].split(",")[0]: row[2:] for row in aims(speed, {"ViT-B/32, 8": {"images/s": 4_500}})}
    assert found["240 epochs of EGA with test passes"] == ("2", "yes")
    assert found["times the release's recipe"] == ("20", "no")
    assert found["eight runs side by side"] == ("3", "yes")
    assert found["16 views of CIFAR-100 by ViT-B/32"] == ("3", "no")
    assert {row[2:] for row in aims({}, {})[1:]} == {("not measured", "–")}


def test_what_failed_stands_last_and_a_folder_without_results_is_refused(tmp_path, capsys):
    with pytest.raises(InputError, match="no results"):
        report(tmp_path)
    (tmp_path / "runs.json").write_text(json.dumps({"fp16": {"error": "it broke"}}))
    assert report(tmp_path).endswith("## What failed\n\n- runs, fp16: it broke")
    (tmp_path / "speed.json").write_text("{")
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "speed.json is corrupt: delete it" in capsys.readouterr().err


def test_accuracies_are_of_finished_runs_and_others_say_how_far_they_are(tmp_path):
    def run(finished: bool, *accuracies: float) -> dict:
        history = [{"epoch": i, "test_acc": acc, "seconds": 60} for i, acc in enumerate(accuracies, 1)]
        return {"history": history, "finished": finished}

    table = {"ega_seed0": run(True, 70, 74, 73), "ega_seed1": run(True, 70, 76, 75), "kd_seed0": run(False, 1, 2)}
    (tmp_path / "table.json").write_text(json.dumps(table))
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report(tmp_path).splitlines()]
    (ega,), (kd,) = ([line for line in lines if line and line[0] == name] for name in ("EGA", "KD"))
    assert (ega[1], ega[2][:5], ega[3][:5], ega[4:]) == ("2", "75.00", "74.00", ["3", "none"])
    assert kd == ["KD", "0", "–", "–", "–", "2"]
