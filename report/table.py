"""A table of finished runs of train_student.py: ``python -m report SAVE/student_model/NAME ...``."""

import statistics

from errors import InputError
from evaluation.tables import REPEATS, SAME, markdown, mean_and_deviation, repeats, run_labels, title, told
from helper.exits import exit_on_bad_input
from helper.parser import Parser, positive_int
from helper.records import StoredRun, best_record, read_run

from .published import REPDISTILLER_TEACHERS, published


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
    from scipy import stats  # here, so that a table without tests needs no scipy

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
        names = (group[0].options.keys() | other[0].options.keys()) - SAME - set(REPEATS)
        return sum(told(group[0].option(name)) != told(other[0].option(name)) for name in names)

    if group in references:
        first = max(references, key=len)
        return None if group is first else first
    return min(references, key=lambda other: (differing(other), -len(other)), default=None)


def run_table(runs: list[StoredRun], against: str | None = None) -> str:
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
        InputError: no run is of that method.
    """
    ahead = "" if against is None else f"{title(against)} − it, p"
    rows = [("", "best", "last", "held out", ahead, "published")]
    groups = repeats(runs)
    references = [group for group in groups if group[0].options["distill"] == against]
    if against is not None and not references:
        raise InputError(f"--against {against}: none of these runs is of that method")
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
    """The row of these runs' teacher, whose head each may have trained; one that is fixed has no spread."""
    curves, options = [run.curve("teacher_acc")[1] for run in group], group[0].options
    curves = curves if len({*map(tuple, curves)}) > 1 else curves[:1]
    best, last = (mean_and_deviation([value(curve) for curve in curves]) for value in (max, lambda curve: curve[-1]))
    known = None if options.get("clip_tn", 1) else REPDISTILLER_TEACHERS.get(options["model_t"])
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
        InputError: a run held none out, or has no such option.
    """
    for run in runs:
        if option not in run.options:
            raise InputError(f"--choose {option}: {run.folder} has no such option")
        if "val_acc" not in (best_record(run.history) or {}):
            raise InputError(f"{run.folder} held nothing out: choose among runs with --holdout, not on the test set")
    return max(runs, key=lambda run: best_record(run.history)["val_acc"]).option(option)


def main(argv: list[str] | None = None) -> None:
    parser = Parser("report", "Print a table of runs.")
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
            print(run_table(runs, args.against))


if __name__ == "__main__":
    main()
