"""The table of runs."""

import math

import pytest
import torch
from scipy import stats

from evaluation.tables import repeats, run_labels
from helper.records import StoredRun
from report.published import published
from report.table import best_methods, choose, compare, holm, run_table


def test_labels_are_methods_and_what_tells_equal_ones_apart(tmp_path):
    def run(**options):
        return StoredRun(tmp_path, {"seed": 0, "model_s": "resnet8", "save_dir": "a", **options}, [])

    assert run_labels([run(distill="none"), run(distill="kd", seed=3), run(distill="ega", save_dir="b")]) == [
        "student alone",
        "KD",
        "EGA",
    ]
    assert run_labels([run(distill="ega"), run(distill="ega", seed=1), run(distill="none")]) == [
        "EGA, seed 0",
        "EGA, seed 1",
        "student alone",
    ]
    assert run_labels([run(distill="kd", alpha=0.5, beta=1), run(distill="kd", alpha=1, beta=1.0)]) == [
        "KD, alpha 0.5",
        "KD, alpha 1",
    ]
    assert run_labels([run(distill="ega"), run(distill="ega", save_dir="b")]) == ["EGA (1)", "EGA (2)"]
    started = [{"pretrained_s": x, "normalization": [[x / 2] * 3, [0.5] * 3]} for x in (False, True)]
    assert run_labels([run(distill="ega", **x) for x in started]) == [
        "EGA, pretrained_s False",
        "EGA, pretrained_s True",
    ]
    # What most have is not told; of a file, its name is.
    varied = [{}, {"beta": 0.5}, {"path_t": "there/head.pth"}, {"beta": 0.5, "batch_size": 32}, {}]
    assert run_labels([run(**{"distill": "ega", "beta": 1, "batch_size": 64, "path_t": None} | x) for x in varied]) == [
        "EGA (1)",
        "EGA, beta 0.5",
        "EGA, path_t head.pth",
        "EGA, beta 0.5, batch_size 32",
        "EGA (2)",
    ]
    # What the teacher is called stands for where it is from.
    teachers = {"model_t": "clip", "clip_tn": 1, "path_t": None}, {"model_t": "vgg13", "clip_tn": 0, "path_t": "a.pth"}
    labels = run_labels([run(distill="kd", **teacher) for teacher in teachers])
    assert labels == ["KD, model_t clip", "KD, model_t vgg13"]


def test_table_gives_the_teacher_and_each_run(tmp_path):
    def run(distill, records):
        options = BASE | {"distill": distill}
        return StoredRun(tmp_path, options, [{"epoch": i, **record} for i, record in enumerate(records, start=1)])

    alone = run("none", [{"test_acc": 30.0}, {"test_acc": 20.0}])
    # The best epoch is the one that the held-out rows choose.
    chosen = [{"test_acc": 50.0, "val_acc": 41.0}, {"test_acc": 40.0, "val_acc": 42.0}, {"test_acc": 30, "val_acc": 1}]
    taught = run("ega", [{"teacher_acc": 60.0, **record} for record in chosen])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in run_table([alone, taught]).splitlines()]
    assert rows[0] == ["", "best", "last", "held out"]
    assert rows[2:] == [
        ["teacher: vit32", "60.00", "60.00", ""],
        ["resnet8: student alone", "30.00", "20.00", ""],
        ["resnet8: EGA", "40.00", "30.00", "42.00"],
    ]


BASE = {"seed": 0, "trial": "1", "clip_tn": 1, "model_s": "resnet8", "model_t": "vit32", "dataset": "shapes"}
CNN = {"clip_tn": 0, "model_t": "resnet32x4", "model_s": "resnet8x4", "dataset": "cifar100"}


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:2] == "| "]


def test_seeds_are_averaged_and_stand_beside_what_is_published(tmp_path):
    def run(distill, seed, last, **options):
        records = [{"epoch": 1, "test_acc": 75.0, "teacher_acc": 79.0}, {"epoch": 2, "test_acc": last}]
        return StoredRun(tmp_path, CNN | {"distill": distill, "seed": seed, "trial": str(seed)} | options, records)

    runs = [run("kd", 0, 73.0), run("crd", 2, 74.0), run("kd", 1, 74.0), run("kd", 2, 72.0), run("kd", 0, 71, alpha=1)]
    assert cells(run_table(runs)) == [
        ["", "best", "last", "published"],
        ["teacher: resnet32x4", "79.00", "79.00", "79.42 (last)"],
        ["resnet8x4: KD", "75.00 ± 0.00 (3)", "73.00 ± 1.00 (3)", "73.33 (last)"],
        ["resnet8x4: CRD", "75.00", "74.00", "75.51 (last)"],
        ["resnet8x4: KD, alpha 1", "75.00", "71.00", "73.33 (last)"],
    ]


