"""Pictures of runs by class: embeddings in the plane, and each class's gain over the student alone."""

import textwrap

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from torch import Tensor

from dataset import ImageDataset
from dataset.loader import Loader, eval_batch_size
from errors import InputError
from evaluation.student import TrainedStudent, open_run_dataset, open_student
from evaluation.subjects import predict
from evaluation.tables import run_labels
from evaluation.teacher import open_teacher
from helper.records import StoredRun

# Okabe and Ito's colours, which colour-blind readers can tell apart. Once they are used up the marker changes, which a
# print without colours shows as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "o^sD"

# The most classes in the picture of embeddings, and the most images of each.
_CLASSES, _PER_CLASS = 20, 40

# Up to so many classes, each bar is named.
_NAMED = 100


def class_rows(targets: Tensor, num_classes: int, per_class: int) -> Tensor:
    """The first samples of classes spread evenly over all, ordered by class.

    Args:
        targets: (N,) classes.
        num_classes: the most classes.
        per_class: the most samples of a class.

    Returns:
        Row numbers.
    """
    present = targets.unique()
    chosen = present[torch.linspace(0, len(present) - 1, min(num_classes, len(present))).round().long()]
    return torch.cat([(targets == target).nonzero().flatten()[:per_class] for target in chosen])


def outputs_on_test(
    opened: TrainedStudent, dataset: ImageDataset, rows: Tensor | None = None, of_teacher: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Embeddings (N, D) and logits (N, classes) of test images, on the CPU.

    The run's own kind of device computes them, where this machine has one.

    Args:
        rows: rows of the test split; all by default.
        of_teacher: take the run's teacher, not its student; a teacher without a head has no logits.

    Raises:
        InputError, OSError: see ``open_teacher``.
    """
    device = opened.run.options["device"] if torch.cuda.is_available() else "cpu"
    network = open_teacher(opened.run, opened.state, dataset, device) if of_teacher else opened.network.to(device)
    common = {"rows": rows, "views": dataset.views, "normalization": opened.normalization}
    size = eval_batch_size(device, opened.network.resolution or opened.image_size)
    loader = Loader(dataset.test, "test", size, torch.device(device), **common)
    out = predict(network, loader, amp="off")
    return out.embedding, out.logits


def plane(embedding: Tensor) -> Tensor:
    """Points (N, 2) for embeddings (N, D): t-SNE of their directions (van der Maaten and Hinton, JMLR 2008)."""
    directions = torch.nn.functional.normalize(embedding - embedding.mean(0))
    perplexity = min(30, (len(embedding) - 1) / 3)
    return torch.from_numpy(TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(directions.numpy()))


def _open(runs: list[StoredRun]) -> tuple[list[TrainedStudent], ImageDataset]:
    """The best students of runs that learned from one data set, and that data set."""
    if len({run.options["dataset_sha256"] for run in runs}) > 1:
        raise InputError("the runs are of several data sets; give runs of one")
    return [open_student(run) for run in runs], open_run_dataset(runs[0])


def _percent(accuracy: float | None) -> str:
    return "" if accuracy is None else f" ({accuracy:.1f} %)"


def embedding_figure(runs: list[StoredRun]) -> Figure:
    """Each run's best student's embeddings of test images of at most 20 classes, and the first one's teacher's: t-SNE.

    Raises:
        InputError, OSError: runs of several data sets, or see ``open_student`` and ``open_teacher``.
    """
    students, dataset = _open(runs)
    rows = class_rows(dataset.test.targets, _CLASSES, _PER_CLASS)
    targets = dataset.test.targets[rows]
    panels = [
        (name + _percent(opened.state.get("test_acc")), outputs_on_test(opened, dataset, rows)[0])
        for name, opened in zip(run_labels(runs), students, strict=True)
    ]
    taught = next((opened for opened in students if opened.run.options["distill"] != "none"), None)
    if taught is not None:
        name = f"teacher: {taught.run.options['model_t']}" + _percent(taught.state.get("teacher_acc"))
        panels.append((name, outputs_on_test(taught, dataset, rows, of_teacher=True)[0]))

    figure = Figure(figsize=(4.2 * len(panels), 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (title, embedding) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        points = plane(embedding)
        for place, target in enumerate(targets.unique().tolist()):
            style = {"c": COLOURS[place % len(COLOURS)], "marker": _MARKERS[place // len(COLOURS)]}
            axis.scatter(*points[targets == target].T, s=14, lw=0, label=dataset.classes[target], **style)
        axis.set_title(textwrap.fill(title, 46))
        axis.set(xticks=[], yticks=[], aspect="equal", adjustable="datalim")
        axis.spines[:].set(visible=True, color="#cccccc")
    handles, labels = axis.get_legend_handles_labels()
    longest = max(map(len, labels))
    columns = max(1, min(10, 40 * len(panels) // (longest + 4)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, markerscale=1.8)
    return figure


def class_accuracy(opened: TrainedStudent, dataset: ImageDataset) -> Tensor:
    """Top-1 accuracy (classes,) in percent for each class of the test split; NaN for a class without images."""
    _, logits = outputs_on_test(opened, dataset)
    targets = dataset.test.targets
    correct = (logits.argmax(1) == targets).double()
    count = torch.bincount(targets, minlength=len(dataset.classes))
    return 100 * torch.bincount(targets, correct, minlength=len(dataset.classes)) / count


def gain_figure(runs: list[StoredRun]) -> Figure:
    """Each class's gain in accuracy over the first run without a teacher, for every other run.

    Raises:
        InputError, OSError: no run is without a teacher, or there is no other run; or see ``embedding_figure``.
    """
    alone = next((place for place, run in enumerate(runs) if run.options["distill"] == "none"), None)
    if alone is None or len(runs) == 1:
        raise InputError("--per_class compares runs with a student alone: give one of --distill none, and others")
    students, dataset = _open(runs)
    accuracies = [class_accuracy(opened, dataset) for opened in students]
    others = [place for place in range(len(runs)) if place != alone]
    figure = Figure(figsize=(13, 3.6 * len(others)), layout="constrained")
    FigureCanvasAgg(figure)
    names = run_labels(runs)
    for axis, place in zip(figure.subplots(len(others), 1, squeeze=False)[:, 0], others, strict=True):
        gain = accuracies[place] - accuracies[alone]
        _draw_gain(axis, gain, dataset.classes)
        axis.set_title(
            f"{names[place]}: points gained over {names[alone]}, {gain.nanmean():+.1f} in the mean", loc="left"
        )
    return figure


def _draw_gain(axis: Axes, gain: Tensor, classes: list[str]) -> None:
    order = gain.argsort(descending=True, stable=True)
    order = order[~gain[order].isnan()]
    gain = gain[order]
    colours = [COLOURS[0] if x >= 0 else COLOURS[1] for x in gain]
    axis.bar(range(len(order)), gain.tolist(), width=0.8, color=colours)
    axis.axhline(float(gain.mean()), color="#555555", ls="--", lw=1)
    axis.axhline(0, color="black", lw=0.8)
    better, worse = int((gain > 0).sum()), int((gain < 0).sum())
    axis.set(xlim=(-0.8, len(order) - 0.2), ylabel="points")
    axis.set_xlabel(f"{len(order)} classes: {better} better, {worse} worse, {len(order) - better - worse} the same")
    axis.spines[["top", "right", "bottom"]].set_visible(False)
    named = [classes[place] for place in order] if len(order) <= _NAMED else []
    axis.set_xticks(range(len(named)), named, rotation=90, fontsize=6 if len(named) > 40 else 8)
    axis.tick_params(axis="x", length=0)
