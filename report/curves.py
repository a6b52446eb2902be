"""Pictures of runs: curves, embedding graphs of teacher and student, accuracies, and gains by class.

``python -m report.curves [--accuracies|--embedding|--per_class] RUN... [--out PNG]`` draws them. RUN is the folder of a
finished run of train_student.py.
"""

import contextlib
import itertools
import textwrap
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib import colors
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from distiller_zoo.EGA import standardize
from errors import InputError
from evaluation.student import model_path, open_run_dataset, open_student
from evaluation.tables import REPEATS, repeats, run_labels
from helper.exits import exit_on_bad_input
from helper.parser import Parser
from helper.records import StoredRun, read_run

from .class_plots import COLOURS, class_rows, embedding_figure, gain_figure, outputs_on_test
from .table import accuracies

# The line style changes once the colours are used up.
_LINES = ("-", "--", ":", "-.")
_TEACHER = "#555555"

# Up to so many runs, each panel has a legend; for more runs, one legend stands above all panels.
_FEW = 6

# The most letters in a line of a label, of a title, and of the legend above all panels.
_LABEL_WIDTH, _TITLE_WIDTH, _LEGEND_WIDTH = 40, 50, 170

_TERMS = {"cls": "classification", "kd": "KD", "node": "EGA: nodes", "edge": "EGA: edges", "distill": "distillation"}


@dataclass(frozen=True)
class Graphs:
    """The teacher's and the student's edge matrices (N, N) of the same N test samples, ordered by class.

    Attributes:
        rows: (N,) row numbers of the samples in the test split.
        targets: (N,) classes of the samples.
        classes: names of the classes, in the order of the samples.
    """

    teacher: Tensor
    student: Tensor
    rows: Tensor
    targets: Tensor
    classes: list[str]


def edge_matrix(embedding: Tensor) -> Tensor:
    """The edges (N, N) of the graph of embeddings (N, D): their Pearson correlations."""
    z = standardize(embedding.double())
    return z @ z.T


def embedding_graphs(run: StoredRun, num_classes: int = 10, per_class: int = 12) -> Graphs:
    """The teacher's and the best student's edge matrices of some test samples.

    The embeddings are those in the joint space. With a CNN teacher and a method that does not act there, they are the
    pooled features. A frozen encoder's embeddings come from the run's bank.

    Raises:
        InputError: the run has no teacher or no weights, or its teacher or its data set has changed.
        OSError: data set or teacher are missing.
    """
    student, dataset = open_student(run), open_run_dataset(run)
    rows = class_rows(dataset.test.targets, num_classes, per_class)
    edges = [edge_matrix(outputs_on_test(student, dataset, rows, of_teacher)[0]) for of_teacher in (True, False)]
    targets = dataset.test.targets[rows]
    classes = [dataset.classes[target] for target in targets.unique_consecutive()]
    return Graphs(*edges, rows, targets, classes)


def plot_runs(
    folders: list[str] | list[Path], out: str | Path | None = None, graph_of: str | Path | None = None
) -> Path:
    """Draw the picture of some runs and save it.

    Args:
        folders: the runs' folders.
        out: the picture's file; by default SAVE/plots/NAME.png, named after the run of the graphs.
        graph_of: the run of the graphs; by default the first run with EGA, or else the first run with a teacher. The
            picture holds the curves alone where no run has a teacher, or the weights are not in the run's folder.

    Returns:
        The picture's path.

    Raises:
        InputError, OSError: see ``read_run`` and ``embedding_graphs``; or the picture cannot be written.
    """
    runs = [read_run(folder) for folder in folders]
    if graph_of is not None:
        shown = next((run for run in runs if run.folder.resolve() == Path(graph_of).resolve()), None)
        if shown is None:
            raise InputError(f"--graph_of {graph_of} is none of the runs that are drawn")
    else:
        taught = [run for run in runs if run.options["distill"] != "none"]
        shown = next((run for run in taught if run.options["distill"] == "ega"), taught[0] if taught else None)
    with_weights = shown is not None and (graph_of is not None or model_path(shown).is_file())
    graphs = embedding_graphs(shown) if with_weights else None

    with _style():
        return _save(_figure(runs, shown, graphs), shown or runs[0], "", out)


def plot_comparison(folders: list[str] | list[Path], what: str, out: str | Path | None = None) -> Path:
    """Draw a picture that sets runs side by side, and save it.

    Args:
        folders: the runs' folders.
        what: 'accuracies', 'embedding' or 'per_class', see ``accuracy_figure``, ``embedding_figure``, ``gain_figure``.
        out: the picture's file; by default SAVE/plots/NAME_WHAT.png, named after the first run with a teacher.

    Returns:
        The picture's path.

    Raises:
        InputError, OSError: see these, and ``plot_runs``.
    """
    runs = [read_run(folder) for folder in folders]
    named = next((run for run in runs if run.options["distill"] != "none"), runs[0])
    with _style():
        figures = {"accuracies": accuracy_figure, "embedding": embedding_figure, "per_class": gain_figure}
        figure = figures[what](runs)
        return _save(figure, named, f"_{what}", out)


