"""The loaders of a run: for training, for testing, and for choosing the best epoch."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from dataset import ImageDataset
from dataset.augment import Augment
from dataset.loader import Loader, eval_batch_size
from dataset.splits import holdout_rows, keep_labels
from dataset.views import Normalization, normalization_of
from errors import InputError

from . import distributed
from .data_options import check_labels


@dataclass(frozen=True)
class Loaders:
    """A run's loaders.

    Attributes:
        train, test: loaders of the two splits.
        val: loader of the rows that are held out of the training split; None where none are.
        held_out: loader of these rows, or else of the test split, in batches as large as in training.
        targets: (N,) class of every training row, -1 for the rows that are not trained on; an image without a label
            is a class of its own.
        image_size: height and width of what a student sees.
        labelled: number of training rows with a label.
        classes: the classes' names, in the order of the targets.
        stored_size: height and width of the stored images; a student's test view is their centre.
    """

    train: Loader
    test: Loader
    val: Loader | None
    held_out: Loader
    targets: Tensor
    image_size: int
    labelled: int
    classes: list[str]
    stored_size: int

    def image_facts(self) -> dict:
        """The facts about its images that a student's file keeps for its users."""
        sizes = {"image_size": self.image_size, "stored_size": self.stored_size}
        return {"classes": self.classes, "normalization": self.test.normalization} | sizes


def augmentation(opt) -> Augment:
    """What the options make of the student's views; a teacher is trained on the data set's own."""
    if not hasattr(opt, "augment"):
        return Augment()
    return Augment(opt.augment != "none", opt.crop_scale, opt.color_jitter, opt.gray, opt.blur)


def build_loaders(
    opt, dataset: ImageDataset, images: bool = True, normalization: Normalization | None = None
) -> Loaders:
    """The loaders that the options describe; with many processes each gets its share.

    An image that has no label, of itself or by ``--labels``, is trained on where something is distilled, with target
    -1; the hold-out keeps its labels.

    Args:
        images: whether batches hold images: a head on a bank of embeddings needs none.
        normalization: mean and std of the images' channels; by default the protocol's, see ``normalization_of``.

    Raises:
        InputError: a hold-out of classes of one image each; a share of labels that a class is too small for; labels
            that are needed and are not there; or, with ``--sync_bn``, a last batch that leaves a process without a
            sample.
    """
    check_labels(opt, opt.labels * float((dataset.train.targets >= 0).double().mean()))
    device, clip = torch.device(opt.device), bool(opt.clip_tn)
    common = {
        "views": dataset.views,
        "normalization": normalization or normalization_of(clip),
        "images": images,
        "rank": distributed.rank(),
        "processes": distributed.count(),
    }
    # A process's batch norm needs two images where its maps are a pixel each, unless it is that of all processes.
    least = 1 if opt.sync_bn and distributed.count() > 1 else 2
    targets, rows, held = dataset.train.targets, torch.arange(len(dataset.train)), None
    if opt.holdout is not None and dataset.holdout is None:
        rows, held = holdout_rows(targets, opt.holdout)
        targets = targets.clone()
        targets[held] = -1
    if opt.labels < 1:
        targets = keep_labels(targets, opt.labels, dataset.classes)
    labelled = int((targets >= 0).sum())
    if not (getattr(opt, "alpha", 0) or getattr(opt, "beta", 0)):  # classification alone
        rows = rows[targets[rows] >= 0]
    train = Loader(
        dataclasses.replace(dataset.train, targets=targets),
        "train",
        opt.batch_size,
        device,
        rows=rows,
        training=True,
        seed=opt.seed,
        teacher_views=opt.teacher_views or None,
        shared=getattr(opt, "views", None) == "shared" or not clip,
        max_steps=opt.max_steps,
        augment=augmentation(opt),
        plain=not clip,
        mixup=getattr(opt, "mixup", 0.0),
        least=least,
        **common,
    )
    if opt.sync_bn and train.last < train.processes:
        # PyTorch's exchange takes float32 from those with samples and, under autocast, half of that from the others.
        raise InputError(
            f"--sync_bn: the last step of an epoch would have {train.last} samples for {train.processes} processes: "
            f"use another --batch_size than {opt.batch_size}"
        )
    size = eval_batch_size(opt.device, dataset.views.size)
    test = Loader(dataset.test, "test", size, device, **common)
    val = None if held is None else Loader(dataset.train, "train", size, device, rows=held, **common)
    measured = (dataset.test, "test") if held is None else (dataset.train, "train")
    held_out = Loader(*measured, opt.batch_size, device, rows=held, least=least, **common)
    unknown = rows[targets[rows] < 0]
    classes = targets.clone()
    classes[unknown] = len(dataset.classes) + unknown
    stored_size = dataset.test.images.shape[-1]
    return Loaders(train, test, val, held_out, classes, dataset.views.size, labelled, dataset.classes, stored_size)
