"""The table of runs."""

import pytest

from helper.report import StoredRun, choose, published, repeats, run_labels, table


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
    # What the teacher is called stands for where it is from.
    teachers = {"model_t": "clip", "clip_tn": 1, "path_t": None}, {"model_t": "vgg13", "clip_tn": 0, "path_t": "a.pth"}
    labels = run_labels([run(distill="kd", **teacher) for teacher in teachers])
    assert labels == ["KD, model_t clip", "KD, model_t vgg13"]


def test_table_gives_the_teacher_and_each_run(tmp_path):
    def run(distill, records):
        options = {"distill": distill, "model_s": "resnet8", "model_t": "vit32"}
        return StoredRun(tmp_path, options, [{"epoch": i, **record} for i, record in enumerate(records, start=1)])

    alone = run("none", [{"test_acc": 30.0}, {"test_acc": 20.0}])
    # The best epoch is the one that the held-out rows choose.
    chosen = [{"test_acc": 50.0, "val_acc": 41.0}, {"test_acc": 40.0, "val_acc": 42.0}, {"test_acc": 30, "val_acc": 1}]
    taught = run("ega", [{"teacher_acc": 60.0, **record} for record in chosen])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table([alone, taught]).splitlines()]
    assert rows[0] == ["", "best", "last"]
    assert rows[2:] == [
        ["teacher: vit32", "60.00", "60.00"],
        ["resnet8: student alone", "30.00", "20.00"],
        ["resnet8: EGA", "40.00", "30.00"],
    ]


CNN = {"clip_tn": 0, "model_t": "resnet32x4", "model_s": "resnet8x4", "dataset": "cifar100"}


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if not line.startswith("|-")]


def test_seeds_are_averaged_and_stand_beside_what_is_published(tmp_path):
    def run(distill, seed, last, **options):
        records = [{"epoch": 1, "test_acc": 75.0, "teacher_acc": 79.0}, {"epoch": 2, "test_acc": last}]
        return StoredRun(tmp_path, CNN | {"distill": distill, "seed": seed, "trial": str(seed)} | options, records)

    runs = [run("kd", 0, 73.0), run("crd", 2, 74.0), run("kd", 1, 74.0), run("kd", 2, 72.0), run("kd", 0, 71, alpha=1)]
    assert cells(table(runs)) == [
        ["", "best", "last", "published"],
        ["teacher: resnet32x4", "79.00", "79.00", "79.42 (last)"],
        ["resnet8x4: KD", "75.00 ± 0.00 (3)", "73.00 ± 1.00 (3)", "73.33 (last)"],
        ["resnet8x4: CRD", "75.00", "74.00", "75.51 (last)"],
        ["resnet8x4: KD, alpha 1", "75.00", "71.00", "73.33 (last)"],
    ]


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


def test_runs_that_began_before_an_option_have_what_it_then_stood_for(tmp_path):
    """An old run, and new ones that say what it had, or that have few labels."""

    def run(accuracy, **options):
        base = {"distill": "ega", "model_s": "resnet8", "model_t": "vit32", "holdout": None}
        return StoredRun(tmp_path, base | options, [{"epoch": 1, "test_acc": accuracy}])

    said = {"labels": 1.0, "joint": "projected", "save_steps": None, "schedule": "step", "teacher_resolution": None}
    runs = [run(10.0, seed=0), run(12.0, seed=1, **said), run(20.0, seed=2, **said | {"labels": 0.1, "save_steps": 5})]
    assert [len(group) for group in repeats(runs)] == [2, 1]
    assert cells(table(runs))[1:] == [
        ["resnet8: EGA, labels 1", "11.00 ± 1.41 (2)", "11.00 ± 1.41 (2)"],
        ["resnet8: EGA, labels 0.1", "20.00", "20.00"],
    ]


def test_a_run_without_labels_has_no_accuracy(tmp_path):
    options = {"distill": "ega", "model_s": "resnet8", "model_t": "vit32"}
    history = [{"epoch": 1, "test_acc": None, "train_loss": 3.0}]
    assert cells(table([StoredRun(tmp_path, options, history)])) == [["", "best", "last"], ["resnet8: EGA", "–", "–"]]