def test_a_teacher_whose_head_is_trained_with_each_seed_is_averaged_too(tmp_path):
    def run(distill, seed, accuracies):
        records = [{"epoch": 1 + i, "test_acc": 50.0, "teacher_acc": value} for i, value in enumerate(accuracies)]
        return StoredRun(tmp_path, BASE | {"distill": distill, "seed": seed}, records)

    runs = [run("ega", 0, [70, 60]), run("ega", 1, [72, 62]), run("kd", 0, [70, 60])]
    assert cells(run_table(runs))[1] == ["teacher: vit32", "71.00 ± 1.41 (2)", "61.00 ± 1.41 (2)"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"distill": "none", "model_t": "none"}, "72.50 (last)"),
        ({"distill": "ega"}, ""),
        ({"distill": "kd", "model_s": "vgg8"}, ""),
        ({"distill": "kd", "dataset": "shapes"}, ""),
        ({"clip_tn": 1, "model_t": "vit32", "distill": "ccl"}, "75.91 (best)"),
        ({"clip_tn": 1, "model_t": "vit32", "distill": "ega", "node_weight": 0.8, "edge_weight": 0.24}, "76.65 (best)"),
        ({"clip_tn": 1, "model_t": "vit32", "distill": "ega", "node_weight": 0, "edge_weight": 1}, "about 75.0 (best)"),
        ({"clip_tn": 1, "model_t": "vit32", "distill": "ega", "node_weight": 1, "edge_weight": 0}, "about 74.6 (best)"),
        ({"clip_tn": 1, "model_t": "none", "distill": "none"}, "about 72.1 (best)"),
        ({"clip_tn": 1, "model_t": "vit32", "model_s": "ShuffleV1", "distill": "hint"}, ""),
        ({"clip_tn": 1, "model_t": "clip", "distill": "kd"}, ""),
    ],
)
def test_what_is_published(options, expected):
    assert published(CNN | options) == expected


def test_the_hold_out_chooses(tmp_path):
    def run(beta, val, test=50.0):
        return StoredRun(tmp_path, {"beta": beta}, [{"epoch": 1, "test_acc": test, "val_acc": val}])

    assert choose("beta", [run(0.5, 40.0), run(1, 42.0, test=10.0), run(2, 41.0, test=90.0)]) == 1
    with pytest.raises(ValueError, match="no such option"):
        choose("gamma", [run(1, 1.0)])
    with pytest.raises(ValueError, match="held nothing out"):
        choose("beta", [StoredRun(tmp_path, {"beta": 1}, [{"epoch": 1, "test_acc": 1.0}])])


def test_every_repeat_counts_and_a_copy_of_a_run_counts_once():
    runs = [
        finished("ega", 0, 50.0, trial="a"),
        finished("ega", 0, 52.0, trial="b", save_steps=5),
        finished("ega", 1, 54.0, trial="a"),
    ]
    runs += [finished("ega", 1, 54.0, trial="a", save_dir="a copy"), finished("ega", 2, 10.0, labels=0.1)]
    assert [len(group) for group in repeats(runs)] == [3, 1]
    assert cells(run_table(runs))[1:] == [
        ["resnet20: EGA, labels 1", "52.00 ± 2.00 (3)", "52.00 ± 2.00 (3)"],
        ["resnet20: EGA, labels 0.1", "10.00", "10.00"],
    ]


def test_a_run_without_labels_has_no_accuracy(tmp_path):
    options = BASE | {"distill": "ega"}
    measured = [(2.0, 30.0), (1.0, 41.234), (1.5, 50.0)]
    history = [
        {"epoch": epoch, "test_acc": None, "train_loss": 3.0, "heldout_loss": loss, "heldout_knn": near}
        for epoch, (loss, near) in enumerate(measured, start=1)
    ]
    assert cells(run_table([StoredRun(tmp_path, options, history)])) == [
        ["", "best", "last", "neighbours"],
        ["resnet8: EGA", "–", "–", "41.23"],
    ]


