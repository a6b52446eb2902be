"""What a run trains: a step, and the state that it goes on from."""

import functools
from collections.abc import Callable

import torch
from torch import nn

from dataset.loader import Loader, epoch_seed
from distiller_zoo import METHODS
from models.heads import Classifier, Student

from . import distributed
from .capture import step_capture
from .data import Loaders
from .exits import save_asked
from .meters import EpochLog
from .objective import Objective
from .optim import adjust_learning_rate, build_optimizer, set_learning_rate, sgd
from .step import Distillation, HeadTraining, Step
from .teacher import CnnTeacher, EncoderTeacher


class Training:
    """A step, repeated for an epoch at a time.

    Args:
        opt: ``seed``, ``device``, ``epochs``, ``print_freq``, ``save_steps`` and the learning rate's schedule.
        step: what is repeated; the schedule is that of its first optimiser.
        trained: the network whose training mode is on in an epoch.
        stateful: all that the next epoch depends on, by name.
        title: of an epoch, in what is printed.
        rate: the learning rate in an epoch's step, both counted from 1; None where it is the epoch's, as ``opt`` says.

    Attributes:
        earlier: seconds that the latest epoch had taken when it was interrupted, where it was.
    """

    def __init__(
        self,
        opt,
        step: Step,
        trained: nn.Module,
        stateful: dict,
        title: str = "Epoch",
        rate: Callable[[int, int], float] | None = None,
    ):
        self.opt, self.step, self.trained, self.title, self.rate = opt, step, trained, title, rate
        self.stateful = stateful | {"scaler": step.scaler}
        self.earlier = 0.0
        self._begun: dict | None = None

    def epoch(self, epoch: int, save: Callable[[int, dict], None]) -> dict:
        """Train for one epoch, counted from 1, or for the rest of the one whose state was loaded.

        Args:
            save: after every ``save_steps`` steps, given how many are done and the state.

        Returns:
            What it measured, for metrics.jsonl.

        Raises:
            NonFiniteLoss: a loss is not finite; seen at the next print, or before the next ``save``.
        """
        torch.manual_seed(epoch_seed(self.opt.seed, epoch))
        optimizer = self.step.optimizers[0]
        if self.rate is None:
            adjust_learning_rate(epoch, self.opt, optimizer)
        self.trained.train()
        begun, self.earlier = None, 0.0
        if self._begun is not None:
            own = self._begun["processes"][distributed.rank()]
            begun, self.earlier = (self._begun["steps"], own["log"]), own["log"]["seconds"]
            self._begun = None
            torch.set_rng_state(own["rng"])
            if self.opt.device == "cuda":
                torch.cuda.set_rng_state(own["rng_cuda"])

        def save_inside(steps: int, log: dict) -> None:
            # Beyond what all processes share, each has drawn and measured what it has.
            own = {"log": log, "rng": torch.get_rng_state()}
            if self.opt.device == "cuda":
                own["rng_cuda"] = torch.cuda.get_rng_state()
            inside = {"steps": steps, "processes": distributed.collect(own)}
            save(steps, self.state_dict() | {"inside": inside})

        how = {"print_freq": self.opt.print_freq, "save_steps": self.opt.save_steps, "save": save_inside}
        how["rate"] = None if self.rate is None else functools.partial(self.rate, epoch)
        measured = train_epoch(epoch, self.step, self.opt.epochs, title=self.title, begun=begun, **how)
        distributed.share_buffers(self.trained)
        return {"epoch": epoch, "lr": optimizer.param_groups[0]["lr"]} | measured

    def state_dict(self) -> dict:
        """What a run that is resumed between two epochs goes on from."""
        return {name: module.state_dict() for name, module in self.stateful.items()}

    def load_state_dict(self, state: dict) -> None:
        """Go on from what ``state_dict`` gave, or from the inside of an epoch."""
        for name, module in self.stateful.items():
            module.load_state_dict(state[name])
        self._begun = state.get("inside")


def build_scaler(opt) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(opt.device, enabled=opt.amp == "fp16")


def _warn_of_rest(loader: Loader) -> None:
    """Say so where an epoch ends, just before its test pass, in a step on so few images that batch norm fails."""
    size, rest = loader.batch_size, loader.num_samples % loader.batch_size
    if 0 < rest < size / 8:
        better = next(n for n in range(size, 0, -1) if not 0 < loader.num_samples % n < n / 2)
        print(f"the last step of an epoch has {rest} of --batch_size {size}, too few for batch norm: try {better}")


def train_student(
    opt,
    student: Student | Classifier,
    teacher: EncoderTeacher | CnnTeacher | None,
    objective: Objective,
    loaders: Loaders,
) -> Training:
    """Distillation: the student and the loss's own layers, and beside them the teacher's head where it is trained."""
    stateful = {"student": student} | ({} if objective.criterion is None else {"criterion": objective.criterion})
    optimizers = [build_optimizer((p for module in stateful.values() for p in module.parameters()), opt)]
    stateful["optimizer"] = optimizers[0]
    trains_head = teacher is not None and teacher.trains_head
    if teacher is not None and teacher.head is not None:
        stateful["teacher_head"] = teacher.head
    if trains_head:
        optimizers.append(sgd(teacher.head.parameters(), opt.learning_rate_t, opt))
        stateful["optimizer_t"] = optimizers[1]
    seen = teacher if objective.needs_teacher or trains_head else None
    losses = Distillation(student, seen, objective, loaders.train, opt, trains_head)
    _warn_of_rest(loaders.train)
    capture = step_capture(opt, seen, METHODS[opt.distill].waits)
    return Training(opt, Step(losses, optimizers, build_scaler(opt), loaders.train, capture), student, stateful)


def train_head(opt, teacher: EncoderTeacher, loaders: Loaders) -> Training:
    """A head on the frozen embeddings, which needs no scaled gradients."""
    optimizer = build_optimizer(teacher.head.parameters(), opt)
    scaler = torch.amp.GradScaler(opt.device, enabled=False)
    step = Step(HeadTraining(teacher, loaders.train), [optimizer], scaler, loaders.train)
    return Training(opt, step, teacher.head, {"teacher_head": teacher.head, "optimizer": optimizer})


def train_cnn(opt, cnn: Classifier, loaders: Loaders) -> Training:
    """A CNN from scratch, by cross-entropy alone."""
    optimizer = build_optimizer(cnn.parameters(), opt)
    objective = Objective(None, (), gamma=1, alpha=0, beta=0, kd_T=1)
    _warn_of_rest(loaders.train)
    losses = Distillation(cnn, None, objective, loaders.train, opt)
    step = Step(losses, [optimizer], build_scaler(opt), loaders.train, step_capture(opt, None))
    return Training(opt, step, cnn, {"model": cnn, "optimizer": optimizer})


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
