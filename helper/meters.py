"""An epoch's averages, and the lines that it prints."""

import time

import torch
from torch import Tensor

from dataset.loader import Loader
from errors import NonFiniteLoss

from . import distributed
from .util import format_seconds

_NEVER = torch.iinfo(torch.int64).max

# These are averages over the samples that have a label; all others are over all samples.
_OF_LABELLED = {"loss_cls", "loss_teacher", "train_acc"}


class Totals:
    """Sums over the samples of an epoch, and the first step at which each loss was not finite.

    They are kept on the device and added to in place, so that a step can be captured and replayed. Reading them waits
    for the device.

    Args:
        device: where the steps compute.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.names: list[str] = []
        self.losses = 0
        self.sums: Tensor | None = None
        self.counts: Tensor | None = None
        self.of_labelled: Tensor | None = None
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.first_bad: Tensor | None = None
        self._shared = False

    def reset(self) -> None:
        """Begin a new epoch."""
        self.step.zero_()
        if self.sums is not None:
            self.sums.zero_()
            self.counts.zero_()
            self.first_bad.fill_(_NEVER)

    def state_dict(self) -> dict:
        """What this process has added so far, on the CPU."""
        tensors = {name: getattr(self, name).clone().cpu() for name in ("sums", "counts", "step", "first_bad")}
        return {"names": self.names, "losses": self.losses, **tensors}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        self.names, self.losses = state["names"], state["losses"]
        for name in ("sums", "counts", "step", "first_bad"):
            setattr(self, name, state[name].to(device))
        self.of_labelled = self._which_are_of_labelled(device)

    def _begin(self, names: list[str], losses: int) -> None:
        device = self.step.device
        self.names, self.losses = names, losses
        self.sums, self.counts = torch.zeros(2, len(names), device=device)
        self.of_labelled = self._which_are_of_labelled(device)
        self.first_bad = torch.full((losses,), _NEVER, device=device)

    def _share_names(self) -> None:
        """Tell a process without a sample what the others measure."""
        if not self._shared:
            known = distributed.collect((self.names, self.losses))
            if self.sums is None:
                self._begin(*next((names, losses) for names, losses in known if names))
            self._shared = True

    def _which_are_of_labelled(self, device: torch.device) -> Tensor:
        return torch.tensor([name in _OF_LABELLED for name in self.names], device=device)

    @torch.no_grad()
    def add(self, losses: dict[str, Tensor], others: dict[str, Tensor], n: int, labelled: Tensor | None = None) -> None:
        """Add a step's values, each the mean of ``n`` samples; ``n`` may be 0, and the names never change.

        Args:
            labelled: how many samples have a label; None where all have one. The others count as zero in the losses
                and the accuracy that need labels, and are left out of their averages.
        """
        if n == 0:
            self.step += 1
            return
        values = torch.stack([*losses.values(), *others.values()])
        if self.sums is None:
            self._begin([*losses, *others], len(losses))
        self.step += 1
        self.counts += n if labelled is None else torch.where(self.of_labelled, labelled, n)
        self.sums += values * n
        bad = ~torch.isfinite(values[: self.losses])
        self.first_bad.copy_(torch.where(bad, self.first_bad.minimum(self.step), self.first_bad))

    def averages(self, title: str) -> dict[str, float]:
        """Means by name over all samples of all processes so far; a name without samples is left out.

        Raises:
            NonFiniteLoss: a loss was not finite, on any process.
        """
        self._share_names()
        first_bad = distributed.least(self.first_bad.clone()).tolist()
        for name, step in zip(self.names, first_bad, strict=False):
            if step != _NEVER:
                raise NonFiniteLoss(f"{name} is not finite at step {step} of {title.lower()}; nothing was saved")
        sums, counts = distributed.total(torch.stack([self.sums, self.counts]))
        means = zip(self.names, (sums / counts).tolist(), counts.tolist(), strict=True)
        return {name: mean for name, mean, count in means if count}


class EpochLog:
    """Prints an epoch's averages after every so many steps; stops the run at a loss that is not finite.

    Args:
        title: 'Epoch 3', say.
        loader: makes the epoch's batches.
        print_freq: steps from one print to the next.
        epochs_left: epochs after this one.
        totals: what the steps add to.
    """

    def __init__(self, title: str, loader: Loader, print_freq: int, epochs_left: int, totals: Totals):
        self.title, self.print_freq, self.epochs_left, self.totals = title, print_freq, epochs_left, totals
        self.steps, self.num_samples = len(loader), loader.num_samples
        self.device = loader.device
        self.count = 0
        self.start = time.perf_counter()
        totals.reset()

    def state_dict(self) -> dict:
        """The state that an epoch goes on from if it is interrupted here.

        Raises:
            NonFiniteLoss: a loss was not finite.
        """
        self.totals.averages(self.title)
        seconds = time.perf_counter() - self.start
        return {"count": self.count, "seconds": seconds, "totals": self.totals.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.count = state["count"]
        self.start -= state["seconds"]
        self.totals.load_state_dict(state["totals"], self.device)

    def update(self, step: int, n: int) -> None:
        """Note that a step, counted from 1, is done; it had ``n`` samples on all processes."""
        self.count += n
        if step % self.print_freq == 0 or step == self.steps:
            averages = "  ".join(f"{name} {value:.3f}" for name, value in self.totals.averages(self.title).items())
            rate = self.count / (time.perf_counter() - self.start)
            left = (self.num_samples * (1 + self.epochs_left) - self.count) / rate
            speed = f"{rate:.0f} images/s, {format_seconds(left)} left"
            print(f"{self.title} [{step}/{self.steps}]  {averages}  {speed}", flush=True)

    def result(self) -> dict[str, float]:
        """Averages by name, and ``images_per_second``."""
        averages = self.totals.averages(self.title)
        return {**averages, "images_per_second": self.count / (time.perf_counter() - self.start)}


def print_record(record: dict) -> None:
    """The epoch's result in one line."""
    named = ("heldout_loss", "heldout_knn", "seconds")
    shown = {name: value for name, value in record.items() if "_acc" in name or name in named}
    shown = {name: value for name, value in shown.items() if value is not None}
    text = "  ".join(f"{name} {value:.2f}" for name, value in shown.items())
    print(f" * Epoch {record['epoch']}  {text}", flush=True)
