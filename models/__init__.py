"""Backbones by name, and students made of them.

Command lines need the names without torch: a network's file is imported when it is built.
"""

import importlib
from collections.abc import Callable

from errors import InputError

from .names import OWN, check_file, parse_name, unknown


def _constructor(file: str, name: str) -> Callable:
    """A function of one of these files; the call imports the file."""
    return lambda *args, **options: getattr(importlib.import_module(f".{file}", __name__), name)(*args, **options)


_RESNETS = ("resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "resnet8x4")
_RESNETS += ("resnet32x4",)

# Constructors of this project's own networks, by name; they are called with ``num_classes``.
model_dict = {
    **{name: _constructor("resnet", name) for name in _RESNETS},
    "ResNet50": _constructor("resnetv2", "ResNet50"),
    **{name: _constructor("wrn", name) for name in ("wrn_16_1", "wrn_16_2", "wrn_40_1", "wrn_40_2")},
    **{name: _constructor("vgg", name) for name in ("vgg8", "vgg11", "vgg13", "vgg16", "vgg19")},
    "MobileNetV2": _constructor("mobilenetv2", "mobile_half"),
    "ShuffleV1": _constructor("ShuffleNetv1", "ShuffleV1"),
    "ShuffleV2": _constructor("ShuffleNetv2", "ShuffleV2"),
}

_CREATE = (
    "create_classifier",
    "create_encoder",
    "create_model",
    "create_student",
    "create_text_encoder",
    "encoder_sha256",
)


def __getattr__(name: str):
    if name in _CREATE:
        return getattr(importlib.import_module(".create", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def check_model_name(model: str) -> None:
    """Raise an InputError that lists known names, unless a name is ours, timm:NAME, torchvision:NAME or one's own.

    The file of a network of one's own has to be there; only building the network runs it.
    """
    name = parse_name(model)
    if name.library == "file" and name.path is not None:
        raise InputError(f"{model}: a student's start weights are given by --init_s {name.path}")
    if name.library in OWN:
        check_file(name)
        return
    if name.library in ("timm", "torchvision"):
        from .library import check_library_model  # here, as it imports the library

        check_library_model(name)
    elif model not in model_dict:
        from .library import names_in_libraries  # here, as it imports the libraries

        if model and (longer := [*(name for name in model_dict if name.startswith(model)), *names_in_libraries(model)]):
            raise InputError(f"unknown model {model!r}; did you mean {' or '.join(longer)}?")
        raise unknown("model", model, [*model_dict, "timm:NAME", "torchvision:NAME", "FILE.py:FUNCTION"])
