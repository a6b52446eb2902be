"""Jobs of several processes, for the tests."""

import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import traceback
import uuid
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args

from helper import launch

# What is imported here need not be imported again.
FORK = multiprocessing.get_context("fork")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def serve(pipe, variables: dict[str, str]) -> None:
    """A process of the job: calls what it is sent, until it is sent None."""
    os.environ |= variables
    torch.set_num_threads(1)
    with launch.processes():
        while (call := pipe.recv()) is not None:
            function, args = call
            try:
                said = (function(*args), None)
            except BaseException:
                said = (None, traceback.format_exc())
            # Bytes: a pipe would share each tensor through a file of its own, which costs more than a tiny step.
            pipe.send_bytes(pickle.dumps(said))


class Job:
    """So many processes, started as torchrun starts them, that stay."""

    def __init__(self, count: int):
        self.count = count
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
        self.pipes, self.processes = [], []
        for rank in range(count):
            ours, theirs = FORK.Pipe()
            variables = place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = FORK.Process(target=serve, args=(theirs, variables), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def __call__(self, function: Callable, *args) -> list:
        """What a function of a test's file gives on each process."""
        for pipe in self.pipes:
            pipe.send((function, args))
        found = [pickle.loads(pipe.recv_bytes()) for pipe in self.pipes]
        assert not any(error for _, error in found), "\n".join(str(error) for _, error in found)
        return [value for value, _ in found]

    def end(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(30)


def forked(function: Callable, *args, **kwargs) -> int:
    """Call a function in a process of its own; its exit code, negative where a signal ended it."""
    process = FORK.Process(target=function, args=args, kwargs=kwargs)
    process.start()
    process.join(120)
    return process.exitcode


def children(parent: int) -> list[int]:
    said = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True)
    return [int(word) for word in said.stdout.split()]


def agent(options: list[str], function: Callable, *args) -> None:
    """torchrun's agent in this process, with a function in the script's place: processes forked, not executed."""
    opt = parse_args([*options, "script.py"])
    if opt.standalone:  # torchrun does this in the function that also starts the script
        opt.rdzv_backend, opt.rdzv_endpoint, opt.rdzv_id = "c10d", "localhost:0", uuid.uuid4().hex
    config, _, _ = config_from_args(opt)
    elastic_launch(replace(config, start_method="fork"), function)(*args)


def run_agent(options: list[str], function: Callable, args: tuple, folder: Path) -> None:
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT, 0o600), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    agent(options, function, *args)


def torchrun(count: int, max_restarts: int, function: Callable, args: tuple, folder: Path) -> BaseProcess:
    """A job under torchrun's agent: a function of a test's file in the script's place, processes forked, not executed.

    Args:
        folder: gets the files stdout and stderr, of the agent and all processes.
    """
    options = ["--standalone", "--nproc_per_node", str(count), "--max_restarts", str(max_restarts)]
    process = FORK.Process(target=run_agent, args=(options, function, args, folder))
    process.start()
    return process
