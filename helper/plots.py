"""A picture of runs: their curves, and the teacher's and the student's embedding graphs.

``python -m helper.plots RUN... [--out PNG]``, each RUN being the folder of a finished run of train_student.py.
"""

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

from dataset import ImageDataset
from dataset.loader import Loader
from dataset.views import CIFAR100_NORMALIZATION, CLIP_NORMALIZATION
from distiller_zoo import Needs
from distiller_zoo.EGA import standardize
from models.heads import Classifier, Student, TeacNet
from models.weights import sha256_of

from . import checkpoint
from .data import open_dataset
from .options import sized_name
from .parser import Parser
from .report import StoredRun, read_run, run_labels
from .student import restore_student
from .teacher import ClipTeacher, CnnTeacher, load_cnn, load_encoder, open_embeddings
from .util import exit_on_bad_input

# Okabe and Ito's colours, told apart by colour-blind readers too; the line style changes once they are used up.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_LINES = ("-", "--", ":", "-.")
_TEACHER = "#555555"

# Up to so many runs, each panel has a legend; of more, one stands above all panels.
_FEW = 6

# Letters to a line of a label, of a title, and of the legend above all panels.
_LABEL_WIDTH, _TITLE_WIDTH, _LEGEND_WIDTH = 40, 50, 170

_TERMS = {"cls": "classification", "kd": "KD", "node": "EGA: nodes", "edge": "EGA: edges", "distill": "distillation"}


@dataclass(frozen=True)
class Graphs:
    """Edge matrices (N, N) of the same N test samples, ordered by class.

    Attributes:
        rows: (N,) their row numbers in the test split.
        targets: (N,) their classes.
        classes: names of the classes, in the order of the samples.
    """

    teacher: Tensor
    student: Tensor
    rows: Tensor
    targets: Tensor
    classes: list[str]


def graph_rows(targets: Tensor, num_classes: int = 10, per_class: int = 12) -> Tensor:
    """The first samples of classes spread evenly over all, ordered by class.

    Args:
        targets: (N,) classes.
        num_classes: how many classes at most.
        per_class: how many samples of each at most.

    Returns:
        Row numbers.
    """
    present = targets.unique()
    chosen = present[torch.linspace(0, len(present) - 1, min(num_classes, len(present))).round().long()]
    return torch.cat([(targets == target).nonzero().flatten()[:per_class] for target in chosen])


def edge_matrix(embedding: Tensor) -> Tensor:
    """Pearson correlations (N, N) of embeddings (N, D): the edges of their graph."""
    z = standardize(embedding.double())
    return z @ z.T


def _check_same(run: StoredRun, name: str, value: str) -> None:
    if run.options[name] != value:
        raise ValueError(f"the run in {run.folder} was trained with another {name.split('_')[0]} than is there now")


def _clip_networks(run: StoredRun, dataset: ImageDataset, state: dict, device: str) -> tuple[ClipTeacher, Student]:
    """A run's CLIP with its head, and its best student."""
    options, num_classes = run.options, len(dataset.classes)
    same_device = device == options["device"]
    amp = options["amp"] if same_device else "off"
    encoder = load_encoder(options["clip_mode"], options["clip_root"], device, amp, options.get("teacher_resolution"))
    _check_same(run, "clip_sha256", encoder.sha256)
    # The bank's test split is enough; one that was built on another device is of another precision.
    views = min(options["teacher_views"], 1) if same_device else 0
    embed = open_embeddings(dataset, encoder, views, str(run.folder.parents[1]), device, amp)
    head = None
    if "teacher_layer" in state:
        head = TeacNet(encoder.dim, options["feature_dim"], num_classes)
        head.load_state_dict(state["teacher_layer"])
    return ClipTeacher(embed, head, dim=encoder.dim), restore_student(options, state, num_classes)


def _cnn_networks(run: StoredRun, dataset: ImageDataset, state: dict, device: str) -> tuple[CnnTeacher, Classifier]:
    """A run's CNN teacher and its best student, with their projections where the run had them."""
    options, num_classes = run.options, len(dataset.classes)
    _check_same(run, "teacher_sha256", sha256_of(options["path_t"]))
    (backbone, resolution), head = load_cnn(options["path_t"], num_classes, Needs()), None
    if "teacher_layer" in state:
        head = TeacNet(backbone.num_features, options["feature_dim"], num_classes)
        head.load_state_dict(state["teacher_layer"])
    return CnnTeacher(backbone, head, amp="off", resolution=resolution), restore_student(options, state, num_classes)


def _best_model(run: StoredRun) -> Path:
    return run.folder / f"{sized_name(run.options['model_s'], run.options.get('student_resolution'))}_best.pth"


