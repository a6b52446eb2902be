"""A campaign of faults: ``python -m tests.campaign --minutes 60``; not part of the tests.

Tiny runs of every script are killed, stopped, given damaged files and full disks, in turn and at random. Each must end
bit-identical to a run that nothing happened to, or be refused in one line; anything else is printed and counted as
lost. Counts are kept in the folder, and the same command adds to them.
"""

import argparse
import builtins
import contextlib
import errno
import hashlib
import io
import itertools
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))  # as pytest has it

import torch
from PIL import Image
from test_command_lines import fuzz

import dataset
import pretrain_clip
import train_student
import train_teacher
from benchmarks.random_clip import write_archive
from conftest import TINY_VIT, make_dataset
from helper import checkpoint, distributed, report
from helper.loops import Step
from models import create_model

# Of few words, which a teacher of images does not need.
SMALL_VIT = (*TINY_VIT[:6], 100, *TINY_VIT[7:])

COMMON = ["--dataset", "tiny", "--device", "cpu", "--amp", "off", "--batch_size", "16"]
STUDENT = ["--model_s", "resnet8", "--epochs", "3"]
EGA = [*STUDENT, "--clip_mode", "{clip}", "--feature_dim", "8"]
CNN = [*STUDENT, "--path_t", "{cnn}"]
VIT = ["--vision_layers", "1", "--vision_width", "64", "--vision_patch", "16", "--text_layers", "1", "--embed_dim"]
SAVE_STEPS = ["--save_steps", "2"]
SHORT = ["--epochs", "1", "--max_steps", "1"]
FOLDER = [*STUDENT, "--distill", "none", "--dataset", "folder", "--data_dir", "{images}", "--image_size", "32", *SHORT]


class Target(NamedTuple):
    """A command whose end is compared; {clip} and the like stand for files that the campaign makes first."""

    script: ModuleType
    options: list[str]
    processes: int = 1


# What is killed and stopped. A new script is a row here.
TARGETS = {
    "train_student, CLIP": Target(train_student, [*EGA, "--teacher_views", "2"]),
    "train_student, CNN": Target(train_student, [*CNN, "--distill", "hint"]),
    "train_student, CRD": Target(
        train_student, [*EGA, "--teacher_views", "2", "--distill", "crd", "--nce_k", "20", "--feat_dim", "8"]
    ),
    "train_student, first stage": Target(
        train_student, [*CNN, "--distill", "fsp", "--learning_rate", "0.001", "--init_epochs", "2"]
    ),
    "train_teacher, head": Target(
        train_teacher, ["--model", "{clip}", "--feature_dim", "8", "--teacher_views", "2", "--epochs", "6"]
    ),
    "train_teacher, CNN": Target(train_teacher, ["--model", "resnet8", "--epochs", "3"]),
    "pretrain_clip": Target(pretrain_clip, [*VIT, "16", "--epochs", "3"]),
    "the bank": Target(train_student, [*EGA, "--teacher_views", "60", *SHORT]),
    "the images": Target(train_student, FOLDER),
    "train_student, CLIP, two processes": Target(train_student, [*EGA, "--teacher_views", "2"], processes=2),
    "train_teacher, CNN, two processes": Target(train_teacher, ["--model", "resnet8", "--epochs", "3"], processes=2),
    "pretrain_clip, two processes": Target(pretrain_clip, [*VIT, "16", "--epochs", "3"], processes=2),
    "the bank, two processes": Target(train_student, [*EGA, "--teacher_views", "60", *SHORT], processes=2),
    "the images, two processes": Target(train_student, FOLDER, processes=2),
}


class Damage(NamedTuple):
    """A file that is damaged, and the command that meets it.

    options: of the command, which is train_student.py.
    pattern: of a file that an earlier, shorter run left, which the command goes on with; None for an input.
    input: the name of an input instead.
    """

    options: list[str]
    pattern: str | None
    input: str | None = None


RESUMED = [*EGA, "--teacher_views", "2"]

