import math
from argparse import Namespace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from conftest import check_finite
from distiller_zoo.CRD import CRD, ContrastSampler, CRDLoss, contrast_loss, contrast_scores


def options(**given) -> Namespace:
    defaults = {"s_dim": 5, "t_dim": 7, "feat_dim": 4, "n_data": 20, "nce_k": 6, "nce_t": 0.07, "nce_m": 0.5}
    return Namespace(**(defaults | {"mode": "exact"} | given))


def features(batch: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 5, generator=generator), torch.randn(batch, 7, generator=generator)


def crd_loss(seed: int = 0, **given) -> CRDLoss:
    torch.manual_seed(seed)
    return CRDLoss(options(**given))


def wave(shape: tuple[int, ...], phase: float) -> Tensor:
    return 0.2 * torch.sin(0.37 * torch.arange(1, math.prod(shape) + 1, dtype=torch.float64) + phase).view(shape)


def slow_loss(crd: CRDLoss, f_s: Tensor, f_t: Tensor, idx: Tensor, contrast_idx: Tensor) -> float:
    """Pair by pair from the paper's critic, p / (p + K / n), and the state before the call; eps as in RepDistiller."""
    state = {name: value.double().numpy() for name, value in crd.state_dict().items()}
    K, T, *Z, _ = state["contrast.params"]
    n = len(state["contrast.memory_v1"])
    total = 0.0
    for which, (f, name, memory) in enumerate(((f_s, "embed_s", "memory_v2"), (f_t, "embed_t", "memory_v1"))):
        v = f.double().numpy() @ state[f"{name}.linear.weight"].T + state[f"{name}.linear.bias"]
        v /= np.linalg.norm(v, axis=1, keepdims=True)
        rows = contrast_idx.tolist()
        p = [[math.exp(v[i] @ state[f"contrast.{memory}"][j] / T) for j in row] for i, row in enumerate(rows)]
        p = np.array(p) / (np.mean(p) * n if Z[which] < 0 else Z[which])
        noise = K / n
        total -= np.log(p[:, 0] / (p[:, 0] + noise + 1e-7)).sum() / len(idx)
        total -= np.log(noise / (p[:, 1:] + noise + 1e-7)).sum() / len(idx)
    return total


def test_it_is_repdistillers_in_value_gradient_and_state(losses):
    crd = crd_loss(s_dim=32, t_dim=32, feat_dim=8, n_data=40, nce_k=12).double()
    with torch.no_grad():
        for phase, embed in enumerate((crd.embed_s, crd.embed_t)):
            embed.linear.weight.copy_(wave((8, 32), phase))
            embed.linear.bias.zero_()
        for phase, memory in ((2, crd.contrast.memory_v1), (3, crd.contrast.memory_v2)):
            memory.copy_(torch.nn.functional.normalize(wave((40, 8), phase), dim=1))
    f_s = losses["in/f_s"].clone().requires_grad_()
    for call in ("first", "second"):
        value = crd(f_s, losses["in/f_t"], losses["in/crd_index"], losses["in/crd_contrast_index"])
        torch.testing.assert_close(value.reshape(1), losses[f"out/crd/{call}/value"], rtol=1e-9, atol=0)
        (found,), expected = torch.autograd.grad(value, f_s), losses[f"out/crd/{call}/grad/f_s"]
        assert (found - expected).abs().max() < 1e-9 * expected.abs().max()
        torch.testing.assert_close(crd.contrast.params, losses["out/crd/first/params"], rtol=1e-9, atol=0)
    for name in ("memory_v1", "memory_v2"):
        torch.testing.assert_close(crd.contrast.get_buffer(name), losses[f"out/crd/{name}"], rtol=0, atol=1e-9)


def test_its_state_has_repdistillers_names_order_and_initial_values():
    crd = crd_loss()
    assert list(crd.state_dict()) == [
        *(f"embed_{which}.linear.{name}" for which in "st" for name in ("weight", "bias")),
        *(f"contrast.{name}" for name in ("params", "memory_v1", "memory_v2")),
    ]
    assert crd.contrast.params.tolist() == pytest.approx([6, 0.07, -1, -1, 0.5])
    torch.manual_seed(0)
    torch.nn.Linear(5, 4), torch.nn.Linear(7, 4)
    bound = 1 / math.sqrt(4 / 3)
    for memory in (crd.contrast.memory_v1, crd.contrast.memory_v2):
        torch.testing.assert_close(memory, torch.rand(20, 4) * 2 * bound - bound)


