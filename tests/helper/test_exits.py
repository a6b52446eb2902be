"""How scripts end: the line, the exit code, and what is left to go on from."""

import builtins
import contextlib
import errno
import gc
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import children, torchrun

import dataset
import pretrain_clip
import train_student
import train_teacher
from conftest import make_dataset, snapshot
from errors import InputError, NonFiniteLoss, WriteError
from helper import bank, checkpoint, contrastive, distributed, launch, step
from helper.exits import exit_on_bad_input, exits, save_asked, unbroken
from helper.logger import Logger

ROOT = Path(__file__).parents[2]
STOPS = {signal.SIGINT: ("Ctrl-C", 130), signal.SIGTERM: ("SIGTERM", 143)}


@pytest.fixture(autouse=True)
def ctrl_c():
    """Ctrl-C reaches the tests also where a shell started them in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def ends(capsys, code: int, function, *args) -> str:
    """Its only line on stderr."""
    handlers = [signal.getsignal(number) for number in (*STOPS, signal.SIGUSR1)]
    with pytest.raises(SystemExit) as stopped:
        function(*args)
    assert stopped.value.code == code
    del stopped
    gc.collect()  # the run, which holds its folder's lock
    assert handlers == [signal.getsignal(number) for number in (*STOPS, signal.SIGUSR1)]
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "chunk" not in line]
    assert len(lines) == 1, lines
    return lines[0]


def at_call(monkeypatch, owner, name: str, number: int, act) -> None:
    """Call ``act`` before the call of that number of a function, counted from 1."""
    original, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(name)
        if len(calls) == number:
            act()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)


def failing(error: BaseException | int):
    """A function that raises this, or the system's error of this number."""

    def fail(*args, **kwargs):
        raise OSError(error, os.strerror(error)) if isinstance(error, int) else error

    return fail


def read_metrics(folder: Path) -> list[dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("seconds", "images_per_second")} for r in records]


def weights(path: Path) -> list[torch.Tensor]:
    found = torch.load(path, weights_only=True)
    return list(found.get("model", found).values())


def assert_equal_files(one: Path, other: Path) -> None:
    for a, b in zip(weights(one), weights(other), strict=True):
        assert torch.equal(a, b)


# What the user gave


@pytest.mark.parametrize("error", [InputError, OSError, FileNotFoundError, PermissionError])
def test_bad_input_ends_with_code_2_and_one_line(capsys, error):
    with pytest.raises(SystemExit) as stopped, exit_on_bad_input("train.py"):
        raise error("this is\nwrong:  do that")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "train.py: error: this is wrong: do that\n"


def test_mistakes_of_the_program_are_not_called_bad_input():
    for error in (KeyError("bug"), ValueError("too many values"), NonFiniteLoss("loss"), WriteError("disk full")):
        with pytest.raises(type(error)), exit_on_bad_input("train.py"):
            raise error


# The decorator by itself


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_ends_it_with_its_code(capsys, number):
    name, code = STOPS[number]

    @exits("train.py", memory="lower --batch_size")
    def main():
        send(number)

    line = ends(capsys, code, main)
    assert line == f"train.py: stopped by {name}; the same command begins anew"


def test_a_signal_waits_for_what_is_not_to_be_broken_and_the_same_one_again_is_one(capsys):
    done = []

    @exits("train.py", memory="lower --batch_size")
    def main():
        with unbroken():
            with unbroken():
                send(signal.SIGTERM)
                send(signal.SIGTERM)
                done.append("inside")
            done.append("all")
        done.append("more")

    ends(capsys, 143, main)
    assert done == ["inside", "all"]


def test_a_signal_that_is_lost_in_a_finaliser_stops_all_the_same(capsys):
    class Holds:
        def __del__(self):
            send(signal.SIGTERM)

    @exits("train.py", memory="lower --batch_size")
    def main():
        holds = Holds()
        del holds  # Python drops what is raised in there, and goes on
        time.sleep(60)

    ends(capsys, 143, main)


def test_a_signal_that_a_library_swallows_stops_at_the_next_step(capsys):
    @exits("train.py", memory="lower --batch_size")
    def main():
        with contextlib.suppress(BaseException):
            send(signal.SIGTERM)
        save_asked(1)

    ends(capsys, 143, main)


