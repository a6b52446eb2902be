"""Train a teacher, a head on a frozen encoder or a CNN from scratch, for ``train_student.py --path_t``."""

import argparse
import time

from dataset import open_dataset, student_size
from helper import launch
from helper.exits import exit_on_bad_input, exits
from helper.names import teacher_run_name
from helper.options import parse_teacher_options, recorded_options


@exits("train_teacher.py", memory="lower --batch_size or --teacher_views")
def main(argv: list[str] | None = None) -> None:
    train(parse_teacher_options(argv))


def train(opt: argparse.Namespace) -> None:
    # These imports stand here so that neither --help nor a refused option waits for torch.
    from helper import training
    from helper.data import build_loaders
    from helper.meters import print_record
    from helper.objective import check_lone_image
    from helper.run import Run
    from helper.runtime import check_machine, resolve
    from helper.teacher import build_cnn, build_teacher, check_cnn, find_teacher, teacher_file
    from helper.validation import Evaluation

    encoder = bool(opt.clip_tn)

    with exit_on_bad_input("train_teacher.py"):
        size = student_size(opt.dataset, opt.image_size)
        check_machine(opt, size)
        facts, identity = find_teacher(opt) if encoder else (None, {})
        if not encoder:
            check_cnn(opt, size)
        dataset = open_dataset(vars(opt))
        identity["dataset_sha256"] = dataset.fingerprint()
        run = Run(opt, identity, "models", "tensorboard", teacher_run_name(opt, dataset.name, identity), opt.model_t)
        if run.finished:
            run.print_result()
            return
        opt = resolve(opt, run.recorded, len(dataset.train), dataset.views)
        loaders = build_loaders(opt, dataset, images=not encoder)
        classes = len(dataset.classes)
        teacher = build_teacher(opt, facts, classes) if encoder else build_cnn(opt, classes, loaders.image_size)
        if not encoder:
            check_lone_image(loaders, teacher)
        run.record(**recorded_options(opt))
        if encoder:
            teacher.open(opt, dataset)
        run.start()

    trained = (training.train_head if encoder else training.train_cnn)(opt, teacher, loaders)
    if run.state is not None:
        trained.load_state_dict(run.state)
    evaluate = Evaluation(loaders, *((None, teacher) if encoder else (teacher, None)), opt)
    while not run.over:
        epoch, start = run.first_epoch, time.perf_counter()
        record = trained.epoch(epoch, run.save_inside) | evaluate(epoch)
        record["seconds"] = trained.earlier + time.perf_counter() - start
        print_record(record)
        run.end_epoch(record, trained.state_dict(), teacher_file(teacher, run.options), opt.save_freq)

    run.finish(teacher_file(teacher, run.options))
    run.print_result()


if __name__ == "__main__":
    with launch.processes():
        main()