# What is flipped and cut. A new kind of file is a row here.
FILES = {
    "resume.pth": Damage(RESUMED, "save/student_model/*/resume.pth"),
    "MODEL_last.pth": Damage(RESUMED, "save/student_model/*/resnet8_last.pth"),
    "options.json": Damage(RESUMED, "save/student_model/*/options.json"),
    "metrics.jsonl": Damage(RESUMED, "save/student_model/*/metrics.jsonl"),
    "the bank's rows": Damage(RESUMED, "save/teacher_bank/*/embeddings.fp16"),
    "the bank's checksums": Damage(RESUMED, "save/teacher_bank/*/crc32.u32"),
    "bank.json": Damage(RESUMED, "save/teacher_bank/*/bank.json"),
    "the images' rows": Damage(FOLDER, "save/images/*/images.u8"),
    "the images' checksums": Damage(FOLDER, "save/images/*/crc32.u32"),
    "images.json": Damage(FOLDER, "save/images/*/images.json"),
    "--clip_mode, TorchScript": Damage(RESUMED, None, "clip"),
    "--clip_mode, state dict": Damage(
        [*STUDENT, "--clip_mode", "{clip_state}", "--feature_dim", "8"], None, "clip_state"
    ),
    "--path_t, CNN": Damage([*CNN, "--distill", "kd"], None, "cnn"),
    "--path_t, head": Damage([*RESUMED, "--path_t", "{head}"], None, "head"),
    "--init_s": Damage([*STUDENT, "--distill", "none", "--init_s", "{weights}"], None, "weights"),
}


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

# Seconds that a command may take, on however busy a machine; and from a signal to its end, see ``Campaign.interrupt``.
PATIENCE, STOPPING = 1800, 60


# One command in processes of its own


class Ended(NamedTuple):
    """How a command ended: the exit code of each process, negative for a signal, and what was written to stderr."""

    codes: list[int]
    said: str
    seconds: float

    @property
    def whole(self) -> bool:
        return all(code == 0 for code in self.codes)

    def in_one_line(self, *codes: int) -> bool:
        """It ended with one of these codes, in one line, without a traceback."""
        lines = [line for line in self.said.splitlines() if ": error: " in line or ".py: " in line]
        return "Traceback" not in self.said and len(lines) == 1 and all(code in codes for code in self.codes)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _child(target: Target, argv: list[str], log: Path, environment: dict, patch: Callable[[], None] | None) -> None:
    code = 99
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stderr, sys.stdout = os.fdopen(2, "w", buffering=1), os.fdopen(1, "w")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        os.environ |= environment
        if patch is not None:
            patch()
        with distributed.processes():
            target.script.main(argv)
        code = 0
    except SystemExit as stopped:
        code = stopped.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def start(
    target: Target, argv: list[str], log: Path, patch: Callable[[], None] | None = None
) -> tuple[list[int], float]:
    """Start a command in forks of this process, which has imported all that takes seconds; their ids, and when."""
    log.unlink(missing_ok=True)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(target.processes)}
    children = []
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # one that comes before a child listens waits until it does
    for rank in range(target.processes):
        environment = place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if target.processes > 1 else {}
        child = os.fork()
        if child == 0:
            _child(target, argv, log, environment, patch)
        children.append(child)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    return children, time.monotonic()


