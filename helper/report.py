"""A table of finished runs of train_student.py: ``python -m helper.report SAVE/student_model/NAME ...``."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from scipy import stats

from distiller_zoo import METHODS

from . import checkpoint
from .parser import Parser, positive_int
from .run import BEFORE, FREE, best_record
from .util import exit_on_bad_input

# Top-1 % on CIFAR-100 by teacher, student and method. RepDistiller's are means of five runs' last epochs (Tian et al.,
# ICLR 2020), the paper's the best epochs of one run each (Ma et al., BMVC 2022), "about" where read off its curves.
_REPDISTILLER = {
    ("resnet32x4", "resnet8x4"): {
        "none": 72.50, "kd": 73.33, "hint": 73.50, "attention": 73.44, "similarity": 72.94, "correlation": 72.97,
        "vid": 73.09, "rkd": 71.90, "pkt": 73.64, "abound": 73.17, "factor": 72.86, "fsp": 72.62, "nst": 73.30,
        "crd": 75.51,
    },
}  # fmt: skip
_REPDISTILLER_TEACHERS = {"resnet32x4": 79.42}
_PAPER_METHODS = ("kd", "hint", "pkt", "rkd", "nce", "irg", "crd", "ccl", "ega")
_PAPER = {
    ("vit32", "resnet8x4"): (71.55, 73.93, 73.86, 73.34, 74.30, 75.11, 75.73, 75.91, 76.65),
    ("vit16", "resnet8x4"): (71.99, 74.13, 73.55, 73.42, 74.41, 74.72, 75.68, 76.13, 76.30),
    ("rn101", "resnet8x4"): (64.77, 74.14, 72.21, 73.70, 73.69, 74.17, 75.13, 75.08, 75.41),
    ("vit32", "ShuffleV1"): (72.90, None, 75.31, 73.93, 73.99, 74.79, 75.54, 76.14, 76.24),
    ("vit32", "vgg13"): (75.20, 75.56, 75.55, 76.41, 76.42, 75.98, 76.83, 77.68, 77.59),
}
_PAPER_CURVES = {"alone": "about 72.1", "edge": "about 75.0", "node": "about 74.6"}  # ViT-B/32, resnet8x4

# Options that say nothing about how two runs of one method differ. Compiled or not, a run is the same but for rounding;
# `auto` settles it by the length of the run and the processor, so that seeds of one table may differ in it.
_SAME = {"save_dir", "data_dir", "clip_root", "print_freq", "save_freq", "save_steps", "device", "teacher_acc"}
_SAME |= {"compile", "max_bad_images"} | {f"{what}_sha256" for what in ("clip", "head", "teacher", "dataset")}


_CORRUPT = "{}: its options.json or metrics.jsonl is missing or corrupt"


@dataclass(frozen=True)
class StoredRun:
    """A finished run, as options.json and metrics.jsonl in its folder tell it; its weights need not be there.

    Attributes:
        folder: SAVE/student_model/NAME, or a copy of it.
        options: of options.json.
        history: the lines of metrics.jsonl.
    """

    folder: Path
    options: dict
    history: list[dict]

    def option(self, name: str) -> object:
        """An option's value; of one that came after the run began, what the run had, or None."""
        return self.options.get(name, BEFORE.get(name))

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Epochs and values of a metric, where it was measured."""
        measured = [record for record in self.history if record.get(name) is not None]
        return [record["epoch"] for record in measured], [record[name] for record in measured]


def read_run(folder: str | Path) -> StoredRun:
    """Read a finished run; where its resume.pth is still there, which has a checksum, the two files must agree with it.

    Raises:
        ValueError: not the folder of a student's run, or of one that is not finished; or a file is damaged.
        OSError: a file cannot be read.
    """
    folder = Path(folder)
    if not (folder / "options.json").is_file():
        raise ValueError(f"{folder} is not the folder of a run (SAVE/student_model/NAME); it has no options.json")
    try:
        options = json.loads((folder / "options.json").read_text())
        history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    except (ValueError, RecursionError, FileNotFoundError) as error:
        raise ValueError(_CORRUPT.format(folder)) from error
    if not isinstance(options, dict) or "distill" not in options:
        raise ValueError(f"{folder} is not the folder of a run of train_student.py")
    named = {"model_s", "model_t"} <= options.keys() and isinstance(options.get("epochs"), int)
    if not named or not all(isinstance(record, dict) for record in history):
        raise ValueError(_CORRUPT.format(folder))
    if len(history) < options["epochs"]:
        raise ValueError(f"the run in {folder} is not finished: resume it, with the command that began it")
    if [record.get("epoch") for record in history] != list(range(1, len(history) + 1)):
        raise ValueError(_CORRUPT.format(folder))
    _compare_with_resume(folder, options, history)
    return StoredRun(folder, options, history)


def _compare_with_resume(folder: Path, options: dict, history: list[dict]) -> None:
    if not (folder / "resume.pth").exists():
        return
    saved = checkpoint.load(folder / "resume.pth")
    kept = {name: value for name, value in saved.get("options", {}).items() if name not in FREE}
    for found, wanted in (({name: options.get(name) for name in kept}, kept), (history, saved.get("history"))):
        if json.dumps(found) != json.dumps(wanted):  # as JSON, in which a tuple is a list and nan equals itself
            raise ValueError(
                f"{folder}: its options.json or metrics.jsonl does not agree with resume.pth: "
                "delete *_last.pth there and run its command again, which writes both anew"
            )


def _title(method: str) -> str:
    """What its paper calls a method."""
    return METHODS[method].citation.split(":")[0] if method in METHODS else method


def _told(value: object) -> str:
    """An option's value in words; a number is the same whether it was given as 1 or as 1.0."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _shortly(name: str, value: object) -> str:
    """An option and its value, as ``_told``; of many names their number alone, of a file its name."""
    if isinstance(value, list) and isinstance(value[0], str):
        value = f"{len(value)} names"
    elif name in ("path_t", "init_s") and value is not None:
        value = Path(value).name
    return f"{name} {_told(value)}"


