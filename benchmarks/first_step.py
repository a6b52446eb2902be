"""Runs a training script up to the end of its first step: ``python first_step.py SCRIPT ARGUMENTS``.

``benchmarks.startup`` starts it in the folder of each revision. ``--prepare`` before the script writes random numbers
into the bank instead of encoding.
"""

import os
import runpy
import sys


def end(*_) -> None:
    """End at once, so that nothing after the step counts."""
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    sys.path[0], argv = os.getcwd(), sys.argv[1:]
    if argv[0] == "--prepare":
        import torch

        from helper import bank

        bank.encode_view = lambda encoder, views, images, *view: torch.rand(len(images), encoder.dim)
        argv = argv[1:]
    from torch.optim.optimizer import register_optimizer_step_post_hook  # this imports what every step imports anyway

    register_optimizer_step_post_hook(end)
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