def alive(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def end(children: list[int], began: float, log: Path, seconds: float) -> Ended:
    """Wait for all; who is not done after so many seconds is killed, which counts as a fault: code -9."""
    deadline = time.monotonic() + seconds
    while any(map(alive, children)) and time.monotonic() < deadline:
        time.sleep(0.02)
    for child in children:
        if alive(child):
            os.kill(child, signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return Ended(codes, log.read_text(errors="replace") if log.exists() else "", time.monotonic() - began)


def command(target: Target, argv: list[str], log: Path, patch: Callable[[], None] | None = None) -> Ended:
    """Run a command to its end."""
    return end(*start(target, argv, log, patch), log, PATIENCE)


def reported(run: Path) -> tuple[Ended, str]:
    """How ``helper.report`` ends on a run, here, and the table that it prints."""
    began, code = time.monotonic(), 0
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            report.main([str(run)])
        except SystemExit as stopped:
            code = stopped.code
        except Exception:
            traceback.print_exc()
            code = 1
    return Ended([code], err.getvalue(), time.monotonic() - began), out.getvalue()


# What is compared


def _digest(value: object, digest) -> None:
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            if key not in ("seconds", "images_per_second", "options", "clip_sha256"):
                digest.update(str(key).encode())
                _digest(value[key], digest)
    elif isinstance(value, (list, tuple)):
        digest.update(b"[%d" % len(value))
        for item in value:
            _digest(item, digest)
    elif isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy())
    else:
        digest.update(repr(value).encode())


def result(save_dir: Path) -> dict[str, str]:
    """A hash of all that a command leaves: weights, optimisers, metrics, the bank; not of times and paths."""
    found = {}
    for path in sorted(save_dir.rglob("*")):
        digest = hashlib.sha256()
        if path.suffix in (".pth", ".pt"):
            _digest(checkpoint.load(path), digest)
        elif path.name == "metrics.jsonl":
            _digest([json.loads(line) for line in path.read_text().splitlines()], digest)
        elif path.suffix in (".fp16", ".u8", ".u32"):
            digest.update(path.read_bytes())
        elif path.suffix == ".tmp":
            digest.update(b"left behind")
        else:
            continue
        found[f"{path.parent.name if path.parent.name == 'init' else ''}/{path.name}"] = digest.hexdigest()
    return found


# Trials


class Campaign:
    """Where it works, the inputs that it made, what unbroken runs end with, and its counts.

    Args:
        folder: of all this.
        seed: of the moments and the places.
    """

    def __init__(self, folder: Path, seed: int):
        self.folder, self.work = folder, folder / "work"
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        self.log = self.work / "stderr"
        self.counts_file = folder / "counts.json"
        self.counts = json.loads(self.counts_file.read_text()) if self.counts_file.exists() else {}
        trials = sum(sum(outcomes.values()) for outcomes in self.counts.values())
        self.random = random.Random(f"{seed} {trials}")  # those that a continued campaign adds are others
        self.inputs = self.make_inputs()
        self.unbroken: dict[str, tuple[dict[str, str], float]] = {}
        self.slowest = 0.0
        self.sizes: dict[str, int] = {}
        self.templates: dict[str, Path] = {}
        self.finished: tuple[Path, tuple[Ended, str]] | None = None
        self.lost = 0

    def make_inputs(self) -> dict[str, Path]:
        """A CLIP as an archive and as a state dict, a CNN, a head, a student's weights, a folder of pictures."""
        folder = self.work / "inputs"
        paths = {name: folder / f"{name}.pth" for name in ("clip", "clip_state", "weights")}

        def make() -> None:
            write_archive(paths["clip"], SMALL_VIT)
            torch.save(dict(torch.jit.load(paths["clip"]).state_dict()), paths["clip_state"])
            torch.manual_seed(0)
            torch.save(create_model("resnet8", 0).state_dict(), paths["weights"])
            draw_pictures(paths["images"])

        paths["images"] = folder / "images"
        folder.mkdir()
        made = command(Target(train_teacher, []), ["--help"], self.log, patch=make)
        paths |= {"cnn": folder / "resnet14.pth", "head": folder / "head.pth"}
        self.inputs = paths
        for name, options in (("cnn", ["--model", "resnet14"]), ("head", ["--model", "{clip}", "--feature_dim", "8"])):
            save_dir = self.work / "teachers"
            made = command(Target(train_teacher, []), self.argv([*options, "--epochs", "1"], save_dir), self.log)
            (file,) = save_dir.glob("models/*/*_last.pth")
            shutil.copy(file, paths[name])
            shutil.rmtree(save_dir)
            assert made.whole, made.said
        return paths

    def argv(self, options: list[str], save_dir: Path, inputs: dict[str, Path] | None = None) -> list[str]:
        words = [word.format(**(inputs or self.inputs)) for word in options]
        return [*COMMON, "--save_dir", str(save_dir), *words]

    def expected(self, target: Target) -> tuple[dict[str, str], float]:
        """What the unbroken command leaves, and how many seconds it takes."""
        name = self.key(target)
        if name not in self.unbroken:
            save_dir = self.work / "unbroken"
            ended = command(target, self.argv(target.options, save_dir), self.log)
            assert ended.whole, ended
            self.unbroken[name] = result(save_dir), ended.seconds
            self.sizes[name] = sum(path.stat().st_size for path in save_dir.rglob("*"))
            shutil.rmtree(save_dir)
        return self.unbroken[name]

    @staticmethod
    def key(target: Target) -> str:
        return " ".join([target.script.__name__, *target.options, str(target.processes)])

    @contextlib.contextmanager
    def save_dir(self) -> Iterator[Path]:
        folder = self.work / "trial"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        yield folder / "save"

    def count(self, kind: str, outcome: str, times: int = 1) -> None:
        outcomes = self.counts.setdefault(kind, {})
        outcomes[outcome] = outcomes.get(outcome, 0) + times
        checkpoint.write_json(self.counts, self.counts_file)

    def fault(self, kind: str, what: str, ended: Ended | None = None) -> None:
        self.lost += 1
        self.count(kind, "LOST")
        print(f"LOST: {kind}: {what}", *([] if ended is None else [f"codes {ended.codes}\n{ended.said}"]), flush=True)

    def check(self, kind: str, save_dir: Path, expected: dict[str, str], ended: Ended) -> bool:
        """Whether a command's end is that of the unbroken one."""
        if not ended.whole:
            self.fault(kind, "the same command did not go on", ended)
            return False
        try:
            found = result(save_dir)
        except (ValueError, OSError) as error:
            self.fault(kind, f"unreadable: {error}", ended)
            return False
        if found != expected:
            differ = sorted(name for name in found | expected if found.get(name) != expected.get(name))
            self.fault(kind, f"differs from the unbroken run: {', '.join(differ)}", ended)
            return False
        return True

    def interrupt(self, name: str, number: int) -> None:
        """One to three signals at random moments of one run, which must then end as the unbroken one."""
        target = TARGETS[name]
        expected, seconds = self.expected(target)
        kind = f"{signal.Signals(number).name}: {name}"
        hits = 0
        with self.save_dir() as save_dir:
            argv = self.argv(target.options, save_dir)
            if self.random.random() < 0.5:
                argv += SAVE_STEPS
            for _ in range(self.random.randint(1, 3)):
                children, began = start(target, argv, self.log)
                time.sleep(self.random.uniform(0, seconds))
                sent = time.monotonic()
                victim = self.random.choice(children)
                hit = alive(victim)
                if hit:
                    os.kill(victim, number)
                for child in children:  # as torchrun does when one of its processes ends
                    if child != victim and hit and alive(child):
                        os.kill(child, signal.SIGTERM if number == signal.SIGKILL else number)
                stops = hit and number != signal.SIGUSR1
                ended = end(children, began, self.log, STOPPING if stops else PATIENCE)
                hits += hit
                if stops and number != signal.SIGKILL:
                    self.slowest = max(self.slowest, time.monotonic() - sent)
                if number == signal.SIGKILL:
                    gone = not hit or all(code in (-9, 0, 1, 143, -15) for code in ended.codes)
                elif number == signal.SIGUSR1:
                    gone = ended.whole or -signal.SIGUSR1 in ended.codes  # before main: the system's own way
                else:
                    # Before main and after it, the signal acts as on any program.
                    outside = ended.codes[0] != 128 + number and not ended.said.count(".py: ")
                    codes = {-number, 128 + number, 0}
                    gone = codes.issuperset(ended.codes) and (outside or ended.in_one_line(*codes))
                if not gone:
                    self.fault(kind, f"ended {time.monotonic() - sent:.1f} s after the signal", ended)
                    return
                if ended.whole:
                    break
            ended = command(target, argv, self.log)
            if self.check(kind, save_dir, expected, ended) and hits:
                self.count(kind, "ended bit-identical", hits)

    def damage(self, name: str, how: Callable[[bytes], bytes], what: str) -> None:
        """A damaged file is refused in one line, or mended, or does not matter: the end is the unbroken run's."""
        damage = FILES[name]
        target = Target(train_student, damage.options)
        expected, _ = self.expected(target)
        kind = f"{what}: {name}"
        with self.save_dir() as save_dir:
            inputs = dict(self.inputs)
            if damage.pattern is not None:
                shutil.copytree(self.earlier(target), save_dir)
                (path,) = save_dir.parent.glob(damage.pattern)
            else:
                path = save_dir.parent / "inputs" / self.inputs[damage.input].name
                path.parent.mkdir()
                shutil.copy(self.inputs[damage.input], path)
                inputs[damage.input] = path
            path.write_bytes(how(path.read_bytes()))
            ended = command(target, self.argv(damage.options, save_dir, inputs), self.log)
            if ended.in_one_line(2):
                self.count(kind, "refused")
            elif self.check(kind, save_dir, expected, ended):
                self.count(kind, "ended bit-identical")

    def earlier(self, target: Target) -> Path:
        """What the command leaves that has fewer epochs; where it has but one, what it leaves before its end."""
        key = self.key(target)
        if key not in self.templates:
            save_dir = self.work / f"earlier{len(self.templates)}"
            options = target.options if "folder" in target.options else [*target.options, "--epochs", "2"]
            ended = command(target, self.argv(options, save_dir), self.log)
            assert ended.whole, ended
            for path in [*save_dir.rglob("resume.pth"), *save_dir.rglob("*_last.pth")] if "folder" in options else ():
                path.unlink()
            self.templates[key] = save_dir
        return self.templates[key]

    def damage_record(self, name: str, how: Callable[[bytes], bytes], what: str) -> None:
        """A damaged file of a finished run: ``helper.report`` refuses it in one line, or prints the same table."""
        kind = f"{what}: {name} of a finished run"
        if self.finished is None:
            save_dir = self.work / "finished"
            ended = command(Target(train_student, RESUMED), self.argv(RESUMED, save_dir), self.log)
            assert ended.whole, ended
            (run,) = save_dir.glob("student_model/*")
            self.finished = run, reported(run)
        run, expected = self.finished
        with self.save_dir() as save_dir:
            shutil.copytree(run, save_dir)
            (save_dir / name).write_bytes(how((run / name).read_bytes()))
            ended, told = reported(save_dir)
            if ended.in_one_line(2):
                self.count(kind, "refused")
            elif ended.whole and told == expected[1]:
                self.count(kind, "told the same")
            else:
                self.fault(kind, told, ended)

    def flip(self, name: str, damage: Callable[..., None]) -> None:
        damage(name, lambda content: flipped(content, self.random), "a bit flipped")

    def cut(self, name: str, damage: Callable[..., None]) -> None:
        damage(name, lambda content: content[: self.random.randrange(len(content))], "cut off")

    def failing_write(self, name: str, number: int, error: int) -> bool:
        """The write of that number fails, and all after it; whether the run came so far."""
        target = TARGETS[name]
        expected, _ = self.expected(target)
        kind = f"{errno.errorcode[error]} at every write: {name}"
        with self.save_dir() as save_dir:
            argv = self.argv(target.options, save_dir)
            ended = command(target, argv, self.log, patch=lambda: fail_writes(save_dir, number, error))
            reached = not ended.whole
            if reached and not ended.in_one_line(2, 4):
                self.fault(kind, f"write {number}", ended)
                return reached
            if self.check(kind, save_dir, expected, command(target, argv, self.log)) and reached:
                self.count(kind, "ended bit-identical")
            return reached

    def full_disk(self, name: str) -> None:
        """A file system that is full at a random moment, and is then made larger."""
        target = TARGETS[name]
        expected, _ = self.expected(target)
        largest = self.sizes[self.key(target)]
        kind = f"a full file system: {name}"
        with self.save_dir() as save_dir:
            mount = save_dir.parent
            size = self.random.randint(8, largest // 1024)
            if os.system(f"mount -t tmpfs -o size={size}k tmpfs {mount}"):
                self.count("a full file system: not allowed here", "skipped")
                return
            try:
                argv = self.argv(target.options, save_dir)
                ended = command(target, argv, self.log)
                if not ended.whole and not ended.in_one_line(2, 4):
                    self.fault(kind, f"{size} KiB", ended)
                    return
                full = not ended.whole
                os.system(f"mount -o remount,size=1g {mount}")
                if self.check(kind, save_dir, expected, command(target, argv, self.log)) and full:
                    self.count(kind, "ended bit-identical")
            finally:
                os.system(f"umount {mount}")


def flipped(content: bytes, numbers: random.Random) -> bytes:
    """With one bit changed."""
    place = numbers.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << numbers.randrange(8)]) + content[place + 1 :]


