"""Contrastive Representation Distillation (Tian, Krishnan, Isola, ICLR 2020, arXiv 1910.10699)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Keeps a ratio of probabilities finite, RepDistiller's.
_EPS = 1e-7

# Up to so many samples per negative, products with all of them are faster than gathering the negatives.
_DENSE = 16


def _unit(x: Tensor) -> Tensor:
    """Rows of unit norm; a zero row stays zero, with zero gradient."""
    return F.normalize(torch.where(x.any(dim=1, keepdim=True), x, 0), dim=1)


def contrast_scores(v: Tensor, memory: Tensor, contrast_idx: Tensor) -> Tensor:
    """Multiply each row of v with the rows of a memory that it is contrasted with.

    Args:
        v: (B, D).
        memory: (n_data, D); it may change before the backward pass, and gets no gradient.
        contrast_idx: the rows of the memory for each row of v, (B, K + 1).

    Returns:
        (B, K + 1).
    """
    if len(memory) <= _DENSE * contrast_idx.shape[1]:
        return (v @ memory.clone().T).gather(1, contrast_idx)
    return (F.embedding(contrast_idx, memory) @ v.unsqueeze(2)).squeeze(2)


def contrast_loss(log_p: Tensor, n_data: int) -> Tensor:
    """Tell the positive pair from K negatives drawn from n_data samples.

    Args:
        log_p: log-probabilities of the pairs under the model, positive first, (B, K + 1).
        n_data: number of samples the negatives are drawn from, uniformly.

    Returns:
        Scalar, the sum over the pairs, the mean over the batch.
    """
    K = log_p.shape[1] - 1
    noise = K / n_data
    # Its sigmoid is the probability that a pair is the positive one, p / (p + noise + eps).
    logit = log_p - math.log(noise + _EPS)
    # The logarithm of a sigmoid is x - softplus(x), that of its complement -softplus(x).
    right = logit[:, 0].sum() - F.softplus(logit).sum()
    # RepDistiller has noise / (p + noise + eps) for a negative, which does not add up to 1 with the positive's.
    return K * math.log1p(_EPS / noise) - right / len(log_p)


class Embed(nn.Module):
    """A linear map of (B, ...), and its result scaled to unit norm, (B, dim_out)."""

    def __init__(self, dim_in: int = 1024, dim_out: int = 128):
        super().__init__()
        self.linear = nn.Linear(dim_in, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        return _unit(self.linear(x.flatten(1).to(self.linear.weight.dtype)))


class ContrastMemory(nn.Module):
    """The latest embeddings of all training samples by the student (memory_v1) and by the teacher (memory_v2).

    Args:
        inputSize: dimension of the embeddings.
        outputSize: number of training samples.
        K: number of negatives.
        T: temperature.
        momentum: share of the old embedding in the new one.

    ``params`` holds K, T, Z_1, Z_2 and momentum; the normalising constants Z are -1 until the first call sets them.
    """

    def __init__(self, inputSize: int, outputSize: int, K: int, T: float = 0.07, momentum: float = 0.5):
        super().__init__()
        self.K = K
        self.register_buffer("params", torch.tensor([K, T, -1, -1, momentum]))
        bound = 1 / math.sqrt(inputSize / 3)
        self.register_buffer("memory_v1", torch.rand(outputSize, inputSize) * (2 * bound) - bound)
        self.register_buffer("memory_v2", torch.rand(outputSize, inputSize) * (2 * bound) - bound)

    def forward(self, v1: Tensor, v2: Tensor, y: Tensor, idx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Log-probabilities of pairs, each (B, K + 1); then the memories take up the embeddings.

        Args:
            v1: the student's embeddings, (B, D), contrasted with the teacher's memory.
            v2: the teacher's, (B, D), contrasted with the student's memory.
            y: the samples' indices, (B,).
            idx: the indices they are contrasted with, their positive first, (B, K + 1); None draws negatives from all.
        """
        if idx is None:
            idx = torch.randint(len(self.memory_v1), (len(y), self.K + 1), device=y.device)
            idx[:, 0] = y
        # A copy: the buffer changes before the backward pass.
        _, T, *Z, momentum = self.params.clone()
        scores = [contrast_scores(v1 / T, self.memory_v2, idx), contrast_scores(v2 / T, self.memory_v1, idx)]
        with torch.no_grad():
            estimates = [score.exp().mean() * len(self.memory_v1) for score in scores]
            Z = [torch.where(old < 0, new, old) for old, new in zip(Z, estimates, strict=True)]
            self.params[2:4] = torch.stack(Z)
            for memory, v in ((self.memory_v1, v1), (self.memory_v2, v2)):
                memory[y] = F.normalize(momentum * memory[y] + (1 - momentum) * v, dim=1)
        return scores[0] - Z[0].log(), scores[1] - Z[1].log()


