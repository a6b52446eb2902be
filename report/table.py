"""A table of finished runs of train_student.py: ``python -m report SAVE/student_model/NAME ...``."""

import statistics
from typing import NamedTuple

from errors import InputError
from evaluation.tables import REPEATS, SAME, markdown, mean_and_deviation, repeats, run_labels, title, told
from helper.exits import exit_on_bad_input
from helper.parser import Parser, positive_int
from helper.records import StoredRun, best_record, read_run

from .published import REPDISTILLER_TEACHERS, published

# Accuracies are stored as float32: two differences that are the same number of images may differ by this much.
_NOISE = 1e-4


class Comparison(NamedTuple):
    """How a row compares with the reference, in the last epoch.

    difference: percentage points by which the reference's mean accuracy is higher.
    p: how likely chance alone makes a difference of this size (two-sided); None where no test is possible.
    """

    difference: float
    p: float | None


def accuracies(group: list[StoredRun]) -> list[float]:
    """Top-1 % of each run in its best epoch; empty where no accuracy was measured, for want of labels."""
    found = [best_record(run.history).get("test_acc") for run in group]
    return [] if None in found else found


def last_accuracies(group: list[StoredRun]) -> dict[int, float]:
    """Top-1 % in the last epoch by seed, the mean of a seed's runs; empty where no accuracy was measured."""
    found: dict[int, list[float]] = {}
    for run in group:
        found.setdefault(run.options["seed"], []).extend(run.curve("test_acc")[1][-1:])
    return {seed: statistics.mean(values) for seed, values in found.items()} if all(found.values()) else {}


def compare(group: list[StoredRun], reference: list[StoredRun]) -> Comparison | None:
    """Compare the accuracy of two groups of runs in the last epoch, which no test image chose.

    Runs of one seed begin with the same weights and see the same images in the same order. Seeds that both groups have
    are therefore compared in pairs, by a paired t-test. A single run is compared with the one of its seed, too. Groups
    without common seeds are compared by Welch's t-test, for unequal variances.

    Returns:
        The comparison; its p is None with fewer than two seeds on a side, or where all differences are equal. None
        where an accuracy was not measured.
    """
    ours, theirs = last_accuracies(reference), last_accuracies(group)
    if not ours or not theirs:
        return None
    common = sorted(ours.keys() & theirs.keys())
    if len(common) > 1 or (common and 1 in (len(ours), len(theirs))):
        differences = [ours[seed] - theirs[seed] for seed in common]
        p = _paired(differences) if _spread(differences) else None
        return Comparison(statistics.mean(differences), p)
    ours, theirs = [*ours.values()], [*theirs.values()]
    testable = min(len(ours), len(theirs)) > 1 and (_spread(ours) or _spread(theirs))
    return Comparison(statistics.mean(ours) - statistics.mean(theirs), _welch(ours, theirs) if testable else None)


def _spread(values: list[float]) -> bool:
    return max(values) - min(values) > _NOISE


def _paired(differences: list[float]) -> float:
    from scipy import stats  # here: most tables test nothing, and it takes longer than they

    return float(stats.ttest_1samp(differences, 0).pvalue)


def _welch(ours: list[float], theirs: list[float]) -> float:
    from scipy import stats

    return float(stats.ttest_ind(ours, theirs, equal_var=False).pvalue)


def holm(ps: list[float]) -> list[float]:
    """The p-values of several tests, adjusted so that chance makes any of them small as seldom as a single one.

    Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 1979.
    """
    adjusted, highest = [0.0] * len(ps), 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[place]))
        adjusted[place] = highest
    return adjusted


def _reference(group: list[StoredRun], references: list[list[StoredRun]]) -> list[StoredRun] | None:
    """The one of some groups of a method that a group is compared with.

    A group of another method is compared with the group that differs from it in the fewest options; of equals, with the
    one that has the most runs, the first of them. A group of that method itself is compared with its largest group,
    the first of equals. That one is compared with none.
    """

    def differing(other: list[StoredRun]) -> int:
        names = (group[0].options.keys() | other[0].options.keys()) - SAME - set(REPEATS)
        return sum(told(group[0].option(name)) != told(other[0].option(name)) for name in names)

    if group in references:
        first = max(references, key=len)
        return None if group is first else first
    return min(references, key=lambda other: (differing(other), -len(other)), default=None)


