"""The linear heads of student and teacher, and what a network gives."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import InputError


class Outputs(NamedTuple):
    """What a student or a teacher makes of a batch.

    embedding: (B, D), projected to the joint space; the pooled features where nothing projects them.
    logits: (B, classes); None where a frozen encoder has no head.
    features: the backbone's maps and pooled features, in order; a frozen encoder gives its embedding alone.
    head_logits: (B, classes), what a teacher's head gives and is trained by; a frozen encoder's are its ``logits``.
    """

    embedding: Tensor
    logits: Tensor | None
    features: list[Tensor]
    head_logits: Tensor | None = None


class Linear(nn.Linear):
    """A linear layer that computes in its weights' precision, under autocast too.

    In bf16 many of a sample's logits would be equal, and their order would decide its class.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_features) to (B, out_features)."""
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


class Projection(nn.Module):
    """A linear projection to the joint space (EGA, section 3).

    Args:
        f_dim: width of the backbone's embedding.
        feature_dim: width D of the joint space.
    """

    def __init__(self, f_dim: int, feature_dim: int = 256):
        super().__init__()
        self.fit_dim_Net = Linear(f_dim, feature_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, f_dim) to embeddings (B, D)."""
        return self.fit_dim_Net(x)


class _Head(nn.Module):
    """A projection to the joint space and a linear classifier on it (EGA, section 3).

    Args:
        f_dim: width of the backbone's embedding.
        feature_dim: width D of the joint space.
        num_classes: number of classes.
    """

    def __init__(self, f_dim: int, feature_dim: int = 256, num_classes: int = 100):
        super().__init__()
        self.fit_dim_Net = Linear(f_dim, feature_dim)
        self.cl_Net = Linear(feature_dim, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, f_dim) to embeddings (B, D) and logits (B, classes)."""
        embedding = self.fit_dim_Net(x)
        return embedding, self.cl_Net(embedding)


class StudNet(_Head):
    """The student's head, on its backbone's pooled features."""


class TeacNet(_Head):
    """The teacher's head, on the frozen CLIP's image embedding or the frozen CNN's pooled features."""


def enlarge(image: Tensor, resolution: int | None) -> Tensor:
    """Images (B, C, H, W) at ``resolution`` pixels, bilinear; None, or their own size, leaves them as they are."""
    if resolution in (None, image.shape[-1]):
        return image
    return F.interpolate(image, (resolution, resolution), mode="bilinear", align_corners=False)


@torch.no_grad()
def check_image_size(model: nn.Module, name: str, image_size: int, flag: str) -> None:
    """Try a network on images of a size, as it will see them.

    Args:
        model: a ``Student`` or a ``Classifier``.
        name: the backbone's name.
        image_size: height and width of the data set's images, in pixels.
        flag: the option that enlarges them.

    Raises:
        InputError: it cannot take them.
    """
    mode = model.training
    try:
        model.eval()(torch.zeros(2, 3, image_size, image_size))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(
            f"{name} cannot take images of {model.resolution or image_size} pixels ({reason}); set {flag}"
        ) from error
    backbone, size = model.backbone, model.resolution or image_size
    check_sees_all(backbone, lambda image: backbone(image, is_feat=True)[0][-1], name, size, flag)
    model.train(mode)


def _step(net: nn.Module) -> int:
    """Pixels from one patch to the next: the product of the strides of convolutions that do not overlap."""
    convolutions = (module for module in net.modules() if isinstance(module, nn.Conv2d))
    return math.prod(x.stride[0] for x in convolutions if x.kernel_size == x.stride and x.padding in (0, (0, 0)))


