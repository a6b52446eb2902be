"""A student that understands texts: the space of its CLIP teacher, and classification by names alone in it."""

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from errors import InputError
from helper.contrastive import caption_tokens, class_embeddings
from helper.records import StoredRun
from helper.util import accuracy
from models import create_text_encoder
from models.encoders import TextEncoder
from models.names import parse_name
from models.weights import sha256_of

from . import measures
from .subjects import Subject, listed
from .teacher import check_same


def check_understands_text(run: StoredRun) -> None:
    """Raise an InputError unless a run's student lives in the space of a CLIP that has a text encoder."""
    if run.options["joint"] != "teacher":
        raise InputError(
            f"the student in {run.folder} does not understand texts: one that does is trained from a CLIP with "
            "--joint teacher"
        )
    if parse_name(run.options["clip_mode"]).library not in (None, "open_clip"):
        raise InputError(
            f"the student in {run.folder} does not understand texts, nor does its teacher {run.options['clip_mode']}: "
            "OpenAI's CLIPs and open_clip's models do"
        )


def load_text_encoder(run: StoredRun) -> TextEncoder:
    """The text encoder of a run's CLIP.

    Raises:
        InputError: the student understands no text, or its teacher has changed.
        OSError: the teacher's weights are missing.
    """
    check_understands_text(run)
    clip_mode = run.options["clip_mode"]
    path = parse_name(clip_mode).path or clip_mode
    if Path(path).is_file():
        check_same(run, "clip_sha256", sha256_of(path))
    return create_text_encoder(clip_mode, run.options["clip_root"])


class ZeroShot:
    """Classification by names alone (Radford et al., ICML 2021, section 3.1), in the space of the student's teacher.

    Args:
        labels: names to choose from; by default the data set's classes. A name that is no class of the data set is
            always wrong; images of a class that is not named are left out.
    """

    def __init__(self, labels: list[str] | None):
        self.labels = labels
        self._encoders: dict[str, TextEncoder] = {}

    def data(self, subject: Subject) -> str:
        """The data set that the answer is about; where names were given, their number and a hash of them."""
        if self.labels is None:
            return subject.dataset.name
        digest = hashlib.sha256("\n".join(self.labels).encode()).hexdigest()
        return f"{subject.dataset.name}, {len(self.labels)} names ({digest[:6]})"

    def check(self, subject: Subject) -> None:
        """Raise an InputError where a subject cannot be asked."""
        check_understands_text(subject.run)
        if self.labels is not None and not set(self.labels) & set(subject.dataset.classes):
            raise InputError(
                f"--labels names none of the classes of {subject.dataset.name}, such as "
                f"{listed(subject.dataset.classes, 3)}: no image could be right"
            )

    def __call__(self, subject: Subject) -> dict[str, dict]:
        """'zero_shot' by 'student' and 'teacher'."""
        clip_mode, dataset = subject.run.options["clip_mode"], subject.dataset
        if clip_mode not in self._encoders:
            self._encoders[clip_mode] = load_text_encoder(subject.run)
        text, names = self._encoders[clip_mode], self.labels or dataset.classes
        weights = class_embeddings(text, caption_tokens(names, tokenize=text.tokenize))
        place = {name: number for number, name in enumerate(names)}
        targets = torch.tensor([place.get(name, -1) for name in dataset.classes])[dataset.test.targets]
        asked = targets >= 0
        unseen = torch.tensor([name not in subject.trained.classes for name in names])
        loader, results = subject.loader(dataset.test, dataset.views), {}
        for side, network in subject.networks().items():
            embedding = subject.predict(network, loader).embedding[asked]
            similarity = F.normalize(embedding, dim=1) @ weights.T
            results[side] = _zero_shot_accuracies(similarity, targets[asked], names, unseen)
        return {"zero_shot": results}


def _zero_shot_accuracies(similarity: Tensor, targets: Tensor, names: list[str], unseen: Tensor) -> dict:
    top1, top5 = accuracy(similarity, targets, topk=(1, 5))
    predicted, new = similarity.argmax(dim=1), unseen[targets]
    right = (predicted == targets).double()
    matrix = measures.confusion(predicted, targets, len(names))
    parts = {"seen": ~new, "unseen": new}
    return {
        "top1": float(top1),
        "top5": float(top5),
        **{name: 100 * float(right[part].mean()) if part.any() else None for name, part in parts.items()},
        "per_class": measures.by_name(names, measures.per_class_accuracy(matrix)),
    }
