"""Batches of a data set: no worker processes, the same on CPU and GPU.

Images in memory, or on the GPU where they fit, are simply taken; threads read images that lie elsewhere ahead.
"""

import copy
import functools
import itertools
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .augment import Augment, mixed
from .images import Split
from .rows import Rows, channels_last, gather
from .views import CIFAR_VIEWS, CLIP_NORMALIZATION, Views, normalize

# Samples of 32 pixels per batch of a test pass, by device: any number gives the same result. A GPU is fast with a
# large one; a CPU is as fast with a small one, whose maps fit its cache, and needs a fifth of the memory.
_EVAL_BATCH_SIZE = {"cpu": 100, "cuda": 2500}

# Threads that read images, and batches that are read before they are asked for. On a CPU more threads would take the
# cores from the step.
_READERS, _AHEAD = {"cpu": 1, "cuda": 4}, {"cpu": 2, "cuda": 8}

# The copies on GPUs of images that are in memory, one for all that use them.
_on_gpu = WeakTensorKeyDictionary()


def on_device(images: Tensor | Rows, device: torch.device) -> Tensor | Rows:
    """Move images (N, 3, H, W) to the device, unless they would take more than half of a GPU's free memory."""
    if isinstance(images, Rows):
        stored = on_device(images.images, device)
        return Rows(stored, images.numbers.to(stored.device))
    if not channels_last(images):
        images = images.contiguous()
    if device.type == "cpu":
        return images
    if images not in _on_gpu and images.nbytes < torch.cuda.mem_get_info(device)[0] // 2:
        _on_gpu[images] = images.to(device)
    return _on_gpu.get(images, images)


def take(images: Tensor | Rows, index: Tensor, device: torch.device) -> Tensor:
    """Rows ``index`` (B,) of the images that ``on_device`` gave, (B, 3, H, W) on the device."""
    if images.device.type != device.type:
        return read(images, index.cpu(), device)
    return images[index] if isinstance(images, Rows) else gather(images, index)


def read(images: Tensor | Rows, index: Tensor, device: torch.device) -> Tensor:
    """Do as ``take``, for images on the host; the calling thread alone copies, and leaves the cores to the step.

    The copy to a GPU belongs to the current stream and is not waited for.
    """
    if isinstance(images, Rows):
        images, index = images.images, images.numbers[index]
    last = channels_last(images)
    images = images.permute(0, 2, 3, 1) if last else images
    stored = torch.empty(len(index), *images.shape[1:], dtype=images.dtype, pin_memory=device.type == "cuda")
    np.take(images.numpy(), index.numpy(), axis=0, out=stored.numpy(), mode="clip")
    stored = stored.permute(0, 3, 1, 2) if last else stored
    return stored.to(device, non_blocking=True)


def _read_beside(
    stream: torch.cuda.Stream, images: Tensor | Rows, index: Tensor, device: torch.device
) -> tuple[Tensor, torch.cuda.Event]:
    """Do as ``read``, with the copy on a stream of its own; the event says when it is done."""
    with torch.cuda.stream(stream):
        stored = read(images, index, device)
        return stored, stream.record_event()


def _arrived(stored: Tensor, copied: torch.cuda.Event) -> Tensor:
    """What ``_read_beside`` gave, for use on the current stream."""
    current = torch.cuda.current_stream()
    current.wait_event(copied)
    stored.record_stream(current)  # its memory is given away again only after its use there
    return stored


