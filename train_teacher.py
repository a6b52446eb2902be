"""Train what teaches: a head on a frozen CLIP, or a CNN from scratch, for ``train_student.py --path_t``."""

import time

import torch
from torch import nn

from dataset import load_dataset
from dataset.loader import Loader, epoch_seed
from dataset.views import CIFAR100_NORMALIZATION, CLIP_NORMALIZATION, NUM_VIEWS
from helper import distributed
from helper.loops import (
    EVAL_BATCH_SIZE,
    Distillation,
    HeadTraining,
    Objective,
    Step,
    sgd,
    train_epoch,
    validate,
)
from helper.meters import print_record
from helper.options import parse_teacher_options, teacher_run_name
from helper.run import Run
from helper.runtime import resolve_auto, resolve_auto_compile, step_capture
from helper.teacher import build_teacher
from helper.util import adjust_learning_rate, exit_on_bad_input, exit_on_non_finite_loss
from models import create_classifier


def main(argv: list[str] | None = None) -> None:
    opt = parse_teacher_options(argv)
    clip = bool(opt.clip_tn)

    with exit_on_bad_input("train_teacher.py"):
        run = Run(opt, "models", "tensorboard", teacher_run_name(opt), opt.model_t)
        resolve_auto(opt, run)
        if run.finished:
            run.print_result()
            return
        dataset = load_dataset(opt.dataset, opt.data_dir)
        run.record(dataset_sha256=dataset.fingerprint())
        device = torch.device(opt.device)
        normalization = CLIP_NORMALIZATION if clip else CIFAR100_NORMALIZATION
        place = {"rank": distributed.rank(), "processes": distributed.count()}
        train_loader = Loader(
            dataset.train,
            "train",
            opt.batch_size,
            device,
            training=True,
            seed=opt.seed,
            teacher_views=opt.teacher_views or NUM_VIEWS,
            images=not clip,
            max_steps=opt.max_steps,
            normalization=normalization,
            **place,
        )
        test_loader = Loader(
            dataset.test,
            "test",
            EVAL_BATCH_SIZE[opt.device],
            device,
            images=not clip,
            normalization=normalization,
            **place,
        )
        if clip:
            opt.compile = "off"
            teacher = build_teacher(opt, dataset, run)
            trained = teacher.head
        else:
            resolve_auto_compile(opt, run, steps=opt.epochs * len(train_loader))
            torch.manual_seed(opt.seed)
            cnn = create_classifier(opt.model, len(dataset.classes))
            trained = cnn.to(device, memory_format=torch.channels_last)
            if opt.sync_bn:
                trained = cnn = nn.SyncBatchNorm.convert_sync_batchnorm(cnn)
        run.start()

    optimizer = sgd(trained.parameters(), opt.learning_rate, opt)
    scaler = torch.amp.GradScaler(opt.device, enabled=not clip and opt.amp == "fp16")
    stateful = {"teacher_head" if clip else "model": trained, "optimizer": optimizer, "scaler": scaler}
    if run.state is not None:
        for name, module in stateful.items():
            module.load_state_dict(run.state[name])
    if clip:
        step = Step(HeadTraining(teacher, train_loader), [optimizer], scaler, train_loader)
    else:
        losses = Distillation(cnn, None, Objective(None, (), gamma=1, alpha=0, beta=0, kd_T=1), train_loader, opt)
        step = Step(losses, [optimizer], scaler, train_loader, step_capture(opt, None))

    def model() -> dict:
        """The content of the model's file: a head with the SHA-256 of its CLIP, a CNN with its architecture."""
        if clip:
            about = {"model": trained.state_dict(), "clip_sha256": run.options["clip_sha256"]}
        else:
            about = {"model": trained.backbone.state_dict(), "arch": opt.model}
        return about | {"options": run.options}

    with exit_on_non_finite_loss("train_teacher.py"):
        for epoch in range(run.first_epoch, opt.epochs + 1):
            start = time.perf_counter()
            torch.manual_seed(epoch_seed(opt.seed, epoch))
            record = {"epoch": epoch, "lr": adjust_learning_rate(epoch, opt, optimizer)}
            trained.train()
            record |= train_epoch(epoch, step, opt.epochs, opt.print_freq)
            distributed.share_buffers(trained)
            if epoch % opt.eval_freq == 0 or epoch == opt.epochs:
                record |= validate(test_loader, *((None, teacher) if clip else (cnn, None)), opt)
            record["seconds"] = time.perf_counter() - start
            print_record(record)
            state = {name: module.state_dict() for name, module in stateful.items()}
            run.end_epoch(record, state, model(), opt.save_freq)

    run.finish(model())
    run.print_result()


if __name__ == "__main__":
    with distributed.processes():
        main()
