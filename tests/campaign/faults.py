"""Trials: what is done to a command, and what it must end with."""

import builtins
import contextlib
import errno
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import train_student
import train_teacher
from evaluation.tables import markdown
from helper import checkpoint
from tests.campaign.jobs import PATIENCE, Ended, alive, command, end, reported, result, start
from tests.campaign.targets import COMMON, FILES, RESUMED, SAVE_STEPS, TARGETS, Target, write_inputs

# Seconds from a signal to the end of every process, see ``Campaign.interrupt``.
STOPPING = 60


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
        folder.mkdir()
        paths = {name: folder / f"{name}.pth" for name in ("clip", "clip_state", "weights")}
        paths["images"] = folder / "images"
        # In a fork, as all that computes: this process is to have no threads.
        made = command(Target(train_teacher, []), ["--help"], self.log, patch=lambda: write_inputs(paths))
        assert made.whole, made.said
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
        """A damaged file of a finished run: ``report`` refuses it in one line, or prints the same table."""
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
    return markdown(rows)
