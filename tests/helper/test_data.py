"""Which images a run trains on, and with which labels."""

import dataclasses

import pytest
import torch

from conftest import make_dataset
from dataset import ImageDataset, Split
from helper import distributed
from helper.data import build_loaders
from helper.data_options import check_labels
from helper.options import parse_student_options, parse_teacher_options


def loaders(*argv: str, data: ImageDataset | None = None, parse=parse_student_options):
    opt = parse([*argv, "--batch_size", "16"])
    opt.device, opt.teacher_views = "cpu", opt.teacher_views if opt.teacher_views != "auto" else 1
    return build_loaders(opt, data or make_dataset())


def seen(loader) -> dict[int, int]:
    """Each row that an epoch shows, and its target."""
    return {
        row: target
        for batch in loader.epoch(1)
        for row, target in zip(*map(torch.Tensor.tolist, batch[:2]), strict=True)
    }


def partly_labelled() -> ImageDataset:
    """70 images of five classes, the last 20 of which have no label of themselves."""
    data = make_dataset()
    targets = data.train.targets.clone()
    targets[50:] = -1
    return ImageDataset("partly", data.classes, Split(data.train.images, targets), data.test)


def test_all_images_are_seen_and_the_same_few_have_a_label():
    classes = make_dataset().train.targets.tolist()
    found = [
        seen(loaders("--labels", "0.2", *options).train)
        for options in (["--seed", "0"], ["--seed", "5"], ["--distill", "kd"], ["--joint", "teacher"])
    ]
    assert all(epoch == found[0] for epoch in found)
    assert sorted(found[0]) == list(range(70))
    labelled = {row: target for row, target in found[0].items() if target >= 0}
    assert torch.bincount(torch.tensor(list(labelled.values()))).tolist() == [3] * 5
    assert all(classes[row] == target for row, target in labelled.items())
    alone = loaders("--labels", "0.2", "--distill", "none")  # for whom the others are of no use
    assert seen(alone.train) == labelled
    assert alone.labelled == 15
    head = loaders("--labels", "0.2", parse=parse_teacher_options)
    assert seen(head.train) == labelled


def test_with_all_labels_nothing_changes():
    found = loaders("--labels", "1")
    assert torch.equal(found.targets, make_dataset().train.targets)
    assert seen(found.train) == dict(enumerate(make_dataset().train.targets.tolist()))
    assert next(found.train.epoch(1)).labelled is None
    assert found.labelled == 70


def test_the_hold_out_is_the_same_and_keeps_its_labels():
    data = make_dataset()
    few, all_ = (loaders("--labels", labels, "--holdout", "0.2") for labels in ("0.5", "1"))
    assert seen(few.val) == seen(all_.val)
    assert all(data.train.targets[row] == target for row, target in seen(few.val).items())
    assert set(seen(few.train)) == set(seen(all_.train))
    assert few.labelled == 30  # 5.5 of 11 of each class, rounded to the even number
    # What a contrast is drawn from: an image without a label is a class of its own, what is held out none.
    held = list(seen(few.val))
    assert (few.targets[held] == -1).all()
    unknown = [row for row, target in seen(few.train).items() if target < 0]
    assert few.targets[unknown].tolist() == [5 + row for row in unknown]


def test_what_became_the_test_split_is_not_held_out_again():
    data = dataclasses.replace(make_dataset(), holdout=0.2)
    found = loaders("--holdout", "0.2", data=data)
    assert found.val is None
    assert set(seen(found.train)) == set(range(70))


def test_a_teacher_holds_out_the_rows_that_a_student_does():
    student, teacher = (loaders("--holdout", "0.2", parse=p) for p in (parse_student_options, parse_teacher_options))
    assert seen(student.val) == seen(teacher.val)


def test_a_data_set_may_lack_labels_of_itself():
    assert sum(target < 0 for target in seen(loaders(data=partly_labelled()).train).values()) == 20
    assert set(seen(loaders("--distill", "none", data=partly_labelled()).train)) == set(range(50))
    assert loaders("--labels", "0.5", data=partly_labelled()).labelled == 25
    with pytest.raises(ValueError, match=r"nce needs the class of every image, but only a share of 0.714 has"):
        loaders("--distill", "nce", data=partly_labelled())


@pytest.mark.parametrize(
    ("argv", "share", "words"),
    [
        ([], 0, "use -r 0"),
        (["--distill", "none"], 0, "use -r 0"),
        (["-r", "0"], 0, "use --joint teacher"),
        (["--distill", "kd", "-r", "0"], 0, "the teacher's head"),
        (["--distill", "ccl"], 0.999, "one of hint, similarity, correlation, crd, rkd, pkt, irg, ega, dist"),
    ],
)
def test_what_needs_labels_that_are_not_there_is_refused(argv, share, words):
    opt = parse_student_options(argv)
    check_labels(opt, 1)
    with pytest.raises(ValueError, match=words):
        check_labels(opt, share)


def test_a_teacher_is_not_trained_without_labels():
    opt = parse_teacher_options([])
    check_labels(opt, 0.01)
    with pytest.raises(ValueError, match="none has a label"):
        check_labels(opt, 0)


def test_a_projected_cnn_needs_labels_too():
    opt = parse_student_options(["-r", "0"])
    opt.clip_tn, opt.path_t = 0, "resnet14.pth"
    with pytest.raises(ValueError, match="a method that needs no joint space"):
        check_labels(opt, 0)
    opt.distill = "attention"
    check_labels(opt, 0)


@pytest.mark.parametrize(("processes", "fits"), [(6, True), (7, False)])
def test_batch_norm_over_all_processes_needs_a_sample_on_each(monkeypatch, processes, fits):
    """70 images in batches of 16 leave 6 for the last step."""
    monkeypatch.setattr(distributed, "count", lambda: processes)
    assert len(loaders("--max_steps", "4", "--sync_bn").train) == 4
    assert len(loaders().train) == 5
    if fits:
        assert len(loaders("--sync_bn").train) == 5
    else:
        with pytest.raises(ValueError, match="--sync_bn: .* 6 samples for 7 processes: use another --batch_size"):
            loaders("--sync_bn")
