"""The flags of the data set, its labels and its hold-out; what follows from pictures without labels."""

import argparse

from dataset import DATASETS, FROM_FILES, check_image_size
from distiller_zoo import METHODS
from errors import InputError

from .parser import Parser, number, positive_int

DATA_DIR = "./data"

# The share of the training pictures that is held out where there is nothing to test on.
_HELD_OUT = 0.1


def add_data_options(parser: Parser) -> argparse._ArgumentGroup:
    """Add the flags of the data set."""
    group = parser.add_argument_group("data")
    choices = (*DATASETS, *FROM_FILES)
    group.add_argument("--dataset", choices=choices, default="cifar100", help="data set; folder: your own images")
    what = "folder of the data sets; --dataset folder: the folder with train/CLASS/ and test/CLASS/ or val/CLASS/, or "
    what += "any folders and files, which are one data set without labels"
    group.add_argument("--data_dir", nargs="+", default=DATA_DIR, metavar="DIR", help=what)
    what = "folder: a list in the folder's place, a picture a line or NAME.csv with the columns path and label; names "
    what += "are relative to the list's folder"
    group.add_argument("--data_list", metavar="FILE", help=what)
    group.add_argument(
        "--image_size",
        type=positive_int,
        metavar="R",
        help="folder: height and width of the student's images in pixels",
    )
    what = "leave out up to so many image files that cannot be decoded"
    group.add_argument("--max_bad_images", type=number(int, 0), default=0, metavar="N", help=what)
    what = "decode large JPEGs at their full size: several times slower, for the pixels of the usual evaluation"
    group.add_argument("--exact_decode", action="store_true", help=what)
    return group


def add_holdout_option(parser: Parser) -> None:
    """Add ``--holdout``, the rows that choose the best epoch, and ``--patience``, the wait for a better one."""
    group = parser.add_argument_group("selection")
    what = "stop after so many tested epochs in a row that were no better than the best"
    group.add_argument("--patience", type=positive_int, metavar="N", help=what)
    group.add_argument(
        "--holdout",
        type=number(float, 0, 0.5, above=True),
        metavar="F",
        help="hold out this fraction of the training set and choose the best epoch on it, not on the test set; in a "
        f"folder without test images it becomes the test set, {_HELD_OUT} if unset",
    )


def add_probe_options(parser: Parser) -> None:
    """Add the flags of the k-NN accuracy on another data set during training."""
    group = parser.add_argument_group("probe")
    what = "measure the k-NN accuracy of the student's features on this data set, which trains nothing"
    group.add_argument("--probe", choices=(*DATASETS, *FROM_FILES), help=what)
    group.add_argument("--probe_dir", metavar="DIR", help="its folder; if unset, --data_dir, or ./data")
    group.add_argument("--probe_freq", type=positive_int, default=10, metavar="N", help="after every so many epochs")


def check_data(parser: Parser, opt: argparse.Namespace) -> None:
    """Refuse options of the data set that do not go together; a single folder becomes a text."""
    if not isinstance(opt.data_dir, str) and len(opt.data_dir) == 1:
        (opt.data_dir,) = opt.data_dir
    if opt.dataset != "folder" and not isinstance(opt.data_dir, str):
        parser.error(f"--data_dir names {len(opt.data_dir)} folders, which only --dataset folder makes one of")
    if opt.data_list is not None and opt.dataset != "folder":
        parser.error(f"--data_list is for --dataset folder, not {opt.dataset}; leave it out")
    if opt.data_list is not None and opt.data_dir != DATA_DIR:
        parser.error("--data_list and --data_dir both say where the pictures are; leave one of them out")
    try:
        check_image_size(opt.dataset, opt.image_size)
    except ValueError as error:
        parser.error(str(error))
    if opt.max_bad_images and opt.dataset not in FROM_FILES:
        parser.error(f"--max_bad_images: {opt.dataset} is not decoded from image files; leave it out")
    if opt.exact_decode and opt.dataset not in FROM_FILES:
        parser.error(f"--exact_decode: {opt.dataset} is not decoded from image files; leave it out")


