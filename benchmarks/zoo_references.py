"""The baselines of ``benchmarks.zoo``: every loss of the zoo by its obvious formula, written anew.

Each formula is the one that RepDistiller or the method's authors compute, with their large temporaries: all products
of two maps' channels, all differences of two embeddings, all rows of a memory that are contrasted. Some losses of the
zoo compute the same formula. No reference guards against degenerate input.

Student first, teacher second; lists of maps give lists of losses.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def kd(logit_s: Tensor, logit_t: Tensor, T: float = 4.0) -> Tensor:
    """KL divergence of softened class distributions (B, classes)."""
    log_p_s, p_t = F.log_softmax(logit_s / T, dim=1), F.softmax(logit_t / T, dim=1)
    return F.kl_div(log_p_s, p_t, reduction="sum") * T**2 / len(logit_s)


def hint(f_s: Tensor, f_t: Tensor) -> Tensor:
    """Mean squared error of features of any shape."""
    return F.mse_loss(f_s, f_t)


def _attention_map(f: Tensor) -> Tensor:
    return F.normalize(f.pow(2).mean(dim=1).flatten(1))


def attention(maps_s: list[Tensor], maps_t: list[Tensor]) -> list[Tensor]:
    """Mean squared error of the channels' mean squares, scaled to unit norm."""
    return [(_attention_map(f_s) - _attention_map(f_t)).pow(2).mean() for f_s, f_t in zip(maps_s, maps_t, strict=True)]


def factor(f_s: Tensor, f_t: Tensor) -> Tensor:
    """Mean absolute difference of factors (B, C, H, W), made as attention maps are."""
    return (_attention_map(f_s) - _attention_map(f_t)).abs().mean()


def similarity(maps_s: list[Tensor], maps_t: list[Tensor]) -> list[Tensor]:
    """Mean squared error of the samples' inner products, rows scaled to unit norm."""
    losses = []
    for f_s, f_t in zip(maps_s, maps_t, strict=True):
        f_s, f_t = f_s.flatten(1), f_t.flatten(1)
        losses.append((F.normalize(f_s @ f_s.T) - F.normalize(f_t @ f_t.T)).pow(2).mean())
    return losses


def correlation(f_s: Tensor, f_t: Tensor) -> Tensor:
    """Inner products of neighbouring samples' absolute differences, (B, D)."""
    delta = (f_s - f_t).abs()
    return (delta[:-1] * delta[1:]).sum(dim=1).mean()


def vid(maps_s: list[Tensor], maps_t: list[Tensor], layers: list[tuple[nn.Module, Tensor]]) -> list[Tensor]:
    """Gaussian negative log-likelihood of the teacher's maps, layer by layer.

    Args:
        layers: predictors of the mean from the student's maps, and the variance before its softplus, (C,).
    """
    losses = []
    for f_s, f_t, (regressor, scale) in zip(maps_s, maps_t, layers, strict=True):
        variance = torch.log(1 + torch.exp(scale)) + 1e-5
        variance = variance.view(1, -1, 1, 1)
        losses.append((0.5 * ((regressor(f_s) - f_t) ** 2 / variance + torch.log(variance))).mean())
    return losses


def _contrast(v: Tensor, memory: Tensor, contrast_index: Tensor, T: float) -> Tensor:
    """exp(v · m / T) for all memory rows m that a sample is contrasted with, (B, K + 1)."""
    rows = memory.index_select(0, contrast_index.flatten()).view(*contrast_index.shape, -1)
    return torch.exp(torch.bmm(rows, v.unsqueeze(2)).squeeze(2) / T)


def _tell_apart(p: Tensor, n_data: int, eps: float = 1e-7) -> Tensor:
    noise = (p.shape[1] - 1) / n_data
    positive = torch.log(p[:, 0] / (p[:, 0] + noise + eps))
    negative = torch.log(noise / (p[:, 1:] + noise + eps))
    return -(positive.sum() + negative.sum()) / len(p)


