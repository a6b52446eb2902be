"""Distil a frozen teacher into a small student: ``python train_student.py --distill ega -r 1 -b 1``."""

import time

import torch
from torch import nn

from dataset import load_dataset
from dataset.loader import Loader, epoch_seed, holdout_rows
from dataset.views import CIFAR100_NORMALIZATION, CLIP_NORMALIZATION, NUM_VIEWS
from distiller_zoo import METHODS, TwoStage
from helper import distributed, pretrain
from helper.loops import EVAL_BATCH_SIZE, Distillation, Objective, Step, sgd, train_epoch, validate
from helper.meters import print_record
from helper.options import parse_student_options, student_run_name
from helper.run import Run
from helper.runtime import resolve_auto, resolve_auto_compile, step_capture
from helper.teacher import CnnTeacher, build_teacher, describe
from helper.util import adjust_learning_rate, exit_on_bad_input, exit_on_non_finite_loss
from models import create_classifier, create_student


def main(argv: list[str] | None = None) -> None:
    opt = parse_student_options(argv)
    method, clip = METHODS[opt.distill], bool(opt.clip_tn)
    build, feeds = method.with_teacher(clip)

    # Everything that can be wrong with the input is found here, before anything is trained.
    with exit_on_bad_input("train_student.py"):
        run = Run(opt, "student_model", "student_tensorboards", student_run_name(opt), opt.model_s)
        resolve_auto(opt, run)
        if run.finished:
            run.print_result()
            return
        dataset = load_dataset(opt.dataset, opt.data_dir)
        run.record(dataset_sha256=dataset.fingerprint())
        device, num_classes = torch.device(opt.device), len(dataset.classes)
        normalization = CLIP_NORMALIZATION if clip else CIFAR100_NORMALIZATION
        place = {"rank": distributed.rank(), "processes": distributed.count()}
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
            shared=opt.views == "shared" or not clip,
            max_steps=opt.max_steps,
            normalization=normalization,
            **place,
        )
        testing = {"batch_size": EVAL_BATCH_SIZE[opt.device], "device": device, "normalization": normalization} | place
        test_loader = Loader(dataset.test, "test", **testing)
        val_loader = None if held is None else Loader(dataset.train, "train", rows=held, **testing)
        resolve_auto_compile(opt, run, steps=opt.epochs * len(train_loader))

        joint = any(name.startswith("joint") for name in feeds)
        # Before the student, which has the same weights whatever the teacher; building its bank can take long.
        teacher = None if opt.distill == "none" else build_teacher(opt, dataset, run, joint, "t" in method.preact)
        torch.manual_seed(opt.seed)
        if clip:
            student = create_student(opt.model_s, opt.feature_dim, num_classes)
        else:
            student = create_classifier(
                opt.model_s, num_classes, opt.feature_dim if joint else None, "s" in method.preact
            )
        student.to(device, memory_format=torch.channels_last)
        criterion = build(opt, describe(student, teacher, dataset, rows)).to(device) if build else None
        if opt.sync_bn:
            student, criterion = (
                module and nn.SyncBatchNorm.convert_sync_batchnorm(module) for module in (student, criterion)
            )
        stage = None
        if isinstance(criterion, TwoStage) and opt.beta and run.state is None:
            stage = pretrain.open_first_stage(run, opt)
        frozen = {}
        if isinstance(teacher, CnnTeacher):  # which gives the same in every epoch
            frozen = {
                "teacher_acc": (run.recorded or validate(test_loader, None, teacher, opt, "teacher"))["teacher_acc"]
            }
            run.record(**frozen)
            print(f"teacher accuracy: {frozen['teacher_acc']:.2f}")
        run.start()

    weights = (opt.gamma, opt.alpha, opt.beta)
    objective = Objective(criterion, feeds, *weights, opt.kd_T, clip, opt.warmup, opt.logit_standard, method.relational)
    spread = f" over {distributed.count()} processes" if distributed.count() > 1 else ""
    print(
        f"{opt.distill}: {opt.model_t} -> {opt.model_s} on {opt.dataset}, {len(train_loader)} steps of "
        f"{opt.batch_size} an epoch{spread}, into {run.folder}"
    )

    stateful = {"student": student} | ({} if criterion is None else {"criterion": criterion})
    trained = [parameter for module in stateful.values() for parameter in module.parameters()]
    optimizers = [sgd(trained, opt.learning_rate, opt)]
    stateful["optimizer"] = optimizers[0]
    if teacher is not None and teacher.head is not None:
        stateful["teacher_head"] = teacher.head
        if not clip or opt.path_t is None:
            optimizers.append(sgd(teacher.head.parameters(), opt.learning_rate_t, opt))
            stateful["optimizer_t"] = optimizers[1]
    scaler = stateful["scaler"] = torch.amp.GradScaler(opt.device, enabled=opt.amp == "fp16")
    if run.state is not None:
        for name, module in stateful.items():
            module.load_state_dict(run.state[name])
    trains_head = len(optimizers) > 1
    seen = teacher if objective.needs_teacher or trains_head else None
    losses = Distillation(student, seen, objective, train_loader, opt, trains_head)

    def model() -> dict:
        """The content of a model's file."""
        layers = {"model": student.backbone.state_dict(), "layer": student.head.state_dict()}
        if "teacher_head" in stateful:
            layers["teacher_layer"] = teacher.head.state_dict()
        return layers | {"arch": opt.model_s, "options": run.options}

    with exit_on_non_finite_loss("train_student.py"):
        if stage is not None:
            pretrain.init(stage, student, teacher, criterion, train_loader, opt)
        step = Step(losses, optimizers, scaler, train_loader, step_capture(opt, seen, method.waits))
        for epoch in range(run.first_epoch, opt.epochs + 1):
            start = time.perf_counter()
            torch.manual_seed(epoch_seed(opt.seed, epoch))
            record = {"epoch": epoch, "lr": adjust_learning_rate(epoch, opt, optimizers[0])}
            student.train()
            record |= train_epoch(epoch, step, opt.epochs, opt.print_freq)
            distributed.share_buffers(student)
            if epoch % opt.eval_freq == 0 or epoch == opt.epochs:
                record |= validate(test_loader, student, teacher if clip else None, opt) | frozen
                if val_loader is not None:
                    record |= validate(val_loader, student, None, opt, prefix="val")
            record["seconds"] = time.perf_counter() - start
            print_record(record)
            state = {name: module.state_dict() for name, module in stateful.items()}
            run.end_epoch(record, state, model(), opt.save_freq)

    run.finish(model())
    run.print_result()


if __name__ == "__main__":
    with distributed.processes():
        main()
