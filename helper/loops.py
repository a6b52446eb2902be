"""The training step and the test pass."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset.loader import Batch, Draw, Loader, deal
from distiller_zoo import kd_loss, standardize_logits
from models.heads import Classifier, Outputs, Student

from . import distributed
from .meters import EpochLog, Totals
from .runtime import autocast
from .teacher import ClipTeacher, CnnTeacher
from .util import AverageMeter, accuracy

# Samples per batch of the test pass, by device: any number gives the same result, a large one is fast.
EVAL_BATCH_SIZE = {"cpu": 500, "cuda": 2500}

# Steps before one is captured, so that all that is made in a first step is there: buffers, algorithms, compiled code.
_STEPS_BEFORE_CAPTURE = 3


@dataclass
class Objective:
    """The student's loss: ``r * cls + a * kd + b * distill``.

    Attributes:
        criterion: the method's loss, or None.
        feeds: what it is fed, in order (see ``Method``).
        gamma, alpha, beta: the weights r, a and b.
        kd_T: temperature of the kd term.
        clip: whether f_s and f_t are projected embeddings (a CLIP teacher's protocol) or pooled features.
        warmup: epochs over which beta grows to its value.
        logit_standard: standardise the logits that kd and the method see.
        relational: the criterion compares samples, so that it has to see those of all processes.
    """

    criterion: nn.Module | None
    feeds: tuple[str, ...]
    gamma: float
    alpha: float
    beta: float
    kd_T: float
    clip: bool = True
    warmup: int = 0
    logit_standard: bool = False
    relational: bool = False

    @property
    def needs_teacher(self) -> bool:
        """Whether a term looks at the teacher at all; a method's first stage alone does not make one."""
        return bool(self.alpha or (self.feeds and self.beta))

    def beta_in(self, epoch: int) -> float:
        """The weight b in an epoch, counted from 1."""
        return self.beta * min(epoch / self.warmup, 1) if self.warmup else self.beta

    def __call__(
        self, out_s: Outputs, out_t: Outputs | None, batch: Batch, epoch: int = 1
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its weighted terms by name; no gradient reaches the teacher.

        Of a batch spread over many processes: the loss whose mean over processes is that of the whole batch, and the
        terms, of this process's share where they are means over samples; without any, zero and no such terms.
        """
        terms, parts = {}, {}
        if len(batch.target):
            terms["cls"] = self.gamma * F.cross_entropy(out_s.logits.float(), batch.target)
            if self.alpha and out_t is not None:
                logit_s, logit_t = (self._feed(name, out_s, out_t, batch) for name in ("logit_s", "logit_t"))
                terms["kd"] = self.alpha * kd_loss(logit_s, logit_t, self.kd_T)
        # Of no samples: zero, yet not without a gradient, which DDP waits for.
        loss = batch.weight * sum(terms.values()) if terms else out_s.features[-1].sum()
        if self.feeds and self.beta and out_t is not None and (self.relational or terms):
            fed = [self._feed(name, out_s, out_t, batch) for name in self.feeds]
            # A loss that takes the shares itself knows a cheaper way than to gather.
            if self.relational and "shares" not in self.feeds:
                fed = [distributed.gather(x, batch.shares) for x in fed]
            # A loss of several terms names them, so that each is logged.
            named = self.criterion.terms(*fed) if hasattr(self.criterion, "terms") else {}
            beta = self.beta_in(epoch)
            parts = {name: beta * value for name, value in named.items()}
            value = sum(parts.values()) if parts else self.criterion(*fed)
            value = sum(value) if isinstance(value, (list, tuple)) else value
            terms["distill"] = value if parts else beta * value
            loss = loss + (1 if self.relational else batch.weight) * terms["distill"]
        return loss, {**terms, **parts}

    def _feed(self, name: str, out_s: Outputs, out_t: Outputs, batch: Batch) -> Tensor | list[Tensor]:
        """What a method's row calls by this name, in float32; the teacher's without a gradient."""
        if name in ("target", "index", "shares"):
            return getattr(batch, name)
        what, whose = name.split("_")
        out = out_s if whose == "s" else out_t

        def ready(x: Tensor) -> Tensor:
            return (x if whose == "s" else x.detach()).float()

        if what == "logit":
            return standardize_logits(ready(out.logits)) if self.logit_standard else ready(out.logits)
        if what == "joint" or (what == "f" and self.clip):
            return ready(out.embedding)
        if what == "f":
            return ready(out.features[-1])
        return [ready(x) for x in (out.features[1:-1] if what == "maps" else out.features)]


class Distillation(nn.Module):
    """What a step of distillation computes before its backward pass.

    Args:
        student: its backbone and head.
        teacher: None to train the student alone.
        objective: the student's loss.
        loader: whose batches it is given.
        opt: ``device``, ``amp`` and ``compile``.
        trains_head: add the cross-entropy of the teacher's own head.
    """

    def __init__(
        self,
        student: Student | Classifier,
        teacher: ClipTeacher | CnnTeacher | None,
        objective: Objective,
        loader: Loader,
        opt,
        trains_head: bool = False,
    ):
        super().__init__()
        self.student, self.teacher, self.criterion = student, teacher, objective.criterion
        self.objective, self.opt, self.trains_head = objective, opt, trains_head
        self.split, self.full = loader.name, deal(loader.batch_size, loader.processes)[loader.rank]
        self.compiled = torch.compile(lambda image: student(image)) if opt.compile == "on" else student.__call__

    def forward(self, batch: Batch, epoch: int) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """What the gradients are of, and by name the losses and what else is measured."""
        # The last, smaller batch would be compiled anew.
        full = len(batch.target) == self.full
        with autocast(self.opt.device, self.opt.amp):
            out_s = (self.compiled if full else self.student)(batch.image)
        out_t = None if self.teacher is None else self.teacher(self.split, batch)
        loss, terms = self.objective(out_s, out_t, batch, epoch)
        losses = {f"loss_{name}": term.detach() for name, term in terms.items()}
        total = loss
        if self.trains_head:
            loss_teacher = _mean_cross_entropy(out_t.head_logits, batch)
            losses["loss_teacher"] = loss_teacher.detach()
            total = total + batch.weight * loss_teacher
        # Last, so that a loss that is not finite is called by the term that made it so.
        losses["train_loss"] = sum(losses[f"loss_{name}"] for name in ("cls", "kd", "distill") if name in terms)
        return total, losses, {"train_acc": _accuracy(out_s.logits, batch)}


class HeadTraining(nn.Module):
    """What a step of training a teacher's head on the frozen embeddings computes before its backward pass."""

    def __init__(self, teacher: ClipTeacher, loader: Loader):
        super().__init__()
        self.teacher, self.split = teacher, loader.name

    def forward(self, batch: Batch, epoch: int) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """See ``Distillation``."""
        logits = self.teacher(self.split, batch).logits
        loss = _mean_cross_entropy(logits, batch)
        return batch.weight * loss, {"train_loss": loss}, {"train_acc": _accuracy(logits, batch)}


def _mean_cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """Zero for no samples, whose mean would not be a number."""
    return F.cross_entropy(logits, batch.target) if len(batch.target) else logits.sum()


def _accuracy(logits: Tensor, batch: Batch) -> Tensor:
    return accuracy(logits.detach(), batch.target)[0]


class Step:
    """A training step: a batch, its losses, the backward pass, the optimisers; ``totals`` is what it measured.

    Nothing in it waits for the device. A step on a full batch can be captured and replayed, as a CUDA graph: all of
    it, the making of the batch included, from the numbers that the loader draws. Where that fails, steps go on without.

    Args:
        losses: a batch and the epoch to what the gradients are of, the losses and what else is measured, by name.
        optimizers: the student's first.
        scaler: of the gradients.
        loader: whose batches they are.
        capture: records what a function does and gives a function that does it again; None to do without.
    """

    def __init__(
        self,
        losses: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        scaler: torch.amp.GradScaler,
        loader: Loader,
        capture: Callable[[Callable[[], None]], Callable[[], None]] | None = None,
    ):
        self.losses = distributed.parallel(losses)
        self.optimizers, self.scaler, self.loader = optimizers, scaler, loader
        self.totals = Totals()
        self._capture, self._before_capture = capture, _STEPS_BEFORE_CAPTURE
        self._replay = self._captured_with = self._numbers = None

    def __call__(self, draw: Draw, epoch: int) -> None:
        """Train on what ``Loader.draws`` gave, in an epoch counted from 1."""
        if self._capture is None or sum(draw.shares) < self.loader.batch_size:
            self._run(draw, epoch)
        elif self._before_capture:
            self._before_capture -= 1
            self._run(draw, epoch)
        else:
            # What a captured step has written into it.
            constants = [group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups]
            constants.append(self.losses.objective.beta_in(epoch))
            if constants != self._captured_with:
                self._numbers, self._replay = draw.numbers.clone(), None
                still = Draw(self._numbers, draw.shares)
                try:
                    self._replay = self._capture(lambda: self._run(still, epoch))
                except RuntimeError as error:  # a driver or a library that cannot; nothing that was recorded has run
                    reason = str(error).partition("\n")[0]
                    print(f"steps are not captured, which makes them slower: {reason}", flush=True)
                    self._capture = None
                    self._run(draw, epoch)
                    return
                self._captured_with = constants
            self._numbers.copy_(draw.numbers)
            self._replay()

    def _run(self, draw: Draw, epoch: int) -> None:
        batch = self.loader.batch(draw)
        loss, losses, others = self.losses(batch, epoch)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        self.totals.add(losses, others, len(batch.target))


def train_epoch(epoch: int, step: Step, epochs: int, print_freq: int, title: str = "Epoch") -> dict[str, float]:
    """One epoch of training, counted from 1.

    Returns:
        train_loss and its terms, train_acc, images_per_second.

    Raises:
        NonFiniteLoss: a term is not finite; seen at the next print.
    """
    log = EpochLog(f"{title} {epoch}", step.loader, print_freq, epochs - epoch, step.totals)
    for number, draw in enumerate(step.loader.draws(epoch), start=1):
        step(draw, epoch)
        log.update(number, sum(draw.shares))
    return log.result()


@torch.no_grad()
def validate(
    loader: Loader,
    student: Student | Classifier | None,
    teacher: ClipTeacher | CnnTeacher | None,
    opt,
    prefix: str = "test",
) -> dict[str, float]:
    """Cross-entropy and accuracy of the student and the teacher on every sample of a split.

    Returns:
        {prefix}_loss, {prefix}_acc and {prefix}_acc_top5 of the student, teacher_acc of the teacher (with the
        teacher alone, the first three are its own).
    """
    meter, names = AverageMeter(), ()
    if student is not None:
        student.eval()
    for batch in loader.epoch():
        if not len(batch.target):
            continue
        values = {}
        out = None if student is None else _eval_student(student, batch, opt)
        out_t = None if teacher is None else teacher(loader.name, batch)
        main = out_t if out is None else out
        logits = main.logits.float()
        top1, top5 = accuracy(logits, batch.target, topk=(1, 5))
        values[f"{prefix}_loss"] = F.cross_entropy(logits, batch.target)
        values[f"{prefix}_acc"], values[f"{prefix}_acc_top5"] = top1, top5
        if out is not None and out_t is not None:
            (values["teacher_acc"],) = accuracy(out_t.logits, batch.target)
        names = tuple(values)
        meter.update(torch.stack(list(values.values())), len(batch.target))
    # Every process has seen its share; to the mean each counts as many samples as it has seen.
    sums = distributed.total(meter.sum) / distributed.total(torch.full_like(meter.sum, meter.count))
    return dict(zip(names, sums.tolist(), strict=True))


def _eval_student(student: Student | Classifier, batch: Batch, opt) -> Outputs:
    with autocast(opt.device, opt.amp):
        return student(batch.image)


def sgd(parameters: Iterable[nn.Parameter], lr: float, opt) -> torch.optim.SGD:
    """SGD as the paper uses it, its step fused into one kernel."""
    return torch.optim.SGD(parameters, lr, momentum=opt.momentum, weight_decay=opt.weight_decay, fused=True)
