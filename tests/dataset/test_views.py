import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from dataset.views import (
    CIFAR100_NORMALIZATION,
    CLIP_NORMALIZATION,
    CropViews,
    crop_flip,
    crop_resize_flip,
    normalize,
    resize,
    view_order,
)

NUM_VIEWS, TEST_VIEW = 162, 80
ALL_VIEWS = [(dy, dx, flip) for dy in range(9) for dx in range(9) for flip in range(2)]


def noise(count: int, size: int = 32, seed: int = 0) -> np.ndarray:
    """(count, size, size, 3): noise, and images of nothing but 0 and 255, whose overshoot is clipped."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    images[::2] = np.where(images[::2] > 127, 255, 0)
    return images


def tensor(images) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def pil_view(image: np.ndarray, dy: int, dx: int, flip: int, size: int | None) -> np.ndarray:
    """The paper's pipeline, with the crop's offset and the coin given: pad, crop, resize, flip."""
    height, width = image.shape[:2]
    picture = TF.crop(TF.pad(Image.fromarray(image), 4), dy, dx, height, width)
    if size is not None:
        picture = TF.resize(picture, [size, size], InterpolationMode.BICUBIC)
    return np.asarray(TF.hflip(picture) if flip else picture)


@pytest.mark.parametrize("size", [32, 64])
def test_student_views_equal_torchvisions_on_pil_images(size):
    for image in noise(2, size):
        expected = tensor([pil_view(image, *view, None) for view in ALL_VIEWS])
        assert torch.equal(crop_flip(tensor([image] * NUM_VIEWS), torch.arange(NUM_VIEWS)), expected)


def test_all_teacher_views_equal_pils_at_224():
    images = tensor([noise(1)[0]])
    for start in range(0, NUM_VIEWS, 54):
        view = torch.arange(start, start + 54)
        expected = tensor([pil_view(noise(1)[0], *ALL_VIEWS[v], 224) for v in view])
        assert torch.equal(crop_resize_flip(images.expand(54, -1, -1, -1), view, 224), expected)


@pytest.mark.parametrize(
    ("size_in", "size_out"), [(32, 224), (32, 288), (32, 336), (32, 384), (32, 48), (32, 16), (64, 224), (64, 48)]
)
def test_teacher_views_equal_pils_at_every_size(size_in, size_out):
    images = noise(12, size_in)
    views = np.random.default_rng(size_out).integers(0, NUM_VIEWS, 12)
    expected = tensor([pil_view(image, *ALL_VIEWS[v], size_out) for image, v in zip(images, views, strict=True)])
    assert torch.equal(crop_resize_flip(tensor(images), torch.from_numpy(views), size_out), expected)


def test_resizing_is_pils_for_images_that_are_not_square():
    images = np.ascontiguousarray(noise(3, 40)[:, :23])
    expected = tensor([np.asarray(Image.fromarray(i).resize((56, 56), Image.Resampling.BICUBIC)) for i in images])
    assert torch.equal(resize(tensor(images), 56), expected)


def test_random_crop_and_flip_of_torchvision_draw_from_these_views():
    image = noise(2)[1]
    known = {view.numpy().tobytes() for view in crop_flip(tensor([image] * NUM_VIEWS), torch.arange(NUM_VIEWS))}
    draw = transforms.Compose([transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()])
    torch.manual_seed(0)
    seen = {tensor([np.asarray(draw(Image.fromarray(image)))]).numpy().tobytes() for _ in range(1500)}
    assert seen == known  # 162 views of 1500 draws: each is missed with probability 1e-4


def test_each_image_of_a_batch_gets_its_own_view():
    view = torch.arange(0, NUM_VIEWS, 11)
    images = tensor(noise(len(view)))
    for function in (crop_flip, lambda x, v: crop_resize_flip(x, v, 48)):
        alone = torch.cat([function(images[i : i + 1], view[i : i + 1]) for i in range(len(view))])
        assert torch.equal(function(images, view), alone)


def test_the_test_view_is_the_image_itself():
    images = tensor(noise(3))
    view = torch.full((3,), TEST_VIEW)
    assert CropViews(32).test == TEST_VIEW
    assert torch.equal(crop_flip(images, view), images)
    expected = tensor([np.asarray(Image.fromarray(i).resize((224, 224), Image.Resampling.BICUBIC)) for i in noise(3)])
    assert torch.equal(crop_resize_flip(images, view, 224), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_no_pixel(dtype):
    images, view = tensor(noise(4)), torch.tensor([0, 80, 81, 161])
    plain = crop_resize_flip(images, view, 224)
    normalized = normalize(plain, CLIP_NORMALIZATION)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(crop_resize_flip(images, view, 224), plain)
        assert torch.equal(normalize(plain, CLIP_NORMALIZATION), normalized)


@pytest.mark.parametrize("normalization", [CLIP_NORMALIZATION, CIFAR100_NORMALIZATION])
def test_normalising_equals_torchvisions_for_every_level(normalization):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    pipeline = transforms.Compose([transforms.ToTensor(), transforms.Normalize(*normalization)])
    result = normalize(tensor([levels]), normalization)
    assert result.dtype == torch.float32
    assert torch.equal(result[0], pipeline(Image.fromarray(levels)))


def test_every_images_order_is_a_permutation_with_the_image_itself_first():
    order = view_order(np.arange(500), NUM_VIEWS)
    assert (np.sort(order, axis=1) == np.arange(NUM_VIEWS)).all()
    assert (order[:, 0] == TEST_VIEW).all()
    assert len(np.unique(order, axis=0)) == 500


@pytest.mark.parametrize("num_views", [1, 2, 16, 161])
def test_fewer_views_are_the_first_of_more(num_views):
    order = view_order(np.arange(200), NUM_VIEWS)
    assert np.array_equal(view_order(np.arange(200), num_views), order[:, :num_views])


def test_an_images_order_depends_on_its_row_alone():
    order = view_order(np.arange(1000), 20)
    rows = np.random.default_rng(0).permutation(1000)[:77]
    assert np.array_equal(view_order(rows, 20), order[rows])
    assert np.array_equal(view_order(np.array([999]), 20), order[999:])


def test_views_follow_one_another_as_if_drawn_at_random():
    second = view_order(np.arange(50_000), 2)[:, 1]
    counts = np.delete(np.bincount(second, minlength=NUM_VIEWS), TEST_VIEW)
    expected = 50_000 / 161
    # Chi-square with 160 degrees of freedom has mean 160 and standard deviation 18.
    assert ((counts - expected) ** 2 / expected).sum() < 160 + 5 * 18


def test_the_order_is_the_one_that_banks_on_disk_were_built_with():
    order = view_order(np.arange(50_000), 16)
    assert order.dtype == np.uint8
    assert (
        hashlib.sha256(order.tobytes()).hexdigest()
        == "f8005dc659826a4410577b99982bd34a0e6201e0beaf90e771c49db98a2bd6c7"
    )


def test_the_order_sorts_the_views_by_splitmix64():
    def splitmix64(state: int) -> int:
        """The state-th output of the generator of seed 0, in whole numbers of Python's."""
        mask = 2**64 - 1
        z = state * 0x9E3779B97F4A7C15 & mask
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        return z ^ z >> 31

    assert splitmix64(1) == 0xE220A8397B1DCDAF  # as published
    for row in (0, 1, 49_999, 10**9):
        others = [view for view in range(NUM_VIEWS) if view != TEST_VIEW]
        others.sort(key=lambda view, row=row: splitmix64(row * NUM_VIEWS + view + 1))
        assert view_order(np.array([row]), NUM_VIEWS)[0].tolist() == [TEST_VIEW, *others]


@pytest.mark.parametrize("num_views", [0, -1, 163])
def test_a_number_of_views_that_no_image_has_is_refused(num_views):
    with pytest.raises(ValueError, match="1 to 162"):
        view_order(np.arange(3), num_views)
