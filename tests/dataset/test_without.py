"""A data set without some of its classes."""

import dataclasses

import pytest
import torch

from conftest import make_dataset
from dataset import Split
from dataset.views import CropViews


def test_the_others_stay_as_they_are():
    made = make_dataset()
    unlabelled = made.train.targets.clone()
    unlabelled[3] = -1
    made = dataclasses.replace(made, train=Split(made.train.images, unlabelled), views=CropViews(40), sha256="0")
    left = made.without(["colour 3", "colour 0"])
    assert left.classes == ["colour 1", "colour 2", "colour 4"]
    assert left.views == made.views
    assert left.fingerprint() not in ("0", made.fingerprint())
    for before, after in ((made.train, left.train), (made.test, left.test)):
        rows = [row for row, target in enumerate(before.targets.tolist()) if target in (1, 2, 4, -1)]
        assert torch.equal(after.images, before.images[rows])
        names = [left.classes[target] if target >= 0 else None for target in after.targets]
        assert names == [made.classes[before.targets[row]] if before.targets[row] >= 0 else None for row in rows]


def test_what_cannot_be_left_out():
    made = make_dataset()
    with pytest.raises(ValueError, match="tiny has no class 'mauve'"):
        made.without(["mauve"])
    with pytest.raises(ValueError, match="without 4 of its 5 classes tiny has nothing to learn"):
        made.without(made.classes[1:])
