"""How well student and teacher classify, alone and under corruption, and how near they are to one another."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dataset import ImageDataset, Split
from errors import InputError
from helper.agreement import linear_cka
from helper.bank import OnTheFly
from helper.teacher import EncoderTeacher
from helper.util import AverageMeter, accuracy
from helper.validation import scores

from . import measures
from .answers import write_confusion
from .subjects import Predictions, Subject, class_numbers


class Accuracy:
    """How well student and teacher classify the test split, and how near they are to one another.

    A teacher without a head has no accuracy, nor has a student that was trained without labels. The confusion matrix is
    written beside the weights: the student's, or the teacher's where it is asked alone.
    """

    def data(self, subject: Subject) -> str:
        """The data set that the answer is about."""
        return subject.dataset.name

    def check(self, subject: Subject) -> None:
        """Raise an InputError where the data set has other classes."""
        class_numbers(subject)

    def __call__(self, subject: Subject) -> dict[str, dict]:
        """'accuracy' by 'student' and 'teacher'; with both, 'agreement' by 'student', and 'graphs' by both."""
        test = subject.dataset.test
        targets, loader = class_numbers(subject)[test.targets], subject.loader(test, subject.dataset.views)
        if (test.targets < 0).any():  # no two images are then of one class
            targets = torch.arange(len(test))
        networks = subject.networks()
        seen = {side: subject.predict(network, loader) for side, network in networks.items()}
        logits = {side: out.logits for side, out in seen.items() if out.logits is not None}
        if subject.run.history and subject.run.history[-1].get("test_acc") is None:
            del logits["student"]
        classes, batch = subject.trained.classes, loader.batch_size
        answers = {"accuracy": {side: classification(x, targets, classes, batch) for side, x in logits.items()}}
        if logits:
            predicted = next(iter(logits.values())).argmax(dim=1)
            print(f"confusion matrix: {write_confusion(subject, measures.confusion(predicted, targets, len(classes)))}")
        if len(seen) == 2:
            joint = isinstance(networks["teacher"], EncoderTeacher) or networks["teacher"].head is not None
            joint = joint and seen["student"].embedding.shape == seen["teacher"].embedding.shape
            answers["agreement"] = {"student": agreement(**seen, classify=len(logits) == 2, joint=joint)}
            if joint:
                # The teacher's numbers are those of a student that equals it.
                size, f_t = subject.run.options["batch_size"], seen["teacher"].embedding
                answers["graphs"] = {
                    side: measures.embedding_graph(out.embedding, f_t, targets, size) for side, out in seen.items()
                }
        return answers


def classification(logits: Tensor, targets: Tensor, classes: list[str], batch_size: int) -> dict:
    """Accuracies in percent, cross-entropy in nats, expected calibration error in percent.

    Means are taken batch by batch as in a run's test pass, so that they are the same numbers.
    """
    meter = AverageMeter()
    for part, target in zip(logits.split(batch_size), targets.split(batch_size), strict=True):
        meter.update(scores(part, target), len(target))
    cross_entropy, top1, top5 = meter.avg.tolist()
    matrix = measures.confusion(logits.argmax(dim=1), targets, len(classes))
    per_class = measures.per_class_accuracy(matrix)
    return {
        "top1": top1,
        "top5": top5,
        "class_mean": float(per_class.nanmean()),
        "cross_entropy": cross_entropy,
        "calibration_error": measures.calibration_error(logits, targets),
        "per_class": measures.by_name(classes, per_class),
    }


def agreement(student: Predictions, teacher: Predictions, classify: bool, joint: bool) -> dict[str, float | None]:
    """How near a student is to its teacher, in numbers; None where there is nothing to compare.

    Args:
        classify: whether both have logits.
        joint: whether both are projected to one joint space.
    """
    found: dict[str, float | None] = dict.fromkeys(("same_class", "divergence", "node_error", "edge_error"))
    if classify:
        found["same_class"] = measures.same_predictions(student.logits, teacher.logits)
        found["divergence"] = measures.divergence(student.logits, teacher.logits)
    if joint:
        errors = measures.alignment_errors(student.embedding, teacher.embedding)
        found["node_error"], found["edge_error"] = errors
    return found | {"cka": linear_cka(student.features, teacher.features)}


_SEVERITIES = 5


class Corruptions:
    """Accuracy on the corrupted test images of Hendrycks and Dietterich (ICLR 2019): CIFAR-10-C and CIFAR-100-C.

    Their files, NAME.npy for each corruption and labels.npy, hold the test images at severity 1, then 2, to 5.

    Args:
        data_dir: the folder that holds CIFAR-100-C/; by default the folder of the run's data set.
    """

    def __init__(self, data_dir: str | None):
        self.data_dir = data_dir

    def data(self, subject: Subject) -> str:
        """See ``Accuracy``."""
        return subject.dataset.name

    def check(self, subject: Subject) -> None:
        """Raise an InputError where the files are missing, or the data set has other classes."""
        self.folder(subject)
        class_numbers(subject)

    def folder(self, subject: Subject) -> Path:
        """The folder of the files of a subject's data set.

        Raises:
            InputError: there are none.
        """
        names = {"cifar10": "CIFAR-10-C", "cifar100": "CIFAR-100-C"}
        if subject.dataset.name not in names:
            raise InputError(f"--corruptions: there are files for {' and '.join(names)}, not {subject.dataset.name}")
        root = self.data_dir or subject.run.options["data_dir"]
        folder = Path(root) / names[subject.dataset.name]
        if not (folder / "labels.npy").is_file() or len(list(folder.glob("*.npy"))) < 2:
            raise InputError(f"--corruptions: {folder} has no labels.npy and NAME.npy; unpack {folder.name}.tar there")
        return folder

    def __call__(self, subject: Subject) -> dict[str, dict]:
        """'corruptions' by 'student' and 'teacher'."""
        folder = self.folder(subject)
        labels = class_numbers(subject)[torch.from_numpy(np.load(folder / "labels.npy").astype(np.int64))]
        files = sorted(path for path in folder.glob("*.npy") if path.stem != "labels")
        count = len(labels) // _SEVERITIES
        networks = subject.networks(own=False)
        found: dict[str, dict[str, list[float]]] = {side: {} for side in networks}
        for path in files:
            stored = np.load(path, mmap_mode="r")
            for severity in range(_SEVERITIES):
                rows = slice(severity * count, (severity + 1) * count)
                images = torch.from_numpy(stored[rows].transpose(0, 3, 1, 2).copy())
                split = Split(images, labels[rows])
                loader = subject.loader(split, subject.dataset.views)
                for side, network in networks.items():
                    if isinstance(network, EncoderTeacher):
                        corrupted = ImageDataset(path.stem, subject.dataset.classes, split, split)
                        network.embed = OnTheFly(corrupted, network.embed.encoder, loader.device)
                    logits = subject.predict(network, loader).logits
                    (top1,) = accuracy(logits, split.targets)
                    found[side].setdefault(path.stem, []).append(float(top1))
        return {"corruptions": {side: _corruption_means(by_name) for side, by_name in found.items()}}


def _corruption_means(by_name: dict[str, list[float]]) -> dict:
    table = np.array(list(by_name.values()))
    severities = {f"severity_{s}": x for s, x in enumerate(table.mean(axis=0).tolist(), start=1)}
    return {"mean": float(table.mean()), **severities, "per_corruption": by_name}
