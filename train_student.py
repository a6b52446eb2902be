"""Distil a frozen CLIP into a small student: ``python train_student.py --distill ega -r 1 -b 1``."""

import time

import torch

from dataset import load_dataset
from dataset.loader import Loader, epoch_seed, holdout_rows
from dataset.views import NUM_VIEWS
from distiller_zoo import METHODS
from helper.loops import EVAL_BATCH_SIZE, Objective, print_record, sgd, train_distill, validate
from helper.options import parse_student_options, resolve_auto, resolve_auto_compile, student_run_name
from helper.run import Run
from helper.teacher import build_teacher
from helper.util import adjust_learning_rate, exit_on_bad_input, exit_on_non_finite_loss
from models import create_student


def main(argv: list[str] | None = None) -> None:
    opt = parse_student_options(argv)
    method = METHODS[opt.distill]

    # Everything that can be wrong with the input is found here, before anything is trained.
    with exit_on_bad_input("train_student.py"):
        run = Run(opt, "student_model", "student_tensorboards", student_run_name(opt), opt.model_s)
        resolve_auto(opt, run)
        if run.finished:
            run.print_result()
            return
        dataset = load_dataset(opt.dataset, opt.data_dir)
        run.record(dataset_sha256=dataset.fingerprint())
        device = torch.device(opt.device)
        rows, held = (None, None) if opt.holdout is None else holdout_rows(dataset.train.targets, opt.holdout)
        train_loader = Loader(
            dataset.train,
            "train",
            opt.batch_size,
            device,
            rows=rows,
            training=True,
            seed=opt.seed,
            teacher_views=opt.teacher_views or NUM_VIEWS,
            shared=opt.views == "shared",
            max_steps=opt.max_steps,
        )
        test_loader = Loader(dataset.test, "test", EVAL_BATCH_SIZE, device)
        val_loader = None if held is None else Loader(dataset.train, "train", EVAL_BATCH_SIZE, device, rows=held)
        resolve_auto_compile(opt, run, steps=opt.epochs * len(train_loader))
        # Last, since building the teacher's bank can take long.
        teacher = None if opt.distill == "none" else build_teacher(opt, dataset, run)
        run.start()

    torch.manual_seed(opt.seed)
    student = create_student(opt.model_s, opt.feature_dim, len(dataset.classes))
    student.to(device, memory_format=torch.channels_last)
    criterion = method.build(opt).to(device) if method.build else None
    objective = Objective(method, criterion, opt.gamma, opt.alpha, opt.beta, opt.kd_T)
    forward = torch.compile(student) if opt.compile == "on" else student
    print(
        f"{opt.distill}: {opt.model_t} -> {opt.model_s} on {opt.dataset}, {len(train_loader)} steps of "
        f"{opt.batch_size} an epoch, into {run.folder}"
    )

    optimizers = [sgd(student.parameters(), opt.learning_rate, opt)]
    stateful = {"student": student, "optimizer": optimizers[0]}
    if teacher is not None:
        stateful["teacher_head"] = teacher.head
        if opt.path_t is None:
            optimizers.append(sgd(teacher.head.parameters(), opt.learning_rate_t, opt))
            stateful["optimizer_t"] = optimizers[1]
    scaler = stateful["scaler"] = torch.amp.GradScaler(opt.device, enabled=opt.amp == "fp16")
    if run.state is not None:
        for name, module in stateful.items():
            module.load_state_dict(run.state[name])

    def model() -> dict:
        """The content of a model's file."""
        layers = {"model": student.backbone.state_dict(), "layer": student.head.state_dict(), "options": run.options}
        return layers if teacher is None else layers | {"teacher_layer": teacher.head.state_dict()}

    with exit_on_non_finite_loss("train_student.py"):
        for epoch in range(run.first_epoch, opt.epochs + 1):
            start = time.perf_counter()
            torch.manual_seed(epoch_seed(opt.seed, epoch))
            record = {"epoch": epoch, "lr": adjust_learning_rate(epoch, opt, optimizers[0])}
            record |= train_distill(epoch, train_loader, student, forward, teacher, objective, optimizers, scaler, opt)
            if epoch % opt.eval_freq == 0 or epoch == opt.epochs:
                record |= validate(test_loader, student, teacher, opt)
                if val_loader is not None:
                    record |= validate(val_loader, student, None, opt, prefix="val")
            record["seconds"] = time.perf_counter() - start
            print_record(record)
            state = {name: module.state_dict() for name, module in stateful.items()}
            run.end_epoch(record, state, model(), opt.save_freq)

    run.finish(model())
    run.print_result()


if __name__ == "__main__":
    main()
