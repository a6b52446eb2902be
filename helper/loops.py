"""The training step, the test pass, and what they measure."""

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset.loader import Batch, Loader
from distiller_zoo import kd_loss, standardize_logits
from models.heads import Classifier, Outputs, Student

from .runtime import autocast
from .teacher import ClipTeacher, CnnTeacher
from .util import AverageMeter, NonFiniteLoss, accuracy, format_seconds

# Samples per batch of the test pass: any number gives the same result, a large one is fast.
EVAL_BATCH_SIZE = 500


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

    @property
    def needs_teacher(self) -> bool:
        """Whether a term looks at the teacher at all; a method's first stage alone does not make one."""
        return bool(self.alpha or (self.feeds and self.beta))

    def __call__(
        self, out_s: Outputs, out_t: Outputs | None, batch: Batch, epoch: int = 1
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its weighted terms by name; no gradient reaches the teacher."""
        terms = {"cls": self.gamma * F.cross_entropy(out_s.logits.float(), batch.target)}
        parts = {}
        if self.alpha and out_t is not None:
            logit_s, logit_t = (self._feed(name, out_s, out_t, batch) for name in ("logit_s", "logit_t"))
            terms["kd"] = self.alpha * kd_loss(logit_s, logit_t, self.kd_T)
        if self.feeds and self.beta and out_t is not None:
            beta = self.beta * min(epoch / self.warmup, 1) if self.warmup else self.beta
            fed = [self._feed(name, out_s, out_t, batch) for name in self.feeds]
            # A loss of several terms names them, so that each is logged.
            named = self.criterion.terms(*fed) if hasattr(self.criterion, "terms") else {}
            parts = {name: beta * value for name, value in named.items()}
            value = sum(parts.values()) if parts else self.criterion(*fed)
            value = sum(value) if isinstance(value, (list, tuple)) else value
            terms["distill"] = value if parts else beta * value
        return sum(terms.values()), {**terms, **parts}

    def _feed(self, name: str, out_s: Outputs, out_t: Outputs, batch: Batch) -> Tensor | list[Tensor]:
        """What a method's row calls by this name, in float32; the teacher's without a gradient."""
        if name in ("target", "index"):
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


class EpochLog:
    """Averages over an epoch, kept on the device between prints; stops the run at a loss that is not finite."""

    def __init__(self, title: str, loader: Loader, print_freq: int, epochs_left: int):
        self.title, self.print_freq, self.epochs_left = title, print_freq, epochs_left
        self.steps, self.num_samples = len(loader), loader.num_samples
        self.meter = AverageMeter()
        self.names: list[str] = []
        self.losses = 0
        self.first_bad: Tensor | None = None
        self.start = time.perf_counter()

    def update(self, step: int, losses: dict[str, Tensor], accuracies: dict[str, Tensor], n: int) -> None:
        values = torch.stack([value.detach() for value in (*losses.values(), *accuracies.values())])
        if self.first_bad is None:
            self.names, self.losses = [*losses, *accuracies], len(losses)
            self.first_bad = torch.full((self.losses,), -1, device=values.device)
        bad = ~torch.isfinite(values[: self.losses]) & (self.first_bad < 0)
        self.first_bad = torch.where(bad, step, self.first_bad)
        self.meter.update(values, n)
        if step % self.print_freq == 0 or step == self.steps:
            self._print(step)

    def _check(self) -> None:
        for name, step in zip(self.names, self.first_bad.tolist(), strict=False):
            if step >= 0:
                raise NonFiniteLoss(f"{name} is not finite at step {step} of {self.title.lower()}; nothing was saved")

    def _print(self, step: int) -> None:
        self._check()
        rate = self.meter.count / (time.perf_counter() - self.start)
        left = (self.num_samples * (1 + self.epochs_left) - self.meter.count) / rate
        averages = "  ".join(
            f"{name} {value:.3f}" for name, value in zip(self.names, self.meter.avg.tolist(), strict=True)
        )
        speed = f"{rate:.0f} images/s, {format_seconds(left)} left"
        print(f"{self.title} [{step}/{self.steps}]  {averages}  {speed}", flush=True)

    def result(self) -> dict[str, float]:
        """Averages by name, and ``images_per_second``."""
        self._check()
        averages = dict(zip(self.names, self.meter.avg.tolist(), strict=True))
        return {**averages, "images_per_second": self.meter.count / (time.perf_counter() - self.start)}


def train_distill(
    epoch: int,
    loader: Loader,
    student: Student | Classifier,
    forward: nn.Module,
    teacher: ClipTeacher | CnnTeacher | None,
    objective: Objective,
    optimizers: list[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
    opt,
) -> dict[str, float]:
    """One epoch of distillation, or with neither teacher nor method of plain training.

    Args:
        epoch: counted from 1.
        forward: the student, compiled or not, for batches of the full size.
        teacher: None to train the student alone.
        optimizers: the student's, then the teacher's head's when that is trained.

    Returns:
        train_loss and its terms, train_acc, images_per_second.

    Raises:
        NonFiniteLoss: a term is not finite; seen at the next print.
    """
    student.train()
    log = EpochLog(f"Epoch {epoch}", loader, opt.print_freq, opt.epochs - epoch)
    for step, batch in enumerate(loader.epoch(epoch), start=1):
        # The last, smaller batch would be compiled anew.
        full = len(batch.target) == loader.batch_size
        with autocast(opt.device, opt.amp):
            out_s = (forward if full else student)(batch.image)
        out_t = None if teacher is None else teacher(loader.name, batch)
        loss, terms = objective(out_s, out_t, batch, epoch)
        losses = {f"loss_{name}": term for name, term in terms.items()}

        total = scaler.scale(loss)
        if len(optimizers) > 1:
            losses["loss_teacher"] = F.cross_entropy(out_t.head_logits, batch.target)
            total = total + losses["loss_teacher"]
        # Last, so that a loss that is not finite is called by the term that made it so.
        losses["train_loss"] = loss
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        total.backward()
        scaler.step(optimizers[0])
        scaler.update()
        for optimizer in optimizers[1:]:
            optimizer.step()

        (train_acc,) = accuracy(out_s.logits.detach(), batch.target)
        log.update(step, losses, {"train_acc": train_acc}, len(batch.target))
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
    return dict(zip(names, meter.avg.tolist(), strict=True))


def _eval_student(student: Student | Classifier, batch: Batch, opt) -> Outputs:
    with autocast(opt.device, opt.amp):
        return student(batch.image)


def train_head(
    epoch: int, loader: Loader, teacher: ClipTeacher, optimizer: torch.optim.Optimizer, opt
) -> dict[str, float]:
    """One epoch of a teacher's head on the frozen embeddings.

    Returns:
        train_loss, train_acc, images_per_second.

    Raises:
        NonFiniteLoss: the loss is not finite; seen at the next print.
    """
    log = EpochLog(f"Epoch {epoch}", loader, opt.print_freq, opt.epochs - epoch)
    for step, batch in enumerate(loader.epoch(epoch), start=1):
        out = teacher(loader.name, batch)
        loss = F.cross_entropy(out.logits, batch.target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        (train_acc,) = accuracy(out.logits.detach(), batch.target)
        log.update(step, {"train_loss": loss}, {"train_acc": train_acc}, len(batch.target))
    return log.result()


def sgd(parameters: Iterable[nn.Parameter], lr: float, opt) -> torch.optim.SGD:
    """SGD as the paper uses it, its step fused into one kernel."""
    return torch.optim.SGD(parameters, lr, momentum=opt.momentum, weight_decay=opt.weight_decay, fused=True)


def print_record(record: dict) -> None:
    """The epoch's result in one line."""
    shown = {name: value for name, value in record.items() if "_acc" in name or name == "seconds"}
    text = "  ".join(f"{name} {value:.2f}" for name, value in shown.items())
    print(f" * Epoch {record['epoch']}  {text}", flush=True)