def test_what_else_is_dropped_is_still_told(capsys):
    class Fails:
        def __del__(self):
            raise ValueError("told")

    hook = sys.unraisablehook
    exits("train.py", memory="")(lambda: Fails() and None)()
    assert "ValueError: told" in capsys.readouterr().err
    assert sys.unraisablehook is hook


def test_what_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        exits("train.py", memory="lower --batch_size")(send)(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_checkpoint_can_be_asked_for_where_torchrun_ignores_the_signal():
    """A process inherits what its parent ignores."""
    before, asked = signal.signal(signal.SIGUSR1, signal.SIG_IGN), []

    def main() -> None:
        send(signal.SIGUSR1)
        asked.append(save_asked(1))

    try:
        exits("train.py", memory="--batch_size")(main)()
        assert asked == [True]
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (NonFiniteLoss("loss_edge is not finite at step 3"), 3, ["loss_edge is not finite at step 3"]),
        (MemoryError(), 5, ["out of memory: lower --batch_size"]),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0"), 5, ["2.50 GiB", "--batch_"]),
    ],
)
def test_errors_of_training_have_their_codes_and_one_line(capsys, error, code, words):
    line = ends(capsys, code, exits("train.py", memory="lower --batch_size")(failing(error)))
    assert line.startswith("train.py: error: ")
    assert all(word in line for word in words)


def test_memory_that_the_host_does_not_have(capsys):
    """What torch and numpy themselves raise."""
    for allocate in (lambda: torch.empty(2**55), lambda: np.empty(2**55)):
        line = ends(capsys, 5, exits("train.py", memory="lower --batch_size")(allocate))
        assert "more were asked for" in line


def test_mistakes_of_the_program_keep_their_traceback():
    for error in (RuntimeError("shapes differ"), ValueError("other"), OSError("other")):
        with pytest.raises(type(error)):
            exits("train.py", memory="lower --batch_size")(failing(error))()


# A run that is stopped


@pytest.mark.parametrize(
    ("number", "owner", "name", "call", "where"),
    [
        (signal.SIGINT, step.Step, "__call__", 8, "after epoch 1"),
        # The best epoch's file: all that belongs to the epoch is written.
        (signal.SIGTERM, checkpoint, "save", 1, "after epoch 1"),
        (signal.SIGTERM, bank, "encode_view", 1, "the same command begins anew"),
    ],
    ids=["in a step", "in a checkpoint", "in the bank"],
)
def test_a_stopped_run_says_where_it_goes_on(train, tmp_path, monkeypatch, capsys, number, owner, name, call, where):
    options = ["--epochs", 2, "--teacher_views", 1]
    whole = train(*options, save_dir=tmp_path / "whole")
    capsys.readouterr()
    with monkeypatch.context() as patch:
        at_call(patch, owner, name, call, lambda: send(number))
        line = ends(capsys, STOPS[number][1], train, *options)
    assert where in line
    assert not list(tmp_path.glob("save/**/*.tmp"))
    resumed = train(*options)
    assert ("resuming" in capsys.readouterr().out) == (where == "after epoch 1")
    assert_equal_files(whole / "resnet8_last.pth", resumed / "resnet8_last.pth")
    assert read_metrics(whole) == read_metrics(resumed)


def test_the_first_stage_says_its_own_folder(train, tmp_path, monkeypatch, capsys):
    train("--model", "resnet14", "--epochs", 1, script=train_teacher)
    (cnn,) = tmp_path.glob("save/models/*/resnet14_last.pth")
    capsys.readouterr()
    at_call(monkeypatch, step.Step, "__call__", 8, lambda: send(signal.SIGTERM))
    line = ends(capsys, 143, train, "--distill", "fsp", "--path_t", cnn, "--init_epochs", 2, "--epochs", 1)
    assert line.endswith("/init after epoch 1")


