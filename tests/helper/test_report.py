"""The table of runs."""

from helper.report import StoredRun, run_labels, table


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
    assert run_labels([run(distill="ega"), run(distill="ega", save_dir="b")]) == ["EGA (1)", "EGA (2)"]


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
