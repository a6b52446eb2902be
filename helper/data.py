"""The loaders of a run: what it trains on, tests on, and chooses its best epoch by."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dataset import ImageDataset
from dataset.loader import Loader, holdout_rows
from dataset.views import CIFAR100_NORMALIZATION, CLIP_NORMALIZATION, NUM_VIEWS

from . import distributed

# Samples per batch of the test pass, by device: any number gives the same result, a large one is fast.
EVAL_BATCH_SIZE = {"cpu": 500, "cuda": 2500}


@dataclass(frozen=True)
class Loaders:
    """A run's loaders.

    Attributes:
        train, test: of the two splits.
        val: of the rows that are held out of the training split; None where none are.
        targets: (N,) class of every training row, -1 for the rows that are held out.
        image_size: height and width of the images.
    """

    train: Loader
    test: Loader
    val: Loader | None
    targets: Tensor
    image_size: int


def build_loaders(opt, dataset: ImageDataset, images: bool = True) -> Loaders:
    """The loaders that the options describe; of many processes, each gets its share.

    Under the paper's protocol images are normalised as CLIP's are, under RepDistiller's as its own.

    Args:
        images: whether batches hold images: a head on a bank of embeddings needs none.

    Raises:
        ValueError: a hold-out that a class is too small for.
    """
    device, clip = torch.device(opt.device), bool(opt.clip_tn)
    common = {
        "normalization": CLIP_NORMALIZATION if clip else CIFAR100_NORMALIZATION,
        "images": images,
        "rank": distributed.rank(),
        "processes": distributed.count(),
    }
    targets, rows, held = dataset.train.targets, None, None
    if getattr(opt, "holdout", None) is not None:
        rows, held = holdout_rows(targets, opt.holdout)
        targets = targets.clone()
        targets[held] = -1
    train = Loader(
        dataset.train,
        "train",
        opt.batch_size,
        device,
        rows=rows,
        training=True,
        seed=opt.seed,
        teacher_views=opt.teacher_views or NUM_VIEWS,
        shared=getattr(opt, "views", None) == "shared" or not clip,
        max_steps=opt.max_steps,
        **common,
    )
    size = EVAL_BATCH_SIZE[opt.device]
    test = Loader(dataset.test, "test", size, device, **common)
    val = None if held is None else Loader(dataset.train, "train", size, device, rows=held, **common)
    return Loaders(train, test, val, targets, dataset.train.images.shape[-1])
