import math

import numpy as np
import pytest
import torch

from dataset import ImageDataset, load_dataset, shapes
from dataset.shapes import CLASSES, SIZE, draw


@pytest.fixture(scope="module")
def dataset() -> ImageDataset:
    return load_dataset("shapes", "no/such/folder")


def test_splits_are_balanced_and_named(dataset):
    assert len(dataset.classes) == len(set(dataset.classes)) == 100
    assert "striped circle" in dataset.classes
    for split, count in ((dataset.train, shapes.TRAIN_PER_CLASS), (dataset.test, shapes.TEST_PER_CLASS)):
        assert split.images.shape == (100 * count, 3, SIZE, SIZE)
        assert split.images.dtype == torch.uint8
        assert split.targets.bincount().tolist() == [count] * 100


def test_drawing_depends_on_no_global_state(dataset):
    np.random.seed(7)  # noqa: NPY002  (that it is not used is what is tested)
    torch.manual_seed(7)
    again = load_dataset("shapes", "./data")
    assert again.fingerprint() == dataset.fingerprint()
    assert torch.equal(again.train.targets, dataset.train.targets)


def test_no_image_is_in_two_splits():
    splits = [draw(name, 3).images for name in ("train", "test", "captioned")]
    distinct = {image.numpy().tobytes() for split in splits for image in split}
    assert len(distinct) == 3 * 300


def test_captioned_images_are_drawn_only_when_asked_for(monkeypatch):
    drawn = []
    monkeypatch.setattr(shapes, "draw", lambda split, per_class: drawn.append(split) or draw(split, 1))
    dataset = shapes.load_shapes("")
    dataset.fingerprint()
    assert drawn == ["train", "test"]
    dataset.captioned()
    assert drawn == ["train", "test", "captioned"]


def test_captioned_images_are_the_training_split_where_there_are_no_more(dataset):
    few = ImageDataset("few", dataset.classes, dataset.train, dataset.test)
    assert few.captioned() is few.train


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("circle", math.pi * 0.85**2),
        ("square", 1.5**2),
        ("triangle", 3 * math.sqrt(3) * 0.55**2),
        ("cross", 2 * 1.9 * 0.66 - 0.66**2),
        ("ring", math.pi * (0.95**2 - 0.35**2)),
        ("bar", 2 * 0.84),
    ],
)
def test_area_of_shape(shape, area):
    x, y = np.meshgrid(np.linspace(-1.5, 1.5, 601), np.linspace(-1.5, 1.5, 601))
    inside = shapes._SHAPES[shape](x, y) < 0
    assert inside.sum() * 0.005**2 == pytest.approx(area, rel=0.01)


def test_star_has_five_equal_points():
    x, y = np.random.default_rng(0).uniform(-1.2, 1.2, (2, 1000))
    for turn in range(1, 5):
        turned = shapes._rotate(x, y, np.float64(2 * np.pi * turn / 5))
        np.testing.assert_allclose(shapes._SHAPES["star"](*turned), shapes._SHAPES["star"](x, y), atol=5e-3)


def test_every_shape_and_texture_differs_from_the_others():
    x, y = np.meshgrid(np.linspace(-1, 1, 64), np.linspace(-1, 1, 64))
    inside = [field(x, y) < 0 for field in shapes._SHAPES.values()]
    u, v = 4 * x, 4 * y
    filled = [field(u, v, np.hypot(u, v), np.hypot(x, y) * 12 - 10) for field in shapes._TEXTURES.values()]
    for masks in (inside, filled):
        for i, one in enumerate(masks):
            assert all(np.abs(one.astype(float) - other).mean() > 0.05 for other in masks[:i])


def test_pixels_alone_do_not_give_the_class_away(dataset):
    """The nearest training image and the nearest class mean are right for about one image in ten."""
    train, test = (split.images.flatten(1).float() for split in (dataset.train, dataset.test))
    nearest = dataset.train.targets[torch.cdist(test, train).argmin(dim=1)]
    means = torch.stack([train[dataset.train.targets == c].mean(dim=0) for c in range(len(CLASSES))])
    for predicted in (nearest, torch.cdist(test, means).argmin(dim=1)):
        assert (predicted == dataset.test.targets).float().mean() < 0.15