def run_labels(runs: list[StoredRun], leave_out: tuple[str, ...] = ()) -> list[str]:
    """A short name for each run: its method, and where methods are equal, the options that differ.

    What more than half of a method's runs have is not told.

    Args:
        leave_out: options that are not told.
    """
    labels = []
    for run in runs:
        method = run.options["distill"]
        equals = [other for other in runs if other.options["distill"] == method]
        names = [name for other in equals for name in other.options if name not in _SAME and name not in leave_out]
        names = [name for name in dict.fromkeys(names) if len({_told(other.option(name)) for other in equals}) > 1]
        names = [name for name in names if name in run.options or name in BEFORE]
        if "model_t" in names:  # which says more than the options that it comes from
            names = [name for name in names if name not in ("clip_mode", "clip_tn", "path_t")]
        sharing = {name: sum(_told(x.option(name)) == _told(run.option(name)) for x in equals) for name in names}
        told = [_shortly(name, run.option(name)) for name in names if 2 * sharing[name] <= len(equals)]
        labels.append(", ".join([_title(method), *told]))
    return [
        f"{label} ({1 + labels[:place].count(label)})" if labels.count(label) > 1 else label
        for place, label in enumerate(labels)
    ]


# What tells runs apart of which a mean is taken.
REPEATS = ("seed", "trial")


def repeats(runs: list[StoredRun]) -> list[list[StoredRun]]:
    """The runs, in order, those together that differ in seed and trial alone, each seed once."""
    groups: dict[str, dict[int, StoredRun]] = {}
    for run in runs:
        names = (run.options.keys() | BEFORE.keys()) - _SAME - set(REPEATS)
        options = {name: _told(run.option(name)) for name in names if run.option(name) is not None}
        groups.setdefault(json.dumps(options, sort_keys=True), {})[run.options.get("seed")] = run
    return [list(group.values()) for group in groups.values()]


