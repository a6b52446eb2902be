"""The data of pretrain_clip.py: images at the CLIP's resolution, and captions."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dataset import ImageDataset, Split
from dataset.loader import Loader, eval_batch_size

from . import distributed
from .contrastive import Images, caption_tokens


@dataclass(frozen=True)
class ClipData:
    """The data of a CLIP's training.

    Attributes:
        train, test: loaders of the images with captions, and of the test split.
        pixels, test_pixels: turn batches of these into the CLIP's input.
        tokens: every caption of every class, (classes, templates, length).
    """

    train: Loader
    test: Loader
    pixels: Images
    test_pixels: Images
    tokens: Tensor

    def sample(self) -> Tensor:
        """Test images, normalised, (B, 3, resolution, resolution)."""
        return self.test_pixels(next(self.test.epoch()))


def build_clip_data(opt, dataset: ImageDataset, captioned: Split) -> ClipData:
    """The loaders that the options describe; with many processes each gets its share.

    Args:
        captioned: the result of ``dataset.captioned()``; images without a label have no caption and are left out.
    """
    device, views = torch.device(opt.device), dataset.views
    # The loader only draws the teacher's views, which are resized to the teacher's resolution.
    place = {"images": False, "views": views, "rank": distributed.rank(), "processes": distributed.count()}
    least = 1 if opt.sync_bn and distributed.count() > 1 else 2  # see helper.data
    how = {"training": True, "seed": opt.seed, "max_steps": opt.max_steps, "least": least}
    rows = (captioned.targets >= 0).nonzero().flatten()
    train = Loader(captioned, "captioned", opt.batch_size, device, rows=rows, **how, **place)
    test = Loader(dataset.test, "test", eval_batch_size(opt.device, opt.resolution), device, **place)
    pixels, test_pixels = (Images(split, opt.resolution, device, views) for split in (captioned, dataset.test))
    return ClipData(train, test, pixels, test_pixels, caption_tokens(dataset.classes).to(device))
