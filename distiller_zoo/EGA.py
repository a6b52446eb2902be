"""Distilling Knowledge from Self-Supervised Teacher by Embedding Graph Alignment (Ma, Chen, Akata, BMVC 2022)."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# A row counts as constant if its centred norm is at most this share of its norm.
_CONSTANT = 1e-6

# So few samples have so few correlations that the rounding of float32 shows where student and teacher agree.
_FEW = 8


def standardize(x: Tensor) -> Tensor:
    """Centre each row of (B, D) and scale it to unit norm, so that products of rows are Pearson correlations.

    A constant row becomes zero. No gradient flows through the result.
    """
    return _standardize(x.detach())[0]


def _standardize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``standardize`` of x, and the factor that each centred row was multiplied by, (B, 1)."""
    z = x - x.mean(dim=1, keepdim=True)
    norm = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    varies = norm > _CONSTANT * torch.linalg.vector_norm(x, dim=1, keepdim=True)
    scale = torch.where(varies, 1 / norm, 0)
    return z.mul_(scale), scale


def _standardize_backward(grad: Tensor, z: Tensor, scale: Tensor) -> Tensor:
    """Turn the gradient at the standardised ``z``, in place, into the gradient at what was standardised."""
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
    teacher, as the difference would. Up to D samples both matrices are computed as they stand. Beyond D, their norms
    and gradients follow from the D x D matrices ``G = z_t^T z_t``, ``M = z_t^T delta`` and ``K = delta^T delta``; the
    cost is then linear in B.

    ``shares`` says how many samples each process has. Up to D samples in all, every process gathers the rows. Beyond
    D, the processes add up the D x D matrices; their size depends on neither B nor the number of processes.

    Autograd over the same formulas gives the same values, but takes more time and memory, and a second exchange
    between processes in the backward pass.
    """

    @staticmethod
    def forward(ctx, f_s: Tensor, f_t: Tensor, shares: Sequence[int] | None) -> tuple[Tensor, Tensor]:
        z_s, scale_s = _standardize(f_s)
        z_t, scale_t = _standardize(f_t)
        batch, dim = len(f_s) if shares is None else sum(shares), f_s.shape[1]
        ctx.dense, ctx.processes, ctx.own = batch <= dim, 1, slice(None)
        if shares is not None:
            ctx.processes = len(shares)
            if ctx.dense:
                start = sum(shares[: dist.get_rank()])
                ctx.own = slice(start, start + len(f_s))
                # A sum in which one process has each row and the others zeros, so that shares may differ in size.
                rows = z_s.new_zeros(batch, 2 * dim)
                torch.cat([z_s, z_t], dim=1, out=rows[ctx.own])
                dist.all_reduce(rows)
                z_s, z_t = rows.split(dim, dim=1)
        delta = z_s - z_t
        if ctx.dense:
            matrices = (z_t @ z_s.T, torch.addmm(delta @ z_t.T, z_s, delta.T))
            matrices[0].diagonal().sub_(1)
            node, edge = (torch.linalg.vector_norm(matrix) for matrix in matrices)
        else:
            matrices = (z_t.T @ z_t, z_t.T @ delta, delta.T @ delta)
            if shares is not None:
                stacked = torch.stack(matrices)
                dist.all_reduce(stacked)
                matrices = stacked.unbind()
            G, M, K = matrices
            cross = G.trace() + M.trace()
            node = _norm(_inner(G, G + M + M.T + K) - 2 * cross + batch)
            edge = _norm(2 * _inner(G, K) + 2 * _inner(M, M.T) + _inner(K, K) + 4 * _inner(M, K))
        ctx.save_for_backward(z_s, delta, scale_s, scale_t, node, edge, *matrices)
        return node, edge

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_node: Tensor, grad_edge: Tensor) -> tuple[Tensor | None, ...]:
        z_s, delta, scale_s, scale_t, node, edge, *matrices = ctx.saved_tensors
        # A norm that is zero has no gradient. Every process has the same loss of all samples, and the gradient is that
        # of the sum of these losses: it counts once per process. DDP's mean over processes makes one loss of it again.
        a = torch.where(node > 0, ctx.processes * grad_node / node, 0)
        b = torch.where(edge > 0, 2 * ctx.processes * grad_edge / edge, 0)
        teacher, own = ctx.needs_input_grad[1], ctx.own
        z_t = z_s - delta if ctx.dense or teacher else None
        grad_s = grad_t = None
        with torch.autocast(z_s.device.type, enabled=False):
            if ctx.dense:
                N, P = matrices[0] * a, matrices[1] * b
                grad_s = torch.addmm(N[:, own].T @ z_t, P[own], z_s)
                grad_t = torch.addmm(N[own] @ z_s, P[own], z_t, alpha=-1) if teacher else None
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
        grad_s = _standardize_backward(grad_s, z_s[own], scale_s)
        return grad_s, _standardize_backward(grad_t, z_t[own], scale_t) if teacher else None, None


def ega_terms(f_s: Tensor, f_t: Tensor, shares: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """The node and the edge matching loss of one batch (EGA, equations 4 to 6), not weighted.

    Nodes are embeddings, an edge is the Pearson correlation of two embeddings across their D features.
    ``L_node = ||N_ts - I||_F`` correlates teacher sample i with student sample j, and
    ``L_edge = ||E_t - E_s||_F`` compares the edges among the teacher's with those among the student's.

    Args:
        f_s: the student's embeddings, (B, D).
        f_t: the teacher's, (B, D). Gradients flow to both, once.
        shares: how many samples of the batch each process of torch.distributed's default group has, in order of
            rank; None where one process has them all. B is then this process's own share, which may be 0. Every
            process calls this and gets the loss of the whole batch. The gradient at its own samples is that of the
            sum of all processes' losses, N times the loss's; DistributedDataParallel takes the mean over N processes.

    Returns:
        (L_node, L_edge), scalars in float32 or better; a term that is zero has zero gradient.

    Raises:
        ValueError: for two tensors that are not of one shape (B, D), or not of this process's share.
    """
    if f_s.dim() != 2 or f_s.shape != f_t.shape:
        raise ValueError(f"EGA needs two (B, D) tensors of one shape, got {tuple(f_s.shape)} and {tuple(f_t.shape)}")
    if shares is not None and (len(shares) != dist.get_world_size() or shares[dist.get_rank()] != len(f_s)):
        raise ValueError(f"shares {tuple(shares)} say otherwise than process {dist.get_rank()} with {len(f_s)} samples")
    dtype = torch.promote_types(torch.promote_types(f_s.dtype, f_t.dtype), torch.float32)
    inside = torch.float64 if (len(f_s) if shares is None else sum(shares)) < _FEW else dtype
    with torch.autocast(f_s.device.type, enabled=False):
        node, edge = _Terms.apply(f_s.to(inside), f_t.to(inside), shares)
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

    def terms(self, f_s: Tensor, f_t: Tensor, shares: Sequence[int] | None = None) -> dict[str, Tensor]:
        """The two weighted terms by name; their sum is the loss."""
        node, edge = ega_terms(f_s, f_t, shares)
        return {"node": self.node_weight * node, "edge": self.edge_weight * edge}

    def forward(self, f_s: Tensor, f_t: Tensor, shares: Sequence[int] | None = None) -> Tensor:
        """The loss of student embeddings (B, D) against teacher embeddings (B, D), a scalar; see ``ega_terms``."""
        return sum(self.terms(f_s, f_t, shares).values())
