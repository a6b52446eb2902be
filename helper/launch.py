"""This process's place in its job, from torchrun's environment variables; reading them needs no torch."""

import contextlib
import datetime
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

# The others wait so long while one process checks a bank or writes a checkpoint. One that dies ends the job at once.
_TIMEOUT = datetime.timedelta(minutes=30)


def count() -> int:
    """The number of processes that were started together."""
    # Another launcher's WORLD_SIZE may mean other things.
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def rank() -> int:
    """This process's number, from 0."""
    return int(os.environ["RANK"]) if count() > 1 else 0


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Join the other processes of the job, if there are any; only the first one prints."""
    if count() == 1:
        yield
        return
    import torch  # here, so that a single process imports it after it has read its arguments
    import torch.distributed as dist

    local = int(os.environ["LOCAL_RANK"])
    if local < torch.cuda.device_count():
        torch.cuda.set_device(local)
    store, number, processes = next(dist.rendezvous("env://", timeout=_TIMEOUT))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun keeps one store for all starts of a job. A process that found a dead one's address there would wait
        # for it. Each agent counts its own starts.
        if int(os.environ["GROUP_WORLD_SIZE"]) > 1 and int(os.environ["TORCHELASTIC_MAX_RESTARTS"]):
            if number == 0:
                what = (
                    "error: to restart on several machines, torchrun needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its"
                )
                print(f"{Path(sys.argv[0]).name}: {what} environment", file=sys.stderr)
            raise SystemExit(2)
        store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    # gloo for tensors on the CPU, NCCL for those on a GPU
    dist.init_process_group(store=store, rank=number, world_size=processes, timeout=_TIMEOUT)
    with contextlib.ExitStack() as stack:
        if number > 0:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        yield
    # This is done only where all went well: after an error the others may not be there to agree. gloo's threads need
    # the interpreter to free the last tensors. Destroying the group holds it while it waits for them, so they get time
    # to finish first.
    dist.barrier()
    time.sleep(0.2)
    dist.destroy_process_group()
