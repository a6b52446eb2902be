"""A long run, whose memory, open files and threads must stay what they were."""

import itertools
import json
import os
from pathlib import Path

import dataset
import train_student
from conftest import make_dataset
from helper import distributed
from helper.step import Step
from tests.campaign.faults import Campaign
from tests.campaign.jobs import end, start
from tests.campaign.targets import EGA, Target

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
    """This process's resident memory in KiB, open files, threads."""
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