def check_sees_all(net: nn.Module, pooled: Callable[[Tensor], Tensor], name: str, resolution: int, flag: str) -> None:
    """Refuse a size at which a network that cuts pictures into patches leaves out the last rows and columns.

    Args:
        net: the network, in evaluation mode.
        pooled: what makes pooled features of images (1, 3, resolution, resolution).
        name: of the network.
        resolution: height and width of its input in pixels.
        flag: the option that sets the size.

    Raises:
        InputError: its features do not depend on the last rows or columns.
    """
    step = _step(net)
    if resolution % step == 0:
        return
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, resolution, resolution, generator=generator).requires_grad_()
    with torch.enable_grad():
        features = pooled(image).float()
        # Not their norm, which a last layer norm makes the same for every image.
        (gradient,) = torch.autograd.grad((features * torch.randn(features.shape, generator=generator)).sum(), image)
    seen = gradient.abs().amax(dim=(0, 1, 3)).nonzero().flatten()
    unseen = resolution - 1 - int(seen.max()) if len(seen) else resolution
    if unseen:
        lower = resolution // step * step
        advice = f"set {flag} to {lower} or {lower + step}" if lower else f"set another {flag}"
        raise InputError(
            f"{name} takes pictures in steps of {step} pixels: at {resolution} it sees nothing of the last {unseen} "
            f"rows and columns; {advice}"
        )


class Student(nn.Module):
    """A backbone and its head, which classifies: the paper's protocol.

    Args:
        backbone: without a classifier of its own.
        head: on its pooled features.
        resolution: what images are enlarged to; None for their own.
    """

    def __init__(self, backbone: nn.Module, head: StudNet, resolution: int | None = None):
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.resolution = resolution

    def forward(self, image: Tensor) -> Outputs:
        features, _ = self.backbone(enlarge(image, self.resolution), is_feat=True)
        embedding, logits = self.head(features[-1])
        return Outputs(embedding, logits, features)


class ReusedHead(nn.Module):
    """A projector to a teacher's features and its frozen classifier on them (SimKD, Chen et al., CVPR 2022).

    Args:
        projector: from the last map, or from pooled features, to the teacher's channels.
        classifier: the teacher's.
        size: height and width that larger maps are pooled to, the teacher's; None to project the pooled features alone.
    """

    def __init__(self, projector: nn.Module, classifier: Linear, size: int | None):
        super().__init__()
        self.projector = projector
        self.classifier = classifier.requires_grad_(False)
        # A tensor, so that a student's file knows it.
        self.register_buffer("size", torch.tensor(size or 0))
        self.pooled_to = size

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """The backbone's features to projected ones, a map where there is one and a pooled one, and logits."""
        if self.pooled_to is None:
            pooled = self.projector(features[-1])
            return [pooled], self.classifier(pooled)
        x = features[-2]
        projected = self.projector(F.adaptive_avg_pool2d(x, self.pooled_to) if x.shape[-1] > self.pooled_to else x)
        pooled = projected.mean(dim=(2, 3))
        return [projected, pooled], self.classifier(pooled)


class Reuser(Student):
    """A student that ends in its teacher's features, and in its teacher's classifier.

    The projected features are its last ones, and its embedding.

    Args:
        backbone: without a classifier of its own.
        head: on its features.
        resolution: what images are enlarged to; None for their own.
    """

    def __init__(self, backbone: nn.Module, head: ReusedHead, resolution: int | None = None):
        super().__init__(backbone, head, resolution)

    def forward(self, image: Tensor) -> Outputs:
        features, _ = self.backbone(enlarge(image, self.resolution), is_feat=True)
        projected, logits = self.head(features)
        return Outputs(projected[-1], logits, [*features[:-1], *projected])


class Classifier(nn.Module):
    """A backbone that classifies by itself: RepDistiller's protocol.

    Args:
        backbone: with a classifier of its own.
        head: applied to the pooled features for a loss alone; by default the loss sees the features themselves.
        preact: give the maps as they are before their last ReLU.
        resolution: what images are enlarged to; None for their own.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: Projection | None = None,
        preact: bool = False,
        resolution: int | None = None,
    ):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Identity() if head is None else head
        self.preact = preact
        self.resolution = resolution

    def forward(self, image: Tensor) -> Outputs:
        features, logits = self.backbone(enlarge(image, self.resolution), is_feat=True, preact=self.preact)
        return Outputs(self.head(features[-1]), logits, features)