def crd(
    f_s: Tensor,
    f_t: Tensor,
    index: Tensor,
    contrast_index: Tensor,
    embed_s: nn.Linear,
    embed_t: nn.Linear,
    memory_s: Tensor,
    memory_t: Tensor,
    params: Tensor,
) -> Tensor:
    """CRD with its negatives gathered, (B, K + 1, D) for each side; updates memories and normalising constants.

    Args:
        contrast_index: rows of the memories, the positive first, (B, K + 1).
        memory_s: all samples' embeddings by the student, (n_data, D).
        memory_t: all samples' embeddings by the teacher.
        params: K, temperature, the two normalising constants (negative before the first call) and momentum.
    """
    v_s, v_t = embed_s(f_s), embed_t(f_t)
    v_s, v_t = (v / v.pow(2).sum(dim=1, keepdim=True).sqrt() for v in (v_s, v_t))
    n_data, (_, T, Z_s, Z_t, momentum) = len(memory_s), params.tolist()
    p_s, p_t = _contrast(v_s, memory_t, contrast_index, T), _contrast(v_t, memory_s, contrast_index, T)
    if Z_s < 0:
        Z_s, Z_t = (p.mean().item() * n_data for p in (p_s, p_t))
        params[2], params[3] = Z_s, Z_t
    with torch.no_grad():
        for memory, v in ((memory_s, v_s), (memory_t, v_t)):
            mixed = momentum * memory[index] + (1 - momentum) * v
            memory[index] = mixed / mixed.pow(2).sum(dim=1, keepdim=True).sqrt()
    return _tell_apart(p_s / Z_s, n_data) + _tell_apart(p_t / Z_t, n_data)


