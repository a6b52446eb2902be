"""Backbones by name, and students made of them."""

from .heads import Student, StudNet
from .resnet import resnet8, resnet8x4, resnet14, resnet20, resnet32, resnet32x4, resnet44, resnet56, resnet110

model_dict = {
    "resnet8": resnet8,
    "resnet14": resnet14,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet44": resnet44,
    "resnet56": resnet56,
    "resnet110": resnet110,
    "resnet8x4": resnet8x4,
    "resnet32x4": resnet32x4,
}


def create_student(model_s: str, feature_dim: int, num_classes: int) -> Student:
    """A backbone without a classifier of its own, under a head that projects to the joint space.

    Raises:
        ValueError: for an unknown name.
    """
    if model_s not in model_dict:
        raise ValueError(f"unknown student {model_s!r}; known: {', '.join(model_dict)}")
    backbone = model_dict[model_s](num_classes=0)
    return Student(backbone, StudNet(backbone.num_features, feature_dim, num_classes))
