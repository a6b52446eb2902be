"""A table of finished runs of train_student.py: ``python -m helper.report SAVE/student_model/NAME ...``."""

import json
from dataclasses import dataclass
from pathlib import Path

from distiller_zoo import METHODS

from .options import Parser
from .run import best_record
from .util import exit_on_bad_input

# Options that say nothing about how two runs of one method differ.
_SAME = {"save_dir", "data_dir", "clip_root", "print_freq", "save_freq", "device", "teacher_acc"}
_SAME |= {f"{what}_sha256" for what in ("clip", "head", "teacher", "dataset")}


@dataclass(frozen=True)
class StoredRun:
    """A finished run, as its folder tells it.

    Attributes:
        folder: SAVE/student_model/NAME.
        options: of options.json.
        history: the lines of metrics.jsonl.
    """

    folder: Path
    options: dict
    history: list[dict]

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Epochs and values of a metric, where it was measured."""
        measured = [record for record in self.history if record.get(name) is not None]
        return [record["epoch"] for record in measured], [record[name] for record in measured]


def read_run(folder: str | Path) -> StoredRun:
    """Read a finished run.

    Raises:
        ValueError: not the folder of a student's run, or of one that is not finished.
        OSError: a file cannot be read.
    """
    folder = Path(folder)
    if not (folder / "options.json").is_file():
        raise ValueError(f"{folder} is not the folder of a run (SAVE/student_model/NAME); it has no options.json")
    try:
        options = json.loads((folder / "options.json").read_text())
        history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{folder}: its options.json or metrics.jsonl is missing or corrupt") from error
    if "distill" not in options:
        raise ValueError(f"{folder} is not the folder of a run of train_student.py")
    if not all((folder / f"{options['model_s']}_{which}.pth").is_file() for which in ("best", "last")):
        raise ValueError(f"the run in {folder} is not finished: resume it, with the command that began it")
    return StoredRun(folder, options, history)


def _title(method: str) -> str:
    """What its paper calls a method."""
    return METHODS[method].citation.split(":")[0] if method in METHODS else method


def run_labels(runs: list[StoredRun]) -> list[str]:
    """A short name for each run: its method, and where methods are equal, the options that differ."""
    labels = []
    for run in runs:
        method = run.options["distill"]
        equals = [other.options for other in runs if other.options["distill"] == method]
        names = [
            name
            for name in run.options
            if name not in _SAME and len({json.dumps(options.get(name)) for options in equals}) > 1
        ]
        # A teacher's name and its path say the same.
        names = [name for name in names if name != "clip_mode" or "model_t" not in names]
        labels.append(", ".join([_title(method)] + [f"{name} {run.options[name]}" for name in names]))
    return [
        f"{label} ({1 + labels[:place].count(label)})" if labels.count(label) > 1 else label
        for place, label in enumerate(labels)
    ]


def table(runs: list[StoredRun]) -> str:
    """Markdown: test accuracy (top-1, %) in the best and the last epoch, of the last run's teacher and of each run.

    Which epoch is best is decided as in training: on the test set, or on the rows that were held out.
    """
    rows = [("", "best", "last")]
    for run in reversed(runs):
        accuracies = run.curve("teacher_acc")[1]
        if accuracies:
            rows.append((f"teacher: {run.options['model_t']}", f"{max(accuracies):.2f}", f"{accuracies[-1]:.2f}"))
            break
    for run, label in zip(runs, run_labels(runs), strict=True):
        best, last = best_record(run.history)["test_acc"], run.curve("test_acc")[1][-1]
        rows.append((f"{run.options['model_s']}: {label}", f"{best:.2f}", f"{last:.2f}"))
    width = max(len(row[0]) for row in rows)
    lines = [f"| {name:{width}} | {best:>6} | {last:>6} |" for name, best, last in rows]
    return "\n".join([lines[0], f"|{'-' * (width + 2)}|-------:|-------:|", *lines[1:]])


def main(argv: list[str] | None = None) -> None:
    parser = Parser("Print a table of runs.")
    parser.prog = "helper.report"
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a finished run: SAVE/student_model/NAME")
    args = parser.parse_args(argv)
    with exit_on_bad_input(parser.prog):
        print(table([read_run(folder) for folder in args.runs]))


if __name__ == "__main__":
    main()
