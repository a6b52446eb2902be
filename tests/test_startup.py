"""What is imported by a command that computes nothing, and by the use of a student."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What takes time or memory to import.
HEAVY = {"torch", "torchvision", "timm", "open_clip", "clip", "numpy", "scipy", "matplotlib", "onnx", "google.protobuf"}

COMMANDS = {
    "train_student.py": [
        (0, "--help"),
        (0, "--list"),
        (2, "--epoks", "3"),
        (2, "--epochs", "0"),
        (2, "--distill", "vid"),
        (2, "--model_s", "timm:resnet18", "--epoks"),
    ],
    "train_teacher.py": [(0, "--help"), (2, "--epoks", "3"), (2, "--model", "timm:"), (2, "--max_bad_images", "3")],
    "pretrain_clip.py": [(0, "--help"), (2, "--epoks", "3"), (2, "--vision_layers", "2"), (2, "--batch_size", "1")],
    "evaluate.py": [(0, "--help"), (2, "RUN", "--epoks"), (2, "RUN", "--search", "a cat"), (2,)],
    "export.py": [(0, "--help"), (2, "RUN", "--epoks"), (2, "RUN", "--format", "onx"), (2,)],
}

# Runs a script, or a package with ``python -m``, with each list of arguments.
RUN = """
import contextlib, io, json, runpy, sys
script, commands = json.loads(sys.argv[1])
sys.path[0] = "."
for argv in commands:
    sys.argv, code = [script, *argv], 0
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            (runpy.run_path if script.endswith(".py") else runpy.run_module)(script, run_name="__main__")
        except SystemExit as stopped:
            code = stopped.code
    print(json.dumps([code, *sys.modules]))
"""


def python(code: str, *argv: str) -> list:
    """What a program of its own prints, a line of JSON each."""
    command = [sys.executable, "-c", code, *argv]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    return [json.loads(line) for line in said.stdout.splitlines()]


def commands(script: str, argvs: list[list[str]]) -> list[tuple[int, set[str]]]:
    """Each command's exit code, and what was imported of ``HEAVY`` by then."""
    return [(code, HEAVY & set(modules)) for code, *modules in python(RUN, json.dumps([script, argvs]))]


@pytest.mark.parametrize("script", COMMANDS)
def test_help_and_refused_arguments_import_no_library(script):
    codes, argvs = zip(*((code, argv) for code, *argv in COMMANDS[script]), strict=True)
    assert commands(script, argvs) == [(code, set()) for code in codes]


def test_a_table_of_runs_imports_no_library():
    run = next((ROOT / "docs" / "runs").rglob("options.json")).parent
    assert commands("report", [["--help"], [str(run)]]) == [(0, set()), (0, set())]


USE = """
import json, os, sys
from evaluation import load_student
print(json.dumps(list(sys.modules)))
import onnx  # and with it protobuf
before, environment = set(sys.modules), dict(os.environ)
net, transform, classes = load_student(sys.argv[1])
print(json.dumps(list(set(sys.modules) - before)))
print(json.dumps([len(classes), environment == dict(os.environ)]))
"""


def test_the_use_of_a_student_imports_what_it_computes_with_alone(finished):
    at_first, in_use, told = python(USE, str(finished["ega"]))
    assert not HEAVY & set(at_first)
    assert "torch" in in_use
    libraries = {"timm", "clip", "torchvision", "scipy", "matplotlib", "tensorboard"}
    training = {f"helper.{name}" for name in ("training", "data", "teacher", "bank", "runtime")}
    assert not (libraries | training) & set(in_use)
    assert told == [5, True]


STOPPED = """
import os, signal, sys

class AtTorch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGTERM)

sys.meta_path.insert(0, AtTorch())
import train_student
train_student.main([])
"""


def test_a_signal_in_the_import_of_torch_ends_in_one_line():
    said = subprocess.run([sys.executable, "-c", STOPPED], cwd=ROOT, capture_output=True, text=True)
    assert said.stderr == "train_student.py: stopped by SIGTERM; the same command begins anew\n"
    assert said.returncode == 143
