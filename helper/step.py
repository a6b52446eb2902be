"""The training step: a batch, its losses, the backward pass, the optimisers."""

import torch
from torch import Tensor, nn

from dataset.loader import Batch, Draw, Loader
from models.heads import Classifier, Outputs, Student

from . import distributed
from .meters import Totals
from .objective import Objective, mean_cross_entropy, total_loss
from .runtime import autocast, compiled
from .teacher import CnnTeacher, EncoderTeacher
from .util import accuracy


class Distillation(nn.Module):
    """The losses of a step of distillation, which are all that it computes before its backward pass.

    Args:
        student: its backbone and head.
        teacher: None to train the student alone.
        objective: the student's loss.
        loader: makes the batches.
        opt: ``device``, ``amp`` and ``compile``.
        trains_head: add the cross-entropy of the teacher's own head.
    """

    def __init__(
        self,
        student: Student | Classifier,
        teacher: EncoderTeacher | CnnTeacher | None,
        objective: Objective,
        loader: Loader,
        opt,
        trains_head: bool = False,
    ):
        super().__init__()
        self.student, self.teacher, self.criterion = student, teacher, objective.criterion
        self.objective, self.opt, self.trains_head = objective, opt, trains_head
        self.split, self.full = loader.name, loader.shares(loader.batch_size)[loader.rank]
        maps = objective.needs_maps

        def see(image: Tensor) -> Outputs:
            # Maps that no loss uses are left out: a compiled network would add up gradients of zero for each of them.
            out = student(image)
            return out if maps else Outputs(out.embedding, out.logits, out.features[-1:])

        self.compiled = compiled(see) if opt.compile == "on" else see

    def forward(self, batch: Batch, epoch: int) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """The loss to differentiate, and by name the losses and the other measurements."""
        # A last batch of another size would be compiled again.
        full = len(batch.target) == self.full
        with autocast(self.opt.device, self.opt.amp):
            out_s = (self.compiled if full else self.student)(batch.image)
        out_t = None if self.teacher is None else self.teacher(self.split, batch)
        loss, terms = self.objective(out_s, out_t, batch, epoch)
        terms = {name: term.detach() for name, term in terms.items()}
        losses = {f"loss_{name}": term for name, term in terms.items()}
        if self.trains_head:
            loss_teacher = mean_cross_entropy(out_t.head_logits, batch)
            losses["loss_teacher"] = loss_teacher.detach()
            loss = loss + batch.weight * loss_teacher
        # The sum comes last: a loss that is not finite is then reported by the term that made it so.
        losses["train_loss"] = total_loss(terms)
        return loss, losses, {"train_acc": _accuracy(out_s.logits, batch.target)}


class HeadTraining(nn.Module):
    """The losses of a step that trains a teacher's head on the frozen embeddings."""

    def __init__(self, teacher: EncoderTeacher, loader: Loader):
        super().__init__()
        self.teacher, self.split = teacher, loader.name

    def forward(self, batch: Batch, epoch: int) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """See ``Distillation``."""
        logits = self.teacher(self.split, batch).logits
        loss = mean_cross_entropy(logits, batch)
        return batch.weight * loss, {"train_loss": loss}, {"train_acc": _accuracy(logits, batch.target)}


def _accuracy(logits: Tensor, target: Tensor) -> Tensor:
    """Top-1 accuracy in percent; a sample without a label has target -1, and counts as missed."""
    (correct,) = accuracy(logits.detach(), target)
    return correct


class Step:
    """A training step; ``totals`` holds what it measured. Nothing in it waits for the device.

    Args:
        losses: turns a batch and the epoch into the loss to differentiate, and by name the losses and the other
            measurements.
        optimizers: the student's optimiser comes first.
        scaler: scales the gradients.
        loader: makes the batches.
        static: every batch uses the same weights, on each process that has a share of it.
    """

    def __init__(
        self,
        losses: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        scaler: torch.amp.GradScaler,
        loader: Loader,
        static: bool = True,
    ):
        # A process without a share of a batch uses other weights. On a CPU the search for them costs little.
        shared = all(min(loader.shares(count)) for count in (loader.batch_size, loader.last))
        self.losses = distributed.parallel(losses, static and shared and loader.device.type == "cuda")
        self.optimizers, self.scaler, self.loader = optimizers, scaler, loader
        self.totals = Totals(loader.device)

    def __call__(self, draw: Draw, epoch: int) -> None:
        """Train on what ``Loader.draws`` gave, in an epoch counted from 1."""
        batch = self.loader.batch(draw)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        losses, others = self._backward(batch, epoch)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        self.totals.add(losses, others, len(batch.target), batch.labelled)

    def _backward(self, batch: Batch, epoch: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Compute the gradients of a batch; returns what it measured."""
        loss, losses, others = self.losses(batch, epoch)
        self.scaler.scale(loss).backward()
        return losses, others