@torch.no_grad()
def embedding_graphs(run: StoredRun, num_classes: int = 10, per_class: int = 12) -> Graphs:
    """The teacher's and the best student's edge matrices of some test samples.

    In the joint space, or with a CNN teacher and a method that does not act there, of the pooled features. A CLIP's
    embeddings come from the run's bank.

    Raises:
        ValueError: the run has no teacher or no weights, or its teacher or data set are others by now.
        OSError: data set or teacher are missing.
    """
    options = run.options
    if options["distill"] == "none":
        raise ValueError(f"the run in {run.folder} has no teacher: it was trained with --distill none")
    device = options["device"] if torch.cuda.is_available() else "cpu"
    dataset = open_dataset(options | {"save_dir": str(run.folder.parents[1])})
    if not _best_model(run).is_file():
        raise ValueError(f"{run.folder} holds no weights to draw the graphs of: {_best_model(run).name} is missing")
    state = checkpoint.load(_best_model(run))
    _check_same(run, "dataset_sha256", dataset.fingerprint())
    networks, normalization = _clip_networks, CLIP_NORMALIZATION
    if not options["clip_tn"]:
        networks, normalization = _cnn_networks, CIFAR100_NORMALIZATION
    try:
        teacher, student = networks(run, dataset, state, device)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{run.folder}: its best model does not fit its options.json") from error
    teacher.to(device)
    student.to(device).eval()

    rows = graph_rows(dataset.test.targets, num_classes, per_class)
    loader = Loader(dataset.test, "test", len(rows), torch.device(device), rows=rows, normalization=normalization)
    (batch,) = loader.epoch()
    edges = (edge_matrix(out.embedding).cpu() for out in (teacher("test", batch), student(batch.image)))
    targets = dataset.test.targets[rows]
    classes = [dataset.classes[target] for target in targets.unique_consecutive()]
    return Graphs(*edges, rows, targets, classes)


def plot_runs(
    folders: list[str] | list[Path], out: str | Path | None = None, graph_of: str | Path | None = None
) -> Path:
    """Draw the picture of some runs and save it.

    Args:
        folders: of the runs.
        out: the picture's file; by default SAVE/plots/NAME.png, of the run whose graphs it shows.
        graph_of: the run whose graphs it shows; by default the first that was trained with EGA, else the first
            that has a teacher. Where none has, or its weights are not in its folder, the picture holds the curves
            alone.

    Returns:
        The picture's path.

    Raises:
        ValueError, OSError: see ``read_run`` and ``embedding_graphs``; or the picture cannot be written.
    """
    runs = [read_run(folder) for folder in folders]
    if graph_of is not None:
        shown = next((run for run in runs if run.folder.resolve() == Path(graph_of).resolve()), None)
        if shown is None:
            raise ValueError(f"--graph_of {graph_of} is none of the runs that are drawn")
    else:
        taught = [run for run in runs if run.options["distill"] != "none"]
        shown = next((run for run in taught if run.options["distill"] == "ega"), taught[0] if taught else None)
    with_weights = shown is not None and (graph_of is not None or _best_model(shown).is_file())
    graphs = embedding_graphs(shown) if with_weights else None

    named = shown or runs[0]
    path = named.folder.parents[1] / "plots" / f"{named.folder.name}.png" if out is None else Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False}):
        _figure(runs, shown, graphs).savefig(path, dpi=150)
    return path


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
    for place, (run, label) in enumerate(zip(runs, labels, strict=True)):
        style = {"color": _COLOURS[place % len(_COLOURS)], "ls": _LINES[place // len(_COLOURS) % len(_LINES)]}
        _line(accuracy, *run.curve("test_acc"), label=label, **style)
        _line(loss, *run.curve("train_loss"), label=label, **style)
    if shown is not None:
        _line(accuracy, *shown.curve("teacher_acc"), label="teacher", color=_TEACHER, ls="--", lw=1)
    accuracy.set(title="Test accuracy (top-1, %)", xlabel="epoch")
    loss.set(title="Training loss", xlabel="epoch")
    if shown is not None:
        place = next(place for place, run in enumerate(runs) if run is shown)
        terms = {name: shown.curve(f"loss_{name}") for name in _TERMS}
        if terms["node"][0]:
            del terms["distill"]  # the sum of the two
        drawn = [name for name, (epochs, _) in terms.items() if epochs]
        for name, line in zip(drawn, _LINES, strict=False):
            # A colour stands for a run in every panel.
            _line(axes[2], *terms[name], label=_TERMS[name], color=_COLOURS[place % len(_COLOURS)], ls=line)
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
    parser = Parser("Draw the curves of runs, and a teacher's and its student's embedding graphs.")
    parser.prog = "helper.plots"
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a finished run: SAVE/student_model/NAME")
    parser.add_argument("--out", metavar="PNG", help="the picture; if unset, SAVE/plots/NAME.png")
    parser.add_argument(
        "--graph_of", metavar="RUN", help="the run whose graphs are drawn; if unset, the first with EGA or a teacher"
    )
    args = parser.parse_args(argv)
    with exit_on_bad_input(parser.prog):
        print(plot_runs(args.runs, args.out, args.graph_of))


if __name__ == "__main__":
    main()
