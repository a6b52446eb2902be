"""The student's augmentation, against plain torchvision and formulas, and its numbers."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision.transforms import functional as TF

from conftest import make_dataset
from dataset.augment import Augment, mixed
from dataset.images import Split
from dataset.loader import Loader
from dataset.views import CLIP_NORMALIZATION, CropViews, ResizedCropViews, normalize, uniforms

CPU = torch.device("cpu")
STRONG = Augment(crop_scale=0.2, color_jitter=0.4, gray=0.2, blur=0.5)


def pictures(count: int, size: int = 32) -> torch.Tensor:
    """Soft shapes: (count, 3, size, size) uint8."""
    rng = np.random.default_rng(0)
    drawn = [Image.fromarray(rng.integers(60, 196, (5, 5, 3), dtype=np.uint8)) for _ in range(count)]
    arrays = [np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC)) for picture in drawn]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def test_numbers_are_uniform_and_follow_row_and_number_alone():
    index, number = torch.arange(2000), torch.arange(2000) % 7 + 1
    drawn = uniforms(index, number, 31)
    assert torch.equal(drawn[5:9], uniforms(index[5:9], number[5:9], 31))
    assert torch.equal(drawn[:, :3], uniforms(index, number, 3))
    assert min(stats.kstest(column.numpy(), "uniform").pvalue for column in drawn.T) > 1e-4
    correlations = np.corrcoef(drawn.T.numpy()) - np.eye(31)
    assert np.abs(correlations).max() < 0.1


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_view_is_the_same_in_every_batch(memory_format):
    images, index = pictures(12).contiguous(memory_format=memory_format), torch.arange(12) * 3
    view, number = torch.arange(12), torch.arange(12) * 11 + 1

    def seen(rows):
        pixels = STRONG.crop(CropViews(32), images[rows], index[rows], view[rows], number[rows])
        return STRONG.recolour(pixels, index[rows], number[rows])

    whole = seen(torch.arange(12))
    assert whole.dtype == torch.uint8 and whole.shape == (12, 3, 32, 32)
    for rows in ([7], [3, 1], [11, 5, 0, 2, 9]):
        assert torch.equal(seen(torch.tensor(rows)), whole[rows])
    assert not torch.equal(seen(torch.arange(12)), STRONG.recolour(images, index, number))


def test_each_number_gives_another_view():
    images = pictures(1).expand(50, -1, -1, -1)
    seen = Augment(color_jitter=0.4).recolour(images, torch.zeros(50, dtype=torch.int64), torch.arange(1, 51))
    assert 0.1 < (seen == images).flatten(1).all(1).double().mean() < 0.35  # a fifth stays as it is
    assert len(torch.unique(seen.flatten(1), dim=0)) > 35


def drawn_of(count: int) -> list[torch.Tensor]:
    return [torch.full((count,), 0.5, dtype=torch.float64) for _ in range(8)]


@pytest.mark.parametrize(
    ("place", "factor", "adjust"),
    [(0, 1.3, TF.adjust_brightness), (1, 0.7, TF.adjust_contrast), (2, 1.4, TF.adjust_saturation)],
)
def test_brightness_contrast_and_saturation_are_torchvisions(place, factor, adjust):
    images, drawn = pictures(4), drawn_of(4)
    drawn[place] = torch.full((4,), 0.5 + (factor - 1) / 0.8, dtype=torch.float64)
    found = Augment(color_jitter=0.4)._jitter(images, images.float(), drawn)
    expected = adjust(images.double() / 255, factor) * 255
    assert (found - expected).abs().max() < 0.1  # torchvision rounds luma's weights


def test_a_turn_of_the_hue_keeps_luma_and_saturation_and_comes_back():
    images, drawn = (0.3 * pictures(4) + 90).to(torch.uint8), drawn_of(4)  # no colour leaves the range
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    augment, seen = Augment(color_jitter=0.4), {}
    for turn in (0.0, 1.0):
        drawn[3] = torch.full((4,), turn, dtype=torch.float64)
        seen[turn] = augment._jitter(images, images.float(), drawn)
        luma, before = (seen[turn] * weights).sum(1), (images.float() * weights).sum(1)
        assert (luma - before).abs().max() < 0.01
        assert (seen[turn] - images.float()).abs().mean() > 1
    drawn[3] = torch.full((4,), 0.0, dtype=torch.float64)
    back = augment._jitter(seen[1.0].round().to(torch.uint8), seen[1.0], drawn)
    assert (back - images.float()).abs().max() < 0.5


def test_gray_pictures_have_the_luma_in_every_channel():
    images, number = pictures(40), torch.arange(1, 41)
    seen = Augment(gray=0.5).recolour(images, torch.arange(40), number)
    is_gray = (seen == seen[:, :1]).flatten(1).all(1)
    assert 10 <= is_gray.sum() <= 30
    expected = TF.rgb_to_grayscale(images[is_gray])
    assert (seen[is_gray].int() - expected.int()).abs().max() <= 1
    assert torch.equal(seen[~is_gray], images[~is_gray])


def test_a_blur_is_torchvisions():
    images = pictures(6, 112)
    chosen, drawn = torch.tensor([0.1, 0.9] * 3), torch.tensor([0.0, 0.5, 0.4, 0.5, 1.0, 0.5], dtype=torch.float64)
    found = Augment(blur=0.5)._blur(images.float(), chosen, drawn)
    for i in range(6):
        sigma = (0.1 + 1.9 * float(drawn[i])) / 2  # of 112 pixels, not 224
        expected = TF.gaussian_blur(images[i].double(), [7, 7], [sigma, sigma]) if i % 2 == 0 else images[i]
        assert (found[i] - expected).abs().max() < 1e-3


@pytest.mark.parametrize(("views", "stored"), [(CropViews(32), 32), (ResizedCropViews(28), 32)])
def test_crops_are_the_data_sets_or_the_image_or_resized_ones(views, stored):
    images, index, view = pictures(20, stored), torch.arange(20), torch.arange(20) + 3
    number = torch.arange(20) + 500
    assert torch.equal(Augment().crop(views, images, index, view, None), views.student(images, index, view))
    tested = views.student(images, index, torch.full_like(view, views.test))
    assert torch.equal(Augment(crops=False).crop(views, images, index, view, None), tested)
    seen = Augment(crop_scale=0.6).crop(views, images, index, view, number)
    expected = ResizedCropViews(views.size, 0.6).student(images, index, number)
    assert seen.shape[-1] == views.size and torch.equal(seen, expected)
    areas = ResizedCropViews(views.size, 0.6).boxes(index, number, 320)[0][:, 2:].prod(1) / 320**2
    assert 0.58 < areas.min() < 0.75


def loader(data, **options) -> Loader:
    return Loader(data.train, "train", 16, CPU, training=True, seed=3, teacher_views=2, **options)


def test_what_a_loader_draws_for_others_stays_as_it_is():
    data = make_dataset()
    plain, strong = (list(loader(data, **options).epoch(2)) for options in ({}, {"augment": STRONG, "mixup": 0.3}))
    for one, other in zip(plain, strong, strict=True):
        assert torch.equal(one.index, other.index) and torch.equal(one.teacher_view, other.teacher_view)
        assert one.mix is None and other.mix.shape == one.index.shape
        assert not torch.equal(one.image, other.image)
    again = list(loader(data, augment=STRONG, mixup=0.3).epoch(2))
    assert all(torch.equal(a.image, b.image) and torch.equal(a.mix, b.mix) for a, b in zip(strong, again, strict=True))


def test_an_augmented_batch_is_its_numbers_written_out():
    data = make_dataset()
    made = loader(data, augment=STRONG, plain=True)
    for draw, batch in zip(made.draws(1), made.epoch(1), strict=True):
        index, view, _, number = draw.numbers
        pixels = STRONG.crop(CropViews(32), data.train.images[index], index, view, number)
        assert torch.equal(batch.plain, normalize(pixels, CLIP_NORMALIZATION))
        assert torch.equal(batch.image, normalize(STRONG.recolour(pixels, index, number), CLIP_NORMALIZATION))
    assert next(made.epoch(1)).mix is None
    tested = Loader(data.test, "test", 16, CPU, augment=STRONG, plain=True, mixup=1.0)
    (batch, *_) = tested.epoch()
    assert batch.plain is None and batch.mix is None and len(next(tested.draws()).numbers) == 3


def test_shares_of_a_mix_have_the_beta_distribution():
    data = Split(torch.zeros(4000, 3, 8, 8, dtype=torch.uint8), torch.zeros(4000, dtype=torch.int64))
    made = Loader(data, "train", 500, CPU, training=True, mixup=0.4, views=CropViews(8))
    shares = torch.cat([batch.mix for batch in made.epoch(1)])
    assert stats.kstest(shares.numpy(), stats.beta(0.4, 0.4).cdf).pvalue > 1e-3
    assert shares.min() >= 0 and shares.max() <= 1


def test_the_first_is_mixed_with_the_last():
    x, share = torch.tensor([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]]), torch.tensor([0.75, 0.3, 1.0])
    assert torch.allclose(mixed(x, share), torch.tensor([[25.75, 51.5], [10.0, 20.0], [100.0, 200.0]]))


def test_photographs_can_be_augmented_too():
    images, index = pictures(3, 128), torch.arange(3)
    views, number = ResizedCropViews(112), torch.arange(3) + 1
    pixels = STRONG.crop(views, images, index, number, number)
    seen = STRONG.recolour(pixels, index, number)
    assert seen.shape == (3, 3, 112, 112) and math.isfinite(float(seen.float().mean()))
