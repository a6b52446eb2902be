"""The linear heads of student and teacher, and what a network gives."""

from typing import NamedTuple

from torch import Tensor, nn


class Outputs(NamedTuple):
    """What a student or a teacher makes of a batch.

    embedding: (B, D), projected to the joint space.
    logits: (B, classes).
    features: the backbone's maps and pooled features, in order; empty where there are none.
    """

    embedding: Tensor
    logits: Tensor
    features: list[Tensor]


class _Head(nn.Module):
    """A linear projection to the joint space and a linear classifier on it (EGA, section 3).

    Args:
        f_dim: width of the backbone's embedding.
        feature_dim: width D of the joint space.
        num_classes: number of classes.
    """

    def __init__(self, f_dim: int, feature_dim: int = 256, num_classes: int = 100):
        super().__init__()
        self.fit_dim_Net = nn.Linear(f_dim, feature_dim)
        self.cl_Net = nn.Linear(feature_dim, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, f_dim) to embeddings (B, D) and logits (B, classes)."""
        embedding = self.fit_dim_Net(x)
        return embedding, self.cl_Net(embedding)


class StudNet(_Head):
    """The student's head, on its backbone's pooled features."""


class TeacNet(_Head):
    """The teacher's head, on the frozen CLIP's image embedding."""


class Student(nn.Module):
    """A backbone and its head."""

    def __init__(self, backbone: nn.Module, head: StudNet):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, image: Tensor) -> Outputs:
        features, _ = self.backbone(image, is_feat=True)
        embedding, logits = self.head(features[-1])
        return Outputs(embedding, logits, features)
