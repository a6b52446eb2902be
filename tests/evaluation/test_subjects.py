"""The views of a data set, as a student of another size sees them."""

import copy
import pickle

import torch

from dataset.resize import resize
from dataset.views import CropViews
from evaluation.subjects import SeenAt


def test_views_at_another_size_are_copied_and_pickled_as_what_they_are():
    seen = SeenAt(CropViews(40), 32)
    for other in (copy.copy(seen), copy.deepcopy(seen), pickle.loads(pickle.dumps(seen))):
        assert other == seen
    assert (seen.count, seen.test) == (CropViews(40).count, CropViews(40).test)


def test_views_at_another_size_are_the_data_set_s_own_resized():
    views = CropViews(40)
    images = torch.randint(256, (3, 3, 40, 40), dtype=torch.uint8)
    index, view = torch.arange(3), torch.full((3,), views.test)
    found = SeenAt(views, 32).student(images, index, view)
    assert torch.equal(found, resize(images, 32))
