"""Backbones by name, and students made of them."""

from torch import nn

from .heads import Classifier, Projection, Student, StudNet
from .mobilenetv2 import mobile_half
from .resnet import resnet8, resnet8x4, resnet14, resnet20, resnet32, resnet32x4, resnet44, resnet56, resnet110
from .resnetv2 import ResNet50
from .ShuffleNetv1 import ShuffleV1
from .ShuffleNetv2 import ShuffleV2
from .vgg import vgg8, vgg11, vgg13, vgg16, vgg19
from .wrn import wrn_16_1, wrn_16_2, wrn_40_1, wrn_40_2

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
    "ResNet50": ResNet50,
    "wrn_16_1": wrn_16_1,
    "wrn_16_2": wrn_16_2,
    "wrn_40_1": wrn_40_1,
    "wrn_40_2": wrn_40_2,
    "vgg8": vgg8,
    "vgg11": vgg11,
    "vgg13": vgg13,
    "vgg16": vgg16,
    "vgg19": vgg19,
    "MobileNetV2": mobile_half,
    "ShuffleV1": ShuffleV1,
    "ShuffleV2": ShuffleV2,
}


def create_model(name: str, num_classes: int) -> nn.Module:
    """A backbone; one of 0 classes has no classifier.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in model_dict:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(model_dict)}")
    return model_dict[name](num_classes=num_classes)


def create_student(model_s: str, feature_dim: int, num_classes: int) -> Student:
    """A backbone without a classifier of its own, under a head that projects to the joint space (the paper's).

    Raises:
        ValueError: for an unknown name.
    """
    backbone = create_model(model_s, 0)
    return Student(backbone, StudNet(backbone.num_features, feature_dim, num_classes))


def create_classifier(
    model_s: str, num_classes: int, feature_dim: int | None = None, preact: bool = False
) -> Classifier:
    """A backbone with its own classifier (RepDistiller's protocol).

    Args:
        model_s: its name.
        num_classes: number of classes.
        feature_dim: width of the joint space, where a loss needs the pooled features projected to it.
        preact: give the maps as they are before their last ReLU.

    Raises:
        ValueError: for an unknown name.
    """
    backbone = create_model(model_s, num_classes)
    head = None if feature_dim is None else Projection(backbone.num_features, feature_dim)
    return Classifier(backbone, head, preact)