def _style() -> contextlib.AbstractContextManager:
    return matplotlib.rc_context({"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False})


def _save(figure: Figure, named: StoredRun, ending: str, out: str | Path | None) -> Path:
    """Save a picture, by default beside the run that it is named after."""
    path = named.folder.parents[1] / "plots" / f"{named.folder.name}{ending}.png" if out is None else Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def accuracy_figure(runs: list[StoredRun]) -> Figure:
    """The accuracy of each run in its best epoch, the best run on top; no weights are needed.

    Runs that differ in seed and trial alone share a line: a dot for each run, their mean and their standard deviation.
    A dashed line marks the student alone.

    Raises:
        InputError: no run measured an accuracy.
    """
    groups = [group for group in repeats(runs) if accuracies(group)]
    if not groups:
        raise InputError("--accuracies: none of these runs measured one, for want of labels")
    labels = run_labels([group[0] for group in groups], REPEATS)
    shown = [(accuracies(group), label, group[0]) for group, label in zip(groups, labels, strict=True)]
    shown.sort(key=lambda row: sum(row[0]) / len(row[0]))
    figure = Figure(figsize=(7, 1.1 + 0.3 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for place, (values, _, run) in enumerate(shown):
        mean = sum(values) / len(values)
        colour = COLOURS[1] if run.options["distill"] == "ega" else COLOURS[0]
        deviation = None if len(values) == 1 else np.std(values, ddof=1)
        axis.errorbar(mean, place, xerr=deviation, color=colour, fmt="o", ms=6, capsize=3, lw=1.5)
        if len(values) > 1:
            axis.plot(values, [place] * len(values), "o", ms=3, mfc="white", mec=colour, mew=0.8)
        if run.options["distill"] == "none":
            axis.axvline(mean, color=_TEACHER, ls="--", lw=0.8, zorder=0)
    axis.set_yticks(range(len(shown)), [textwrap.fill(label, _LABEL_WIDTH) for _, label, _ in shown])
    axis.set(ylim=(-0.6, len(shown) - 0.4), xlabel="test accuracy (top-1, %), best epoch")
    axis.grid(axis="x", color="#eeeeee")
    axis.spines["right"].set_visible(False)
    axis.tick_params(axis="y", length=0)
    return figure


def _figure(runs: list[StoredRun], shown: StoredRun | None, graphs: Graphs | None) -> Figure:
    labels = [textwrap.fill(label, _LABEL_WIDTH) for label in run_labels(runs)]
    lines = -(-len(labels) // _legend_columns(labels)) * max(label.count("\n") + 1 for label in labels)
    height = 3.4 + (0.2 * lines if len(runs) > _FEW else 0)
    figure = Figure(figsize=(13, height if graphs is None else height + 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    if graphs is None:
        curves = figure
    else:
        curves, below = figure.subfigures(2, 1, height_ratios=(height, 4.6))
    _draw_curves(curves.subplots(1, 2 if shown is None else 3), runs, labels, shown)
    if graphs is not None:
        label = labels[next(place for place, run in enumerate(runs) if run is shown)]
        _draw_graphs(below.subplots(1, 3), graphs, label)
    return figure


def _legend_columns(labels: list[str]) -> int:
    longest = max(len(line) for label in labels for line in label.split("\n"))
    return _LEGEND_WIDTH // (longest + 9)  # a line's sample and a space


def _draw_curves(axes: np.ndarray, runs: list[StoredRun], labels: list[str], shown: StoredRun | None) -> None:
    accuracy, loss = axes[:2]
    measured = any(run.curve("test_acc")[0] for run in runs)
    near = not measured and any(run.curve("heldout_knn")[0] for run in runs)  # without labels
    for place, (run, label) in enumerate(zip(runs, labels, strict=True)):
        style = {"color": COLOURS[place % len(COLOURS)], "ls": _LINES[place // len(COLOURS) % len(_LINES)]}
        _line(accuracy, *run.curve("heldout_knn" if near else "test_acc"), label=label, **style)
        _line(loss, *run.curve("train_loss"), label=label, **style)
        _line(loss, *run.curve("heldout_loss"), **style, alpha=0.4)
    if shown is not None:
        _line(accuracy, *shown.curve("teacher_acc"), label="teacher", color=_TEACHER, ls="--", lw=1)
    title = "Nearest neighbours as the teacher's (%)" if near else "Test accuracy (top-1, %)"
    accuracy.set(title=title, xlabel="epoch")
    held_out = any(run.curve("heldout_loss")[0] for run in runs)
    loss.set(title="Training loss; pale: held out" if held_out else "Training loss", xlabel="epoch")
    if shown is not None:
        place = next(place for place, run in enumerate(runs) if run is shown)
        terms = {name: shown.curve(f"loss_{name}") for name in _TERMS}
        if terms["node"][0]:
            del terms["distill"]  # the sum of the two
        drawn = [name for name, (epochs, _) in terms.items() if epochs]
        for name, line in zip(drawn, _LINES, strict=False):
            # A colour stands for a run in every panel.
            _line(axes[2], *terms[name], label=_TERMS[name], color=COLOURS[place % len(COLOURS)], ls=line)
        title = f"Weighted terms of the training loss: {labels[place]}"
        axes[2].set(title=textwrap.fill(title, _TITLE_WIDTH), xlabel="epoch")
    for axis in axes[1:]:
        low, high = axis.dataLim.intervaly
        if axis is loss and 0 < low < high / 30:  # as methods' weights make it
            axis.set_yscale("log")
        else:
            axis.set_ylim(1.05 * min(low, 0), 1.05 * high)
    for axis in axes:
        axis.spines["right"].set_visible(False)
        axis.xaxis.get_major_locator().set_params(integer=True)
    few = len(runs) <= _FEW
    for axis in axes if few else axes[2:]:
        axis.legend(frameon=False, fontsize=8)
    if not few:  # all of the figure's lines but the terms', which the third panel explains
        columns = _legend_columns(labels)
        accuracy.figure.legend(
            handles=list(accuracy.lines), loc="outside upper left", ncols=columns, frameon=False, fontsize=8
        )


def _line(axis: Axes, epochs: list[int], values: list[float], **style) -> None:
    axis.plot(epochs, values, marker="o" if len(epochs) < 20 else None, ms=3, **({"lw": 1.5} | style))


def _draw_graphs(axes: np.ndarray, graphs: Graphs, label: str) -> None:
    difference = graphs.student - graphs.teacher
    scale = max(float(difference.abs().max()), 1e-6)
    pictures = (
        (graphs.teacher, "Teacher: edges", "RdBu_r", 1.0, "correlation"),
        (graphs.student, f"Student, {label}: edges", "RdBu_r", 1.0, "correlation"),
        # Another map, for another scale.
        (difference, f"Student − teacher, Frobenius norm {difference.norm():.1f}", "PuOr_r", scale, "difference"),
    )
    borders = torch.nonzero(graphs.targets.diff()).flatten() + 1
    edges = [0, *borders.tolist(), len(graphs.targets)]
    middles = [(start + end - 1) / 2 for start, end in itertools.pairwise(edges)]
    for axis, (matrix, title, cmap, limit, unit) in zip(axes, pictures, strict=True):
        norm = colors.Normalize(-limit, limit)
        image = axis.imshow(matrix.numpy(), cmap=cmap, norm=norm, interpolation="nearest")
        axis.set_title(textwrap.fill(title, _TITLE_WIDTH))
        axis.set_xticks(middles, [])
        axis.set_yticks(middles, graphs.classes if axis is axes[0] else [], fontsize=8)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        if axis is not axes[0]:  # the second one's bar serves the first too
            sharing = axes[:2] if axis is axes[1] else axis
            bar = axis.figure.colorbar(image, ax=sharing, aspect=25, shrink=0.74, pad=0.02, label=unit)
            bar.outline.set_visible(False)
    axes[0].set_xlabel(f"{len(graphs.targets)} test samples, ordered by class")


def main(argv: list[str] | None = None) -> None:
    parser = Parser("report.curves", "Draw the curves of runs, and a teacher's and its student's embedding graphs.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a finished run: SAVE/student_model/NAME")
    parser.add_argument("--out", metavar="PNG", help="the picture; if unset, SAVE/plots/NAME.png")
    parser.add_argument(
        "--graph_of", metavar="RUN", help="the run whose graphs are drawn; if unset, the first with EGA or a teacher"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--accuracies",
        action="store_const",
        const="accuracies",
        dest="what",
        help="in place of the curves, each run's accuracy as a dot, sorted, with the standard deviation over seeds",
    )
    what.add_argument(
        "--embedding",
        action="store_const",
        const="embedding",
        dest="what",
        help="in place of the curves, test images of at most 20 classes in each run's space and its teacher's (t-SNE)",
    )
    what.add_argument(
        "--per_class",
        action="store_const",
        const="per_class",
        dest="what",
        help="in place of the curves, each class's gain over the run of --distill none",
    )
    args = parser.parse_args(argv)
    if args.what and args.graph_of:
        parser.error(f"--graph_of is of the curves' picture, not of --{args.what}")
    with exit_on_bad_input(parser.prog):
        if args.what:
            print(plot_comparison(args.runs, args.what, args.out))
        else:
            print(plot_runs(args.runs, args.out, args.graph_of))


if __name__ == "__main__":
    main()
