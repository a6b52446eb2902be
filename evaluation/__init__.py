"""A finished student, and what it knows: ``from evaluation import load_student``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from helper.records import StoredRun, best_record

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL import Image
    from torch import Tensor, nn

    from .student import Predictor


class FinishedRun(StoredRun):
    """A finished run as ``train_student.distill`` returns it: ``folder``, ``options``, metrics and its student."""

    @property
    def metrics(self) -> list[dict]:
        """The lines of metrics.jsonl, a dictionary for each epoch."""
        return self.history

    @property
    def best(self) -> dict:
        """The metrics of the best epoch."""
        return best_record(self.history)

    def student(self, which: str = "best") -> tuple[Predictor, Callable[[Image.Image], Tensor], list[str]]:
        """The student, ready to use; see ``load_student``."""
        return load_student(self, which)


def load_student(
    run: StoredRun | str | Path, which: str = "best", module: nn.Module | None = None
) -> tuple[Predictor, Callable[[Image.Image], Tensor], list[str]]:
    """A finished run's student, ready to use; the run's data set need not be there.

    Args:
        run: its folder, SAVE/student_model/NAME.
        which: the 'best' or the 'last' epoch, or the path of another file of the student.
        module: a module like the one that ``distill`` was given as the student, in another program; its weights do not
            matter, and it is not changed.

    Returns:
        The network in evaluation mode, images (B, 3, H, W) to logits (B, classes), with ``embed`` for embeddings; the
        transform from a PIL image to its input (3, H, W); and the classes' names in the order of the logits.

    Raises:
        InputError, OSError: see ``open_student``.
    """
    from .student import Predictor, image_transform, open_student  # here, so that tables of runs need no torch

    opened = open_student(run, which, module)
    transform = image_transform(opened.image_size, opened.normalization, opened.stored_size)
    return Predictor(opened.network).eval(), transform, opened.classes
