"""The rehearsal of what a GPU is asked, and that one failure costs nothing else."""

import importlib
import json
import subprocess
import sys
from argparse import Namespace
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from benchmarks import on_gpu
from helper.options import parse_student_options
from report.gpu import report


class Ended:
    """A process that has ended."""

    def __init__(self, code: int):
        self.returncode = code

    def wait(self, timeout: float | None = None) -> int:
        return self.returncode

    poll = wait


def start_here(arguments: list, log: Path, **environment: str) -> Ended:
    """Do in this process what a new one would do."""
    with log.open("a") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            importlib.import_module(arguments[1]).main([str(x) for x in arguments[2:]])
        except SystemExit as error:
            return Ended(error.code)
    return Ended(0)


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory) -> Path:
    """The results of all steps on a CPU."""
    folder = tmp_path_factory.mktemp("on_gpu")
    argv = ["--rehearse", "--out", str(folder / "out"), "--work", str(folder / "work")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_gpu, "start", start_here)
        patch.setattr(on_gpu.subprocess, "run", lambda command, cwd: print(report(command[-1])))
        on_gpu.main(argv)
    return folder / "out"


def read(folder: Path, step: str) -> dict:
    return json.loads((folder / f"{step}.json").read_text())


def test_every_part_of_every_step_is_rehearsed(rehearsed):
    for step in on_gpu.STEPS:
        assert {name: part["error"] for name, part in read(rehearsed, step).items() if "error" in part} == {}
        assert (rehearsed / f"{step}.done").exists()
    runs, speed = read(rehearsed, "runs"), read(rehearsed, "speed")
    assert len(runs["off"]["losses"]) == 5
    assert runs["off"]["losses"] == runs["off, bank and images on the host"]["losses"] == runs["on the CPU"]["losses"]
    assert runs["bf16"]["losses"] != runs["off"]["losses"]
    assert runs["a capture that fails"]["epochs"] == 1
    assert speed["three epochs of cosine"]["epochs"] == 3
    assert len(set(speed["three epochs of cosine"]["lr"])) == 3
    assert speed["1 side by side"]["images/s"] > 0


def test_the_messages_of_many_processes_change_nothing_where_there_is_one(rehearsed):
    found = read(rehearsed, "collectives")
    assert found["a group of one"]["wrapped"] == "DistributedDataParallel"
    assert found["a group of one"]["losses"] == found["alone"]["losses"][:2]
    assert found["rows of all processes"]["gathered"]


def test_the_table_keeps_every_runs_records(rehearsed):
    table = read(rehearsed, "table")
    assert list(table) == ["none_seed0", "kd_seed0"]
    assert all(run["finished"] and len(run["history"]) == 1 for run in table.values())
    assert not list(rehearsed.glob("table_*.tar"))  # there is nothing to go on from


def test_its_tables_are_drawn(rehearsed):
    said = report(rehearsed)
    for name in ("Aims", "It runs", "Steps", "Side by side", "Epochs", "The bank", "EGA's loss", "Methods", "Accuracy"):
        assert f"\n## {name}\n" in said
    assert "What failed" not in said


def test_a_part_that_fails_is_told_and_tried_again_and_a_done_one_is_not(tmp_path, capsys):
    calls = []

    def fails():
        calls.append("fails")
        raise SystemExit("no such thing\nmore")

    args, results = Namespace(out=tmp_path, step="speed"), {}
    with pytest.raises(KeyboardInterrupt):  # its step's time is up
        on_gpu.part(results, args, "late", on_gpu.interrupt)
    assert results == read(tmp_path, "speed") == {}
    for _ in range(2):
        on_gpu.part(results, args, "broken", fails)
        on_gpu.part(results, args, "whole", lambda: {"x": calls.append("whole")})
        results = read(tmp_path, "speed")
    assert calls == ["fails", "whole", "fails"]
    assert results["broken"]["error"] == "SystemExit: no such thing"
    assert "speed, broken: " in capsys.readouterr().out


def test_a_part_that_does_not_end_is_told_and_not_tried_again(tmp_path, monkeypatch):
    args, results = Namespace(out=tmp_path, step="speed"), {}
    monkeypatch.setattr(on_gpu, "_LONG", 0)
    with pytest.raises(KeyboardInterrupt):
        on_gpu.part(results, args, "endless", on_gpu.interrupt)
    results = read(tmp_path, "speed")
    assert results == {"endless": {"error": "it did not end"}}
    on_gpu.part(results, args, "endless", on_gpu.interrupt)