def fail_writes(folder: Path, number: int, error: int) -> None:
    """Have the call of that number that writes below a folder fail, and all after it: a disk that stays full."""
    calls = []

    def failing(owner, name: str, writes: Callable[..., bool]) -> None:
        original = getattr(owner, name)

        def call(*args, **kwargs):
            if writes(*args, **kwargs):
                calls.append(name)
                if len(calls) >= number:
                    raise OSError(error, os.strerror(error))
            return original(*args, **kwargs)

        setattr(owner, name, call)

    def below(path: object) -> bool:
        return isinstance(path, (str, Path)) and str(path).startswith(str(folder))

    failing(builtins, "open", lambda path, mode="r", *args, **kwargs: below(path) and bool(set(mode) & set("wa+x")))
    failing(os, "mkdir", lambda path, *args, **kwargs: below(path))
    failing(os, "replace", lambda source, target: below(target))
    failing(os, "fsync", lambda descriptor: True)
    failing(os, "posix_fallocate", lambda *args: True)


# An EGA run of many steps on small data, in epochs of 500 that are each tested and saved.
SOAK = [
    *EGA,
    "--teacher_views",
    "2",
    "--batch_size",
    "4",
    "--epochs",
    "40",
    "--save_steps",
    "250",
    "--print_freq",
    "500",
]
SOAK_AT = (2_000, 20_000)


