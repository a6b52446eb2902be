"""The test pass after an epoch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dataset.loader import Batch, Loader
from models.heads import Classifier, Outputs, Student

from . import distributed
from .agreement import held_out
from .data import Loaders
from .objective import Objective
from .runtime import autocast
from .teacher import CnnTeacher, EncoderTeacher
from .util import accuracy


def scores(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy, top-1 and top-5 accuracy in percent, (3,), of logits (B, classes)."""
    return torch.stack([F.cross_entropy(logits, target), *accuracy(logits, target, topk=(1, 5))])


@torch.no_grad()
def validate(
    loader: Loader,
    student: Student | Classifier | None,
    teacher: EncoderTeacher | CnnTeacher | None,
    opt,
    prefix: str = "test",
) -> dict[str, float]:
    """Cross-entropy and accuracy of the student and the teacher on every sample of a split.

    Returns:
        {prefix}_loss, {prefix}_acc and {prefix}_acc_top5 of the student, teacher_acc of the teacher (with the
        teacher alone, the first three are its own).
    """
    names = (f"{prefix}_loss", f"{prefix}_acc", f"{prefix}_acc_top5")
    if student is not None and teacher is not None:
        names += ("teacher_acc",)
    sums, count = torch.zeros(len(names), device=loader.device), 0
    if student is not None:
        student.eval()
    for batch in loader.epoch():
        if not len(batch.target):
            continue
        out = None if student is None else _eval_student(student, batch, opt)
        out_t = None if teacher is None else teacher(loader.name, batch)
        values = [*scores((out_t if out is None else out).logits.float(), batch.target)]
        if out is not None and out_t is not None:
            values += accuracy(out_t.logits, batch.target)
        sums += torch.stack(values) * len(batch.target)
        count += len(batch.target)
    # Every process has seen its share, which may be empty; in the mean it counts by its number of samples.
    means = distributed.total(sums) / distributed.total(torch.full_like(sums, count))
    return dict(zip(names, means.tolist(), strict=True))


def _eval_student(student: Student | Classifier, batch: Batch, opt) -> Outputs:
    with autocast(opt.device, opt.amp):
        return student(batch.image)


class Evaluation:
    """The test pass after an epoch: student and teacher on the test set, the trained one on the hold-out too.

    Args:
        loaders: the run's loaders.
        student: its accuracy decides; None to test a teacher alone.
        teacher: None where there is none. A frozen CNN gives the same in every epoch, and is tested once, here. An
            encoder without a head does not classify, and is not tested.
        opt: ``device``, ``amp``, ``epochs`` and ``eval_freq``.
        objective: the loss that is measured on the test set, or on the hold-out, where nothing trains the student to
            classify; its accuracy says nothing then, and is None. None where it is trained to classify.
    """

    def __init__(
        self,
        loaders: Loaders,
        student: Student | Classifier | None,
        teacher: EncoderTeacher | CnnTeacher | None,
        opt,
        objective: Objective | None = None,
    ):
        self.loaders, self.student, self.teacher, self.opt = loaders, student, teacher, opt
        self.objective, self.guide, self.fixed = objective, teacher, {}
        if isinstance(teacher, EncoderTeacher) and teacher.head is None:
            self.teacher = None
        if isinstance(teacher, CnnTeacher):
            accuracy = validate(loaders.test, None, teacher, opt, "teacher")["teacher_acc"]
            print(f"teacher accuracy: {accuracy:.2f}")
            self.teacher, self.fixed = None, {"teacher_acc": accuracy}

    def __call__(self, epoch: int) -> dict[str, float]:
        """The result of ``validate`` after every ``eval_freq`` epochs and the last; empty after the others."""
        if epoch % self.opt.eval_freq and epoch != self.opt.epochs:
            return {}
        if self.objective is not None:
            record = dict.fromkeys(("test_loss", "test_acc", "test_acc_top5")) | self.fixed
            return record | held_out(self.loaders.held_out, self.student, self.guide, self.objective, self.opt)
        record = validate(self.loaders.test, self.student, self.teacher, self.opt) | self.fixed
        if self.loaders.val is not None:
            trained = (None, self.teacher) if self.student is None else (self.student, None)
            record |= validate(self.loaders.val, *trained, self.opt, prefix="val")
        return record