def test_a_clips_training_is_stopped(tiny_dataset, tmp_path, monkeypatch, capsys):
    argv = ["--dataset", "tiny", "--save_dir", str(tmp_path), "--device", "cpu", "--amp", "off", "--batch_size", "16"]
    argv += [
        "--vision_layers",
        "1",
        "--vision_width",
        "64",
        "--vision_patch",
        "16",
        "--text_layers",
        "1",
        "--embed_dim",
        "16",
        "--epochs",
        "2",
    ]
    at_call(monkeypatch, contrastive.ContrastiveStep, "_backward", 7, lambda: send(signal.SIGINT))
    line = ends(capsys, 130, pretrain_clip.main, argv)
    assert line.startswith("pretrain_clip.py: stopped by Ctrl-C; the same command resumes")
    assert "epoch 1" in line


def test_sigusr1_saves_inside_the_epoch_and_training_goes_on(train, tmp_path, monkeypatch, capsys):
    """Asked in the eighth step, the third of the second epoch; stopped in the fifth."""
    whole = train("--epochs", 2, save_dir=tmp_path / "whole")
    capsys.readouterr()
    with monkeypatch.context() as patch:
        at_call(patch, step.Step, "__call__", 8, lambda: send(signal.SIGUSR1))
        at_call(patch, step.Step, "__call__", 10, lambda: send(signal.SIGTERM))
        line = ends(capsys, 143, train, "--epochs", 2)
    assert line.endswith("after step 3 of epoch 2")
    resumed = train("--epochs", 2)
    assert "after step 3 of epoch 2\n" in capsys.readouterr().out
    assert_equal_files(whole / "resnet8_last.pth", resumed / "resnet8_last.pth")
    assert read_metrics(whole) == read_metrics(resumed)


def asked_in_step_15(*argv: str) -> None:
    """Run train_student.py; the second of two processes is asked to save in step 15."""
    torch.set_num_threads(1)
    dataset.DATASETS["tiny"] = lambda data_dir: make_dataset(num_train=2000)
    call, calls = step.Step.__call__, []

    def counted(*args):
        calls.append(None)
        if len(calls) == 15 and distributed.rank() == 1:
            send(signal.SIGUSR1)
        if len(calls) == 22:
            print("at step 22", flush=True)
        return call(*args)

    step.Step.__call__ = counted
    with launch.processes():
        train_student.main(argv)


def test_all_processes_of_a_job_end_and_it_goes_on_inside_the_epoch(tmp_path):
    """One of two is asked to save in step 15, both do in step 20."""
    argv = ["--distill", "none", "--dataset", "tiny", "--model_s", "resnet8", "--epochs", "100", "--batch_size", "8"]
    argv += ["--device", "cpu", "--amp", "off", "--compile", "off", "--save_dir", str(tmp_path)]
    job = torchrun(2, 0, asked_in_step_15, argv, tmp_path)
    while not ((tmp_path / "stdout").exists() and "at step 22\n" in (tmp_path / "stdout").read_text()):
        assert job.is_alive(), (tmp_path / "stderr").read_text()
        time.sleep(0.01)
    workers = children(job.pid)
    job.terminate()
    job.join(60)
    said = (tmp_path / "stderr").read_text().splitlines()
    (line,) = [line for line in said if line.startswith("train_student.py:")]
    assert line.startswith("train_student.py: stopped by SIGTERM")
    assert line.endswith("after step 20 of epoch 1")
    assert len(workers) == 2
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


@pytest.mark.parametrize("signalled", [False, True])
def test_a_process_that_is_gone_is_said_to_be_and_a_signal_says_more(monkeypatch, capsys, signalled):
    """What ended the other may come here a little later."""
    for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("time.sleep", lambda seconds: send(signal.SIGTERM) if signalled else None)
    main = exits("train.py", memory="lower --batch_size")(
        failing(RuntimeError("[gloo/pair.cc] Connection closed by peer"))
    )
    line = ends(capsys, 143 if signalled else 1, main)
    assert ("stopped by SIGTERM" if signalled else "another process of this job is gone") in line


# What cannot be written


