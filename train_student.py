"""Distil a frozen teacher into a small student: ``python train_student.py --distill ega -r 1 -b 1``.

From Python: ``from train_student import distill``.
"""

import argparse
import contextlib
import os
import shlex
import time
from typing import TYPE_CHECKING

from dataset import open_dataset, student_size
from distiller_zoo import METHODS
from helper import exits, launch
from helper.call import command_line, data_options, network_option
from helper.names import student_run_name
from helper.options import parse_student_options, recorded_options, student_parser
from models.names import parse_name

if TYPE_CHECKING:
    from torch import nn

    from evaluation import FinishedRun
    from helper.run import Run


@exits.exits("train_student.py", memory="lower --batch_size or --teacher_views")
def main(argv: list[str] | None = None) -> None:
    train(parse_student_options(argv), exits.exit_on_bad_input("train_student.py"))


def distill(
    data: str | os.PathLike | list | None = None,
    *,
    student: "str | nn.Module | None" = None,
    teacher: "str | nn.Module | None" = None,
    method: str | None = None,
    **options,
) -> "FinishedRun":
    """Do as the command line does, from Python: ``distill("photos", image_size=64, student=net, method="ega")``.

    A finished run is returned at once, and an interrupted one goes on. The random numbers of the calling program stay
    as they are.

    Args:
        data: the name of a data set, or the folder of your own images; ``--dataset`` and ``--data_dir``.
        student: a name, or a module that gives logits and ends in a linear layer; ``--model_s``. A module starts from
            the weights that it has. They are part of the run's name: to go on with an interrupted run, give a module
            with the same weights, as ``torch.manual_seed`` before its construction makes them. It is not changed.
        teacher: the name of a frozen encoder, or a module from images to embeddings; ``--clip_mode``.
        method: ``--distill``.
        options: every other flag by its name, as ``batch_size=64``; a flag without a value is True.

    Returns:
        The run: its folder, its options and metrics, and ``student()``.

    Raises:
        InputError: what the command line refuses with exit code 2, in the same words.
        NonFiniteLoss: a loss was not finite.
        OSError: a file cannot be read; WriteError, one of these: it cannot be written.
    """
    networks = {"model_s": network_option(student), "clip_mode": network_option(teacher)}
    keywords = data_options(data) | {"distill": method} | networks
    argv = command_line(student_parser(), {key: x for key, x in keywords.items() if x is not None} | options)

    import torch

    from evaluation import FinishedRun
    from helper.records import read_run

    with torch.random.fork_rng():
        run = exits.call(lambda: train(parse_student_options(argv, raises=True), contextlib.nullcontext()))
    return FinishedRun(**vars(read_run(run.folder)))


def train(opt: argparse.Namespace, checking: contextlib.AbstractContextManager) -> "Run":
    """Train the student that the options describe, or go on with it.

    Args:
        checking: the context of all that can be wrong with the input.
    """
    # These imports stand here so that neither --help nor a refused option waits for torch.
    from helper import first_stage, training
    from helper.acquaint import acquaint
    from helper.data import build_loaders
    from helper.meters import print_record
    from helper.objective import build_objective, check_lone_image
    from helper.pictures import first_views
    from helper.probe import Probe
    from helper.run import Run
    from helper.runtime import check_machine, resolve
    from helper.student import build_student, find_student, model_file, own_code
    from helper.teacher import build_teacher, find_teacher
    from helper.validation import Evaluation

    needs = METHODS[opt.distill].needs(clip=bool(opt.clip_tn))

    # This finds everything that can be wrong with the input, cheap checks first: images are downloaded or decoded after
    # the networks are checked, and embeddings are encoded last.
    with checking:
        size = student_size(opt.dataset, opt.image_size)
        check_machine(opt, size)
        facts, identity = find_teacher(opt)
        normalization, own = find_student(opt, needs, size)
        identity |= own
        dataset = open_dataset(vars(opt))
        identity["dataset_sha256"] = dataset.fingerprint()
        probe = None if opt.probe is None else Probe(opt, dataset.views.size)
        identity |= {} if probe is None else {"probe_sha256": probe.dataset.fingerprint()}
        name = student_run_name(opt, dataset.name, identity)
        run = Run(opt, identity, "student_model", "student_tensorboards", name, opt.stem)
        if run.finished:
            print_result(run, opt)
            return run
        opt = resolve(opt, run.recorded, len(dataset.train), dataset.views)
        loaders = build_loaders(opt, dataset, normalization=normalization)
        classes = len(dataset.classes)
        teacher = None if opt.distill == "none" else build_teacher(opt, facts, classes, needs, normalization)
        student = build_student(opt, classes, loaders.image_size, needs, teacher)
        objective = build_objective(opt, student, teacher, loaders)
        check_lone_image(loaders, student, teacher, objective)
        run.record(normalization=list(map(list, normalization)), **recorded_options(opt))
        stage = None if run.state else first_stage.open_first_stage(opt, objective, run)
        if teacher is not None:
            teacher.open(opt, dataset)
            acquaint(objective, teacher, loaders, opt)
        classifies = objective.classifies or needs.reuses or loaders.labelled > 0
        evaluate = Evaluation(loaders, student, teacher, opt, None if classifies else objective)
        if probe is not None:
            probe.open(opt, normalization)
        run.start(own_code(opt) | first_views(loaders.train, teacher))
    seen = loaders.image_facts()

    spread = f" over {opt.processes} processes" if opt.processes > 1 else ""
    print(
        f"{opt.distill}: {opt.model_t} -> {opt.model_s} on {dataset.name}, {len(loaders.train)} steps of "
        f"{opt.batch_size} an epoch{spread}, into {run.folder}"
    )
    if stage is not None:
        first_stage.init(stage, student, teacher, objective.criterion, loaders.train, opt)
    trained = training.train_student(opt, student, teacher, objective, loaders)
    if run.state is not None:
        trained.load_state_dict(run.state)
    while not run.over:
        epoch, start = run.first_epoch, time.perf_counter()
        record = trained.epoch(epoch, run.save_inside) | evaluate(epoch)
        record |= {} if probe is None else probe(epoch, student)
        record["seconds"] = trained.earlier + time.perf_counter() - start
        print_record(record)
        run.end_epoch(record, trained.state_dict(), model_file(student, teacher, run.options, seen), opt.save_freq)

    run.finish(model_file(student, teacher, run.options, seen))
    print_result(run, opt)
    return run


def print_result(run: "Run", opt: argparse.Namespace) -> None:
    run.print_result()
    if parse_name(opt.model_s).library == "module":  # which only this program has
        return
    folder = shlex.quote(str(run.folder))
    print(f"evaluate it: python evaluate.py {folder}")
    print(f"export it:   python export.py {folder} --format onnx")


if __name__ == "__main__":
    with launch.processes():
        main()