def test_a_step_that_fails_or_hangs_is_passed_over_and_a_done_one_not_run_again(tmp_path, monkeypatch, capsys):
    programs = {
        "good": "print('well')",
        "bad": "raise SystemExit('broken beyond repair')",
        "endless": "import time; time.sleep(99)",
        "last": "print('too')",
    }
    monkeypatch.setattr(on_gpu, "STEPS", {name: (None, 2 if name == "endless" else 60) for name in programs})

    def start(arguments: list, log: Path) -> subprocess.Popen:
        with log.open("w") as file:
            return subprocess.Popen([sys.executable, "-c", programs[arguments[-1]]], stdout=file, stderr=file)

    monkeypatch.setattr(on_gpu, "start", start)
    args = on_gpu.parse(["--out", str(tmp_path)])
    monkeypatch.setattr(on_gpu.subprocess, "run", lambda *_, **__: None)
    on_gpu.run_steps(args, list(programs), 5)
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(" after")[0] for line in said if line] == [
        "good: done",
        "bad: failed, exit code 1",
        "endless: its time is up",
        "last: done",
    ]
    assert said[1].endswith("broken beyond repair")
    on_gpu.run_steps(args, ["good", "bad"], 5)
    assert [line.partition(" after")[0] for line in capsys.readouterr().out.splitlines() if line] == [
        "good: done before",
        "bad: failed, exit code 1",
    ]
    on_gpu.run_steps(args, ["bad"], 0.01)
    assert capsys.readouterr().out.splitlines()[0] == "bad: no time left"


def test_an_unfinished_run_travels_in_its_file(tmp_path):
    """Another machine goes on from it: its work folder is empty."""
    args = Namespace(out=tmp_path / "out", work=tmp_path / "work")
    folder = args.work / "save" / "student_model" / "table_ega_seed1"
    folder.mkdir(parents=True)
    args.out.mkdir()
    for name in ("resume.pth", "options.json", "ckpt_epoch_40.pth", "lock"):
        (folder / name).write_text(name)
    (folder / "metrics.jsonl").write_text('{"epoch": 1, "test_acc": 3.5, "seconds": 2.0, "lr": 1}\n')
    on_gpu.keep({}, args, args.work / "save", "ega_seed1", None)
    assert read(args.out, "table") == {
        "ega_seed1": {"history": [{"epoch": 1, "test_acc": 3.5, "seconds": 2.0}], "finished": False, "exit code": None}
    }
    on_gpu.unpack(args.out, tmp_path / "elsewhere")
    found = tmp_path / "elsewhere" / "student_model" / "table_ega_seed1"
    assert {path.name for path in found.iterdir()} == {"resume.pth", "options.json", "metrics.jsonl"}
    (found / "resume.pth").write_text("newer")
    on_gpu.unpack(args.out, tmp_path / "elsewhere")
    assert (found / "resume.pth").read_text() == "newer"


def test_the_table_is_trained_as_was_fastest(tmp_path):
    args = on_gpu.parse(["--out", str(tmp_path)])
    assert on_gpu.fastest(args) == (8, "off")
    rates = {
        "captured": 10,
        "compiled and captured": 12,
        "1 side by side": 10,
        "2 side by side": 19,
        "4 side by side": 18,
    }
    (tmp_path / "speed.json").write_text(json.dumps({name: {"images/s": rate} for name, rate in rates.items()}))
    assert on_gpu.fastest(args) == (2, "on")
    assert on_gpu.fastest(on_gpu.parse(["--out", str(tmp_path), "--side_by_side", "3"])) == (3, "on")


def test_the_tables_commands_are_train_students(tmp_path):
    args = on_gpu.parse(["--out", str(tmp_path), "--weights", "w.pth", "--views", "4"])
    args.device = "cuda"
    names = [f"{method}_seed{seed}" for method, seed in on_gpu._TABLE]
    commands = [list(map(str, on_gpu.table_run(args, name, tmp_path))) for name in names]
    parsed = [parse_student_options(argv[1:]) for argv in commands]
    assert {(opt.epochs, opt.batch_size, opt.model_s, opt.teacher_views) for opt in parsed} == {
        (240, 64, "resnet8x4", 4)
    }
    assert {(opt.clip_mode, opt.teacher_resolution) for opt in parsed} == {("timm:tf_efficientnet_lite2=w.pth", 160)}
    assert [(opt.distill, opt.seed) for opt in parsed] == on_gpu._TABLE
    assert {argv[0] for argv in commands} == {"train_student.py"}