def mean_and_deviation(values: list[float], digits: int = 2) -> str:
    """The mean, with the sample standard deviation and the number of values where there are several."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f} ({len(values)})"


def markdown(rows: list[tuple[str, ...]]) -> str:
    """A Markdown table, its first row the headings; the first column to the left, the others to the right."""
    widths = [max(6, *map(len, column)) for column in zip(*rows, strict=True)]
    first, *others = widths
    lines = [
        f"| {row[0]:{first}} | " + " | ".join(f"{cell:>{w}}" for cell, w in zip(row[1:], others, strict=True)) + " |"
        for row in rows
    ]
    rule = f"|{'-' * (first + 2)}|" + "|".join("-" * (width + 1) + ":" for width in others) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def accuracies(group: list[StoredRun]) -> dict[int, float]:
    """Top-1 % in the best epoch, by seed; empty where no accuracy was measured, for want of labels."""
    best = {run.options.get("seed"): best_record(run.history).get("test_acc") for run in group}
    return {} if None in best.values() else best


def compare(group: list[StoredRun], reference: list[StoredRun]) -> tuple[float, float | None] | None:
    """By how much the reference is ahead in mean accuracy, and how likely chance alone does as much (two-sided p).

    Runs of one seed begin with the same weights and see the same images in the same order, so that seeds which both
    have are compared in pairs, also a single run with the one of its seed: a paired t-test. Otherwise Welch's, of
    unequal variances.

    Returns:
        Percentage points and p, which is None with fewer than two seeds on a side or without any spread; None where an
        accuracy was not measured.
    """
    ours, theirs = accuracies(reference), accuracies(group)
    if not ours or not theirs:
        return None
    common = sorted(ours.keys() & theirs.keys())
    if len(common) > 1 or (common and 1 in (len(ours), len(theirs))):
        pairs = [(ours[seed], theirs[seed]) for seed in common]
        difference = statistics.mean(one - other for one, other in pairs)
        spread = len({one - other for one, other in pairs}) > 1
        test = stats.ttest_rel(*zip(*pairs, strict=True)) if spread else None
    else:
        difference = statistics.mean(ours.values()) - statistics.mean(theirs.values())
        enough = min(len(ours), len(theirs)) > 1
        spread = len({*ours.values()}) > 1 or len({*theirs.values()}) > 1
        test = stats.ttest_ind([*ours.values()], [*theirs.values()], equal_var=False) if enough and spread else None
    return difference, None if test is None else float(test.pvalue)


def _reference(group: list[StoredRun], references: list[list[StoredRun]]) -> list[StoredRun] | None:
    """With which among some groups of one method a group is compared.

    One of another method with the group whose options differ least from its own, of equals with that of the most seeds,
    the first of such. One of theirs with the group of the most seeds, the first of equals, which itself has none.
    """

    def differing(other: list[StoredRun]) -> int:
        names = (group[0].options.keys() | other[0].options.keys() | BEFORE.keys()) - _SAME - set(REPEATS)
        return sum(_told(group[0].option(name)) != _told(other[0].option(name)) for name in names)

    if group in references:
        first = max(references, key=len)
        return None if group is first else first
    return min(references, key=lambda other: (differing(other), -len(other)), default=None)


def published(options: dict) -> str:
    """What a paper reports for such a run's accuracy, and in which epoch; empty where none does."""
    method, pair = options["distill"], (options["model_t"], options["model_s"])
    if options.get("dataset") != "cifar100":
        return ""
    if not options.get("clip_tn", 1):
        if method == "none":  # a student alone has no teacher to look it up by
            found = {table["none"] for (_, student), table in _REPDISTILLER.items() if student == pair[1]}
            value = found.pop() if len(found) == 1 else None
        else:
            value = _REPDISTILLER.get(pair, {}).get(method)
        return "" if value is None else f"{value:.2f} (last)"
    if pair[1] == "resnet8x4" and method == "none":
        return f"{_PAPER_CURVES['alone']} (best)"
    if pair == ("vit32", "resnet8x4") and method == "ega" and not (options["node_weight"] and options["edge_weight"]):
        return f"{_PAPER_CURVES['node' if options['node_weight'] else 'edge']} (best)"
    value = dict(zip(_PAPER_METHODS, _PAPER.get(pair, ()), strict=False)).get(method)
    return "" if value is None else f"{value:.2f} (best)"


