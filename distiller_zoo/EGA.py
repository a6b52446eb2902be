"""Distilling Knowledge from Self-Supervised Teacher by Embedding Graph Alignment (Ma, Chen, Akata, BMVC 2022)."""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# A row whose centred norm is at most this share of its norm counts as constant.
_CONSTANT = 1e-6

# So few samples have so few correlations that the rounding of float32 shows where student and teacher agree.
_FEW = 8


def standardize(x: Tensor) -> Tensor:
    """Centre each row of (B, D) and scale it to unit norm, so that products of rows are Pearson correlations.

    A constant row becomes zero. Without a gradient.
    """
    return _standardize(x.detach())[0]


def _standardize(x: Tensor) -> tuple[Tensor, Tensor]:
    """``standardize``, and what each centred row was multiplied by, (B, 1)."""
    z = x - x.mean(dim=1, keepdim=True)
    norm = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    varies = norm > _CONSTANT * torch.linalg.vector_norm(x, dim=1, keepdim=True)
    scale = torch.where(varies, 1 / norm, 0)
    return z.mul_(scale), scale


def _standardize_backward(grad: Tensor, z: Tensor, scale: Tensor) -> Tensor:
    """The gradient with respect to what was standardised to ``z``, in the place of that with respect to ``z``."""
    grad.sub_(grad.mean(dim=1, keepdim=True))
    return grad.addcmul_(z, (grad * z).sum(dim=1, keepdim=True), value=-1).mul_(scale)


def _norm(squared: Tensor) -> Tensor:
    """The norm whose square may be a little below zero by rounding."""
    return squared.clamp(min=0).sqrt()


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """The sum of the products of two matrices' entries."""
    return (a * b).sum()


class _Terms(torch.autograd.Function):
    """(L_node, L_edge) of two (B, D) tensors of one dtype, and their gradients.

    With the standardised rows ``z_s`` and ``z_t`` and ``delta = z_s - z_t``, the node matrix is ``z_t z_s^T - I`` and
    the edge matrix ``E_s - E_t = delta z_t^T + z_s delta^T``: a sum that loses no digits where the student is near the
    teacher, as the difference would. Up to D samples both are computed as they stand. Beyond, their norms and
    gradients follow from the D x D matrices ``G = z_t^T z_t``, ``M = z_t^T delta`` and ``K = delta^T delta``, whose
    cost is linear in B.
    """

    @staticmethod
    def forward(ctx, f_s: Tensor, f_t: Tensor) -> tuple[Tensor, Tensor]:
        z_s, scale_s = _standardize(f_s)
        z_t, scale_t = _standardize(f_t)
        delta = z_s - z_t
        ctx.dense = f_s.shape[0] <= f_s.shape[1]
        if ctx.dense:
            matrices = (z_t @ z_s.T, torch.addmm(delta @ z_t.T, z_s, delta.T))
            matrices[0].diagonal().sub_(1)
            node, edge = (torch.linalg.vector_norm(matrix) for matrix in matrices)
        else:
            matrices = G, M, K = (z_t.T @ z_t, z_t.T @ delta, delta.T @ delta)
            cross = G.trace() + M.trace()
            node = _norm(_inner(G, G + M + M.T + K) - 2 * cross + len(f_s))
            edge = _norm(2 * _inner(G, K) + 2 * _inner(M, M.T) + _inner(K, K) + 4 * _inner(M, K))
        ctx.save_for_backward(z_s, delta, scale_s, scale_t, node, edge, *matrices)
        return node, edge

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_node: Tensor, grad_edge: Tensor) -> tuple[Tensor | None, Tensor | None]:
        z_s, delta, scale_s, scale_t, node, edge, *matrices = ctx.saved_tensors
        # A norm that is zero has no gradient.
        a = torch.where(node > 0, grad_node / node, 0)
        b = torch.where(edge > 0, 2 * grad_edge / edge, 0)
        teacher = ctx.needs_input_grad[1]
        z_t = z_s - delta if ctx.dense or teacher else None
        grad_s = grad_t = None
        with torch.autocast(z_s.device.type, enabled=False):
            if ctx.dense:
                N, P = matrices[0] * a, matrices[1] * b
                grad_s = torch.addmm(N.T @ z_t, P, z_s)
                grad_t = torch.addmm(N @ z_s, P, z_t, alpha=-1) if teacher else None
            else:
                G, M, K = matrices
                identity = torch.eye(len(G), dtype=G.dtype, device=G.device)
                # Products with delta stay products with delta, for the sake of the digits.
                grad_s = z_s @ (a * (G - identity) + b * (M.T + K))
                grad_s.addmm_(delta, a * identity + b * (G + M))
                if teacher:
                    S = G + M + M.T + K
                    grad_t = z_s @ (a * (S - identity) - b * M.T)
                    grad_t.addmm_(delta, a * S + b * G, alpha=-1)
        grad_s = _standardize_backward(grad_s, z_s, scale_s)
        return grad_s, _standardize_backward(grad_t, z_t, scale_t) if teacher else None


def ega_terms(f_s: Tensor, f_t: Tensor) -> tuple[Tensor, Tensor]:
    """The node and the edge matching loss of one batch (EGA, equations 4 to 6), not weighted.

    Nodes are embeddings, an edge is the Pearson correlation of two embeddings across their D features.
    ``L_node = ||N_ts - I||_F`` correlates teacher sample i with student sample j, and
    ``L_edge = ||E_t - E_s||_F`` compares the edges among the teacher's with those among the student's.

    Args:
        f_s: the student's embeddings, (B, D).
        f_t: the teacher's, (B, D). Gradients flow to both, once.

    Returns:
        (L_node, L_edge), scalars in float32 or better; a term that is zero has zero gradient.

    Raises:
        ValueError: for two tensors that are not of one shape (B, D).
    """
    if f_s.dim() != 2 or f_s.shape != f_t.shape:
        raise ValueError(f"EGA needs two (B, D) tensors of one shape, got {tuple(f_s.shape)} and {tuple(f_t.shape)}")
    dtype = torch.promote_types(torch.promote_types(f_s.dtype, f_t.dtype), torch.float32)
    inside = torch.float64 if len(f_s) < _FEW else dtype
    with torch.autocast(f_s.device.type, enabled=False):
        node, edge = _Terms.apply(f_s.to(inside), f_t.to(inside))
    return node.to(dtype), edge.to(dtype)


class EGA(nn.Module):
    """Embedding graph alignment: ``node_weight * L_node + edge_weight * L_edge`` (EGA, equation 7).

    Args:
        node_weight: weight of the node matching loss.
        edge_weight: weight of the edge matching loss.
    """

    def __init__(self, node_weight: float = 0.8, edge_weight: float = 0.24):
        super().__init__()
        self.node_weight = node_weight
        self.edge_weight = edge_weight

    def terms(self, f_s: Tensor, f_t: Tensor) -> dict[str, Tensor]:
        """The two weighted terms by name; their sum is the loss."""
        node, edge = ega_terms(f_s, f_t)
        return {"node": self.node_weight * node, "edge": self.edge_weight * edge}

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        """The loss of student embeddings (B, D) against teacher embeddings (B, D), a scalar."""
        return sum(self.terms(f_s, f_t).values())