class ContrastLoss(nn.Module):
    """``contrast_loss`` for a number of samples."""

    def __init__(self, n_data: int):
        super().__init__()
        self.n_data = n_data

    def forward(self, log_p: Tensor) -> Tensor:
        return contrast_loss(log_p, self.n_data)


class CRDLoss(nn.Module):
    """Contrast of the student with the teacher's memory plus contrast of the teacher with the student's.

    The embeddings are trained with the student; the state dict also holds everything else that the loss keeps.

    Args:
        opt: s_dim and t_dim, the features' dimensions; feat_dim, the embeddings'; n_data, the number of training
            samples; nce_k, nce_t and nce_m, number of negatives, temperature and momentum.
    """

    def __init__(self, opt):
        super().__init__()
        if opt.nce_k < 1:
            raise ValueError(f"CRD needs a negative: nce_k must be at least 1, got {opt.nce_k}")
        self.embed_s = Embed(opt.s_dim, opt.feat_dim)
        self.embed_t = Embed(opt.t_dim, opt.feat_dim)
        self.contrast = ContrastMemory(opt.feat_dim, opt.n_data, opt.nce_k, opt.nce_t, opt.nce_m)
        self.criterion_t = ContrastLoss(opt.n_data)
        self.criterion_s = ContrastLoss(opt.n_data)

    def forward(self, f_s: Tensor, f_t: Tensor, idx: Tensor, contrast_idx: Tensor | None = None) -> Tensor:
        """The loss of a batch, a scalar; updates the memories.

        Args:
            f_s: the student's features, (B, ...).
            f_t: the teacher's, (B, ...).
            idx: the samples' indices in the training set, (B,).
            contrast_idx: indices of each sample's positive and its nce_k negatives, (B, nce_k + 1); None draws
                negatives uniformly from the whole training set, classes notwithstanding.

        Raises:
            ValueError: for shapes other than these.
        """
        if not len(f_s) == len(f_t) == len(idx):
            raise ValueError(f"CRD needs one batch, got {tuple(f_s.shape)}, {tuple(f_t.shape)} and {tuple(idx.shape)}")
        expected = (len(idx), self.contrast.K + 1)
        if contrast_idx is not None and contrast_idx.shape != expected:
            raise ValueError(f"CRD needs a contrast_idx of shape {expected}, got {tuple(contrast_idx.shape)}")
        with torch.autocast(f_s.device.type, enabled=False):
            log_p_s, log_p_t = self.contrast(self.embed_s(f_s), self.embed_t(f_t), idx, contrast_idx)
            return self.criterion_s(log_p_s) + self.criterion_t(log_p_t)