@pytest.mark.parametrize("n_data", [20, 500], ids=["products with all", "gathered"])
def test_it_is_the_papers_loss_pair_by_pair(n_data):
    crd = crd_loss(n_data=n_data)
    f_s, f_t = features()
    idx = torch.tensor([4, 0, 9])
    contrast_idx = torch.randint(n_data, (3, 7), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        expected = slow_loss(crd, f_s, f_t, idx, contrast_idx)
        assert crd(f_s, f_t, idx, contrast_idx).item() == pytest.approx(expected, rel=1e-5)


def test_scores_are_the_same_gathered_or_from_products_with_all(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    v, memory = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (3, 20))
    idx = torch.randint(20, (3, 7), generator=generator)
    found = {}
    for dense in (0, 1000):
        monkeypatch.setitem(contrast_scores.__globals__, "_DENSE", dense)
        leaf, changing = v.clone().requires_grad_(), memory.clone()
        scores = contrast_scores(leaf, changing, idx)
        changing.zero_()  # as the memory changes before the backward pass
        found[dense] = scores, *torch.autograd.grad(scores.square().sum(), leaf)
    torch.testing.assert_close(found[0], found[1000], rtol=1e-12, atol=1e-14)
    expected = torch.tensor([[v[i] @ memory[j] for j in row] for i, row in enumerate(idx.tolist())])
    torch.testing.assert_close(found[0][0], expected)


def test_its_gradients_are_its_derivatives():
    """With the memories put back before each call; the first call has set Z."""
    crd = crd_loss().double()
    idx, contrast_idx = torch.tensor([4, 0, 9]), torch.randint(20, (3, 7), generator=torch.Generator().manual_seed(0))
    f_s, f_t = (f.double().requires_grad_() for f in features())
    crd(f_s, f_t, idx, contrast_idx)
    state = {name: value.clone() for name, value in crd.contrast.state_dict().items()}

    def loss(f_s: Tensor, f_t: Tensor) -> Tensor:
        crd.contrast.load_state_dict(state)
        return crd(f_s, f_t, idx, contrast_idx)

    assert torch.autograd.gradcheck(loss, (f_s, f_t))


def test_the_memories_take_up_the_batch_after_its_loss_and_nothing_else_and_no_gradient():
    crd = crd_loss(nce_m=0.25)
    f_s, f_t = features()
    idx, contrast_idx = torch.tensor([4, 0, 9]), torch.zeros(3, 7, dtype=torch.long)
    before = {name: value.clone() for name, value in crd.named_buffers()}
    crd(f_s, f_t, idx, contrast_idx).backward()
    for name, embed, f in (("memory_v1", crd.embed_s, f_s), ("memory_v2", crd.embed_t, f_t)):
        memory, old = crd.contrast.get_buffer(name), before[f"contrast.{name}"]
        expected = 0.25 * old[idx] + 0.75 * embed(f).detach()
        torch.testing.assert_close(memory[idx], expected / expected.norm(dim=1, keepdim=True))
        others = [i for i in range(20) if i not in idx]
        assert torch.equal(memory[others], old[others])
        assert not memory.requires_grad
    assert {name for name, _ in crd.named_parameters()} == {
        f"embed_{e}.linear.{w}" for e in "st" for w in ("weight", "bias")
    }
    assert all(w.grad.abs().max() > 0 for w in crd.parameters())


def test_two_calls_before_one_backward_pass_give_the_sum_of_their_gradients():
    f_s, f_t = features()
    idx, contrast_idx = torch.tensor([4, 0, 9]), torch.randint(20, (3, 7), generator=torch.Generator().manual_seed(0))
    grads = []
    for together in (True, False):
        crd, leaf = crd_loss(), f_s.clone().requires_grad_()
        values = []
        for _ in range(2):
            value = crd(leaf, f_t, idx, contrast_idx)
            values.append(value) if together else value.backward()
        if together:
            sum(values).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


def test_a_loaded_state_goes_on_bit_for_bit():
    crd, index = crd_loss(), torch.tensor([4, 0, 9])
    crd(*features(), index)
    other = crd_loss(seed=5)
    other.load_state_dict({name: value.clone() for name, value in crd.state_dict().items()})
    values = []
    for module in (crd, other):
        torch.manual_seed(1)
        values.append([module(*features(seed=i), index) for i in range(3)])
    assert values[0] == values[1]
    assert torch.equal(crd.contrast.memory_v1, other.contrast.memory_v1)
    assert torch.equal(crd.contrast.params, other.contrast.params)


def test_without_a_contrast_index_negatives_are_drawn_from_all(monkeypatch):
    crd = crd_loss(n_data=5, nce_k=200)
    seen = []
    monkeypatch.setitem(
        contrast_loss.__globals__, "contrast_scores", lambda v, m, idx: seen.append(idx) or v @ m[idx[0]].T
    )
    crd(*features(), torch.tensor([4, 0, 2]))
    assert seen[0] is seen[1]
    assert seen[0].shape == (3, 201)
    assert seen[0][:, 0].tolist() == [4, 0, 2]
    assert all(set(row[1:].tolist()) == set(range(5)) for row in seen[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_batches_are_finite(dtype):
    crd = crd_loss().to(dtype)
    with torch.no_grad():
        crd.embed_s.linear.bias.zero_()
        crd.embed_t.linear.bias.zero_()
    f_s, f_t = (f.to(dtype) for f in features())
    dead_s, dead_t = f_s.clone(), f_t.clone()
    dead_s[1] = dead_t[2] = 0
    contrast_idx = torch.randint(20, (3, 7), generator=torch.Generator().manual_seed(0))
    for a, b in ((f_s, f_t), (dead_s, dead_t), (f_s * 0, f_t * 0), (f_s * 0 + 2, f_t * 0 + 2), (f_s * 1e6, f_t * 1e-6)):
        for idx in (torch.tensor([4, 0, 9]), torch.tensor([4, 4, 4])):
            check_finite(lambda s, t, idx=idx: crd(s, t, idx, contrast_idx), a, b)
            check_finite(lambda s, t, idx=idx: crd(s, t, idx[:1], contrast_idx[:1]), a[:1], b[:1])
    assert all(buffer.isfinite().all() for buffer in crd.buffers())


def test_a_zero_embedding_gets_no_gradient():
    crd = crd_loss()
    f_s, f_t = features()
    with torch.no_grad():
        crd.embed_s.linear.bias.zero_()
    crd(f_s * 0, f_t, torch.tensor([4, 0, 9])).backward()
    assert (crd.embed_s.linear.bias.grad == 0).all()
    assert crd.embed_t.linear.bias.grad.abs().max() > 0


def test_a_memory_opposite_to_its_sample_is_left_at_zero():
    crd = crd_loss()
    f_s, f_t = features(1)
    crd.contrast.memory_v1[4] = -crd.embed_s(f_s)[0].detach()
    crd(f_s, f_t, torch.tensor([4]))
    assert (crd.contrast.memory_v1[4] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_change_nothing(dtype):
    f_s, f_t = (f.to(dtype) for f in features())
    idx, contrast_idx = torch.tensor([4, 0, 9]), torch.zeros(3, 7, dtype=torch.long)
    expected = crd_loss()(f_s.float(), f_t.float(), idx, contrast_idx)
    assert torch.equal(crd_loss()(f_s, f_t, idx, contrast_idx), expected)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(crd_loss()(f_s, f_t, idx, contrast_idx), expected)


def test_maps_are_embedded_whole_in_any_memory_format():
    maps = torch.randn(3, 5, 2, 2, generator=torch.Generator().manual_seed(0))
    idx, contrast_idx = torch.tensor([4, 0, 9]), torch.zeros(3, 7, dtype=torch.long)
    expected = crd_loss(s_dim=20)(maps.reshape(3, 20), features()[1], idx, contrast_idx)
    found = crd_loss(s_dim=20)(maps.to(memory_format=torch.channels_last), features()[1], idx, contrast_idx)
    assert torch.equal(found, expected)


def test_other_shapes_are_refused():
    f_s, f_t = features()
    with pytest.raises(ValueError, match="one batch"):
        crd_loss()(f_s, f_t[:2], torch.arange(3))
    with pytest.raises(ValueError, match=r"\(3, 7\), got \(3, 6\)"):
        crd_loss()(f_s, f_t, torch.arange(3), torch.zeros(3, 6, dtype=torch.long))
    with pytest.raises(ValueError, match="nce_k must be at least 1"):
        crd_loss(nce_k=0)
    with pytest.raises(ValueError, match="n_data is 20, targets are 19"):
        CRD(options(), torch.arange(19))


TARGETS = torch.tensor([0, 1, 0, -1, 2, 0, 1, -1, 0])
ROWS = {c: {i for i, t in enumerate(TARGETS.tolist()) if t == c} for c in range(3)}


@pytest.mark.parametrize("mode", ["exact", "relax"])
@pytest.mark.parametrize("k", [1, 3, 4, 6, 30])
def test_positives_are_of_the_class_and_negatives_of_the_others_without_repeats_if_there_are_enough(mode, k):
    """Class 0 has 3 negatives, class 1 five and class 2 six."""
    index = torch.tensor([2, 6, 4, 0, 2])
    for seed in range(20):
        torch.manual_seed(seed)
        drawn = ContrastSampler(TARGETS, k, mode)(index)
        assert drawn.shape == (5, k + 1)
        for i, (positive, *negatives) in zip(index.tolist(), drawn.tolist(), strict=True):
            own = TARGETS[i].item()
            others = set().union(*(rows for c, rows in ROWS.items() if c != own))
            assert positive == i if mode == "exact" else positive in ROWS[own]
            assert set(negatives) <= others
            assert k > len(others) or len(set(negatives)) == k


@pytest.mark.parametrize("k", [2, 5, 40], ids=["without replacement", "all that there are", "with replacement"])
def test_each_possible_row_is_drawn_as_often(k):
    torch.manual_seed(0)
    index = torch.tensor([1, 2] * 4)
    sample = ContrastSampler(TARGETS, k, "relax")
    drawn = torch.cat([sample(index) for _ in range(500)])
    for own, rows in ((1, drawn[0::2]), (0, drawn[1::2])):
        counts = torch.bincount(rows[:, 0], minlength=9)[sorted(ROWS[own])]
        assert chisquare(counts).pvalue > 1e-3
        counts = torch.bincount(rows[:, 1:].flatten(), minlength=9)
        others = sorted(set().union(*(r for c, r in ROWS.items() if c != own)))
        assert counts[others].sum() == 2000 * k
        if k < len(others):  # what is drawn without replacement scatters less
            assert (counts[others] - 2000 * k / len(others)).abs().max() < 150
        elif k > len(others):
            assert chisquare(counts[others]).pvalue > 1e-3


@pytest.mark.parametrize("targets", [torch.arange(12) % 3, torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 2, 2])])
def test_each_pair_of_rows_is_drawn_as_often(targets):
    """The pairs within a sample, in their order, and between two samples of a batch."""
    torch.manual_seed(0)
    index = torch.tensor([0, 2])
    sample = ContrastSampler(targets, 3)
    drawn = torch.stack([sample(index)[:, 1:] for _ in range(1000)])
    for i, row in enumerate(index.tolist()):
        others = (targets != targets[row]).nonzero()[:, 0]
        for a, b in ((0, 1), (0, 2), (1, 2)):
            pairs = torch.bincount(drawn[:, i, a] * 12 + drawn[:, i, b], minlength=144).view(12, 12)
            pairs = pairs[others][:, others]
            assert not pairs.diagonal().any()
            assert chisquare(pairs[~torch.eye(len(others), dtype=torch.bool)]).pvalue > 1e-3
    first, second = ((targets != targets[row]).nonzero()[:, 0] for row in index)
    pairs = torch.bincount(drawn[:, 0, 0] * 12 + drawn[:, 1, 1], minlength=144).view(12, 12)
    assert chisquare(pairs[first][:, second].flatten()).pvalue > 1e-3


def test_samples_of_a_batch_draw_apart_from_each_other():
    torch.manual_seed(0)
    drawn = ContrastSampler(torch.arange(200) % 2, 50)(torch.zeros(8, dtype=torch.long))
    assert len({tuple(sorted(row)) for row in drawn.tolist()}) == 8


def test_draws_follow_the_global_seed():
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(ContrastSampler(torch.arange(50) % 5, 10, "relax")(torch.tensor([0, 1])))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_one_class_has_no_negatives():
    for targets in (torch.zeros(5, dtype=torch.long), torch.tensor([0, -1, 0, -1])):
        with pytest.raises(ValueError, match="no negatives"):
            ContrastSampler(targets, 2)


def test_another_mode_is_refused():
    with pytest.raises(ValueError, match="'exact' or 'relax', got 'all'"):
        ContrastSampler(TARGETS, 2, "all")


@pytest.mark.parametrize("mode", ["exact", "relax"])
def test_the_module_draws_and_calls_the_loss(mode):
    targets = torch.arange(20) % 4
    torch.manual_seed(0)
    crd = CRD(options(mode=mode), targets)
    loss = crd_loss()
    index = torch.tensor([4, 0, 9])
    torch.manual_seed(1)
    expected = loss(*features(), index, ContrastSampler(targets, 6, mode)(index))
    torch.manual_seed(1)
    assert torch.equal(crd(*features(), index), expected)
    assert list(crd.state_dict()) == [f"loss.{name}" for name in loss.state_dict()]


def test_training_on_it_brings_each_sample_next_to_its_own_teacher():
    """Two fixed views of 20 samples, embedded so that a student finds its partner in the teacher's memory."""
    crd = crd_loss(feat_dim=8, nce_k=15, nce_t=0.1)
    generator = torch.Generator().manual_seed(0)
    f_t = torch.randn(20, 7, generator=generator)
    f_s = f_t @ torch.randn(7, 5, generator=generator)
    optimizer = torch.optim.Adam(crd.parameters(), 0.05)
    index = torch.arange(20)
    sample = ContrastSampler(index, 15)
    for _ in range(60):
        loss = crd(f_s, f_t, index, sample(index))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    nearest = (crd.embed_s(f_s) @ crd.contrast.memory_v2.T).argmax(dim=1)
    assert (nearest == index).sum() >= 18
