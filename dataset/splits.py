"""Choose the rows of a training split that are held out, or keep their label: the same rows for every seed."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from errors import InputError


def holdout_rows(targets: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Split row numbers into (kept, held out): the same fraction of every class, and the same rows for every seed.

    A class keeps at least one image, and gives up at least one where it has two or more.

    Args:
        targets: (N,) classes; -1 for images without a label, which are never held out.
        fraction: in (0, 1).

    Raises:
        InputError: no class has two images, so that none can be held out.
    """
    held = torch.zeros(len(targets), dtype=torch.bool)
    for _, rows in _shuffled_classes(targets, seed=0):
        count = min(max(round(len(rows) * fraction), 1), len(rows) - 1)
        held[rows[:count]] = True
    if not held.any():
        raise InputError(f"--holdout {fraction}: no class has two labelled images, so none can be held out")
    rows = torch.arange(len(targets))
    return rows[~held], rows[held]


def keep_labels(targets: Tensor, fraction: float, classes: Sequence[str]) -> Tensor:
    """The targets of the same fraction of every class, and -1 for all others; the same images for every seed.

    A larger fraction keeps the labels that a smaller one keeps, and more.

    Args:
        targets: (N,) classes; -1 for images that have no label.
        fraction: in [0, 1].
        classes: the classes' names, for the message.

    Raises:
        InputError: a class would keep no label, though ``fraction`` is not 0.
    """
    kept = torch.full_like(targets, -1)
    for target, rows in _shuffled_classes(targets, seed=1):
        count = round(len(rows) * fraction)
        if fraction and not count:
            raise InputError(
                f"--labels {fraction:g} leaves class {classes[target]!r} no label on any of its {len(rows)} images; "
                f"use {1 / len(rows):.2g} or more"
            )
        kept[rows[:count]] = target
    return kept


def _shuffled_classes(targets: Tensor, seed: int) -> Iterator[tuple[int, Tensor]]:
    """Each class and its rows in an order that the seed alone decides."""
    generator = torch.Generator().manual_seed(seed)
    for target in targets[targets >= 0].unique().tolist():
        rows = (targets == target).nonzero().flatten()
        yield target, rows[torch.randperm(len(rows), generator=generator)]