class ContrastSampler(nn.Module):
    """Draws the rows that each sample of a batch is contrasted with: a positive, then k negatives.

    Negatives come from all rows of other classes, uniformly, without replacement if there are k of them, else with.

    Args:
        targets: classes of the training set, (n_data,); a row of class -1 is never drawn.
        k: number of negatives.
        mode: 'exact' for the sample itself as its positive, 'relax' for any row of its class, itself included.

    Raises:
        ValueError: for another mode, or a class without negatives.
    """

    def __init__(self, targets: Tensor, k: int, mode: str = "exact"):
        super().__init__()
        if mode not in ("exact", "relax"):
            raise ValueError(f"mode must be 'exact' or 'relax', got {mode!r}")
        self.k, self.mode = k, mode
        rows = torch.argsort(targets, stable=True)[int((targets < 0).sum()) :]
        sizes = torch.bincount(targets[rows])
        counts = len(rows) - sizes[sizes > 0]
        if not len(counts) or not counts.min():
            raise ValueError("CRD has no negatives to draw: all rows are of one class")
        self.fewest, self.most = int(counts.min()), int(counts.max())
        # The rows of class after class, twice: those of the other classes follow a class in one piece.
        for name, value in {"targets": targets, "sizes": sizes, "rows": rows.repeat(2)}.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, index: Tensor) -> Tensor:
        """Rows, (B, k + 1), for the samples at index, (B,), each of a class."""
        classes = self.targets[index, None]
        size, end = self.sizes[classes], self.sizes.cumsum(0)[classes]
        count = len(self.rows) // 2 - size
        if self.fewest >= self.k:
            rank = _draw_distinct(count, self.k, self.fewest, self.most)
        else:
            rank = _draw(count, self.k)
            if self.most >= self.k:
                enough = count >= self.k
                distinct = _draw_distinct(count.where(enough, self.most), self.k, self.k, self.most)
                rank = torch.where(enough, distinct, rank)
        # On a CPU this is twice as fast as rows[...].
        negatives = self.rows.index_select(0, (rank + end).flatten()).view(rank.shape)
        positive = index[:, None] if self.mode == "exact" else self.rows[end - size + _draw(size, 1)]
        return torch.cat([positive, negatives], dim=1)


def _draw(count: Tensor, k: int) -> Tensor:
    """k numbers below each count, uniformly, with replacement: (B, 1) to (B, k)."""
    return (torch.rand(len(count), k, dtype=torch.float64, device=count.device) * count).long()


def _draw_distinct(count: Tensor, k: int, fewest: int, most: int) -> Tensor:
    """k different numbers below each count, uniformly, in no order: (B, 1) to (B, k).

    No number is compared with another. The samples share a random permutation of the numbers below ``most``. Sample i
    maps x to permutation[(x + b) mod most] + c mod most, with b and c of its own. This is a permutation, as likely as
    any other, so that its first k values below the count are a uniform choice. The numbers of two samples are
    independent in pairs.

    Args:
        count: from ``fewest`` to ``most``, which are known to the host; ``fewest`` is at least k.
    """
    width, device = _width(k, fewest, most), count.device
    permutation = torch.randperm(most, dtype=torch.int32, device=device)
    b, c = (torch.randint(most, (len(count), 1), dtype=torch.int32, device=device) for _ in range(2))
    rank = torch.cat([permutation, permutation[: width - 1]]).unfold(0, width, 1)[b[:, 0]]
    rank += c
    rank -= (rank >= most) * most
    if fewest == most:
        return rank
    right = rank < count
    place = right.cumsum(1)
    place = torch.where(right & (place <= k), place - 1, k)  # column k takes what is left over
    return rank.new_zeros(len(count), k + 1).scatter_(1, place, rank)[:, :k]


def _width(k: int, fewest: int, most: int) -> int:
    """So many different numbers below ``most`` hold k below ``fewest``, but for one draw in 2^64 (Hoeffding, 1963)."""
    share, slack = fewest / most, math.sqrt(32 * math.log(2))
    root = (slack + math.sqrt(slack**2 + 4 * share * k)) / (2 * share)
    return k if fewest == most else min(math.ceil(root**2), most)


class CRD(nn.Module):
    """``CRDLoss`` that draws its own positives and negatives.

    Args:
        opt: CRDLoss's, and mode, 'exact' or 'relax'.
        targets: classes of the training set, (n_data,), -1 for what is held out of it.

    Raises:
        ValueError: for another number of targets than n_data, or a class without negatives.
    """

    def __init__(self, opt, targets: Tensor):
        super().__init__()
        if len(targets) != opt.n_data:
            raise ValueError(f"CRD needs a target per sample: n_data is {opt.n_data}, targets are {len(targets)}")
        self.loss = CRDLoss(opt)
        self.sample = ContrastSampler(targets, opt.nce_k, opt.mode)

    def forward(self, f_s: Tensor, f_t: Tensor, index: Tensor) -> Tensor:
        """The loss of features (B, ...) of the samples at index, (B,), a scalar; updates the memories."""
        return self.loss(f_s, f_t, index, self.sample(index))