def fails_for(monkeypatch, name: str, error: int) -> None:
    """Writing to files of that name fails, from now on."""
    opened = builtins.open

    def refuse(path, mode="r", *args, **kwargs):
        if isinstance(path, (str, Path)) and name in str(path) and set(mode) & set("wa+"):
            failing(error)()
        return opened(path, mode, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", refuse)


@pytest.mark.parametrize(
    ("name", "error", "advice"),
    [
        ("resume.pth", errno.ENOSPC, "free some space"),
        ("resnet8_best.pth", errno.EROFS, "make it writable"),
        ("metrics.jsonl", errno.EIO, "see to the disk"),
        ("tensorboards", errno.ENOSPC, "free some space"),
        ("last.pth", errno.EDQUOT, "free some space"),
    ],
)
def test_what_cannot_be_written_ends_with_code_4_and_can_be_resumed(
    train, tmp_path, monkeypatch, capsys, name, error, advice
):
    options = ["--epochs", 2, "--distill", "none", "--name", "run"]
    whole = train(*options, save_dir=tmp_path / "whole")
    before = train("--epochs", 1, "--distill", "none", "--name", "run")
    kept = snapshot(before)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        if name == "tensorboards":
            patch.setattr(Logger, "_write_events", failing(error))
        elif name == "metrics.jsonl":
            at_call(patch, Logger, "append", 1, lambda: fails_for(patch, name, error))
        else:
            fails_for(patch, name, error)
        line = ends(capsys, 4, train, *options)
    assert name in line and advice in line and f"resumes {before} after epoch" in line
    after = snapshot(before)
    assert after.keys() >= kept.keys()
    assert name == "metrics.jsonl" or after.get(name) == kept.get(name)
    resumed = train(*options)
    assert_equal_files(whole / "resnet8_last.pth", resumed / "resnet8_last.pth")
    assert read_metrics(whole) == read_metrics(resumed)


# Clocks


def test_a_clock_that_jumps_changes_nothing(train, tmp_path, monkeypatch):
    """A day back at every look, as a machine's whose time is set."""
    whole = train("--epochs", 2, save_dir=tmp_path / "whole")
    now = time.time()
    days = itertools.count()
    monkeypatch.setattr(time, "time", lambda: now - 86400 * next(days))
    jumped = train("--epochs", 2)
    assert_equal_files(whole / "resnet8_last.pth", jumped / "resnet8_last.pth")
    assert read_metrics(whole) == read_metrics(jumped)
    seconds = [json.loads(line)["seconds"] for line in (jumped / "metrics.jsonl").read_text().splitlines()]
    assert all(value > 0 for value in seconds)


_STARTS = """
import os, sys
from errors import SpeedUpFailed
from helper.exits import exits, spares, without

@exits("script.py", memory="-")
def main(argv=None):
    print("begins without", sorted(without()), sys.argv[1:], flush=True)
    spares({"compile", "graph"} - set(sys.argv[1:]))
    for option in ("graph", "compile"):
        if option not in without():
            raise SpeedUpFailed(option, "because")

main(*eval(os.environ.get("ARGUMENTS", "()")))
"""


def starts(tmp_path, *options: str, **environment: str) -> tuple[int, list[str], list[str]]:
    """Exit code, output and lines on stderr of a script that can neither be captured nor compiled."""
    script = tmp_path / "script.py"
    script.write_text(_STARTS)
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    environment.pop("EGA_WITHOUT", None)
    found = subprocess.run([sys.executable, script, *options], env=environment, capture_output=True, text=True)
    return found.returncode, found.stdout.splitlines(), found.stderr.splitlines()


def test_a_script_starts_again_without_what_made_it_fast(tmp_path):
    code, said, errors = starts(tmp_path, "--epochs")
    assert code == 0
    assert said == [f"begins without {found} ['--epochs']" for found in ([], ["graph"], ["compile", "graph"])]
    assert errors == [
        "script.py: steps cannot be captured as a CUDA graph (because): starting again with --graph off",
        "script.py: steps cannot be compiled (because): starting again with --compile off",
    ]


@pytest.mark.parametrize(("options", "environment"), [(["graph"], {}), ([], {"ARGUMENTS": "([],)"})])
def test_but_not_where_it_was_asked_for_or_is_a_part_of_another_program(tmp_path, options, environment):
    code, said, errors = starts(tmp_path, *options, **environment)
    assert (code, len(said)) == (2, 1)
    assert errors == [
        "script.py: error: steps cannot be captured as a CUDA graph (because): use --graph off",
    ]
