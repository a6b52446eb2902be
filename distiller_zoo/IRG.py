"""Knowledge Distillation via Instance Relationship Graph (Liu et al., CVPR 2019)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The least squared distance, as in the PyTorch version of Knowledge-Distillation-Zoo.
_MIN_SQUARED = 1e-12


def _float(x: Tensor) -> Tensor:
    """Convert to float32 at least: sums of squares of a whole map overflow half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _edges(x: Tensor) -> Tensor:
    """Squared distances between the samples of (B, ...), divided by the largest, (B, B)."""
    x = _float(x).flatten(1)
    # The first sample becomes the origin: no other is farther from it than the largest distance. The rounding error
    # then stays as small as that distance allows, however much all samples have in common.
    x = x - x[:1].detach()
    products = x @ x.T
    squares = products.diagonal()
    squared = (squares[:, None] + squares - 2 * products).clamp(min=_MIN_SQUARED)
    squared = squared * (1 - torch.eye(len(x), dtype=x.dtype, device=x.device))
    return squared / squared.max().clamp(min=_MIN_SQUARED)


def _shrink(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    """Average maps to fewer channels and to a smaller size, and flatten them, (B, channels * height * width)."""
    if x.shape[2:] != (height, width):
        x = F.adaptive_avg_pool2d(x, (height, width))
    if x.shape[1] == channels:
        return x.flatten(1)
    if x.shape[1] % channels == 0:
        return x.unflatten(1, (channels, -1)).mean(dim=2).flatten(1)
    return F.adaptive_avg_pool3d(x, (channels, height, width)).flatten(1)


def _transformation(before: Tensor, after: Tensor) -> Tensor:
    """Squared distance between each sample's maps before and after a stage, divided by the batch's largest, (B,)."""
    size = [min(sizes) for sizes in zip(before.shape[1:], after.shape[1:], strict=True)]
    before, after = (_shrink(_float(x), *size) for x in (before, after))
    squared = (before - after).square().sum(dim=1).clamp(min=_MIN_SQUARED)
    return squared / squared.max()


def irg_vertex_loss(logit_s: Tensor, logit_t: Tensor) -> Tensor:
    """Mean squared error between the graphs' vertices, the logits, both (B, classes)."""
    if logit_s.shape != logit_t.shape:
        raise ValueError(f"IRG needs logits of one shape, got {tuple(logit_s.shape)} and {tuple(logit_t.shape)}")
    return F.mse_loss(_float(logit_s), _float(logit_t))


def irg_edge_loss(x_s: Tensor, x_t: Tensor) -> Tensor:
    """Mean squared error between the graphs' edges, relative squared distances among a batch's samples.

    Args:
        x_s: the student's embeddings or maps, (B, ...).
        x_t: the teacher's embeddings or maps, (B, ...), of any other shape.
    """
    if min(x_s.dim(), x_t.dim()) < 2 or len(x_s) != len(x_t):
        raise ValueError(f"IRG's edges need tensors of one batch, got {tuple(x_s.shape)} and {tuple(x_t.shape)}")
    with torch.autocast(x_s.device.type, enabled=False):
        return F.mse_loss(_edges(x_s), _edges(x_t))


def irg_transformation_loss(maps_s: tuple[Tensor, Tensor], maps_t: tuple[Tensor, Tensor]) -> Tensor:
    """Mean squared error between how far a stage moves each sample in the student and in the teacher.

    Args:
        maps_s: the student's maps before and after a stage, both (B, C, H, W). Where they differ in channels, height
            or width, the larger is averaged to the smaller.
        maps_t: the teacher's maps.
    """
    shapes = [tuple(x.shape) for x in (*maps_s, *maps_t)]
    if any(len(shape) != 4 for shape in shapes) or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(f"IRG's transformation needs maps (B, C, H, W) of one batch, got {shapes}")
    return F.mse_loss(_transformation(*maps_s), _transformation(*maps_t))


class IRG(nn.Module):
    """Weighted sum of the vertex, edge and transformation terms; gradients flow to student and teacher.

    Args:
        w_vert: weight of the vertices.
        w_edge: weight of the edges, the mean of the edge losses of embeddings and of each map.
        w_tran: weight of the transformation.
    """

    def __init__(self, w_vert: float = 0.1, w_edge: float = 5.0, w_tran: float = 5.0):
        super().__init__()
        self.w_vert = w_vert
        self.w_edge = w_edge
        self.w_tran = w_tran

    def terms(
        self,
        f_s: Tensor,
        f_t: Tensor,
        logit_s: Tensor,
        logit_t: Tensor,
        maps_s: tuple[Tensor, Tensor] | None = None,
        maps_t: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The weighted terms by name; their sum is the loss. Without maps there is no transformation."""
        pairs = [(f_s, f_t)]
        if maps_s is not None and maps_t is not None:
            pairs += zip(maps_s, maps_t, strict=True)
        edge = sum(irg_edge_loss(*pair) for pair in pairs) / len(pairs)
        terms = {"vertex": self.w_vert * irg_vertex_loss(logit_s, logit_t), "edge": self.w_edge * edge}
        if len(pairs) > 1:
            terms["transformation"] = self.w_tran * irg_transformation_loss(maps_s, maps_t)
        return terms

    def forward(
        self,
        f_s: Tensor,
        f_t: Tensor,
        logit_s: Tensor,
        logit_t: Tensor,
        maps_s: tuple[Tensor, Tensor] | None = None,
        maps_t: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The loss, a scalar.

        Args:
            f_s: the student's embeddings, (B, ...).
            f_t: the teacher's embeddings, (B, ...), of any length.
            logit_s: the student's logits, (B, classes).
            logit_t: the teacher's logits, (B, classes).
            maps_s: the student's maps before and after a stage, both (B, C, H, W).
            maps_t: the teacher's maps; None for a teacher without maps, and the student's are then not used.

        Raises:
            ValueError: the shapes are other than these.
        """
        return sum(self.terms(f_s, f_t, logit_s, logit_t, maps_s, maps_t).values())