def add_label_options(parser: Parser, what: str, low: float | None = None) -> None:
    """Add ``--labels``, the share of the training images that has a label.

    Args:
        what: says what becomes of the other images.
        low: the share must be above this number; None where it may be 0.
    """
    group = parser.add_argument_group("labels")
    group.add_argument(
        "--labels",
        type=number(float, low or 0, 1, above=low is not None),
        metavar="F",
        help=f"share of each class's training images that has a label, the same images for every seed; {what}; if "
        "unset, 1, or 0 where no picture has a label",
    )


def follow_data(parser: Parser, opt: argparse.Namespace) -> None:
    """Fill in the unset options that follow from one's own pictures, each told in one line; see ``known_splits``.

    Without a label in the training set these are ``--labels 0``, and for a student ``--joint teacher`` and ``-r 0``.
    Without anything to test on it is ``--holdout``.
    """
    labels, tests = True, True
    if opt.dataset == "folder":
        from dataset.listing import known_splits  # here, as it knows the pictures' formats by Pillow

        try:
            labels, tests = known_splits(opt.data_dir, opt.data_list)
        except (InputError, OSError) as error:
            parser.error(" ".join(str(error).split()))
    chosen = []
    if not labels:
        one = isinstance(opt.data_dir, str)
        source = f"{opt.data_dir} holds" if one else f"{' and '.join(opt.data_dir)} hold"
        lacks = f"{source} no train/CLASS/, so " if opt.data_list is None else ""
        chosen.append(("labels", 0.0, f"{lacks}no picture has a label"))
        if hasattr(opt, "gamma"):
            chosen.append(("gamma", 0.0, "there is nothing to classify"))
        if opt.clip_tn and opt.path_t is None and getattr(opt, "distill", None) != "none":
            chosen.append(("joint", "teacher", "the joint space is the frozen encoder's own"))
    if not tests:
        told = "this share of the pictures is held out, as there is nothing else to measure the student on"
        chosen.append(("holdout", _HELD_OUT, told))
    if getattr(opt, "probe", None) is not None and opt.probe_dir is None:
        opt.probe_dir = DATA_DIR if opt.dataset == "folder" else opt.data_dir
    for name, value, why in chosen:
        if getattr(opt, name) is None:
            setattr(opt, name, value)
            flag = "-r" if name == "gamma" else f"--{name}"
            print(f"{flag} {value if isinstance(value, str) else f'{value:g}'}: {why}")
    if opt.labels is None:
        opt.labels = 1.0
    if getattr(opt, "joint", None) is None:
        opt.joint = "projected"


def check_labels(opt, share: float) -> None:
    """Raise an InputError where the options need labels that are missing.

    Args:
        opt: the options of train_student.py or train_teacher.py; the latter needs labels, but not for every image.
        share: share of the training images that have a label.
    """
    if share == 1:
        return
    distill = getattr(opt, "distill", None)
    if distill is not None and METHODS[distill].needs_labels(opt):
        others = {name: other for name, other in METHODS.items() if other.build and not other.needs_labels(opt)}
        able = ", ".join(name for name, other in others.items() if not (opt.clip_tn and other.needs_maps))
        what = f"{distill} --mode relax" if distill == "crd" else distill
        raise InputError(
            f"--distill {what} needs the class of every image, but only a share of {share:.3g} has a label: use "
            f"{'' if opt.labels == 1 else '--labels 1, or '}one of {able}"
        )
    if share > 0:
        return
    if distill is None:
        raise InputError("a teacher is trained by the classes of its images, but none has a label")
    if opt.gamma:
        raise InputError(f"-r {opt.gamma:g} weighs the classification, but no image has a label: use -r 0 (and -b 1)")
    untrained = "the teacher's head would be trained by the classes of the images, but none has a label"
    if opt.clip_tn and opt.path_t is None and opt.joint == "projected":
        raise InputError(f"{untrained}: use --joint teacher, which has no head, or --path_t with a trained head")
    if not opt.clip_tn and METHODS[distill].needs(clip=False).joint:
        raise InputError(
            f"{untrained}: use a frozen encoder with --joint teacher, or a method that needs no joint space"
        )