def resources() -> dict[str, int]:
    """Of this process: resident memory in KiB, open files, threads."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    files = len(os.listdir("/proc/self/fd"))
    return {"KiB": int(status["VmRSS"].split()[0]), "files": files, "threads": int(status["Threads"])}


def soak(campaign: Campaign, processes: int) -> bool:
    """Whether memory, files and threads are after all steps what they were after the first of them; prints them."""
    notes = campaign.work / "soak"

    def note_resources() -> None:
        dataset.DATASETS["tiny"] = lambda data_dir: make_dataset(num_train=2000)
        step, count = Step.__call__, itertools.count(1)

        def counted(*args):
            step(*args)
            if next(count) in SOAK_AT:
                with open(f"{notes}{distributed.rank()}", "a") as file:
                    file.write(json.dumps(resources()) + "\n")

        Step.__call__ = counted

    with campaign.save_dir() as save_dir:
        target = Target(train_student, SOAK, processes)
        ended = end(*start(target, campaign.argv(SOAK, save_dir), campaign.log, note_resources), campaign.log, 7200)
    if not ended.whole:
        print(ended)
        return False
    constant = True
    for rank in range(processes):
        early, late = map(json.loads, Path(f"{notes}{rank}").read_text().splitlines())
        growth = late["KiB"] / early["KiB"] - 1
        constant &= growth < 0.02 and early["files"] == late["files"] and early["threads"] == late["threads"]
        print(
            f"process {rank} of {processes}: after {SOAK_AT[0]} steps {early}, after {SOAK_AT[1]} {late}: {growth:+.2%}"
        )
        Path(f"{notes}{rank}").unlink()
    return constant


def draw_pictures(folder: Path) -> None:
    """A folder of 600 pictures of 3 classes for training, and 30 for tests."""
    data = make_dataset(num_train=600, num_test=30, num_classes=3)
    for name, split in (("train", data.train), ("test", data.test)):
        for number, (image, target) in enumerate(zip(split.images, split.targets.tolist(), strict=True)):
            path = folder / name / f"class_{target}" / f"{number:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).resize((64, 48)).save(path)


def trials(campaign: Campaign) -> Iterator[Callable[[], None]]:
    """The trials of a campaign, for ever, in an order that tries each kind early."""
    pick = campaign.random.choice
    write = dict.fromkeys(("train_student, CLIP", "train_teacher, CNN", "pretrain_clip"), 1)
    while True:
        for name in TARGETS:
            yield lambda name=name: campaign.interrupt(name, signal.SIGKILL)
            yield lambda name=name: campaign.interrupt(name, pick((signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)))
        damaged = [(name, campaign.damage) for name in FILES]
        damaged += [(name, campaign.damage_record) for name in ("options.json", "metrics.jsonl")]
        for name, damage in damaged:
            yield lambda name=name, damage=damage: campaign.flip(name, damage)
            yield lambda name=name, damage=damage: campaign.flip(name, damage)
            yield lambda name=name, damage=damage: campaign.cut(name, damage)
        for name in write:

            def next_write(name=name):
                came = campaign.failing_write(name, write[name], pick((errno.ENOSPC, errno.EROFS, errno.EIO)))
                write[name] = write[name] + 1 if came else 1

            yield from [next_write] * 4
        for name in ("train_student, CLIP", "train_student, first stage", "pretrain_clip", "the images"):
            yield lambda name=name: campaign.full_disk(name)


def summary(counts: dict[str, dict[str, int]]) -> str:
    """Markdown: each fault, in how many kinds of commands or files, how often, and what happened."""
    faults: dict[str, Counter[str]] = {}
    names: Counter[str] = Counter()
    for kind, outcomes in sorted(counts.items()):
        fault = kind.partition(": ")[0]
        faults.setdefault(fault, Counter()).update(outcomes)
        names[fault] += 1
    rows = [("fault", "commands, or files", "tried", "what happened")]
    for fault, outcomes in faults.items():
        told = ", ".join(f"{outcome} {times}" for outcome, times in sorted(outcomes.items()))
        rows.append((fault, str(names[fault]), str(outcomes.total()), told))
    return report.markdown(rows)


def main(argv: list[str] | None = None) -> int:
    """Run it; 1 where anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5, help="how long (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the places")
    parser.add_argument("--folder", type=Path, default=Path("save/campaign"), help="of its counts and its work")
    parser.add_argument("--soak", action="store_true", help="instead: 20,000 steps by one process and by two")
    parser.add_argument("--command_lines", type=int, metavar="N", help="instead: so many random command lines")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    dataset.DATASETS["tiny"] = lambda data_dir: make_dataset(num_train=48, num_test=10)
    until = time.monotonic() + 60 * args.minutes
    campaign = Campaign(args.folder.absolute(), args.seed)
    if args.soak:
        kept = [soak(campaign, processes) for processes in (1, 2)]
        return int(not all(kept))
    if args.command_lines:
        outcomes = fuzz(campaign.inputs["clip"], args.command_lines, args.seed)
        print(", ".join(f"{outcome} {times}" for outcome, times in sorted(outcomes.items())))
        return 0
    for trial in trials(campaign):
        if time.monotonic() > until:
            break
        trial()
    print(summary(campaign.counts))
    print(f"Ctrl-C and SIGTERM: every process had ended after {campaign.slowest:.1f} s at most")
    lost = sum(outcomes.get("LOST", 0) for outcomes in campaign.counts.values())
    print(f"{sum(sum(outcomes.values()) for outcomes in campaign.counts.values())} trials, lost: {lost}")
    return int(campaign.lost > 0)


if __name__ == "__main__":
    sys.exit(main())
