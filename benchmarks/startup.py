"""The cost of a start, against an earlier revision: ``python -m benchmarks.startup``.

It measures commands that compute nothing, and the way from a command to the end of its first training step with the
bank of embeddings there.

Seconds are processor time of a command and its children, so that other work on the machine does not change them. Both
revisions take turns.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from benchmarks.common import machine, print_table, three_digits
from helper.exits import exit_on_bad_input
from helper.parser import positive_int

ROOT = Path(__file__).parents[1]

# The last revision in which a command line imported torch.
BEFORE = "2501572"

_FIRST_STEP = str(ROOT / "benchmarks" / "first_step.py")

# A process counts the memory of the one that started it as its own, so a small one has to start it.
_LAUNCH = """
import json, os, sys
pid = os.posix_spawn(sys.executable, [sys.executable, *sys.argv[1:]], os.environ)
_, _, used = os.wait4(pid, 0)
print(json.dumps([used.ru_utime + used.ru_stime, used.ru_maxrss / 1024]))
"""


class Start(NamedTuple):
    """A command, as Python's arguments.

    name: its name in the table.
    now: the arguments in this revision.
    before: the arguments in the earlier one.
    """

    name: str
    now: list[str]
    before: list[str]


def starts() -> list[Start]:
    """The commands to measure, one for each row."""
    told = [(f"{script}.py", word) for script in ("train_student", "train_teacher") for word in ("--help", "--epoks")]
    told += [(f"{script}.py", word) for script in ("pretrain_clip", "evaluate", "export") for word in ("--help", "--x")]
    told.insert(1, ("train_student.py", "--list"))
    rows = [Start(" ".join(argv), [*argv], [*argv]) for argv in told]
    use = "from {} import load_student"
    rows.append(Start("import load_student", ["-c", use.format("evaluation")], ["-c", use.format("helper.student")]))
    # The function's first call imports these too.
    rows.append(Start("all that it needs", ["-c", "import evaluation.student"], ["-c", "import helper.student"]))
    return rows


def first_steps(work: Path, before: Path, data_dir: str) -> list[Start]:
    """Trainings up to the end of their first step, one for each frozen encoder; prepares the files for both revisions.

    Args:
        work: an empty folder, for encoders with random weights and banks of random numbers.
        before: the files of the earlier revision.
        data_dir: the folder of CIFAR-100; if it is not there, the images are those of ``--dataset shapes``.
    """
    import timm
    import torch

    from benchmarks.random_clip import SIZES, write_archive

    write_archive(work / "clip.pt", SIZES["ViT-B/32"])
    torch.save(timm.create_model("tf_efficientnet_lite0").state_dict(), work / "lite0.pth")
    encoders = {"timm's": f"timm:tf_efficientnet_lite0={work / 'lite0.pth'}", "OpenAI's": str(work / "clip.pt")}
    root = Path(data_dir).absolute()
    real = (root / "cifar-100-python" / "meta").exists()
    data = ["--dataset", "cifar100", "--data_dir", str(root)] if real else ["--dataset", "shapes"]
    rows = []
    for name, encoder in encoders.items():
        sides = []
        for side, folder in (("now", ROOT), ("before", before)):
            script = ["train_student.py", "--clip_mode", encoder, *data, "--save_dir", str(work / side)]
            script += ["--device", "cpu", "--compile", "off"]
            measure([_FIRST_STEP, "--prepare", *script], folder)
            sides.append([_FIRST_STEP, *script])
        rows.append(Start(f"first step, {data[1]}, an encoder of {name}", *sides))
    return rows


def measure(argv: list[str], folder: Path) -> tuple[float, float]:
    """Processor seconds and peak memory in MiB of a Python command that runs in a folder."""
    command = [sys.executable, "-c", _LAUNCH, *argv]
    said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    seconds, memory = json.loads(said.stdout.splitlines()[-1])
    return seconds, memory


def row(start: Start, now: Path, before: Path, repeats: int) -> list[str]:
    """One row: ratios, and the medians that they come from."""
    sides = ((start.before, before), (start.now, now))
    for side in sides:  # this run does not count: it brings files into the system's cache
        measure(*side)
    turns = [[measure(*side) for side in sides] for _ in range(repeats)]
    (seconds, memory), (seconds_now, memory_now) = (
        tuple(map(statistics.median, zip(*results, strict=True))) for results in zip(*turns, strict=True)
    )
    ratios = (seconds / seconds_now, memory / memory_now)
    values = (*ratios, seconds, seconds_now, memory, memory_now)
    return [start.name, *map(three_digits, values)]


def check_out(revision: str, folder: Path) -> None:
    """Put the files of a revision into a folder."""
    packed = subprocess.run(["git", "archive", revision], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    subprocess.run(["tar", "-x"], cwd=folder, input=packed.stdout, check=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split(":")[0] + ".", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--revision", default=BEFORE, help="the earlier revision")
    parser.add_argument("--repeats", type=positive_int, default=5, help="turns of each command; the median counts")
    parser.add_argument("--data_dir", default="./data", help="folder of CIFAR-100, for the first steps")
    parser.add_argument("--part", choices=("commands", "steps", "both"), default="both", help="what is measured")
    args = parser.parse_args(argv)
    with (
        exit_on_bad_input("benchmarks.startup"),
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryDirectory() as work,
    ):
        check_out(args.revision, Path(folder))
        rows = [] if args.part == "steps" else starts()
        rows += [] if args.part == "commands" else first_steps(Path(work), Path(folder), args.data_dir)
        print(f"{machine()}; before: {args.revision}\n", flush=True)
        header = ("command", "CPU, times less", "memory, times less", "CPU before, s", "now, s")
        header += ("memory before, MiB", "now, MiB")
        print_table(header, (row(start, ROOT, Path(folder), args.repeats) for start in rows))


if __name__ == "__main__":
    main()
