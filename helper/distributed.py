"""What the processes of a job tell one another. With one process these functions do nothing.

DistributedDataParallel takes the mean of the processes' gradients. Each process therefore multiplies a loss that is a
mean over samples by ``Batch.weight``. A loss of the whole batch is computed alike by every process and counts once; its
gradients at a process's own samples are multiplied by the number of processes.
"""

import contextlib
import os
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from filelock import FileLock
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from errors import InputError

# Seconds that a network's file system may take to show one machine what another one wrote.
_SEEN_WITHIN = 10.0


def count() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0; the first is the one that writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def wait() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def restarted() -> bool:
    """Whether torchrun started this job again, after a process of it ended."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def from_first(value: object) -> object:
    """The first process's value, on every process."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def collect(value: object) -> list:
    """Every process's value, in order of rank, on every process."""
    values = [value] * count()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def in_first(function: Callable[[], object]) -> None:
    """Call a function in the first process alone, while the others wait.

    The others end too where it raises an OSError or an InputError.
    """
    error = None
    if rank() == 0:
        try:
            function()
        except (OSError, ValueError) as raised:
            error = raised
    if from_first(error is not None):
        raise error or SystemExit(2)


def refuse(message: str) -> NoReturn:
    """Raise an InputError in the first process, and end the others, which found the same."""
    raise InputError(message) if rank() == 0 else SystemExit(2)


def check_alike(values: dict) -> None:
    """Raise an InputError unless every process has the same values by name."""
    first, *others = collect(values)
    for number, other in enumerate(others, start=1):
        for name, value in first.items():
            if other.get(name) != value:
                refuse(
                    f"process {number} has {name} {other.get(name)}, the first one {value}: start all with the same "
                    "options, data and weights"
                )


def check_shared(folder: Path, lock: Path | None = None) -> None:
    """Raise an InputError unless every process sees what the first one writes into a folder.

    Args:
        lock: a file that the first process locks meanwhile; None where no other job checks the folder.
    """
    if count() == 1:
        return
    mark = folder / f"shared-{from_first(uuid.uuid4().hex)}.tmp"
    held = contextlib.ExitStack()

    def leave_mark() -> None:
        if lock is not None:
            held.enter_context(FileLock(lock))
        for left in folder.glob("shared-*.tmp"):  # left by a job that was killed meanwhile
            left.unlink()
        mark.touch()

    with held:
        in_first(leave_mark)
        end = time.monotonic() + _SEEN_WITHIN
        while not (seen := mark.exists()) and time.monotonic() < end:
            time.sleep(0.1)
        found = collect((socket.gethostname(), seen))
        if rank() == 0:
            mark.unlink()
    for number, (host, seen) in enumerate(found):
        if not seen:
            refuse(
                f"process {number} (on {host}) does not see what the first one (on {found[0][0]}) writes into "
                f"{folder.absolute()}: it has to be on storage that all machines share"
            )


@torch.no_grad()
def total(x: Tensor) -> Tensor:
    """Replace ``x`` by its sum over all processes."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def of_any(fact: bool) -> bool:
    """Whether a fact is true on any process."""
    return bool(total(torch.tensor(int(fact))))


@torch.no_grad()
def least(x: Tensor) -> Tensor:
    """Replace ``x`` by its minimum over all processes, element by element."""
    if dist.is_initialized():
        dist.all_reduce(x, dist.ReduceOp.MIN)
    return x


@torch.no_grad()
def share_buffers(module: nn.Module) -> None:
    """Give every process the first one's buffers, such as the running statistics of batch norm."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def parallel(module: nn.Module, static: bool = False) -> nn.Module:
    """Wrap a module, so that its gradients are the mean over all processes.

    Args:
        static: every step uses the same weights as the first one on all processes, so that none is searched for them.
    """
    if not dist.is_initialized() or not any(parameter.requires_grad for parameter in module.parameters()):
        return module
    # A step may leave weights unused: the method decides, and a process without a share uses none of the loss's.
    # Buffers are shared once an epoch instead, when they are read.
    how = {"static_graph": True} if static else {"find_unused_parameters": True}
    return DistributedDataParallel(module, broadcast_buffers=False, **how)


def unsynchronised(module: nn.Module) -> contextlib.AbstractContextManager:
    """A context in which passes through a ``parallel`` module keep their gradients on this process.

    The gradients add up until a pass outside of the context shares them.
    """
    return module.no_sync() if isinstance(module, DistributedDataParallel) else contextlib.nullcontext()


def own(x: Tensor, shares: Sequence[int] | None) -> Tensor:
    """This process's rows (share, ...) of all rows (B, ...).

    Args:
        shares: rows on each process; None where there is one process.
    """
    return x if shares is None else x.split(shares)[rank()]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, shares: Sequence[int], alike: bool) -> Tensor:
        start = sum(shares[: rank()])
        ctx.own, ctx.alike = slice(start, start + len(x)), alike
        # One process has a row and the others zeros in its place; a sum of these lets shares differ in size.
        rows = x.new_zeros(sum(shares), *x.shape[1:])
        rows[ctx.own] = x
        return total(rows)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        grad = grad * count() if ctx.alike else total(grad.clone(memory_format=torch.contiguous_format))
        return grad[ctx.own], None, None


def gather(x: Tensor | list[Tensor], shares: Sequence[int] | None, alike: bool = True) -> Tensor | list[Tensor]:
    """Join this process's rows (share, ...) and the others' to (B, ...), in order of rank.

    The gradient is that of the sum of the losses that the processes compute from the result.

    Args:
        x: this process's rows, a tensor or a list of tensors.
        shares: rows on each process; None where there is one process.
        alike: the processes compute the same loss; otherwise they exchange their gradients too.
    """
    if shares is None:
        return x
    if isinstance(x, list):
        return [_Gather.apply(part, shares, alike) for part in x]
    return _Gather.apply(x, shares, alike)


def logsumexp(x: Tensor) -> Tensor:
    """Log-sum-exp of each column over the rows of all processes, (share, K) to (K,).

    The gradient is that of the sum of the processes' losses, which are all the same.

    Args:
        x: this process's rows; at least one process has some.
    """
    if not dist.is_initialized():
        return torch.logsumexp(x, dim=0)
    highest = x.detach().amax(dim=0) if len(x) else x.new_full(x.shape[1:], -torch.inf)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    sums = (x - highest).exp().sum(dim=0, keepdim=True)
    return gather(sums, [1] * count()).sum(dim=0).log() + highest
