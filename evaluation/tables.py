"""Rows of tables of runs: what a run is called, which are repeats of one another, means, Markdown."""

import json
import statistics
from pathlib import Path

from distiller_zoo import METHODS
from helper.records import StoredRun

# Options that say nothing about how two runs of one method differ. Compiled or not, a run is the same but for rounding;
# `auto` settles it by the length of the run and the processor, so that seeds of one table may differ in it.
SAME = {"save_dir", "data_dir", "clip_root", "print_freq", "save_freq", "save_steps", "save_seconds"}
SAME |= {"device", "teacher_acc", "compile", "max_bad_images"}
SAME |= {f"{what}_sha256" for what in ("clip", "head", "teacher", "dataset")}


def title(method: str) -> str:
    """What its paper calls a method."""
    return METHODS[method].citation.split(":")[0] if method in METHODS else method


def told(value: object) -> str:
    """An option's value in words; a number is the same whether it was given as 1 or as 1.0."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _shortly(name: str, value: object) -> str:
    """An option and its value, as ``told``; of many names their number alone, of a file its name."""
    if isinstance(value, list) and isinstance(value[0], str):
        value = f"{len(value)} names"
    elif name in ("path_t", "init_s") and value is not None:
        value = Path(value).name
    return f"{name} {told(value)}"


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
        names = [name for other in equals for name in other.options if name not in SAME and name not in leave_out]
        names = [name for name in dict.fromkeys(names) if len({told(other.option(name)) for other in equals}) > 1]
        names = [name for name in names if name in run.options]
        if "model_t" in names:  # which says more than the options that it comes from
            names = [name for name in names if name not in ("clip_mode", "clip_tn", "path_t")]
        sharing = {name: sum(told(x.option(name)) == told(run.option(name)) for x in equals) for name in names}
        own = [_shortly(name, run.option(name)) for name in names if 2 * sharing[name] <= len(equals)]
        labels.append(", ".join([title(method), *own]))
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
        names = run.options.keys() - SAME - set(REPEATS)
        options = {name: told(run.option(name)) for name in names if run.option(name) is not None}
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
