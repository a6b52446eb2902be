"""The first stage of the two-stage methods: abound, factor, fsp."""

import copy
import time

import torch

from dataset.loader import Loader, epoch_seed
from distiller_zoo import TwoStage
from models.heads import Classifier

from .loops import EpochLog, print_record, sgd
from .run import Run
from .runtime import autocast
from .teacher import CnnTeacher


def open_first_stage(run: Run, opt) -> Run:
    """The first stage's run of ``--init_epochs`` epochs, in the folder ``init`` of the second's.

    It resumes as every run does.

    Raises:
        ValueError: the folder holds another run's first stage.
    """
    init_opt = copy.copy(opt)
    init_opt.epochs = opt.init_epochs
    stage = Run(init_opt, "student_model", "student_tensorboards", f"{run.folder.name}/init", opt.model_s)
    stage.record(**run.options)
    return stage


def init(stage: Run, student: Classifier, teacher: CnnTeacher, criterion: TwoStage, loader: Loader, opt) -> None:
    """Train what the method's first stage trains; student and criterion then have the weights to go on with.

    Args:
        stage: see ``open_first_stage``.

    Raises:
        NonFiniteLoss: the loss is not finite; seen at the next print.
    """
    if not stage.finished:
        stage.start()
    trained = criterion.init_modules(student.backbone)
    lr = criterion.init_learning_rate(opt.model_s, opt.learning_rate)
    optimizer = sgd(trained.parameters(), lr, opt)
    scaler = torch.amp.GradScaler(opt.device, enabled=opt.amp == "fp16")
    stateful = {"student": student, "criterion": criterion, "optimizer": optimizer, "scaler": scaler}
    if stage.state is not None:
        for name, module in stateful.items():
            module.load_state_dict(stage.state[name])

    # What the first stage does not train keeps still, as in RepDistiller.
    student.eval()
    trained.train()
    for epoch in range(stage.first_epoch, opt.init_epochs + 1):
        start = time.perf_counter()
        torch.manual_seed(epoch_seed(opt.seed, epoch))
        log = EpochLog(f"First stage, epoch {epoch}", loader, opt.print_freq, opt.init_epochs - epoch)
        for step, batch in enumerate(loader.epoch(epoch), start=1):
            with autocast(opt.device, opt.amp):
                out_s = student(batch.image)
            out_t = teacher(loader.name, batch)
            feat_s, feat_t = ([x.float() for x in out.features] for out in (out_s, out_t))
            loss = criterion.init_loss(feat_s, feat_t)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            log.update(step, {"init_train_loss": loss}, {}, len(batch.target))
        record = {"epoch": epoch, "lr": lr, **log.result(), "seconds": time.perf_counter() - start}
        print_record(record)
        state = {name: module.state_dict() for name, module in stateful.items()}
        stage.end_epoch(record, state, {})
    if not stage.finished:
        stage.finish({"model": student.backbone.state_dict()})
