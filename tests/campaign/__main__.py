"""The command line: ``python -m tests.campaign``."""

import argparse
import sys
import time
from pathlib import Path

import torch
from test_command_lines import fuzz

import dataset
from conftest import make_dataset
from tests.campaign import __doc__ as what
from tests.campaign.faults import Campaign, summary, trials
from tests.campaign.soak import soak


def main(argv: list[str] | None = None) -> int:
    """Run it; 1 where anything was lost."""
    parser = argparse.ArgumentParser(description=what.splitlines()[0])
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
