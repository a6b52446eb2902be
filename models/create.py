"""Networks by name: backbones, students made of them, frozen encoders."""

import importlib.metadata

import torch
from torch import nn

from errors import InputError

from . import check_model_name, model_dict
from .encoders import FrozenEncoder, LibraryEncoder, TextEncoder, open_clip_text_encoder
from .heads import Classifier, Projection, Student, StudNet
from .library import create_library_model
from .names import OWN, Name, check_file, parse_name
from .own import create_own_model, own_sha256
from .published import fetch_clip
from .weights import sha256_of


def create_model(name: str, num_classes: int, **options) -> nn.Module:
    """A backbone; with 0 classes it has no classifier.

    Args:
        name: one of ``model_dict``, timm:NAME, torchvision:NAME or FILE.py:FUNCTION.
        num_classes: number of classes.
        options: options of a library's network, see ``create_library_model``. Our own networks give all maps at any
            size.

    Raises:
        InputError: the name is unknown, or the network cannot give what is asked for.
    """
    check_model_name(name)
    if name in model_dict:
        return model_dict[name](num_classes=num_classes)
    if parse_name(name).library in OWN:
        return create_own_model(parse_name(name), num_classes, options.get("maps", False), options.get("preact", False))
    return create_library_model(parse_name(name), num_classes, **options)


def create_student(
    model_s: str, feature_dim: int, num_classes: int, resolution: int | None = None, **options
) -> Student:
    """A backbone without its own classifier, under a head that projects to the joint space (the paper's protocol).

    Args:
        model_s: the backbone's name.
        feature_dim: width of the joint space.
        num_classes: number of classes.
        resolution: pixels that images are enlarged to; None for their own size.
        options: see ``create_model``.

    Raises:
        InputError: as ``create_model``.
    """
    backbone = create_model(model_s, 0, resolution=resolution, **options)
    return Student(backbone, StudNet(backbone.num_features, feature_dim, num_classes), resolution)


def create_classifier(
    model_s: str,
    num_classes: int,
    feature_dim: int | None = None,
    preact: bool = False,
    resolution: int | None = None,
    **options,
) -> Classifier:
    """A backbone with its own classifier (RepDistiller's protocol).

    Args:
        model_s: the backbone's name.
        num_classes: number of classes.
        feature_dim: width of the joint space, where a loss needs the pooled features projected to it.
        preact: give the maps as they are before their last ReLU.
        resolution: pixels that images are enlarged to; None for their own size.
        options: see ``create_model``.

    Raises:
        InputError: as ``create_model``.
    """
    backbone = create_model(model_s, num_classes, preact=preact, resolution=resolution, **options)
    head = None if feature_dim is None else Projection(backbone.num_features, feature_dim)
    return Classifier(backbone, head, preact, resolution)


def create_encoder(
    clip_mode: str, clip_root: str, dtype: torch.dtype = torch.float32, resolution: int | None = None
) -> FrozenEncoder:
    """The frozen encoder of a name (see ``models.names``), on the CPU.

    Args:
        clip_mode: the encoder's name, or the path of a checkpoint in OpenAI's format.
        clip_root: the folder of CLIP's published weights.
        dtype: the type that it computes in.
        resolution: height and width of its input in pixels; None for its own.

    Raises:
        InputError: the name is unknown, the weights do not fit, or the encoder cannot take the resolution.
        OSError: the weights are missing and cannot be downloaded.
    """
    name = parse_name(clip_mode)
    if name.library is None:
        from .clip_teacher import ImageEncoder  # here, so that losses and students do without clip

        return ImageEncoder(clip_mode, clip_root, dtype, resolution)
    return LibraryEncoder(name, dtype, resolution)


# The package that builds a library's networks.
_PACKAGES = {"timm": "timm", "torchvision": "torchvision", "open_clip": "open_clip_torch"}


def library_version(name: Name) -> str | None:
    """The version of the library that builds a network; None for OpenAI's, or where the library is not installed."""
    if name.library is None:
        return None
    try:
        return importlib.metadata.version(_PACKAGES[name.library])
    except importlib.metadata.PackageNotFoundError:  # building the network will report it
        return None


def encoder_sha256(clip_mode: str, clip_root: str) -> str:
    """The SHA-256 of a frozen encoder's weights, see ``create_encoder``; a file is hashed, not loaded.

    Raises:
        InputError, OSError: as ``create_encoder``, but for errors that only building the network shows.
    """
    name = parse_name(clip_mode)
    if name.library is None:
        return fetch_clip(clip_mode, clip_root)[1]
    check_file(name)
    if name.library in OWN:
        return own_sha256(name)
    if name.path is None:
        return LibraryEncoder(name).sha256
    return sha256_of(name.path)


def create_text_encoder(clip_mode: str, clip_root: str) -> TextEncoder:
    """The text encoder beside a CLIP's image encoder, on the CPU.

    Args:
        clip_mode, clip_root: see ``create_encoder``.

    Raises:
        InputError: the encoder has no text encoder; see also ``create_encoder``.
        OSError: the weights are missing and cannot be downloaded.
    """
    name = parse_name(clip_mode)
    if name.library is None:
        from .clip_teacher import load_text_encoder

        return load_text_encoder(clip_mode, clip_root)
    if name.library != "open_clip":
        raise InputError(f"{clip_mode} understands no text: OpenAI's CLIPs and open_clip's models do")
    return open_clip_text_encoder(name)
