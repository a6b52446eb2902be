"""Rows of tables of runs: what a run is called, which are repeats of one another, means, Markdown."""

import json
import statistics
from pathlib import Path

from distiller_zoo import METHODS
from helper.records import HASH, StoredRun

# Options that say nothing about how two runs of one method differ. Compiled or not, captured in a graph or not, a run
# is the same but for rounding; `auto` decides by its length and the processor, so seeds of one table may differ.
SAME = {"save_dir", "data_dir", "data_list", "clip_root", "print_freq", "save_freq", "save_steps", "save_seconds"}
SAME |= {"device", "compile", "graph", "max_bad_images", "exact_decode", "log", HASH}
SAME |= {"probe", "probe_dir", "probe_freq", "probe_sha256"}  # it trains nothing
SAME |= {"normalization"}  # follows from where the student starts
SAME |= {f"{what}_sha256" for what in ("clip", "head", "teacher", "dataset")}


def title(method: str) -> str:
    """The name that its paper gives a method."""
    return METHODS[method].citation.split(":")[0] if method in METHODS else method


def told(value: object) -> str:
    """An option's value in words; a number is the same whether it was given as 1 or as 1.0."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _shortly(name: str, value: object) -> str:
    """An option and its value; a list of names is their number, a file its name, a hash its first six characters."""
    if isinstance(value, list) and isinstance(value[0], str):
        value = f"{len(value)} names"
    elif name in ("path_t", "init_s") and value is not None:
        value = Path(value).name
    elif name.endswith("_sha256") and value is not None:
        value = value[:6]
    return f"{name} {told(value)}"


def run_labels(runs: list[StoredRun], leave_out: tuple[str, ...] = ()) -> list[str]:
    """A short name for each run: its method, and where methods are equal, the options that differ.

    A label leaves out a value that more than half of the method's runs have.

    Args:
        leave_out: options to leave out.
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


# Options in which repeats of one run differ.
REPEATS = ("seed", "trial")


def repeats(runs: list[StoredRun]) -> list[list[StoredRun]]:
    """The runs in groups, in order; the runs of a group differ in seed or trial alone.

    Runs with equal seed and trial are copies of one run, which counts once.
    """
    groups: dict[str, dict[tuple, StoredRun]] = {}
    for run in runs:
        names = run.options.keys() - SAME - set(REPEATS)
        options = {name: told(run.option(name)) for name in names if run.option(name) is not None}
        groups.setdefault(json.dumps(options, sort_keys=True), {})[run.option("seed"), run.option("trial")] = run
    return [list(group.values()) for group in groups.values()]


def mean_and_deviation(values: list[float], digits: int = 2) -> str:
    """The mean; of several values also the sample standard deviation and how many they are."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f} ({len(values)})"


def markdown(rows: list[tuple[str, ...]]) -> str:
    """A Markdown table. The first row holds the headings; the first column is aligned left, the others right."""
    widths = [max(6, *map(len, column)) for column in zip(*rows, strict=True)]
    first, *others = widths
    lines = [
        f"| {row[0]:{first}} | " + " | ".join(f"{cell:>{w}}" for cell, w in zip(row[1:], others, strict=True)) + " |"
        for row in rows
    ]
    rule = f"|{'-' * (first + 2)}|" + "|".join("-" * (width + 1) + ":" for width in others) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
