"""The training step and the test pass."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dataset.loader import Batch, Draw, Loader, deal
from models.heads import Classifier, Outputs, Student

from . import distributed
from .meters import Totals
from .objective import Objective, mean_cross_entropy, total_loss
from .optim import capturable
from .runtime import autocast
from .teacher import CnnTeacher, EncoderTeacher
from .util import accuracy

# Steps before one is captured, so that all that is made in a first step is there: buffers, algorithms, compiled code.
_STEPS_BEFORE_CAPTURE = 3


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
        teacher: EncoderTeacher | CnnTeacher | None,
        objective: Objective,
        loader: Loader,
        opt,
        trains_head: bool = False,
    ):
        super().__init__()
        self.student, self.teacher, self.criterion = student, teacher, objective.criterion
        self.objective, self.opt, self.trains_head = objective, opt, trains_head
        self.split, self.full = loader.name, deal(loader.batch_size, loader.processes)[loader.rank]
        maps = objective.needs_maps

        def see(image: Tensor) -> Outputs:
            # Without the maps that no loss looks at: compiled, gradients of zero would be added up for each of them.
            out = student(image)
            return out if maps else Outputs(out.embedding, out.logits, out.features[-1:])

        self.compiled = torch.compile(see) if opt.compile == "on" else see

    def forward(self, batch: Batch, epoch: int) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """What the gradients are of, and by name the losses and what else is measured."""
        # The last, smaller batch would be compiled anew.
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
        # Last, so that a loss that is not finite is called by the term that made it so.
        losses["train_loss"] = total_loss(terms)
        return loss, losses, {"train_acc": _accuracy(out_s.logits, batch.target)}


class HeadTraining(nn.Module):
    """What a step of training a teacher's head on the frozen embeddings computes before its backward pass."""

    def __init__(self, teacher: EncoderTeacher, loader: Loader):
        super().__init__()
        self.teacher, self.split = teacher, loader.name

    def forward(self, batch: Batch, epoch: int) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """See ``Distillation``."""
        logits = self.teacher(self.split, batch).logits
        loss = mean_cross_entropy(logits, batch)
        return batch.weight * loss, {"train_loss": loss}, {"train_acc": _accuracy(logits, batch.target)}


def _accuracy(logits: Tensor, target: Tensor) -> Tensor:
    """In percent; a sample without a label, whose target is -1, counts as missed."""
    (correct,) = accuracy(logits.detach(), target)
    return correct


class Step:
    """A training step: a batch, its losses, the backward pass, the optimisers; ``totals`` is what it measured.

    Nothing in it waits for the device. A step on a full batch can be captured and replayed, as a CUDA graph: all of
    it, the making of the batch included, from the numbers that the loader draws. Where that fails, steps go on without.

    Args:
        losses: a batch and the epoch to what the gradients are of, the losses and what else is measured, by name.
        optimizers: the student's first.
        scaler: of the gradients.
        loader: whose batches they are.
        capture: records what a function does and gives a function that does it again; None to do without, as where
            a thread reads images meanwhile.
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
        self._capture = None if loader.reads_ahead else capture
        self._before_capture = _STEPS_BEFORE_CAPTURE
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
                    with capturable(self.optimizers):
                        self._replay = self._capture(lambda: self._run(still, epoch))
                except RuntimeError as error:  # a driver or a library that cannot; nothing that was recorded has run
                    # Of a recording that broke, the error that PyTorch ends with says only that it did.
                    reason = str(error.__context__ or error).partition("\n")[0]
                    print(f"steps are not captured, which makes them slower: {reason}", flush=True)
                    self._capture = None
                    self._run(draw, epoch)
                    return
                self._captured_with = constants
            self._numbers.copy_(draw.numbers)
            self._replay()

    def _run(self, draw: Draw, epoch: int) -> None:
        batch = self.loader.batch(draw)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        losses, others = self._backward(batch, epoch)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        self.totals.add(losses, others, len(batch.target), batch.labelled)

    def _backward(self, batch: Batch, epoch: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Add a batch's gradients to those of the weights; what it measured."""
        loss, losses, others = self.losses(batch, epoch)
        self.scaler.scale(loss).backward()
        return losses, others
