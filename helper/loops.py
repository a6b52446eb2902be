"""The training step and the test pass."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset.loader import Batch, Draw, Loader, deal
from models.heads import Classifier, Outputs, Student

from . import distributed
from .data import Loaders
from .exits import save_asked
from .meters import EpochLog, Totals
from .objective import Objective, mean_cross_entropy, total_loss
from .optim import capturable, set_learning_rate
from .runtime import autocast
from .teacher import ClipTeacher, CnnTeacher
from .util import AverageMeter, accuracy

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

    def __init__(self, teacher: ClipTeacher, loader: Loader):
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


def train_epoch(
    epoch: int,
    step: Step,
    epochs: int,
    print_freq: int,
    title: str = "Epoch",
    begun: tuple[int, dict] | None = None,
    save_steps: int | None = None,
    save: Callable[[int, dict], None] | None = None,
    rate: Callable[[int], float] | None = None,
) -> dict[str, float]:
    """One epoch of training, counted from 1.

    Args:
        begun: how many of its steps are done, and what the log had then; None for a new epoch.
        save_steps: ``save`` is called with these two after every so many steps, but for the last, and where SIGUSR1
            asks for it; None for there alone.
        rate: the learning rate in each of its steps, counted from 1; None where it is set already.

    Returns:
        train_loss and its terms, train_acc, images_per_second.

    Raises:
        NonFiniteLoss: a term is not finite; seen at the next print.
    """
    log, done = EpochLog(f"{title} {epoch}", step.loader, print_freq, epochs - epoch, step.totals), 0
    if begun is not None:
        done, logged = begun
        log.load_state_dict(logged)
    for number, draw in enumerate(step.loader.draws(epoch, done), start=done + 1):
        if rate is not None:
            for optimizer in step.optimizers:
                set_learning_rate(rate(number), optimizer)
        step(draw, epoch)
        log.update(number, sum(draw.shares))
        due = save_steps is not None and number % save_steps == 0
        if number < log.steps and (save_asked(number) or due):
            save(number, log.state_dict())
    return log.result()


def scores(logits: Tensor, target: Tensor) -> Tensor:
    """(3,): mean cross-entropy, top-1 and top-5 accuracy in percent, of logits (B, classes)."""
    return torch.stack([F.cross_entropy(logits, target), *accuracy(logits, target, topk=(1, 5))])


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
        named = (f"{prefix}_loss", f"{prefix}_acc", f"{prefix}_acc_top5")
        values |= zip(named, scores(main.logits.float(), batch.target), strict=True)
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


class Evaluation:
    """The test pass after an epoch: of student and teacher on the test set, of what is trained on what is held out.

    Args:
        loaders: the run's.
        student: whose accuracy decides; None to test a teacher alone.
        teacher: None where there is none. A frozen CNN, which gives the same in every epoch, is tested once, here. An
            encoder without a head does not classify, and is not tested.
        opt: ``device``, ``amp``, ``epochs`` and ``eval_freq``.
        classifies: whether anything trains the student to classify; otherwise its accuracy says nothing, and is None.
    """

    def __init__(
        self,
        loaders: Loaders,
        student: Student | Classifier | None,
        teacher: ClipTeacher | CnnTeacher | None,
        opt,
        classifies: bool = True,
    ):
        self.loaders, self.student, self.teacher, self.opt = loaders, student, teacher, opt
        self.classifies, self.fixed = classifies, {}
        if isinstance(teacher, ClipTeacher) and teacher.head is None:
            self.teacher = None
        if isinstance(teacher, CnnTeacher):
            accuracy = validate(loaders.test, None, teacher, opt, "teacher")["teacher_acc"]
            print(f"teacher accuracy: {accuracy:.2f}")
            self.teacher, self.fixed = None, {"teacher_acc": accuracy}

    def __call__(self, epoch: int) -> dict[str, float]:
        """What ``validate`` finds, after every so many epochs and the last; nothing after the others."""
        if epoch % self.opt.eval_freq and epoch != self.opt.epochs:
            return {}
        if not self.classifies:
            return dict.fromkeys(("test_loss", "test_acc", "test_acc_top5")) | self.fixed
        record = validate(self.loaders.test, self.student, self.teacher, self.opt) | self.fixed
        if self.loaders.val is not None:
            trained = (None, self.teacher) if self.student is None else (self.student, None)
            record |= validate(self.loaders.val, *trained, self.opt, prefix="val")
        return record
