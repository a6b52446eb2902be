"""One command in processes of its own: how it ended, and what it left."""

import contextlib
import hashlib
import io
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from processes import free_port

from helper import checkpoint, launch
from report import table
from tests.campaign.targets import Target

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

# Seconds that a command may take, on however busy a machine.
PATIENCE = 1800


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
        with launch.processes():
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
    """How ``report`` ends on a run, here, and the table that it prints."""
    began, code = time.monotonic(), 0
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            table.main([str(run)])
        except SystemExit as stopped:
            code = stopped.code
        except Exception:
            traceback.print_exc()
            code = 1
    return Ended([code], err.getvalue(), time.monotonic() - began), out.getvalue()


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