def eval_batch_size(device: str, image_size: int) -> int:
    """Samples per batch of a test pass; batches of all sizes of images take about the same memory."""
    return max(8, _EVAL_BATCH_SIZE[device] * 32**2 // image_size**2)


class Batch(NamedTuple):
    """One batch on the device; with many processes, this one's share of it.

    index: (B,) int64, row numbers in the split.
    target: (B,) int64, classes; -1 for an image without a label.
    image: (B, 3, H, W) float32, the student's view, normalised; None where the loader draws none.
    teacher_view: (B,) int64, the number of the teacher's view.
    shares: samples on each process, in order of rank, where there are several.
    weight: factor of a mean over this share, so that the mean over processes is that over the whole batch.
    host: index and teacher_view on the CPU, for look-ups there; None in a step that is captured.
    labelled: how many of this share have a label, a scalar; None where all images of the loader have one.
    plain: the student's view before its colours were changed, for a teacher that sees the same image; None where that
        is ``image``.
    mix: (B,) float32, the share of each sample's own values where samples are mixed, see ``mixed``; else None.
    """

    index: Tensor
    target: Tensor
    image: Tensor | None
    teacher_view: Tensor
    shares: tuple[int, ...] | None = None
    weight: float = 1.0
    host: tuple[Tensor, Tensor] | None = None
    labelled: Tensor | None = None
    plain: Tensor | None = None
    mix: Tensor | None = None


class Draw(NamedTuple):
    """The numbers and images that a batch is made of.

    numbers: (3, B) int64 on the device: row, student's view and teacher's view of each sample. A row more where the
        student's view is augmented by numbers of its own, and another where samples are mixed.
    shares: samples on each process, in order of rank; B is this one's.
    host: the numbers on the CPU.
    stored: (B, 3, S, S) uint8 on the device, the images of the rows, where they were read ahead.
    """

    numbers: Tensor
    shares: tuple[int, ...]
    host: Tensor | None = None
    stored: Tensor | None = None


def deal(count: int, processes: int, least: int = 1) -> tuple[int, ...]:
    """How many of ``count`` samples each process gets: as equal as possible, the first processes get more.

    Args:
        least: a process gets at least so many samples or none; the last processes then have none. Fewer samples than
            that go to the first process.
    """
    used = min(processes, max(count // least, 1))
    return tuple(count // used + (rank < count % used) if rank < used else 0 for rank in range(processes))


_AS_IT_IS = Augment()

# Shares of a mix are whole numbers of this unit.
_MIX_UNIT = 2.0**-31


class Loader:
    """Batches of one split; order and views depend on (seed, epoch) alone.

    In training, the student's view is drawn from all views of its image, the teacher's uniformly from the image's
    first ``teacher_views``, independently; ``shared`` draws one of the latter for both. In evaluation, rows come in
    order, each in the test view.

    Attributes:
        reads_ahead: threads read the images of the next batches, as they lie neither on the device nor in memory.
        waited: seconds spent so far waiting for images to be read.

    Args:
        split: images and targets.
        name: 'train' or 'test': the part of the teacher's bank that ``index`` refers to.
        batch_size: samples of all processes together; the last batch may be smaller, or larger, see ``least``.
        device: where the batches are made; the images move there once, where they fit.
        rows: (N,) the rows of the split that are used; all by default.
        training: shuffle and draw views.
        seed: seed of the order and the views.
        teacher_views: how many views of each image the teacher has; None for all.
        shared: teacher and student see the same view.
        images: whether batches hold images.
        max_steps: at most so many batches per epoch.
        views: the data set's views.
        rank: this process's number among those that share each batch, from 0.
        processes: number of processes that share each batch.
        augment: what the student's views go through in training.
        plain: give the views before their colours are changed, too.
        mixup: samples are mixed by shares of a beta distribution with both parameters of this value; 0: they are not.
            With many processes each mixes its own.
        least: see ``deal``. A smaller rest of an epoch joins the batch before it: batch norm in training cannot take
            one sample alone where maps are one pixel.
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
        teacher_views: int | None = None,
        shared: bool = False,
        images: bool = True,
        max_steps: int | None = None,
        views: Views = CIFAR_VIEWS,
        normalization: tuple = CLIP_NORMALIZATION,
        rank: int = 0,
        processes: int = 1,
        augment: Augment = _AS_IT_IS,
        plain: bool = False,
        mixup: float = 0.0,
        least: int = 1,
    ):
        self.name = name
        self.batch_size = batch_size
        self.device = device
        self.training = training
        self.seed = seed
        self.shared = shared
        self.views = views
        self.teacher_views = None if teacher_views == views.count else teacher_views
        self.max_steps = max_steps
        self.normalization = normalization
        self.rank = rank
        self.processes = processes
        self.least = least
        self.augment = augment if training else _AS_IT_IS
        self.plain = plain and self.augment.recolours
        self.mixup = mixup if training else 0.0
        self.rows = torch.arange(len(split)) if rows is None else rows
        self.images = on_device(split.images, device) if images else None
        far = images and self.images.device.type != device.type
        self.reads_ahead = far or (images and split.mapped and device.type == "cpu")
        self.waited = 0.0
        self.targets = split.targets.to(device)
        self._all_labelled = bool((split.targets[self.rows] >= 0).all())
        self._order = None
        if training and self.teacher_views is not None:
            self._order = views.order(len(split), self.teacher_views)

    def in_order(self, batch_size: int, images: bool = True) -> "Loader":
        """All of the same rows, once and in order, each in the test view; on this process alone.

        Args:
            batch_size: samples of a batch.
            images: whether batches hold images.
        """
        twin = copy.copy(self)
        twin.batch_size, twin.training, twin.max_steps = batch_size, False, None
        twin.rank, twin.processes, twin.least = 0, 1, 1
        if not images:
            twin.images, twin.reads_ahead = None, False
        return twin

    def __len__(self) -> int:
        """Batches per epoch."""
        full, rest = divmod(len(self.rows), self.batch_size)
        batches = full + (rest >= self.least or bool(rest and not full))
        return batches if self.max_steps is None else min(batches, self.max_steps)

    @property
    def num_samples(self) -> int:
        """Samples per epoch, on all processes together."""
        count = len(self.rows)
        return count if self.max_steps is None else min(count, self.max_steps * self.batch_size)

    @property
    def last(self) -> int:
        """Samples of the last batch, on all processes together."""
        return self.num_samples - (len(self) - 1) * self.batch_size

    def shares(self, count: int) -> tuple[int, ...]:
        """How many samples of a batch of ``count`` are on each process."""
        return deal(count, self.processes, self.least)

    def epoch(self, epoch: int = 0) -> Iterator[Batch]:
        """The batches of one epoch."""
        yield from map(self.batch, self.draws(epoch))

    def draws(self, epoch: int = 0, done: int = 0) -> Iterator[Draw]:
        """The draws of an epoch's batches, after the first ``done`` of them."""
        draws = self._draws(epoch, done)
        return self._read_ahead(draws) if self.reads_ahead else draws

    def _draws(self, epoch: int, done: int) -> Iterator[Draw]:
        host = torch.stack(self._draw(epoch))
        numbers = host.to(self.device)
        for number in range(done, len(self)):
            shares = self.shares(self.batch_size if number < len(self) - 1 else self.last)
            first = number * self.batch_size + sum(shares[: self.rank])
            own = slice(first, first + shares[self.rank])
            yield Draw(numbers[:, own], shares, host[:, own])

    def _read_ahead(self, draws: Iterator[Draw]) -> Iterator[Draw]:
        """The draws with their images, on the device."""
        kind, cuda = self.device.type, self.device.type == "cuda"
        current = (torch.cuda.current_device(),) if cuda else ()
        reading = functools.partial(_read_beside, torch.cuda.Stream()) if cuda else read
        with ThreadPoolExecutor(
            _READERS[kind], initializer=torch.cuda.set_device if cuda else None, initargs=current
        ) as threads:
            ahead = deque()
            while True:
                for draw in itertools.islice(draws, _AHEAD[kind] - len(ahead)):
                    ahead.append((draw, threads.submit(reading, self.images, draw.host[0], self.device)))
                if not ahead:
                    return
                draw, found = ahead.popleft()
                start = time.perf_counter()
                stored = found.result()
                self.waited += time.perf_counter() - start
                yield draw._replace(stored=_arrived(*stored) if cuda else stored)

    def batch(self, draw: Draw) -> Batch:
        """Make a batch, on the device."""
        index, view, teacher_view, *more = draw.numbers
        number = more.pop(0) if self.augment.numbered else None
        mix = more[0].double().mul(_MIX_UNIT).float() if self.mixup else None
        shares, host = draw.shares, None if draw.host is None else (draw.host[0], draw.host[2])
        image = plain = None
        if self.images is not None:
            stored = take(self.images, index, self.device) if draw.stored is None else draw.stored
            pixels = self.augment.crop(self.views, stored, index, view, number)
            if self.plain:
                plain = normalize(pixels, self.normalization)
            if self.augment.recolours:
                pixels = self.augment.recolour(pixels, index, number)
            image = normalize(pixels, self.normalization)
            if mix is not None:
                image, plain = mixed(image, mix), None if plain is None else mixed(plain, mix)
        weight = len(shares) * shares[self.rank] / sum(shares)
        spread = shares if len(shares) > 1 else None
        target = self.targets[index]
        labelled = None if self._all_labelled else (target >= 0).sum()
        return Batch(index, target, image, teacher_view, spread, weight, host, labelled, plain, mix)

    def _draw(self, epoch: int) -> tuple[Tensor, ...]:
        """The numbers of every sample of the epoch, see ``Draw``, in order, on the CPU."""
        count = len(self.rows)
        if not self.training:
            view = torch.full((count,), self.views.test)
            return self.rows, view, view
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, epoch))
        index = self.rows[torch.randperm(count, generator=generator)]
        if self.shared:
            view = teacher_view = self._draw_teacher_view(index, generator)
        else:
            view = self.views.draw(count, generator)
            # The teacher's view comes later: the student's order and views are then the same for every teacher.
            teacher_view = self._draw_teacher_view(index, generator)
        return index, view, teacher_view, *self._draw_more(epoch, count)

    def _draw_more(self, epoch: int, count: int) -> tuple[Tensor, ...]:
        """The numbers beyond the views; they depend on no teacher."""
        random = np.random.default_rng([epoch_seed(self.seed, epoch), 1])
        numbers = random.integers(1, 2**31, count)
        shares = random.beta(self.mixup, self.mixup, count) if self.mixup else None
        drawn = (torch.from_numpy(numbers),) if self.augment.numbered else ()
        return drawn if shares is None else (*drawn, torch.from_numpy((shares / _MIX_UNIT).astype(np.int64)))

    def _draw_teacher_view(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """One of the views that the teacher has of each image."""
        if self._order is None:
            return self.views.draw(len(index), generator)
        return self._order[index, torch.randint(self.teacher_views, (len(index),), generator=generator)].long()


def epoch_seed(seed: int, epoch: int) -> int:
    """One 63-bit generator seed for (seed, epoch), unrelated for neighbouring ones."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> 1)