def finished(distill: str, seed: int, accuracy: float | None, **options) -> StoredRun:
    options = BASE | {"distill": distill, "seed": seed, "model_s": "resnet20", "labels": 1.0, **options}
    measured = {"heldout_loss": 1.0, "heldout_knn": 50.0} if accuracy is None else {}
    return StoredRun("", options, [{"epoch": 1, "test_acc": accuracy} | measured])


def test_equal_seeds_are_compared_in_pairs():
    alone = [finished("none", seed, accuracy) for seed, accuracy in enumerate((50.0, 60.0, 70.0))]
    ega = [finished("ega", seed, accuracy) for seed, accuracy in enumerate((51.0, 62.0, 73.0))]
    difference, p = compare(alone, ega)
    assert difference == pytest.approx(2)
    # Differences 1, 2, 3: t = 2 / (1 / sqrt 3) with 2 degrees of freedom, whose distribution is known in closed form.
    t = 2 * math.sqrt(3)
    assert p == pytest.approx(1 - t / math.sqrt(t * t + 2))
    # The spread over seeds, which both share, would have drowned it.
    _, unpaired = compare(
        alone, [finished("ega", 10 + place, run.history[0]["test_acc"]) for place, run in enumerate(ega)]
    )
    assert unpaired > 0.8


def test_other_seeds_are_compared_by_welchs_test():
    one, other = (40.0, 42.0), (50.0, 50.5, 51.0)
    difference, p = compare(
        [finished("none", seed, accuracy) for seed, accuracy in enumerate(one)],
        [finished("ega", 5 + seed, accuracy) for seed, accuracy in enumerate(other)],
    )
    assert difference == pytest.approx(9.5)
    # Welch-Satterthwaite: t and the degrees of freedom; p by integrating Student's density.
    v, w = 2 / 2, 0.25 / 3
    t, df = 9.5 / math.sqrt(v + w), (v + w) ** 2 / (v**2 / 1 + w**2 / 2)
    constant = math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2))
    step = t / 20000
    inside = sum(constant * (1 + ((i + 0.5) * step) ** 2 / df) ** (-(df + 1) / 2) for i in range(20000)) * step
    assert p == pytest.approx(1 - 2 * inside, rel=1e-4)


def test_a_single_run_is_compared_with_the_one_of_its_seed():
    ega = [finished("ega", seed, accuracy) for seed, accuracy in enumerate((51.0, 62.0, 73.0))]
    assert compare([finished("none", 1, 60.0)], ega) == (2.0, None)
    assert compare(ega, [finished("none", 2, 70.0)]) == (-3.0, None)
    assert compare([finished("none", 7, 60.0)], ega) == (2.0, None)  # of no seed of EGA's: with their mean


def test_a_single_seed_or_no_spread_has_no_p_and_no_labels_nothing():
    assert compare([finished("none", 0, 40.0)], [finished("ega", 0, 43.0)]) == (3.0, None)
    same = [finished("none", seed, 40.0) for seed in (0, 1)], [finished("ega", seed, 43.0) for seed in (0, 1)]
    assert compare(*same) == (3.0, None)
    assert compare([finished("none", 0, None)], [finished("ega", 0, 43.0)]) is None


def test_differences_of_equally_many_images_are_equal_whatever_float32_makes_of_them():
    """Accuracies of 10 000 test images, as metrics.jsonl has them: 137 images more in each of three seeds."""
    stored = [torch.tensor(correct / 100).item() for correct in (6342, 6381, 6399, 6479, 6518, 6536)]
    differences = {ours - theirs for ours, theirs in zip(stored[3:], stored[:3], strict=True)}
    assert len(differences) > 1
    alone = [finished("none", seed, accuracy) for seed, accuracy in enumerate(stored[:3])]
    ega = [finished("ega", seed, accuracy) for seed, accuracy in enumerate(stored[3:])]
    assert compare(alone, ega) == (pytest.approx(1.37, abs=1e-5), None)
    other = [finished("ega", 5 + seed, accuracy) for seed, accuracy in enumerate([stored[0]] * 2)]
    assert compare([finished("none", seed, stored[1]) for seed in (0, 1)], other).p is None
    # A single image is a difference.
    ega[0] = finished("ega", 0, torch.tensor(64.80).item())
    assert compare(alone, ega).p is not None


