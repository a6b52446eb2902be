"""What an evaluation leaves: evaluation.json beside the weights, a Markdown table, a confusion matrix."""

import csv
import io
import json
from pathlib import Path

from filelock import FileLock
from matplotlib import colors
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from errors import InputError
from helper import checkpoint

from .subjects import Subject
from .tables import REPEATS, markdown, mean_and_deviation, repeats, run_labels

# The table of each section: its title, and for each column the number's name, its heading and its decimals.
_PERCENT, _FINE = 2, 4
TABLES: dict[str, tuple[str, dict[str, tuple[str, int]]]] = {
    "accuracy": (
        "Accuracy on {}",
        {
            "top1": ("top-1, %", _PERCENT),
            "top5": ("top-5, %", _PERCENT),
            "class_mean": ("mean over classes, %", _PERCENT),
            "cross_entropy": ("cross-entropy", _FINE),
            "calibration_error": ("calibration error, %", _PERCENT),
        },
    ),
    "agreement": (
        "Agreement with the teacher on {}",
        {
            "same_class": ("same class, %", _PERCENT),
            "divergence": ("KL(teacher, student)", _FINE),
            "node_error": ("node error", _FINE),
            "edge_error": ("edge error", _FINE),
            "cka": ("CKA", _FINE),
        },
    ),
    "graphs": (
        "Embedding graphs on {}, batch by batch",
        {
            "node": ("‖N − I‖", _PERCENT),
            "edge": ("‖E_t − E_s‖", _PERCENT),
            "itself": ("N: itself", _FINE),
            "same_class": ("same class", _FINE),
            "other_classes": ("other classes, rms", _FINE),
        },
    ),
    "transfer": (
        "Transfer to {}: frozen features, top-1 in %",
        {"linear": ("linear probe", _PERCENT)} | {f"knn_{k}": (f"{k}-NN", _PERCENT) for k in (1, 5, 20)},
    ),
    "zero_shot": (
        "Zero-shot on {}: by the classes' names alone, top-1 in %",
        {
            "top1": ("all", _PERCENT),
            "top5": ("all, top-5", _PERCENT),
            "seen": ("classes trained on", _PERCENT),
            "unseen": ("classes never seen", _PERCENT),
        },
    ),
    "corruptions": (
        "Accuracy on {}, corrupted, top-1 in %",
        {"mean": ("mean", _PERCENT)} | {f"severity_{s}": (f"severity {s}", _PERCENT) for s in range(1, 6)},
    ),
}


def ask(question, subjects: list[Subject]) -> None:
    """Ask every subject, keep each answer in its evaluation.json, and print them side by side.

    Args:
        question: called with a subject, it gives results by section and side; ``data`` says what they are about.
    """
    answers = []
    for subject in subjects:
        answers.append(question(subject))
        for section, result in answers[-1].items():
            store(subject, section, question.data(subject), result)
    about = ", ".join(dict.fromkeys(question.data(subject) for subject in subjects))
    for section in dict.fromkeys(section for answer in answers for section in answer):
        print(f"\n{answer_table(section, about, subjects, [answer.get(section, {}) for answer in answers])}")


def store(subject: Subject, section: str, dataset: str, result: dict) -> None:
    """Put a result into evaluation.json beside the subject's weights, under its section, data set and file of weights.

    Raises:
        InputError: the file is corrupt.
        OSError: it cannot be written.
    """
    path = subject.run.folder / "evaluation.json"
    with FileLock(path.with_name(".evaluation.lock")):  # two evaluations at once each add theirs
        try:
            content = json.loads(path.read_text()) if path.exists() else {}
        except ValueError as error:
            raise InputError(f"{path} is corrupt: delete it and run again") from error
        content.setdefault(section, {}).setdefault(dataset, {})[subject.trained.path.stem] = result
        checkpoint.write_json(content, path)


def answer_table(section: str, dataset: str, subjects: list[Subject], results: list[dict]) -> str:
    """A title and a Markdown table: a row for each student, and one for its teacher.

    Runs that differ in their seed alone share a row: the mean, the standard deviation and their number.

    Args:
        results: one for each subject: numbers by name, under 'student' and 'teacher'.
    """
    title, columns = TABLES[section]
    found = {id(subject.run): result for subject, result in zip(subjects, results, strict=True)}
    groups = repeats([subject.run for subject in subjects])
    rows = []
    for group, label in zip(groups, run_labels([group[0] for group in groups], REPEATS), strict=True):
        options = group[0].options
        names = {"student": f"{options['model_s']}: {label}", "teacher": f"teacher: {options.get('model_t')}"}
        for side, name in names.items():
            values = [found[id(run)].get(side) for run in group]
            if None not in values:
                cells = (_cell([value.get(key) for value in values], digits) for key, (_, digits) in columns.items())
                rows.append((name, *cells))
    if not rows:
        return f"{title.format(dataset)}: not measured, as nothing was trained to classify"
    shown = [True, *(any(row[place] != "–" for row in rows) for place in range(1, len(columns) + 1))]
    rows = [("", *(heading for heading, _ in columns.values())), *dict.fromkeys(rows)]
    rows = [tuple(cell for cell, show in zip(row, shown, strict=True) if show) for row in rows]
    return f"{title.format(dataset)}\n\n{markdown(rows)}"


def _cell(values: list[float | None], digits: int) -> str:
    return "–" if None in values else mean_and_deviation(values, digits)


def write_confusion(subject: Subject, matrix: Tensor) -> Path:
    """confusion_DATASET_FILE.csv and .png beside the weights, the counts and their picture; the picture's path.

    Rows are the true classes, columns the predicted ones. The picture shows shares of the true class.
    """
    classes = subject.trained.classes
    stem = subject.run.folder / f"confusion_{subject.dataset.name}_{subject.trained.path.stem}"
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["true class", *classes])
    writer.writerows([name, *row] for name, row in zip(classes, matrix.tolist(), strict=True))
    checkpoint.write_bytes(text.getvalue().encode(), Path(f"{stem}.csv"))

    side = max(4.0, min(0.16 * len(classes) + 2.5, 24.0))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    share = matrix.double() / matrix.sum(dim=1, keepdim=True).clamp(min=1)
    # The square root of a share makes single mistakes visible.
    norm = colors.PowerNorm(0.5, 0, 1)
    image = axis.imshow(share.numpy(), cmap="Blues", norm=norm, interpolation="nearest")
    size = 8 if len(classes) <= 30 else 6
    if len(classes) <= 130:  # more names cannot be read
        axis.set_xticks(range(len(classes)), classes, rotation=90, fontsize=size)
        axis.set_yticks(range(len(classes)), classes, fontsize=size)
    right = 100 * float(matrix.diagonal().sum() / matrix.sum())
    axis.set(
        xlabel="predicted class",
        ylabel="true class",
        title=f"{subject.trained.path.stem} on {subject.dataset.name}: {right:.2f} % right",
    )
    figure.colorbar(image, ax=axis, shrink=0.7, label="share of the true class")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    checkpoint.write_bytes(picture.getvalue(), Path(f"{stem}.png"))
    return Path(f"{stem}.png")
