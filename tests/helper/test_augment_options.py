"""The flags of the augmentation, and what they do in a step."""

from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from runs import assert_equal_tensors, assert_refused, load, read_metrics

from conftest import make_dataset
from dataset.augment import Augment, mixed
from dataset.loader import Batch, Loader
from dataset.views import CLIP_NORMALIZATION
from helper.bank import OnTheFly, encode_view
from helper.data import augmentation
from helper.objective import mean_cross_entropy
from helper.options import parse_student_options
from helper.teacher import CnnTeacher, EncoderTeacher
from models import create_model
from models.clip_teacher import ImageEncoder

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", Augment()),
        ("--augment crop --gray 0.1", Augment(gray=0.1)),
        ("--augment none", Augment(crops=False)),
        ("--augment none --blur 1", Augment(crops=False, blur=1.0)),
        ("--augment color", Augment(color_jitter=0.4)),
        ("--augment color --color_jitter 0.2 --crop_scale 0.5", Augment(color_jitter=0.2, crop_scale=0.5)),
        ("--augment strong", Augment(crop_scale=0.08, color_jitter=0.4, gray=0.2, blur=0.5)),
        ("--augment strong --gray 0 --views shared --teacher_views 4", Augment(color_jitter=0.4, blur=0.5)),
    ],
)
def test_parts_that_are_unset_are_those_of_the_word(options, expected):
    assert augmentation(parse_student_options(options.split())) == expected


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--augment none --crop_scale 0.5", "--augment none crops nothing"),
        ("--augment none --views shared --teacher_views 4", "gives the student the encoder's crops"),
        ("--crop_scale 0.5 --views shared --teacher_views 4", "gives the student the encoder's crops"),
        ("--mixup 0.2", "a bank knows no mixed images; let the encoder see every batch, --teacher_views 0"),
        ("--mixup 0.2 --teacher_views 0 --distill crd", "--distill crd takes each image for one class"),
        ("--mixup 0.2 --teacher_views 0 --distill nce", "--distill nce takes each image for one class"),
        ("--gray 1.5", "is not a number at least 0 and at most 1"),
    ],
)
def test_what_does_not_go_together_is_refused(capsys, options, said):
    with pytest.raises(SystemExit):
        parse_student_options(options.split())
    assert_refused(capsys, 2, said)


def batch_of(data, **options) -> Batch:
    made = Loader(data.train, "train", 12, CPU, training=True, seed=1, normalization=CLIP_NORMALIZATION, **options)
    return next(made.epoch(1))


def test_an_encoder_that_sees_every_batch_sees_the_views_mixed(tiny_clip):
    data, encoder = make_dataset(), ImageEncoder(str(tiny_clip), "")
    batch, seen = batch_of(data, mixup=0.5), []
    encoder.forward = lambda image: seen.append(image) or image.flatten(1)[:, :4]
    images = data.train.images[batch.index]
    encode_view(encoder, data.views, images, batch.index, batch.teacher_view)
    EncoderTeacher(OnTheFly(data, encoder, CPU), None, dim=4)("train", batch)
    plain, mixture = seen
    assert torch.equal(mixture, mixed(plain, batch.mix))
    assert not torch.equal(mixture, plain)


def test_a_cnn_sees_no_colours_that_are_changed_for_the_student():
    data = make_dataset()
    teacher = CnnTeacher(create_model("resnet8", 5), None, "off")
    batch = batch_of(data, augment=Augment(color_jitter=1.0), plain=True)
    assert not torch.equal(batch.image, batch.plain)
    same = batch_of(data)  # the same crops
    assert torch.equal(batch.plain, same.image)
    found, expected = (teacher("train", x).logits for x in (batch, same))
    assert torch.equal(found, expected)
    assert batch_of(data, augment=Augment(blur=1.0)).plain is None


def test_the_classification_of_a_mix_is_mixed():
    torch.manual_seed(0)
    logits, target = torch.randn(5, 3), torch.tensor([0, 2, -1, 1, 1])
    batch = batch_of(make_dataset(), mixup=0.5)
    batch = batch._replace(target=target, mix=torch.tensor([0.9, 0.2, 0.5, 1.0, 0.0]))
    log = F.log_softmax(logits, dim=1)
    expected = 0.0
    for i in range(5):
        for row, share in ((i, float(batch.mix[i])), (4 - i, 1 - float(batch.mix[i]))):
            expected -= share * float(log[i, target[row]]) if target[row] >= 0 else 0
    assert float(mean_cross_entropy(logits, batch)) == pytest.approx(expected / 5, rel=1e-5)
    whole = batch._replace(mix=torch.ones(5), target=target.clamp(min=0))
    assert float(mean_cross_entropy(logits, whole)) == pytest.approx(float(F.cross_entropy(logits, whole.target)))


def test_a_run_that_was_stopped_inside_an_epoch_sees_the_same_augmented_views(train, tmp_path, monkeypatch):
    options = ["--augment", "strong", "--mixup", 0.3, "--teacher_views", 0, "--epochs", 2, "--save_steps", 2]
    whole = train(*options, save_dir=tmp_path / "whole")
    calls, recolour = [], Augment.recolour

    def stopped(augment, *args):
        calls.append(1)
        if len(calls) == 8:  # in the second epoch
            raise KeyboardInterrupt
        return recolour(augment, *args)

    monkeypatch.setattr(Augment, "recolour", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(*options)
    monkeypatch.setattr(Augment, "recolour", recolour)
    again = train(*options)
    assert read_metrics(again) == read_metrics(whole)
    assert_equal_tensors(load(again / "resnet8_last.pth")["model"], load(whole / "resnet8_last.pth")["model"])


def test_augmentation_is_for_training_alone():
    dataset = make_dataset()
    opt = Namespace(augment="strong", crop_scale=0.2, color_jitter=0.4, gray=0.2, blur=0.5)
    made = Loader(dataset.test, "test", 20, CPU, augment=augmentation(opt), mixup=1.0)
    plain = Loader(dataset.test, "test", 20, CPU)
    assert torch.equal(next(made.epoch()).image, next(plain.epoch()).image)