def run_table(runs: list[StoredRun], against: str | None = None) -> str:
    """Markdown: test accuracy (top-1, %) in the best and in the last epoch, of the teacher and of each run.

    Runs that differ in seed and trial alone are one row: their mean and standard deviation. The teacher's row is that
    of the runs with the most seeds, the last of equals. The best epoch is the one that training chose: by the rows that
    were held out, or else by the test set. Further columns appear where a row has something to say: the accuracy on
    the rows that were held out, the comparison, and what papers report. A run without labels has the percentage of
    nearest neighbours that are the teacher's, in its best epoch.

    Args:
        against: a method that each row is compared with, in the last epoch: how far that method is ahead, p, and p with
            Holm's correction for all tests of the table. See ``compare`` for the test. Where the method has
            several rows, the one with the most similar options is taken, then the one with the most runs.

    Raises:
        InputError: no run is of that method.
    """
    groups = repeats(runs)
    references = [group for group in groups if group[0].options["distill"] == against]
    if against is not None and not references:
        raise InputError(f"--against {against}: none of these runs is of that method")
    ahead = "" if against is None else f"{title(against)} − it, last"
    rows = [("", "best", "last", "held out", "neighbours", ahead, "p", "p, Holm", "published")]
    taught = [group for group in groups if group[0].curve("teacher_acc")[1]]
    if taught:
        rows.append(_teacher_row(max(reversed(taught), key=len)))
    compared = [_compared(group, references) for group in groups]
    tested = [found.p for found in compared if found is not None and found.p is not None]
    adjusted = iter(holm(tested))
    labels = run_labels([group[0] for group in groups], REPEATS)
    for group, label, found in zip(groups, labels, compared, strict=True):
        best = last = "–"  # without labels
        if values := accuracies(group):
            best = mean_and_deviation(values)
            last = mean_and_deviation([run.curve("test_acc")[1][-1] for run in group])
        held_out = [best_record(run.history).get("val_acc") for run in group]
        held_out = "" if None in held_out else mean_and_deviation(held_out)
        difference = "" if found is None else f"{found.difference:+.2f}"
        ps = ("", "") if found is None or found.p is None else (_told_p(found.p), _told_p(next(adjusted)))
        options = group[0].options
        near = [best_record(run.history).get("heldout_knn") for run in group]
        near = "" if None in near else mean_and_deviation(near)
        rows.append((f"{options['model_s']}: {label}", best, last, held_out, near, difference, *ps, published(options)))
    # Columns in which no row says anything are left out.
    kept = [place for place in range(len(rows[0])) if place < 3 or any(row[place] for row in rows[1:])]
    table = markdown([tuple(row[place] for place in kept) for row in rows])
    if not tested:
        return table
    tests = "1 comparison has a p" if len(tested) == 1 else f"{len(tested)} comparisons have a p"
    how = "t-tests of the last epoch, of equal seeds in pairs. Holm's p is corrected for all of them."
    return f"{table}\n\n{tests}: {how}"


def _compared(group: list[StoredRun], references: list[list[StoredRun]]) -> Comparison | None:
    reference = _reference(group, references)
    return None if reference is None else compare(group, reference)


def _teacher_row(group: list[StoredRun]) -> tuple[str, ...]:
    """The row of these runs' teacher; each run may have trained its own head, a fixed teacher has no spread."""
    curves, options = [run.curve("teacher_acc")[1] for run in group], group[0].options
    curves = curves if len({*map(tuple, curves)}) > 1 else curves[:1]
    best, last = (mean_and_deviation([value(curve) for curve in curves]) for value in (max, lambda curve: curve[-1]))
    known = None if options["clip_tn"] else REPDISTILLER_TEACHERS.get(options["model_t"])
    published_ = "" if known is None else f"{known:.2f} (last)"
    return f"teacher: {options['model_t']}", best, last, "", "", "", "", "", published_


def _told_p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def best_methods(count: int, runs: list[StoredRun], without: list[str]) -> list[str]:
    """The methods with the highest mean accuracy in the best epoch, the best method first.

    Args:
        without: methods to pass over.
    """
    groups = [group for group in repeats(runs) if accuracies(group) and group[0].options["distill"] not in without]
    groups.sort(key=lambda group: statistics.mean(accuracies(group)), reverse=True)
    return list(dict.fromkeys(group[0].options["distill"] for group in groups))[:count]


def choose(option: str, runs: list[StoredRun]) -> object:
    """The value of an option in the run that is best on the rows that were held out.

    Raises:
        InputError: a run held none out, or has no such option.
    """
    for run in runs:
        if option not in run.options:
            raise InputError(f"--choose {option}: {run.folder} has no such option")
        if "val_acc" not in best_record(run.history):
            raise InputError(f"{run.folder} held nothing out: choose among runs with --holdout, not on the test set")
    return max(runs, key=lambda run: best_record(run.history)["val_acc"]).option(option)


def main(argv: list[str] | None = None) -> None:
    parser = Parser("report", "Print a table of runs.")
    parser.add_argument(
        "--against", metavar="METHOD", help="say how far this method is ahead of each row, with the p-value of a t-test"
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument(
        "--choose", metavar="OPTION", help="print the value of this option in the run that is best on its hold-out"
    )
    only.add_argument("--best", type=positive_int, metavar="N", help="print the N methods with the highest accuracy")
    parser.add_argument("--except", dest="without", metavar="METHODS", help="methods that --best passes over")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a finished run: SAVE/student_model/NAME")
    args = parser.parse_args(argv)
    with exit_on_bad_input(parser.prog):
        runs = [read_run(folder) for folder in args.runs]
        if args.choose is not None:
            print(choose(args.choose, runs))
        elif args.best is not None:
            print(*best_methods(args.best, runs, (args.without or "").split()))
        else:
            print(run_table(runs, args.against))


if __name__ == "__main__":
    main()
