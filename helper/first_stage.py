"""The first stage of the two-stage methods: abound, factor, fsp."""

import copy
import time

import torch
from torch import Tensor, nn

from dataset.loader import Batch, Loader
from distiller_zoo import TwoStage
from models.heads import Classifier

from .meters import print_record
from .objective import Objective
from .optim import sgd
from .run import Run
from .runtime import autocast
from .step import Step
from .teacher import CnnTeacher
from .training import Training


def open_first_stage(opt, objective: Objective, run: Run) -> Run | None:
    """The first stage's run, in the folder ``init`` of the second stage's; None for a method without one.

    It has ``--init_epochs`` epochs, and resumes as every run does.

    Args:
        run: the second stage's; the first stage records the same options.

    Raises:
        InputError: the folder holds another run's first stage.
    """
    if not (isinstance(objective.criterion, TwoStage) and opt.beta):
        return None
    init_opt = copy.copy(opt)
    init_opt.epochs, init_opt.log = opt.init_epochs, None
    kind = "student_model", "student_tensorboards"
    stage = Run(init_opt, run.identity, *kind, f"{run.folder.name}/init", opt.model_s)
    stage.record(**run.options)
    return stage


class _FirstStage(nn.Module):
    """The losses of a step of the first stage; see ``Distillation``."""

    def __init__(self, student: Classifier, teacher: CnnTeacher, criterion: TwoStage, loader: Loader, opt):
        super().__init__()
        self.student, self.teacher, self.criterion = student, teacher, criterion
        self.split, self.opt = loader.name, opt

    def forward(self, batch: Batch, epoch: int) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        with autocast(self.opt.device, self.opt.amp):
            out_s = self.student(batch.image)
        if not len(batch.target):  # a process without a share
            return sum(x.sum() for x in out_s.features), {}, {}
        out_t = self.teacher(self.split, batch)
        feat_s, feat_t = ([x.float() for x in out.features] for out in (out_s, out_t))
        loss = self.criterion.init_loss(feat_s, feat_t)
        return batch.weight * loss, {"init_train_loss": loss.detach()}, {}


def init(stage: Run, student: Classifier, teacher: CnnTeacher, criterion: TwoStage, loader: Loader, opt) -> None:
    """Train the method's first stage; student and criterion then have the weights that the second goes on with.

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
    stateful = {"student": student, "criterion": criterion, "optimizer": optimizer}
    step = Step(_FirstStage(student, teacher, criterion, loader, opt), [optimizer], scaler, loader)
    opt = copy.copy(opt)
    opt.epochs, opt.learning_rate = opt.init_epochs, lr
    opt.schedule, opt.lr_decay_epochs, opt.warmup_epochs = "step", [], 0  # never decayed
    training = Training(opt, step, trained, stateful, "First stage, epoch")
    if stage.state is not None:
        training.load_state_dict(stage.state)

    student.eval()  # layers that the first stage does not train stay unchanged, as in RepDistiller
    for epoch in range(stage.first_epoch, opt.epochs + 1):
        start = time.perf_counter()
        record = training.epoch(epoch, stage.save_inside)
        record["seconds"] = training.earlier + time.perf_counter() - start
        print_record(record)
        stage.end_epoch(record, training.state_dict(), {})
    if not stage.finished:
        stage.finish({"model": student.backbone.state_dict()})
