import contextlib
import hashlib
import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from dataset.resize import _resize_boxes_at_once, resize, resize_boxes
from dataset.views import (
    CIFAR100_NORMALIZATION,
    CLIP_NORMALIZATION,
    CropViews,
    ResizedCropViews,
    crop_flip,
    crop_resize_flip,
    normalize,
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


def pil_view(image: np.ndarray, dy: int, dx: int, flip: int, size: int | None, padding: int = 4) -> np.ndarray:
    """The paper's pipeline, with the crop's offset and the coin given: pad, crop, resize, flip."""
    height, width = image.shape[:2]
    picture = TF.crop(TF.pad(Image.fromarray(image), padding), dy, dx, height, width)
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
@pytest.mark.parametrize("padding", [4, 12])
def test_fewer_views_are_the_first_of_more(num_views, padding):
    order = view_order(np.arange(200), 2 * (2 * padding + 1) ** 2, padding)
    assert np.array_equal(view_order(np.arange(200), num_views, padding), order[:, :num_views])


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
    for row, (padding, count, test) in itertools.product((0, 49_999, 10**9), ((4, 162, 80), (8, 578, 288))):
        others = [view for view in range(count) if view != test]
        others.sort(key=lambda view, row=row, count=count: splitmix64(row * count + view + 1))
        assert view_order(np.array([row]), count, padding)[0].tolist() == [test, *others]


@pytest.mark.parametrize("num_views", [0, -1, 163])
def test_a_number_of_views_that_no_image_has_is_refused(num_views):
    with pytest.raises(ValueError, match="1 to 162"):
        view_order(np.arange(3), num_views)


@pytest.mark.parametrize(("size", "count", "test"), [(32, 162, 80), (64, 578, 288), (96, 1250, 624)])
def test_views_of_other_sizes_are_padded_by_an_eighth(size, count, test):
    views = CropViews(size)
    assert (views.padding, views.count, views.test) == (size // 8, count, test)
    offsets = size // 4 + 1
    drawn = [0, 1, test, test + 1, count - 1, *np.random.default_rng(0).integers(0, count, 7).tolist()]
    image = noise(1, size)[0]
    where = [(view // 2 // offsets, view // 2 % offsets, view % 2) for view in drawn]
    stored, index, view = tensor([image] * len(drawn)), torch.arange(len(drawn)), torch.tensor(drawn)
    expected = tensor([pil_view(image, *place, None, size // 8) for place in where])
    assert torch.equal(views.student(stored, index, view), expected)
    assert torch.equal(expected[2], stored[2])
    expected = tensor([pil_view(image, *place, 48, size // 8) for place in where])
    assert torch.equal(views.teacher(stored, index, view, 48), expected)


def test_the_order_of_many_views_holds_each_once_in_numbers_that_are_large_enough():
    order = CropViews(96).order(4000, 1250)  # more rows than are sorted at a time
    assert order.dtype == torch.int16
    assert (order.sort(dim=1).values == torch.arange(1250)).all()
    assert (order[:, 0] == 624).all()
    assert np.array_equal(order[3999:], view_order(np.array([3999]), 1250, 12))


PHOTOS = ResizedCropViews(224)


def drawn_boxes(count: int, stored: int = 256, index: int | None = None) -> np.ndarray:
    """(count, 5): top, left, height, width and flip; of views of one image, or of one view of many images."""
    rows, one = torch.arange(count), torch.full((count,), 1 if index is None else index)
    boxes, flip = PHOTOS.boxes(rows, one, stored) if index is None else PHOTOS.boxes(one, rows + 1, stored)
    return torch.cat([boxes, flip[:, None]], dim=1).numpy()


@pytest.fixture(scope="module")
def torchvisions_boxes() -> np.ndarray:
    torch.manual_seed(0)
    image = torch.zeros(1, 256, 256)
    draw = transforms.RandomResizedCrop(224)
    return np.array([draw.get_params(image, draw.scale, draw.ratio) for _ in range(6000)])


@pytest.mark.parametrize("index", [None, 7])
def test_boxes_of_photographs_are_distributed_as_torchvisions(torchvisions_boxes, index):
    ours, theirs = drawn_boxes(6000, index=index).T, torchvisions_boxes.T
    assert abs(ours[4].mean() - 0.5) < 0.03

    def measured(top, left, height, width):
        inside = [offset / np.maximum(256 - length, 1) for offset, length in ((top, height), (left, width))]
        return {"area": height * width, "ratio": width / height, "top": inside[0], "left": inside[1], "width": width}

    for (name, a), b in zip(measured(*ours[:4]).items(), measured(*theirs).values(), strict=True):
        assert stats.ks_2samp(a, b).pvalue > 1e-3, name
        hist, edges = np.histogram(b, bins=12)
        counts = np.stack([np.histogram(a, bins=edges)[0], hist])
        assert stats.chi2_contingency(counts[:, counts.sum(0) > 0]).pvalue > 1e-3, name


def test_boxes_lie_in_the_image_and_differ_from_view_to_view():
    for stored in (111, 256):
        top, left, height, width, _ = drawn_boxes(3000, stored, index=0).T
        assert min(top.min(), left.min()) == 0
        assert max((top + height).max(), (left + width).max()) == stored
        assert min(height.min(), width.min()) > 0.2 * stored
    boxes = np.concatenate([drawn_boxes(1000, index=index) for index in range(3)])
    assert len(np.unique(boxes, axis=0)) > 2950


def test_where_no_attempt_fits_it_is_all_of_the_image(monkeypatch):
    monkeypatch.setattr(ResizedCropViews, "_ATTEMPTS", 1)
    whole = (drawn_boxes(2000, index=3)[:, :4] == [0, 0, 256, 256]).all(axis=1)
    assert 0.1 < whole.mean() < 0.2  # of a square, an attempt in seven


def test_boxes_are_those_that_banks_on_disk_were_built_with():
    boxes = np.concatenate([drawn_boxes(500), drawn_boxes(500, index=10**7)])
    digest = hashlib.sha256(boxes.astype(np.int64).tobytes()).hexdigest()
    assert digest == "9e7e4656e821a6ec1b0665085ad64f48ef39788f2fc9a5b40c012d83eac4d6d2"


def stored_photos(count: int, stored: int) -> torch.Tensor:
    """In the memory format that is fastest."""
    return tensor(noise(count, stored)).contiguous(memory_format=torch.channels_last)


def test_the_test_view_of_a_photograph_is_its_centre():
    images, index = stored_photos(3, 37), torch.arange(3)
    views = ResizedCropViews(32)
    test = torch.full((3,), views.test)
    centre = images[:, :, 2:34, 2:34]
    assert torch.equal(views.student(images, index, test), centre)
    expected = torch.nn.functional.interpolate(centre, (48, 48), mode="bicubic", antialias=True)
    assert torch.equal(views.teacher(images, index, test, 48), expected)


@pytest.mark.parametrize(("size", "interpolation"), [(56, "bilinear"), (24, "bicubic"), (96, "bicubic")])
def test_photographs_are_cropped_and_resized_as_by_torchvision_to_a_level_or_two(size, interpolation):
    images, index, view = stored_photos(40, 64), torch.arange(40) * 10**5, torch.arange(40) % 9
    views = ResizedCropViews(56)
    boxes, flip = views.boxes(index, view, 64)
    expected = []
    for image, box, mirrored in zip(images, boxes.tolist(), flip.tolist(), strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        picture = TF.resized_crop(picture, *box, [size, size], InterpolationMode(interpolation))
        expected.append(np.asarray(TF.hflip(picture) if mirrored else picture))
    found = views.teacher(images, index, view, size, interpolation)
    assert found.is_contiguous(memory_format=torch.channels_last)
    apart = (found.int() - tensor(expected).int()).abs()
    assert apart.max() <= (1 if interpolation == "bilinear" else 2)
    assert apart.double().mean() < 0.1
    assert torch.equal(views.teacher(images.contiguous(), index, view, size, interpolation), found)
    if size == views.size:
        assert torch.equal(views.student(images, index, view), found)


def test_a_view_of_a_photograph_is_the_same_in_any_batch():
    images, index, view = stored_photos(30, 37), torch.arange(30) + 5, torch.arange(30) % 7
    views = ResizedCropViews(32)
    whole = views.student(images, index, view)
    some = torch.randperm(30, generator=torch.Generator().manual_seed(0))[:11]
    assert torch.equal(views.student(images[some], index[some], view[some]), whole[some])
    assert not torch.equal(views.student(images, index + 1, view), whole)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [56, 24, 96])
def test_what_gpus_compute_of_boxes_is_what_cpus_do_bit_for_bit(size, interpolation):
    """Boxes of every length, alone on this device: the formula has no step that another device may round otherwise."""
    generator = torch.Generator().manual_seed(size)
    height, width = torch.randperm(64, generator=generator) + 1, torch.arange(64) + 1
    top, left = ((torch.rand(64, generator=generator) * (65 - length)).long() for length in (height, width))
    boxes, images = torch.stack([top, left, height, width], dim=1), stored_photos(64, 64)
    expected = resize_boxes(images, boxes, torch.zeros(64).long(), size, interpolation)
    assert torch.equal(_resize_boxes_at_once(images, boxes, size, interpolation), expected)


def test_boxes_that_shrink_to_less_than_a_quarter_are_within_one_level():
    """Sums in float32 are then no longer exact."""
    images, generator = stored_photos(64, 96), torch.Generator().manual_seed(0)
    length = torch.randint(64, 97, (64,), generator=generator)
    start = (torch.rand(64, generator=generator) * (97 - length)).long()
    boxes = torch.stack([start, start, length, length.flip(0).clamp(max=96 - start)], dim=1)
    for interpolation in ("bilinear", "bicubic"):
        expected = resize_boxes(images, boxes, torch.zeros(64).long(), 8, interpolation).int()
        differences = (_resize_boxes_at_once(images, boxes, 8, interpolation).int() - expected).abs()
        assert differences.max() <= 1
        assert differences.double().mean() < 1e-3


def test_the_weights_of_a_resize_are_copied_to_a_device_once(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # there is none for this device

    class Copies(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            if function.overloadpacket.__name__ == "_to_copy":
                Copies.seen += args[0].device != made.device
            return made

    images, view = torch.zeros(2, 3, 24, 24, dtype=torch.uint8, device="meta"), torch.zeros(2, device="meta").long()
    found = []
    for _ in range(3):
        with Copies():
            crop_resize_flip(images, view, 36, padding=3)
        found.append(Copies.seen)
    assert found[0] > 0
    assert found == found[:1] * 3


@pytest.mark.parametrize(("interpolation", "antialias"), [("lanczos", True), ("bilinear", False)])
def test_other_ways_of_resizing_photographs_are_those_of_whole_pictures(interpolation, antialias):
    images, index, view = stored_photos(6, 37), torch.arange(6), torch.arange(6) + 1
    views = ResizedCropViews(32)
    boxes, flip = views.boxes(index, view, 37)
    found = views.teacher(images, index, view, 40, interpolation, antialias)
    for i, (top, left, height, width) in enumerate(boxes.tolist()):
        box = images[i : i + 1, :, top : top + height, left : left + width]
        expected = resize(box, 40, interpolation, antialias)
        assert torch.equal(found[i : i + 1], expected.flip(-1) if flip[i] else expected)
