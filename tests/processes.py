"""Jobs of several processes, for the tests."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable

import torch

from helper import launch


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
                pipe.send((function(*args), None))
            except BaseException:
                pipe.send((None, traceback.format_exc()))


class Job:
    """So many processes, started as torchrun starts them, that stay."""

    def __init__(self, count: int):
        self.count = count
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
        context = multiprocessing.get_context("fork")  # what is imported here need not be imported again
        self.pipes, self.processes = [], []
        for rank in range(count):
            ours, theirs = context.Pipe()
            variables = place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = context.Process(target=serve, args=(theirs, variables), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def __call__(self, function: Callable, *args) -> list:
        """What a function of a test's file gives on each process."""
        for pipe in self.pipes:
            pipe.send((function, args))
        found = [pipe.recv() for pipe in self.pipes]
        assert not any(error for _, error in found), "\n".join(str(error) for _, error in found)
        return [value for value, _ in found]

    def end(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(30)
