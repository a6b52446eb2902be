"""Batches of a data set held in memory: no worker processes, the same on CPU and GPU."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import Split
from .views import CLIP_NORMALIZATION, NUM_VIEWS, TEST_VIEW, crop_flip, normalize, view_order


class Batch(NamedTuple):
    """One batch on the device; of many processes, this one's share of it.

    index: (B,) int64, row numbers in the split.
    target: (B,) int64, classes.
    image: (B, 3, H, W) float32, the student's view, normalised; None where the loader draws none.
    teacher_view: (B,) int64, the number of the teacher's view.
    shares: samples on each process, in order of rank, where there are several.
    weight: what a mean over this share counts for, so that the mean over processes is that over the whole batch.
    host: index and teacher_view on the CPU, for what is looked up there; None in a step that is captured.
    """

    index: Tensor
    target: Tensor
    image: Tensor | None
    teacher_view: Tensor
    shares: tuple[int, ...] | None = None
    weight: float = 1.0
    host: tuple[Tensor, Tensor] | None = None


class Draw(NamedTuple):
    """What a batch is made of.

    numbers: (3, B) int64 on the device: row, student's view and teacher's view of each sample.
    shares: samples on each process, in order of rank; B is this one's.
    host: the numbers on the CPU.
    """

    numbers: Tensor
    shares: tuple[int, ...]
    host: Tensor | None = None


def deal(count: int, processes: int) -> tuple[int, ...]:
    """How many of so many samples each process gets: as equal as can be, the first ones more."""
    return tuple(count // processes + (rank < count % processes) for rank in range(processes))


class Loader:
    """Batches of one split; order and views depend on (seed, epoch) alone.

    In training, the student's view is drawn uniformly from all 162, the teacher's uniformly from the
    image's first ``teacher_views`` (see ``view_order``), independently; ``shared`` gives the teacher the
    student's. In evaluation, rows come in order and every view is the image itself.

    Args:
        split: images and targets.
        name: 'train' or 'test': the part of the teacher's bank that ``index`` refers to.
        batch_size: of all processes together; the last batch may be smaller.
        device: where the batches are made; the images move there once.
        rows: (N,) the rows of the split that are used; all by default.
        training: shuffle and draw views.
        seed: of the order and the views.
        teacher_views: how many views of each image the teacher has, 1 to 162.
        shared: the teacher's view is the student's.
        images: whether batches hold images.
        max_steps: at most so many batches per epoch.
        rank: this process's number among those that share each batch, from 0.
        processes: how many they are.
    """

    def __init__(
        self,
        split: Split,
        name: str,
        batch_size: int,
        device: torch.device,
        *,
        rows: Tensor | None = None,
        training: bool = False,
        seed: int = 0,
        teacher_views: int = NUM_VIEWS,
        shared: bool = False,
        images: bool = True,
        max_steps: int | None = None,
        normalization: tuple = CLIP_NORMALIZATION,
        rank: int = 0,
        processes: int = 1,
    ):
        self.name = name
        self.batch_size = batch_size
        self.device = device
        self.training = training
        self.seed = seed
        self.shared = shared
        self.teacher_views = teacher_views
        self.max_steps = max_steps
        self.normalization = normalization
        self.rank = rank
        self.processes = processes
        self.rows = torch.arange(len(split)) if rows is None else rows
        self.images = split.images.to(device) if images else None
        self.targets = split.targets.to(device)
        self._order = None
        if training and not shared and teacher_views < NUM_VIEWS:
            self._order = torch.from_numpy(view_order(np.arange(len(split)), teacher_views))

    def __len__(self) -> int:
        """Batches per epoch."""
        batches = -(-len(self.rows) // self.batch_size)
        return batches if self.max_steps is None else min(batches, self.max_steps)

    @property
    def num_samples(self) -> int:
        """Samples per epoch, on all processes together."""
        return min(len(self.rows), len(self) * self.batch_size)

    def epoch(self, epoch: int = 0) -> Iterator[Batch]:
        """The batches of one epoch."""
        yield from map(self.batch, self.draws(epoch))

    def draws(self, epoch: int = 0) -> Iterator[Draw]:
        """What each batch of an epoch is made of."""
        host = torch.stack(self._draw(epoch))
        numbers = host.to(self.device)
        for start in range(0, self.num_samples, self.batch_size):
            shares = deal(min(self.batch_size, self.num_samples - start), self.processes)
            first = start + sum(shares[: self.rank])
            own = slice(first, first + shares[self.rank])
            yield Draw(numbers[:, own], shares, host[:, own])

    def batch(self, draw: Draw) -> Batch:
        """Make a batch, on the device."""
        index, view, teacher_view = draw.numbers
        shares, host = draw.shares, None if draw.host is None else (draw.host[0], draw.host[2])
        image = None
        if self.images is not None:
            image = normalize(crop_flip(self.images[index], view), self.normalization)
        weight = len(shares) * shares[self.rank] / sum(shares)
        spread = shares if len(shares) > 1 else None
        return Batch(index, self.targets[index], image, teacher_view, spread, weight, host)

    def _draw(self, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Row, student's view and teacher's view of every sample of the epoch, in order, on the CPU."""
        count = len(self.rows)
        if not self.training:
            view = torch.full((count,), TEST_VIEW)
            return self.rows, view, view
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, epoch))
        index = self.rows[torch.randperm(count, generator=generator)]
        view = torch.randint(NUM_VIEWS, (count,), generator=generator)
        if self.shared:
            return index, view, view
        # Drawn after the student's, whose order and views are then the same for every teacher.
        drawn = torch.randint(self.teacher_views, (count,), generator=generator)
        if self._order is not None:
            drawn = self._order[index, drawn].long()
        return index, view, drawn


def epoch_seed(seed: int, epoch: int) -> int:
    """One 63-bit generator seed for (seed, epoch), unrelated for neighbouring ones."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> 1)


def holdout_rows(targets: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Split row numbers into (kept, held out), the same fraction of every class, the same for every seed.

    Args:
        targets: (N,) classes.
        fraction: in (0, 1).

    Raises:
        ValueError: where a class would lose all of its images, or none at all were held out.
    """
    generator = torch.Generator().manual_seed(0)
    held = torch.zeros(len(targets), dtype=torch.bool)
    for target in targets.unique():
        rows = (targets == target).nonzero().flatten()
        count = round(len(rows) * fraction)
        if not 0 < count < len(rows):
            raise ValueError(f"--holdout {fraction} holds out {count} of the {len(rows)} images of class {int(target)}")
        held[rows[torch.randperm(len(rows), generator=generator)[:count]]] = True
    rows = torch.arange(len(targets))
    return rows[~held], rows[held]