def _right_singular(f: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first k singular values (B, k) and right vectors (B, C, k) of the matrices of pixels by channels."""
    _, values, rows = torch.linalg.svd(f.flatten(2).mT, full_matrices=False)
    return F.normalize(values[:, :k]), rows[:, :k].mT


def kdsvd(maps_s: list[Tensor], maps_t: list[Tensor], k: int = 1) -> list[Tensor]:
    """Radial basis functions between the singular vectors of successive maps; the student's are decomposed too."""
    layers = []
    for f_s, f_t in zip(maps_s, maps_t, strict=True):
        scale, v_t = _right_singular(f_t, k)
        _, v_s = _right_singular(f_s, k + 3)
        cosines = (v_s.mT @ v_t).detach()
        closest = cosines.abs() == cosines.abs().amax(dim=1, keepdim=True)
        v_s = v_s @ (closest * cosines.sign())
        layers.append((v_s * scale[:, None], v_t * scale[:, None]))
    losses = []
    for below, above in pairwise(layers):
        rbf_s, rbf_t = (
            torch.exp(-(top[:, :, None] - bottom[:, None]).pow(2) / 8) for bottom, top in zip(below, above, strict=True)
        )
        losses.append((rbf_s - rbf_t).pow(2).sum() / len(rbf_s))
    return losses


def _rows(f: Tensor) -> Tensor:
    """Maps as (B, C, H * W), pixels next to one another in memory: faster here, and the format of RepDistiller."""
    return f.flatten(2).contiguous()


def _flow(bottom: Tensor, top: Tensor) -> Tensor:
    """Mean over pixels of all products of two channels, by way of all of them, (B, C', C, H * W), (B, C', C)."""
    if bottom.shape[2] > top.shape[2]:
        bottom = F.adaptive_avg_pool2d(bottom, top.shape[2:])
    return (_rows(bottom)[:, None] * _rows(top)[:, :, None]).mean(dim=-1)


def fsp(maps_s: list[Tensor], maps_t: list[Tensor]) -> list[Tensor]:
    """Mean squared error of the flows between successive maps, which do not grow."""
    flows = [[_flow(*pair) for pair in pairwise(maps)] for maps in (maps_s, maps_t)]
    return [(flow_s - flow_t).pow(2).mean() for flow_s, flow_t in zip(*flows, strict=True)]


def _distances(x: Tensor) -> Tensor:
    squares = x.pow(2).sum(dim=1)
    distances = (squares[:, None] + squares - 2 * x @ x.T).clamp(min=1e-12).sqrt()
    return distances * (1 - torch.eye(len(x), dtype=x.dtype, device=x.device))


def _angles(x: Tensor) -> Tensor:
    """Cosines of the angle at each sample between any two others, from all differences (B, B, D)."""
    differences = F.normalize(x[None] - x[:, None], dim=2)
    return torch.bmm(differences, differences.mT)


def rkd(f_s: Tensor, f_t: Tensor, w_d: float = 25, w_a: float = 50) -> Tensor:
    """Huber losses of relative distances, (B, B), and of angles, (B, B, B)."""
    d_s, d_t = _distances(f_s), _distances(f_t)
    distance = F.smooth_l1_loss(d_s / d_s[d_s > 0].mean(), d_t / d_t[d_t > 0].mean())
    return w_d * distance + w_a * F.smooth_l1_loss(_angles(f_s), _angles(f_t))


def _neighbours(x: Tensor, eps: float) -> Tensor:
    x = x / (x.pow(2).sum(dim=1, keepdim=True).sqrt() + eps)
    similarity = (x @ x.T + 1) / 2
    return similarity / similarity.sum(dim=1, keepdim=True)


def pkt(f_s: Tensor, f_t: Tensor, eps: float = 1e-7) -> Tensor:
    """Divergence of the probabilities that samples are neighbours, by cosine, (B, B)."""
    p_s, p_t = _neighbours(f_s, eps), _neighbours(f_t, eps)
    return (p_t * torch.log((p_t + eps) / (p_s + eps))).mean()


def abound(maps_s: list[Tensor], maps_t: list[Tensor], margin: float = 1.0) -> list[Tensor]:
    """Squared distance from the margins of the neurons on the wrong side, by masks for both sides."""
    losses = []
    for i, (f_s, f_t) in enumerate(zip(maps_s, maps_t, strict=True)):
        too_high = ((f_s > -margin) & (f_t <= 0)).to(f_s.dtype)
        too_low = ((f_s <= margin) & (f_t > 0)).to(f_s.dtype)
        loss = (f_s + margin) ** 2 * too_high + (f_s - margin) ** 2 * too_low
        losses.append(loss.sum() / len(f_s) * 0.003 * 2 ** (i - len(maps_s) + 1))
    return losses


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    """Squared inner products of channels, from products (B, C', C, H * W)."""
    return (a[:, None] * b[:, :, None]).sum(dim=-1).pow(2)


def nst(maps_s: list[Tensor], maps_t: list[Tensor]) -> list[Tensor]:
    """Squared maximum mean discrepancy of channels under the quadratic kernel."""
    losses = []
    for f_s, f_t in zip(maps_s, maps_t, strict=True):
        s, t = F.normalize(_rows(f_s), dim=2), F.normalize(_rows(f_t), dim=2)
        losses.append(_kernel(t, t).mean() + _kernel(s, s).mean() - 2 * _kernel(s, t).mean())
    return losses


def nce(f_s: Tensor, f_t: Tensor, target: Tensor, temperature: float = 0.1, eps: float = 1e-10) -> Tensor:
    """Supervised contrast: cosines come from all differences (B, B, D), its two parts from masks (B, B)."""
    f_s, f_t = F.normalize(f_s, dim=1), F.normalize(f_t, dim=1)
    cosines = 1 - (f_s[:, None] - f_t).pow(2).sum(dim=2) / 2
    p = F.softmax(cosines / temperature, dim=1)
    same = (target[:, None] == target).to(p.dtype)
    other = 1 - same
    attract = (-torch.log(p + eps) * same).sum(dim=1) / same.sum(dim=1)
    repel = (-torch.log(1 - p + eps) * other).sum(dim=1) / other.sum(dim=1)
    return (attract + repel).mean()


def ccl(f_s: Tensor, f_t: Tensor, target: Tensor, logit_s: Tensor, logit_t: Tensor) -> Tensor:
    """``nce`` and the mean of the KL divergences in both directions."""
    return nce(f_s, f_t, target) + (kd(logit_s, logit_t, T=1) + kd(logit_t, logit_s, T=1)) / 2


def _relative_squared_distances(x: Tensor) -> Tensor:
    x = x.flatten(1)
    squares = x.pow(2).sum(dim=1)
    squared = (squares[:, None] + squares - 2 * x @ x.T).clamp(min=1e-12)
    squared = squared * (1 - torch.eye(len(x), dtype=x.dtype, device=x.device))
    return squared / squared.max()


def _moved(before: Tensor, after: Tensor) -> Tensor:
    """The distance that a stage moves each sample, (B,); the stage halves the maps and doubles the channels."""
    before = F.adaptive_avg_pool2d(before, after.shape[2:])
    after = (after[:, 0::2] + after[:, 1::2]) / 2
    squared = (before - after).pow(2).flatten(1).sum(dim=1).clamp(min=1e-12)
    return squared / squared.max()


def irg(
    f_s: Tensor, f_t: Tensor, logit_s: Tensor, logit_t: Tensor, maps_s: list[Tensor], maps_t: list[Tensor]
) -> Tensor:
    """Vertices, edges and transformation of the instance relationship graph, weighted by 0.1, 5 and 5."""
    edges = [
        F.mse_loss(_relative_squared_distances(x_s), _relative_squared_distances(x_t))
        for x_s, x_t in zip([f_s, *maps_s], [f_t, *maps_t], strict=True)
    ]
    transformation = F.mse_loss(_moved(*maps_s), _moved(*maps_t))
    return 0.1 * F.mse_loss(logit_s, logit_t) + 5 * sum(edges) / len(edges) + 5 * transformation


def dkd(
    logit_s: Tensor, logit_t: Tensor, target: Tensor, alpha: float = 1.0, beta: float = 8.0, T: float = 4.0
) -> Tensor:
    """Decoupled KD; a large constant masks the target class out of the second part."""
    is_target = F.one_hot(target, logit_s.shape[1]).to(logit_s.dtype)
    p_s, p_t = F.softmax(logit_s / T, dim=1), F.softmax(logit_t / T, dim=1)
    binary_s, binary_t = (
        torch.stack([(p * is_target).sum(dim=1), (p * (1 - is_target)).sum(dim=1)], dim=1) for p in (p_s, p_t)
    )
    target_class = F.kl_div(torch.log(binary_s), binary_t, reduction="batchmean")
    others_s = F.log_softmax(logit_s / T - 1000 * is_target, dim=1)
    others_t = F.softmax(logit_t / T - 1000 * is_target, dim=1)
    other_classes = F.kl_div(others_s, others_t, reduction="batchmean")
    return (alpha * target_class + beta * other_classes) * T**2


def _pearson(x: Tensor, y: Tensor) -> Tensor:
    x, y = x - x.mean(dim=1, keepdim=True), y - y.mean(dim=1, keepdim=True)
    return ((x * y).sum(dim=1) / (x.norm(dim=1) * y.norm(dim=1) + 1e-8)).mean()


def dist(logit_s: Tensor, logit_t: Tensor) -> Tensor:
    """One minus the correlation of class probabilities, along samples and along classes."""
    p_s, p_t = logit_s.softmax(dim=1), logit_t.softmax(dim=1)
    return (1 - _pearson(p_s, p_t)) + (1 - _pearson(p_s.T, p_t.T))


def reviewkd(maps_s: list[Tensor], maps_t: list[Tensor]) -> Tensor:
    """ReviewKD's hierarchical context loss on maps and pooled features."""
    loss = 0
    for f_s, f_t in zip(maps_s, maps_t, strict=True):
        if f_s.dim() == 2:
            f_s, f_t = f_s[:, :, None, None], f_t[:, :, None, None]
        pair, weights = F.mse_loss(f_s, f_t), [1.0]
        for size in (4, 2, 1):
            if size < f_s.shape[2]:
                weights.append(weights[-1] / 2)
                pooled = [F.adaptive_avg_pool2d(f, size) for f in (f_s, f_t)]
                pair = pair + weights[-1] * F.mse_loss(*pooled)
        loss = loss + pair / sum(weights)
    return loss


def ofd(maps_s: list[Tensor], maps_t: list[Tensor], margins: list[Tensor]) -> Tensor:
    """OFD's partial distance, by masks for its three cases.

    Args:
        margins: a margin per channel for each layer, (C,), none positive.
    """
    total = 0
    for i, (f_s, f_t, margin) in enumerate(zip(maps_s, maps_t, margins, strict=True)):
        margin = margin.view(1, -1, 1, 1)
        below = ((f_s > margin) & (f_t <= margin)).to(f_s.dtype)
        between = ((f_s > f_t) & (f_t > margin) & (f_t <= 0)).to(f_s.dtype)
        active = (f_t > 0).to(f_s.dtype)
        loss = (f_s - margin) ** 2 * below + (f_s - f_t) ** 2 * between + (f_s - f_t) ** 2 * active
        total = total + loss.sum() / len(f_s) / 2 ** (len(margins) - 1 - i)
    return total


def simkd(map_s: list[Tensor], map_t: list[Tensor]) -> Tensor:
    """Mean squared error of the last maps."""
    return F.mse_loss(map_s[-1], map_t[-1])


def _standardized(x: Tensor) -> Tensor:
    return (x - x.mean(dim=0)) / x.std(dim=0)


def itrd(f_s: Tensor, f_t: Tensor, embed: nn.Linear) -> list[Tensor]:
    """Correlation of each dimension, by the matrix of all, and Gram matrices by their spectra's second moments."""
    z = embed(f_s)
    r = torch.diagonal(_standardized(z).T @ _standardized(f_t)) / len(z)
    n_s, n_t = F.normalize(f_s, dim=1), F.normalize(f_t, dim=1)
    gram_s, gram_t = n_s @ n_s.T, n_t @ n_t.T
    joint = gram_s * gram_t
    gram_s, joint = gram_s / torch.trace(gram_s), joint / torch.trace(joint)
    return [torch.log2((1 - r).abs().pow(3).sum()), (gram_s @ gram_s).trace() - (joint @ joint).trace()]


def srd(f_s: Tensor, f_t: Tensor, embed: nn.Linear) -> Tensor:
    """Logarithm of the summed fourth powers of two batch norms' differences."""
    n_s, n_t = (F.batch_norm(f, None, None, training=True, eps=1e-4) for f in (embed(f_s), f_t))
    return (n_s - n_t).abs().pow(4).sum().log()


def clipkd(f_s: Tensor, f_t: Tensor, label: Tensor, scale: Tensor) -> Tensor:
    """Mimicry, contrast and relation, each with its own similarities."""
    n_s, n_t = F.normalize(f_s, dim=1), F.normalize(f_t, dim=1)
    own = torch.arange(len(f_s), device=f_s.device)
    contrast = (F.cross_entropy(scale * n_s @ n_t.T, own) + F.cross_entropy(scale * n_s @ n_t.T, own)) / 2
    logit_s, logit_t = n_s @ n_t.T / 0.07, n_t @ n_t.T / 0.07
    relation = (kd(logit_s, logit_t, T=1) + kd(logit_s.T, logit_t.T, T=1)) / 2
    return 2000 * F.mse_loss(n_s, n_t) + contrast + relation


def unic(f_s: Tensor, f_t: Tensor, embed: nn.Linear, mean: Tensor, std: Tensor) -> Tensor:
    """Cosine and smooth L1 distance from standardised embeddings."""
    z_s, z_t = embed(f_s), (f_t - mean) / (std + 1e-6)
    return (1 - F.cosine_similarity(z_s, z_t)).mean() / 2 + F.smooth_l1_loss(z_s, z_t) / 2


def vkd(f_s: Tensor, f_t: Tensor, free: Tensor) -> Tensor:
    """Smooth L1 distance of orthogonally projected embeddings from layer-normalised ones.

    Args:
        free: the matrix with the projection as the first factor of its QR decomposition.
    """
    q, r = torch.linalg.qr(free)
    return F.smooth_l1_loss(f_s @ (q * torch.sign(torch.diagonal(r))).T, F.layer_norm(f_t, f_t.shape[1:]))


def rrd(f_s: Tensor, f_t: Tensor, embed_s: nn.Linear, embed_t: nn.Linear, queue: Tensor, place: Tensor) -> Tensor:
    """Cross-entropy of similarities to a queue; the batch replaces rows of it."""
    z_s, z_t = F.normalize(embed_s(f_s), dim=1), F.normalize(embed_t(f_t), dim=1).detach()
    for row in z_t:
        queue[place] = row
        place.copy_((place + 1) % len(queue))
    rows = queue.clone()
    p_t, log_s = F.softmax(z_t @ rows.T / 0.02, dim=1), F.log_softmax(z_s @ rows.T / 0.1, dim=1)
    return -(p_t * log_s).sum(dim=1).mean()


def nkd(logit_s: Tensor, logit_t: Tensor, target: Tensor) -> Tensor:
    """The target's cross-entropy, and that of the other classes, with the target's column taken out."""
    own = F.one_hot(target, logit_s.shape[1]).bool()
    first = -(F.softmax(logit_t, dim=1)[own] * F.log_softmax(logit_s, dim=1)[own]).mean()
    rest_s, rest_t = (x[~own].view(len(x), -1) for x in (logit_s, logit_t))
    return first - 1.5 * (F.softmax(rest_t, dim=1) * F.log_softmax(rest_s, dim=1)).sum(dim=1).mean()


def ttm(logit_s: Tensor, logit_t: Tensor, gamma: float = 0.1, weighted: bool = False) -> Tensor:
    """KL divergence from powers of the teacher's probabilities."""
    power = F.softmax(logit_t, dim=1).pow(gamma)
    total = power.sum(dim=1)
    p = power / total[:, None]
    divergence = F.kl_div(F.log_softmax(logit_s, dim=1), p, reduction="none").sum(dim=1)
    return (total * divergence if weighted else divergence).mean()


def wttm(logit_s: Tensor, logit_t: Tensor) -> Tensor:
    """``ttm``, weighted by the powers' sums."""
    return ttm(logit_s, logit_t, weighted=True)


def rld(logit_s: Tensor, logit_t: Tensor, target: Tensor) -> Tensor:
    """Confidences as pairs of probabilities; a large constant masks the classes that are left out."""
    p_s, p_t = F.softmax(logit_s, dim=1), F.softmax(logit_t, dim=1)
    own = F.one_hot(target, logit_s.shape[1]).bool()
    sure_s, sure_t = p_s[own], p_t.amax(dim=1)
    pair_s, pair_t = (torch.stack([sure, 1 - sure], dim=1) for sure in (sure_s, sure_t))
    confidence = F.kl_div(pair_s.log(), pair_t, reduction="batchmean")
    left_out = logit_t >= logit_t[own][:, None]
    rest_s, rest_t = ((x / 4).masked_fill(left_out, -1e9) for x in (logit_s, logit_t))
    rest = F.kl_div(F.log_softmax(rest_s, dim=1), F.softmax(rest_t, dim=1), reduction="batchmean")
    return confidence + 8 * 16 * rest


def wkd(logit_s: Tensor, logit_t: Tensor, target: Tensor, cost: Tensor) -> Tensor:
    """The target's cross-entropy, and Sinkhorn's transport with a matrix of costs for each sample."""
    own = F.one_hot(target, logit_s.shape[1]).bool()
    first = -(F.softmax(logit_t, dim=1)[own] * F.log_softmax(logit_s, dim=1)[own]).mean()
    a, b = (F.softmax(x[~own].view(len(x), -1) / 8, dim=1)[:, :, None] for x in (logit_s, logit_t))
    classes = len(cost)
    others = torch.arange(classes, device=cost.device).expand(len(target), -1)[~own].view(len(target), -1)
    c = cost[others[:, :, None], others[:, None]].clamp(min=0) + 1e-8
    kernel = torch.exp(-c / 0.05)
    u = torch.full_like(a, 1 / (classes - 1))
    for _ in range(10):
        v = b / (kernel.mT @ u + 1e-8)
        u = a / (kernel @ v + 1e-8)
    return first + 600 * (u * kernel * v.mT * c).sum(dim=(1, 2)).mean()


def wkd_feature(map_s: list[Tensor], map_t: list[Tensor]) -> Tensor:
    """Distance of the channels' means and standard deviations."""
    (mean_s, std_s), (mean_t, std_t) = (
        (x[-1].mean(dim=(2, 3)), torch.sqrt(x[-1].var(dim=(2, 3)) + 1e-5)) for x in (map_s, map_t)
    )
    return (4 * (mean_s - mean_t).pow(2).sum(dim=1) + (std_s - std_t).pow(2).sum(dim=1)).mean()


def abkd(logit_s: Tensor, logit_t: Tensor, alpha: float = 0.8, beta: float = 0.3, T: float = 4.0) -> Tensor:
    """The alpha-beta divergence from powers of probabilities."""
    p, q = F.softmax(logit_t / T, dim=1), F.softmax(logit_s / T, dim=1)
    total = alpha + beta
    alike = alpha / total * p.pow(total) + beta / total * q.pow(total)
    return -((p.pow(alpha) * q.pow(beta) - alike) / (alpha * beta)).sum(dim=1).mean()


def pefd(f_s: Tensor, f_t: Tensor, projectors: nn.ModuleList) -> Tensor:
    """Cosine distance of three projections' mean, each after a ReLU."""
    mean = torch.stack([projector(f_s).relu() for projector in projectors]).mean(dim=0)
    return (1 - F.cosine_similarity(mean, f_t)).mean()


def mlld(logit_s: Tensor, logit_t: Tensor) -> list[Tensor]:
    """KL divergences and two kinds of Gram matrices at five temperatures, and the means of two masks."""
    p_t = F.softmax(logit_t, dim=1)
    samples, classes = (x <= x.median() for x in (p_t.amax(dim=1), p_t.sum(dim=0)))
    terms = [0, 0, 0]
    for T in (4, 3, 5, 2, 6):
        p_s, p_t = F.softmax(logit_s / T, dim=1), F.softmax(logit_t / T, dim=1)
        of_classes = (p_s.T @ p_s - p_t.T @ p_t).pow(2).sum() / p_s.shape[1]
        of_batch = (p_s @ p_s.T - p_t @ p_t.T).pow(2).sum() / len(p_s)
        terms[0] = terms[0] + (kd(logit_s, logit_t, T) * samples).mean()
        terms[1] = terms[1] + (of_classes * classes).mean()
        terms[2] = terms[2] + (of_batch * samples).mean()
    return terms


def nd(f_s: Tensor, f_t: Tensor, target: Tensor, centres: Tensor) -> Tensor:
    """One minus the length along the class's centre, divided by the larger norm."""
    centre = centres[target]
    along = (f_s * centre / centre.norm(dim=1, keepdim=True)).sum(dim=1)
    return (1 - along / torch.stack([f_s.norm(dim=1), f_t.norm(dim=1)]).amax(dim=0)).mean()


def ofa(logit_s: Tensor, logit_t: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy with the teacher's probabilities, the target's raised."""
    own = F.one_hot(target, logit_s.shape[1])
    soft = (F.softmax(logit_t, dim=1) + own).pow(1) - own
    return -(soft * F.log_softmax(logit_s, dim=1)).sum(dim=1).mean()


def skd(logit_s: Tensor, logit_t: Tensor) -> list[Tensor]:
    """KL divergence, and the difference's Mahalanobis length by the inverse of its covariance."""
    p_t = F.softmax(logit_t, dim=1)
    samples, classes = ((x <= x.median()).to(x.dtype).mean() for x in (p_t.amax(dim=1), p_t.sum(dim=0)))
    n_s, n_t = F.normalize(logit_s, dim=1), F.normalize(logit_t, dim=1)
    difference = (n_s @ n_s.T - n_t @ n_t.T) / logit_s.shape[1]
    covariance = torch.cov(difference.T) + 0.1 * torch.eye(len(n_s)).to(difference)
    squares = (difference @ torch.linalg.inv(covariance) * difference).sum(dim=1)
    return [samples * kd(logit_s, logit_t), classes * squares.sqrt().mean()]


def cka(f_s: Tensor, f_t: Tensor) -> Tensor:
    """One minus the ratio of the norms of products of centred embeddings, (D, D)."""
    s, t = f_s - f_s.mean(dim=0), f_t - f_t.mean(dim=0)
    return 1 - (s.T @ t).pow(2).sum() / ((s.T @ s).norm() * (t.T @ t).norm())
