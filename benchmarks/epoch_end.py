"""Time that a run spends between two epochs, without its test pass: ``python -m benchmarks.epoch_end``.

The baseline is ``--save_seconds 0``, which writes a checkpoint after every epoch. It is compared with epochs that write
none, as most do with ``--save_seconds 30``. Both take turns, on the same state: that of a student, its optimiser and
its loss on CIFAR-100. Every fourth epoch is the best so far.
"""

import argparse
import statistics
import tempfile
import time
from argparse import Namespace

import torch

from benchmarks.common import machine, print_table, three_digits
from distiller_zoo import METHODS, Networks
from helper.optim import sgd
from helper.options import student_parser
from helper.run import Run
from models import create_student

_METHODS = ("ega", "crd")
_IMAGES, _CLASSES = 50_000, 100


def training_state(method: str, model_s: str) -> tuple[dict, dict]:
    """The state that a run of a method goes on from, and its model's file."""
    opt = student_parser().parse_args(["--distill", method, "--model_s", model_s])
    opt.weight_decay = 5e-4
    student = create_student(model_s, opt.feature_dim, _CLASSES)
    dim, targets = opt.feature_dim, torch.arange(_IMAGES) % _CLASSES
    build, _ = METHODS[method].with_teacher(clip=True)
    criterion = build(opt, Networks([(2, dim)], [(2, dim)], dim, dim, targets))
    optimizer = sgd([*student.parameters(), *criterion.parameters()], 0.05, opt)
    stateful = {"student": student, "criterion": criterion, "optimizer": optimizer}
    files = {"model": student.backbone.state_dict(), "layer": student.head.state_dict()}
    return {name: module.state_dict() for name, module in stateful.items()}, files


def time_epoch_ends(method: str, model_s: str, epochs: int, save_dir: str) -> list[float]:
    """Median seconds of an epoch's end, with a checkpoint after every epoch and between two checkpoints."""
    state, files = training_state(method, model_s)
    runs, seconds = [], ([], [])
    for save_seconds in (0, 1e9):
        opt = Namespace(save_dir=save_dir, resume="auto", epochs=epochs + 2, save_seconds=save_seconds, log=None)
        runs.append(Run(opt, {}, "student_model", "student_tensorboards", f"{method}{save_seconds:.0f}", model_s))
        runs[-1].start()
    for epoch in range(1, epochs + 2):  # the last epoch, which always writes, is not reached
        for run, found in zip(runs, seconds, strict=True):
            record = {"epoch": epoch, "train_loss": 1 / epoch, "test_acc": epoch - 4.5 * (epoch % 4 > 0)}
            start = time.perf_counter()
            run.end_epoch(record, state, files)
            found.append(time.perf_counter() - start)
    return [statistics.median(found[1:]) for found in seconds]  # the first epoch always writes


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_s", default="resnet8x4", help="the student")
    parser.add_argument("--epochs", type=int, default=40, help="epochs of each run")
    parser.add_argument("--save_dir", help="a folder on the disk that is measured; if unset, a temporary one")
    args = parser.parse_args(argv)
    print(f"{machine()}\n")
    rows = []
    with tempfile.TemporaryDirectory(dir=args.save_dir) as folder:
        for method in _METHODS:
            always, between = time_epoch_ends(method, args.model_s, args.epochs, folder)
            rows.append([method, three_digits(1e3 * always), three_digits(1e3 * between), f"{between / always:.2f}"])
    print_table(["method", "checkpoint after every epoch, ms", "between two checkpoints, ms", "share"], rows)


if __name__ == "__main__":
    main()
