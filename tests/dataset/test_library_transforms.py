"""The teacher's pixels, over every view, against the evaluation transforms of the libraries that teachers come from."""

import numpy as np
import open_clip
import pytest
import timm.data
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF
from torchvision.transforms._presets import ImageClassification

from dataset.resize import resize
from dataset.views import crop_resize_flip, normalize

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def timm_transform(size: int, interpolation: str):
    return timm.data.create_transform(
        (3, size, size), interpolation=interpolation, mean=MEAN, std=STD, crop_pct=1.0, is_training=False
    )


def torchvision_transform(size: int, interpolation: str):
    mode = InterpolationMode(interpolation)
    return ImageClassification(crop_size=size, resize_size=size, mean=MEAN, std=STD, interpolation=mode)


def open_clip_transform(size: int, interpolation: str):
    return open_clip.image_transform(size, is_train=False, mean=MEAN, std=STD, interpolation=interpolation)


CASES = [
    (timm_transform, "bicubic"),
    (timm_transform, "bilinear"),
    (timm_transform, "lanczos"),
    (torchvision_transform, "bilinear"),
    (torchvision_transform, "bicubic"),
    (open_clip_transform, "bicubic"),
    (open_clip_transform, "bilinear"),
]


def picture(size: int = 32) -> np.ndarray:
    """(size, size, 3): noise on one half; on the other nothing but 0 and 255, whose overshoot is clipped."""
    image = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    image[: size // 2] = np.where(image[: size // 2] > 127, 255, 0)
    return image


@pytest.mark.parametrize(("library", "interpolation"), CASES)
@pytest.mark.parametrize("size", [48, 20])
def test_every_views_pixels_are_those_of_the_librarys_own_transform(library, interpolation, size):
    transform, image = library(size, interpolation), Image.fromarray(picture())
    padded, expected = ImageOps.expand(image, 4), []
    for view in range(162):
        dy, dx, flip = view // 18, view // 2 % 9, view % 2
        seen = transform(padded.crop((dx, dy, dx + 32, dy + 32)))
        expected.append(seen.flip(-1) if flip else seen)
    images = torch.from_numpy(picture()).permute(2, 0, 1).expand(162, -1, -1, -1)
    pixels = crop_resize_flip(images, torch.arange(162), size, interpolation)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    levels = torch.stack(expected).mul(std).add(mean).mul(255)
    assert (levels - pixels).abs().max() < 1e-3  # which is the same of 256 levels
    torch.testing.assert_close(normalize(pixels, (MEAN, STD)), torch.stack(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("interpolation", ["box", "bilinear", "hamming", "bicubic", "lanczos"])
@pytest.mark.parametrize(("size_in", "size_out"), [(32, 33), (32, 224), (64, 48), (50, 7)])
def test_every_interpolation_is_pillows(interpolation, size_in, size_out):
    resample = Image.Resampling[interpolation.upper()]
    expected = np.asarray(Image.fromarray(picture(size_in)).resize((size_out, size_out), resample))
    found = resize(torch.from_numpy(picture(size_in)).permute(2, 0, 1)[None], size_out, interpolation)
    assert np.array_equal(found[0].permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [20, 48])
def test_without_antialiasing_pixels_are_those_of_torchvisions_transforms_of_tensors(interpolation, size):
    images = torch.from_numpy(picture()).permute(2, 0, 1)[None].contiguous()
    mode = InterpolationMode(interpolation)
    found = resize(images, size, interpolation, antialias=False)
    assert torch.equal(found, TF.resize(images, [size, size], mode, antialias=False))
    exact = F.interpolate(images.double(), (size, size), mode=interpolation, align_corners=False).clamp(0, 255)
    assert (found - exact).abs().max() <= 0.5 + 1e-4


@pytest.mark.parametrize(
    ("interpolation", "antialias", "message"),
    [
        ("nearest", True, "known: box, bilinear"),
        ("random", True, "known: box"),
        ("lanczos", False, "only bilinear and bicubic"),
    ],
)
def test_another_interpolation_is_refused(interpolation, antialias, message):
    with pytest.raises(ValueError, match=message):
        resize(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), 8, interpolation, antialias)
