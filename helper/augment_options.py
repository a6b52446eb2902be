"""The flags of the student's augmentation."""

import argparse

from distiller_zoo import METHODS

from .parser import Parser, number, weight

# What the parts are where they are unset. The strong one is SimCLR's (Chen et al., ICML 2020), with MoCo v2's jitter.
_PARTS = ("crop_scale", "color_jitter", "gray", "blur")
_PRESETS = {
    "none": (0.0, 0.0, 0.0, 0.0),
    "crop": (0.0, 0.0, 0.0, 0.0),
    "color": (0.0, 0.4, 0.0, 0.0),
    "strong": (0.08, 0.4, 0.2, 0.5),
}


def add_augment_options(parser: Parser) -> None:
    """Add ``--augment``, its parts and ``--mixup``."""
    group = parser.add_argument_group("augmentation", "of the student's views alone")
    what = "none: the image itself; crop: the data set's crops and flips; color: these and --color_jitter 0.4; strong: "
    what += "--crop_scale 0.08 --color_jitter 0.4 --gray 0.2 --blur 0.5"
    group.add_argument("--augment", choices=tuple(_PRESETS), default="crop", help=what)
    share = number(float, 0, 1)
    what = "random resized crops with at least this share of the picture; 0: the data set's own crops"
    group.add_argument("--crop_scale", type=share, metavar="F", help=what)
    what = "strength of the change of brightness, contrast, saturation and hue"
    group.add_argument("--color_jitter", type=share, metavar="F", help=what)
    group.add_argument("--gray", type=share, metavar="F", help="share of the views that lose their colour")
    group.add_argument("--blur", type=share, metavar="F", help="share of the views that are blurred")
    what = "mix pairs of images, for student and teacher alike, by shares of a beta distribution (A, A); the teacher "
    what += "has to see every batch: a CNN, or an encoder with --teacher_views 0"
    group.add_argument("--mixup", type=weight, default=0.0, metavar="A", help=what)


def resolve_augment(parser: Parser, opt: argparse.Namespace) -> None:
    """Fill in the parts that are unset, and refuse what does not go together."""
    shared = opt.clip_tn and opt.views == "shared"
    if shared and (opt.augment == "none" or opt.crop_scale):
        parser.error("--views shared gives the student the encoder's crops: leave --crop_scale and none out")
    if opt.augment == "none" and opt.crop_scale:
        parser.error("--augment none crops nothing: leave --crop_scale out, or use --augment crop")
    for name, value in zip(_PARTS, _PRESETS[opt.augment], strict=True):
        if getattr(opt, name) is None:
            setattr(opt, name, 0.0 if shared and name == "crop_scale" else value)
    if not opt.mixup:
        return
    if opt.clip_tn and opt.distill != "none" and opt.teacher_views != 0:
        parser.error("--mixup: a bank knows no mixed images; let the encoder see every batch, --teacher_views 0")
    method = METHODS[opt.distill]
    if not {"target", "index"}.isdisjoint(method.with_teacher(bool(opt.clip_tn))[1]):
        parser.error(f"--mixup: --distill {opt.distill} takes each image for one class, or for itself; leave it out")