def test_the_last_epoch_is_compared_not_the_one_that_is_best_on_the_test_set():
    def run(distill, seed, *values):
        options = BASE | {"distill": distill, "seed": seed}
        return StoredRun("", options, [{"epoch": 1 + i, "test_acc": value} for i, value in enumerate(values)])

    alone, ega = [run("none", 0, 90.0, 40.0), run("none", 1, 90.0, 41.0)], [run("ega", 0, 42.0), run("ega", 1, 45.0)]
    assert compare(alone, ega).difference == pytest.approx(3.0)


def test_the_runs_of_a_seed_are_one_value_of_a_test():
    alone = [finished("none", 0, 40.0), finished("none", 1, 42.0), finished("none", 1, 44.0, trial="b")]
    ega = [finished("ega", 0, 41.0), finished("ega", 1, 45.0)]
    assert compare(alone, ega) == compare([*alone[:1], finished("none", 1, 43.0)], ega)


def test_holms_correction():
    # By hand: the smallest times 4, the next times 3, ...; never below one that came before, at most 1.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6, 0.04]) == pytest.approx([1.0, 1.0, 0.12])
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


def test_the_table_says_how_many_comparisons_were_made():
    runs = [finished("ega", seed, 60.0 + seed) for seed in (0, 1, 2)]
    runs += [finished("none", seed, value) for seed, value in enumerate((58.0, 58.5, 60.5))]
    runs += [finished("kd", seed, value) for seed, value in enumerate((50.0, 52.0, 51.0))] + [finished("rkd", 0, 49.0)]
    table = run_table(runs, "ega")
    rows = {row[0]: row[3:] for row in cells(table) if len(row) > 1}
    alone, kd = (
        [60.0 + seed - value for seed, value in enumerate(values)]
        for values in ((58.0, 58.5, 60.5), (50.0, 52.0, 51.0))
    )
    ps = [stats.ttest_rel(differences, [0, 0, 0]).pvalue for differences in (alone, kd)]
    assert rows[""] == ["EGA − it, last", "p", "p, Holm"]
    assert rows["resnet20: student alone"] == ["+2.00", f"{ps[0]:.3f}", f"{ps[0]:.3f}"]
    assert rows["resnet20: KD"] == ["+10.00", f"{ps[1]:.3f}", f"{2 * ps[1]:.3f}"]
    assert rows["resnet20: RKD"] == ["+11.00", "", ""]
    assert table.splitlines()[-1].startswith("2 comparisons have a p: t-tests of the last epoch")
    assert "have a p" not in run_table(runs)


def test_each_row_is_compared_with_the_most_similar_row_of_the_method():
    runs = [finished("ega", 0, 56.0), finished("ega", 0, 50.0, labels=0.1), finished("ega", 0, 54.0, edge_weight=0)]
    runs += [finished("none", 0, 53.0), finished("none", 0, 40.0, labels=0.1)]
    rows = cells(run_table(runs, against="ega"))
    assert rows[0][-1] == "EGA − it, last"
    assert [row[-1] for row in rows[1:]] == ["", "+6.00", "+2.00", "+3.00", "+10.00"]
    with pytest.raises(ValueError, match="none of these runs"):
        run_table(runs[3:], against="ega")


def test_of_equally_similar_rows_the_one_of_the_most_seeds_is_compared_with():
    runs = [finished("ega", 0, 60.0, beta=0.5), finished("ega", 0, 55.0, beta=1), finished("ega", 1, 57.0, beta=1)]
    runs += [finished("none", seed, 50.0 + seed, beta=0) for seed in (0, 1)]
    rows = cells(run_table(runs, against="ega"))
    assert [row[-3:] for row in rows[1:4]] == [["-5.00", "", ""], ["", "", ""], ["+5.50", "0.058", "0.058"]]


def test_seeds_of_which_some_were_compiled_are_one_row():
    runs = [finished("nce", 0, 64.0, compile="off"), finished("nce", 1, 65.0, compile="on"), finished("kd", 0, 59.0)]
    assert [row[:2] for row in cells(run_table(runs))[1:]] == [
        ["resnet20: NCE", "64.50 ± 0.71 (2)"],
        ["resnet20: KD", "59.00"],
    ]


def test_best_methods_are_those_of_the_highest_mean():
    runs = [finished("crd", 0, 55.0), finished("crd", 1, 57.0), finished("kd", 0, 55.5), finished("ega", 0, 58.0)]
    runs += [finished("ccl", 0, 50.0), finished("nce", 0, None)]
    assert best_methods(2, runs, ["ega"]) == ["crd", "kd"]
    assert best_methods(9, runs, []) == ["ega", "crd", "kd", "ccl"]
