"""What follows from pictures without labels, and what is refused."""

import pytest
from runs import assert_refused

from dataset.listing import known_splits
from helper.options import parse_student_options, parse_teacher_options


def make(root, files: str) -> str:
    """Empty files by their names: nothing here looks into a picture."""
    for name in files.split():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return str(root)


def parse(where: str, *options: str, parser=parse_student_options):
    return parser(["--dataset", "folder", "--image_size", "32", "--data_dir", where, *options])


CHOSEN = ("labels", "gamma", "joint", "holdout")


@pytest.mark.parametrize(
    ("files", "labels", "tests"),
    [
        ("a.png", False, False),
        ("a/b/c.png test/x/1.png", False, False),
        ("unlabelled/a.png", False, False),
        ("unlabelled/a.png test/x/1.png", False, True),
        ("train/x/1.png", True, False),
        ("train/x/1.png val/x/1.png unlabelled/a.png", True, True),
    ],
)
def test_folders_tell_what_has_a_label_and_what_is_tested_on(tmp_path, capsys, files, labels, tests):
    where = make(tmp_path, files)
    assert known_splits(where) == (labels, tests)
    opt = parse(where)
    assert (opt.labels, opt.gamma, opt.joint) == ((1, 1, "projected") if labels else (0, 0, "teacher"))
    assert opt.holdout == (None if tests else 0.1)
    told = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert told == [*([] if labels else ["--labels", "-r", "--joint"]), *([] if tests else ["--holdout"])]


def test_each_can_be_given(tmp_path, capsys):
    where = make(tmp_path, "a.png b.png")
    parse(where, "--labels", "0", "--joint", "teacher", "-r", "0", "--holdout", "0.2")
    assert capsys.readouterr().out == ""
    with pytest.raises(SystemExit):
        parse(where, "-r", "0.5")
    assert_refused(capsys, 2, "no image has a label: use -r 0")
    with pytest.raises(SystemExit):
        parse(where, "--joint", "projected")
    assert_refused(capsys, 2, "the teacher's head would be trained by the classes of the images")


def test_a_method_that_needs_a_classifier_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse(make(tmp_path, "a.png b.png"), "--distill", "kd")
    assert_refused(capsys, 2, "the teacher has no classifier")


def test_lists_and_several_folders(tmp_path):
    (tmp_path / "mine.csv").write_text("path,label\na.png,x\nb.png,\n")
    (tmp_path / "bare.csv").write_text("path,label\na.png,\nb.png,\n")
    (tmp_path / "mine.txt").write_text("a.png\nb.png\n")
    make(tmp_path, "a.png b.png train/x/1.png")
    for name, labels in (("mine.csv", True), ("bare.csv", False), ("mine.txt", False)):
        opt = parse_student_options(
            ["--dataset", "folder", "--image_size", "32", "--data_list", str(tmp_path / name), "-b", "1"]
        )
        assert (opt.labels, opt.joint, opt.holdout) == ((1, "projected", 0.1) if labels else (0, "teacher", 0.1))
    opt = parse(str(tmp_path / "train"), str(tmp_path / "a.png"))
    assert opt.data_dir == [str(tmp_path / "train"), str(tmp_path / "a.png")] and opt.joint == "teacher"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--dataset", "folder", "--image_size", "8", "--data_dir", "nowhere"], "--data_dir nowhere: no such folder"),
        (["--dataset", "folder", "--image_size", "8", "--data_list", "nowhere"], "--data_list nowhere cannot be read"),
        (["--data_dir", "a", "b"], "--data_dir names 2 folders, which only --dataset folder makes one of"),
        (["--data_list", "a.txt"], "--data_list is for --dataset folder, not cifar100"),
        (
            ["--dataset", "folder", "--image_size", "8", "--data_list", "a.txt", "--data_dir", "b"],
            "--data_list and --data_dir both say where the pictures are",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(capsys, options, said):
    with pytest.raises(SystemExit) as stopped:
        parse_student_options(options)
    assert_refused(capsys, stopped.value.code, said)
    assert stopped.value.code == 2


def test_a_probe_lies_beside_the_other_data_sets(tmp_path):
    where = make(tmp_path, "a.png b.png")
    assert parse(where, where, "--probe", "cifar10").probe_dir == "./data"
    assert parse_student_options(["--data_dir", "there", "--probe", "cifar10"]).probe_dir == "there"
    assert parse(where, "--probe", "cifar10", "--probe_dir", "elsewhere").probe_dir == "elsewhere"


def test_a_teacher_of_classes_needs_labels(tmp_path, capsys):
    opt = parse(make(tmp_path, "train/x/1.png"), parser=parse_teacher_options)
    assert (opt.labels, opt.holdout, opt.joint) == (1, 0.1, "projected")
    assert capsys.readouterr().out.startswith("--holdout 0.1: ")