def table(runs: list[StoredRun], against: str | None = None) -> str:
    """Markdown: test accuracy (top-1, %) in the best and the last epoch, of the teacher and of each run.

    The teacher's row is of the runs with the most seeds, the last of equals.

    Of runs that differ in their seed alone, the mean and the standard deviation; beside them the accuracy of the best
    epoch on rows that were held out, where there were any, and what papers report, where they do. Which epoch is best
    is decided as in training: on the rows that were held out, else on the test set.

    Args:
        against: a method, of which each row says by how much it is ahead there and with which p, see ``compare``; of
            several rows of that method, the one with the most similar options, then the most seeds. Those rows
            themselves are compared with the one of the most seeds, the first of equals.

    Raises:
        ValueError: no run is of that method.
    """
    ahead = "" if against is None else f"{_title(against)} − it, p"
    rows = [("", "best", "last", "held out", ahead, "published")]
    groups = repeats(runs)
    references = [group for group in groups if group[0].options["distill"] == against]
    if against is not None and not references:
        raise ValueError(f"--against {against}: none of these runs is of that method")
    taught = [group for group in groups if group[0].curve("teacher_acc")[1]]
    if taught:
        rows.append(_teacher_row(max(reversed(taught), key=len)))
    for group, label in zip(groups, run_labels([group[0] for group in groups], REPEATS), strict=True):
        best = last = "–"  # without labels
        if found := accuracies(group):
            best = mean_and_deviation([*found.values()])
            last = mean_and_deviation([run.curve("test_acc")[1][-1] for run in group])
        held_out = [(best_record(run.history) or {}).get("val_acc") for run in group]
        held_out = "" if None in held_out else mean_and_deviation(held_out)
        options = group[0].options
        ahead = ""
        if (reference := _reference(group, references)) is not None:
            ahead = _told_difference(compare(group, reference))
        rows.append((f"{options['model_s']}: {label}", best, last, held_out, ahead, published(options)))
    # Columns in which no row says anything are left out.
    kept = [place for place in range(len(rows[0])) if place < 3 or any(row[place] for row in rows[1:])]
    rows = [tuple(row[place] for place in kept) for row in rows]
    return markdown(rows)


def _teacher_row(group: list[StoredRun]) -> tuple[str, ...]:
    """What ``table`` says of these runs' teacher, whose head each may have trained; one that is fixed has no spread."""
    curves, options = [run.curve("teacher_acc")[1] for run in group], group[0].options
    curves = curves if len({*map(tuple, curves)}) > 1 else curves[:1]
    best, last = (mean_and_deviation([value(curve) for curve in curves]) for value in (max, lambda curve: curve[-1]))
    known = None if options.get("clip_tn", 1) else _REPDISTILLER_TEACHERS.get(options["model_t"])
    return f"teacher: {options['model_t']}", best, last, "", "", "" if known is None else f"{known:.2f} (last)"


def _told_difference(found: tuple[float, float | None] | None) -> str:
    if found is None:
        return "–"
    difference, p = found
    return f"{difference:+.2f}" + ("" if p is None else f", {p:.3f}" if p >= 0.001 else ", < 0.001")


def best_methods(count: int, runs: list[StoredRun], without: list[str]) -> list[str]:
    """The methods of the highest mean accuracy, best first.

    Args:
        without: methods that are passed over.
    """
    groups = [group for group in repeats(runs) if accuracies(group) and group[0].options["distill"] not in without]
    groups.sort(key=lambda group: statistics.mean(accuracies(group).values()), reverse=True)
    return list(dict.fromkeys(group[0].options["distill"] for group in groups))[:count]


def choose(option: str, runs: list[StoredRun]) -> object:
    """An option's value in the run that is best on the rows that were held out.

    Raises:
        ValueError: a run held none out, or has no such option.
    """
    for run in runs:
        if option not in run.options and option not in BEFORE:
            raise ValueError(f"--choose {option}: {run.folder} has no such option")
        if "val_acc" not in (best_record(run.history) or {}):
            raise ValueError(f"{run.folder} held nothing out: choose among runs with --holdout, not on the test set")
    return max(runs, key=lambda run: best_record(run.history)["val_acc"]).option(option)


def main(argv: list[str] | None = None) -> None:
    parser = Parser("helper.report", "Print a table of runs.")
    parser.add_argument(
        "--against", metavar="METHOD", help="by how much this method is ahead of each row, and with which p (t-test)"
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--choose", metavar="OPTION", help="print this option's value in the run best on its hold-out")
    only.add_argument("--best", type=positive_int, metavar="N", help="print the N methods of the highest accuracy")
    parser.add_argument("--except", dest="without", default="", metavar="METHODS", help="--best: pass these over")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a finished run: SAVE/student_model/NAME")
    args = parser.parse_args(argv)
    with exit_on_bad_input(parser.prog):
        runs = [read_run(folder) for folder in args.runs]
        if args.choose is not None:
            print(choose(args.choose, runs))
        elif args.best is not None:
            print(*best_methods(args.best, runs, args.without.split()))
        else:
            print(table(runs, args.against))


if __name__ == "__main__":
    main()
