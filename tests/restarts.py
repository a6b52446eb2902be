"""Jobs that lose processes: ``python -m tests.restarts``; minutes, and no part of the tests.

An unbroken job first, then others under ``torchrun --max_restarts 3`` of which a process, chosen at random, is killed
by SIGKILL at a random moment, three times each: while it starts, encodes the bank, trains, tests or saves. Each has to
go on by itself and end with the same weights and records, bit for bit.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.random_clip import write_archive
from tests.conftest import TINY_VIT

ROOT = Path(__file__).parent.parent
RESTARTS = 3

# How the lines begin that say where a job is.
_TOLD = ("Epoch", "* Epoch", "teacher's", "ega:", "resuming", "best accuracy")


def start(save_dir: Path, processes: int, clip: Path, options: list[str]) -> subprocess.Popen:
    """torchrun, its output in SAVE/out."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += ["--max_restarts", str(RESTARTS), "train_student.py", "--distill", "ega", "--clip_mode", str(clip)]
    command += ["--dataset", "shapes", "--model_s", "resnet8", "--epochs", "3", "--batch_size", "4"]
    command += ["--device", "cpu"]
    save_dir.mkdir(parents=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    with open(save_dir / "out", "w") as out:
        words = [*command, *options, "--save_dir", str(save_dir)]
        return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)


def children(parent: int) -> list[int]:
    said = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True)
    return [int(word) for word in said.stdout.split()]


def result(save_dir: Path) -> tuple[list[dict], dict]:
    """The records, less what measures time, and the last weights."""
    (folder,) = (save_dir / "student_model").iterdir()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    records = [{k: v for k, v in r.items() if k not in ("seconds", "images_per_second")} for r in records]
    return records, torch.load(folder / "resnet8_last.pth")


def are_equal(one: tuple[list[dict], dict], other: tuple[list[dict], dict]) -> bool:
    parts = ("model", "layer", "teacher_layer")
    same = [torch.equal(value, other[1][part][name]) for part in parts for name, value in one[1][part].items()]
    return one[0] == other[0] and all(same)


def where(save_dir: Path) -> str:
    """What the job said last."""
    lines = (save_dir / "out").read_text(errors="replace").replace("\r", "\n").splitlines()
    said = [line for line in lines if line.lstrip().startswith(_TOLD) or "failed (exitcode" in line]
    return " ".join(said[-1].split())[:40] if said and "failed" not in said[-1] else "starting"


def kill(job: subprocess.Popen, rng: random.Random, seconds: float, processes: int, before: set[int]) -> set[int]:
    """Kill one of the job's processes that are not among ``before``, within so many seconds; all that it had.

    Empty where the job ended earlier.
    """
    while job.poll() is None and len(alive := set(children(job.pid)) - before) < processes:
        time.sleep(0.05)
    end = time.monotonic() + rng.uniform(0, seconds)
    while job.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    if job.poll() is not None:
        return set()
    victim = rng.choice(sorted(alive))
    try:
        os.kill(victim, signal.SIGKILL)
    except ProcessLookupError:  # ended in this very moment
        return set()
    return alive


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="in all")
    parser.add_argument("--processes", type=int, default=2, help="of a job")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the processes that are chosen")
    parser.add_argument("--save_steps", type=int, default=25, help="0: a job goes on after the last epoch alone")
    args = parser.parse_args()
    rng, options = random.Random(args.seed), ["--save_steps", str(args.save_steps)] if args.save_steps else []
    with tempfile.TemporaryDirectory(prefix="restarts-") as folder:
        folder, clip = Path(folder), Path(folder) / "tiny.pt"
        write_archive(clip, TINY_VIT)
        begin = time.monotonic()
        assert start(folder / "unbroken", args.processes, clip, options).wait() == 0
        seconds, expected = time.monotonic() - begin, result(folder / "unbroken")
        print(f"unbroken: {seconds:.0f} s, {args.processes} processes", flush=True)
        killed = jobs = 0
        while killed < args.kills:
            save_dir, before, places = folder / f"job{jobs}", set(), []
            job = start(save_dir, args.processes, clip, options)
            for _ in range(min(RESTARTS, args.kills - killed)):
                had = kill(job, rng, 0.6 * seconds, args.processes, before)  # early enough to be killed again
                if not had:
                    break
                places.append(where(save_dir))
                before |= had
            code = job.wait()
            equal = code == 0 and are_equal(result(save_dir), expected)
            killed, jobs = killed + len(places), jobs + 1
            print(f"job {jobs}: killed at [{' | '.join(places)}]; exit code {code}; equal: {equal}", flush=True)
            if not equal:
                print((save_dir / "out").read_text(errors="replace")[-4000:])
                raise SystemExit(1)
    print(f"{killed} kills in {jobs} jobs: every one went on by itself and ended bit-identical to the unbroken one")


if __name__ == "__main__":
    main()
