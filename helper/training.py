"""The training of a run: its step, and the state that it goes on from."""

from collections.abc import Callable

import torch
from torch import nn

from dataset.loader import Loader, epoch_seed
from models.heads import Classifier, Student

from . import distributed
from .capture import build_step
from .data import Loaders
from .exits import save_asked
from .meters import EpochLog
from .objective import Objective
from .optim import adjust_learning_rate, build_optimizer, set_learning_rate, sgd
from .step import Distillation, HeadTraining, Step
from .teacher import CnnTeacher, EncoderTeacher


class Training:
    """Repeats a step, an epoch at a time.

    Args:
        opt: ``seed``, ``device``, ``epochs``, ``print_freq``, ``save_steps`` and the learning rate's schedule.
        step: the step; its first optimiser follows the schedule.
        trained: the network that is in training mode during an epoch.
        stateful: all that the next epoch depends on, by name.
        title: an epoch's title in what is printed.
        rate: gives the learning rate for an epoch and a step, both counted from 1; None where ``opt`` gives an epoch's.

    Attributes:
        earlier: seconds that the latest epoch took before it was interrupted; 0 where it was not.
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
        """Train for one epoch, counted from 1, or for the rest of an interrupted one.

        Args:
            save: called after every ``save_steps`` steps with the number of steps done and the state.

        Returns:
            The epoch's measurements, for metrics.jsonl.

        Raises:
            NonFiniteLoss: a loss is not finite; seen at the next print, or before the next ``save``.
        """
        opt, step = self.opt, self.step
        torch.manual_seed(epoch_seed(opt.seed, epoch))
        if self.rate is None:
            adjust_learning_rate(epoch, opt, step.optimizers[0])
        self.trained.train()
        log = EpochLog(f"{self.title} {epoch}", step.loader, opt.print_freq, opt.epochs - epoch, step.totals)
        done = self._take_up(log)
        for number, draw in enumerate(step.loader.draws(epoch, done), start=done + 1):
            if self.rate is not None:
                set_learning_rate(self.rate(epoch, number), step.optimizers[0])
            step(draw, epoch)
            log.update(number, sum(draw.shares))
            due = opt.save_steps is not None and number % opt.save_steps == 0
            if number < log.steps and (save_asked(number) or due):
                save(number, self.state_dict() | {"inside": self._inside(number, log)})
        measured = log.result()
        distributed.share_buffers(self.trained)
        return {"epoch": epoch, "lr": step.optimizers[0].param_groups[0]["lr"]} | measured

    def _inside(self, steps: int, log: EpochLog) -> dict:
        """The state inside an epoch after so many steps, which ``state_dict`` lacks.

        Each process has drawn its own numbers and measured its own samples.
        """
        own = {"log": log.state_dict(), "rng": torch.get_rng_state()}
        if self.opt.device == "cuda":
            own["rng_cuda"] = torch.cuda.get_rng_state()
        return {"steps": steps, "processes": distributed.collect(own)}

    def _take_up(self, log: EpochLog) -> int:
        """Restore what ``_inside`` gave, if such a state was loaded; returns how many steps are done."""
        begun, self._begun, self.earlier = self._begun, None, 0.0
        if begun is None:
            return 0
        own = begun["processes"][distributed.rank()]
        log.load_state_dict(own["log"])
        self.earlier = own["log"]["seconds"]
        torch.set_rng_state(own["rng"])
        if self.opt.device == "cuda":
            torch.cuda.set_rng_state(own["rng_cuda"])
        return begun["steps"]

    def state_dict(self) -> dict:
        """The state that a run goes on from between two epochs."""
        return {name: module.state_dict() for name, module in self.stateful.items()}

    def load_state_dict(self, state: dict) -> None:
        """Restore what ``state_dict`` gave, or a state inside an epoch."""
        for name, module in self.stateful.items():
            module.load_state_dict(state[name])
        self._begun = state.get("inside")


def build_scaler(opt) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(opt.device, enabled=opt.amp == "fp16")


def _warn_of_rest(loader: Loader) -> None:
    """Warn if an epoch's last step, just before the test pass, has so few images that batch norm fails."""
    size, rest = loader.batch_size, loader.last
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
    """Distillation trains the student and the loss's own layers, and the teacher's head unless it is frozen."""
    stateful = {"student": student} | ({} if objective.criterion is None else {"criterion": objective.criterion})
    optimizers = [build_optimizer(stateful.values(), opt)]
    stateful["optimizer"] = optimizers[0]
    trains_head = teacher is not None and teacher.trains_head
    if teacher is not None and teacher.head is not None:
        stateful["teacher_head"] = teacher.head
    if trains_head:
        optimizers.append(sgd(teacher.head.parameters(), opt.learning_rate_t, opt))
        stateful["optimizer_t"] = optimizers[1]
    seen = teacher if objective.needs_teacher or trains_head else None
    _warn_of_rest(loaders.train)
    losses = Distillation(student, seen, objective, loaders.train, opt, trains_head)
    step = build_step(opt.graph, losses, optimizers, build_scaler(opt), loaders.train, seen)
    return Training(opt, step, student, stateful)


def train_head(opt, teacher: EncoderTeacher, loaders: Loaders) -> Training:
    """The training of a head on the frozen embeddings, which needs no scaled gradients."""
    optimizer = build_optimizer([teacher.head], opt)
    scaler = torch.amp.GradScaler(opt.device, enabled=False)
    step = Step(HeadTraining(teacher, loaders.train), [optimizer], scaler, loaders.train)
    return Training(opt, step, teacher.head, {"teacher_head": teacher.head, "optimizer": optimizer})


def train_cnn(opt, cnn: Classifier, loaders: Loaders) -> Training:
    """The training of a CNN from scratch, by cross-entropy alone."""
    optimizer = build_optimizer([cnn], opt)
    objective = Objective(None, (), gamma=1, alpha=0, beta=0, kd_T=1)
    _warn_of_rest(loaders.train)
    losses = Distillation(cnn, None, objective, loaders.train, opt)
    step = build_step(opt.graph, losses, [optimizer], build_scaler(opt), loaders.train)
    return Training(opt, step, cnn, {"model": cnn, "optimizer": optimizer})
