import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import check_finite, check_golden
from distiller_zoo.RKD import RKDLoss, rkd_loss


def embeddings(batch: int = 6, dim: int = 5, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    f_s, f_t = torch.randn(2, batch, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + offset
    return f_s, f_t


def gradient(f_s: Tensor, f_t: Tensor) -> tuple[Tensor, Tensor]:
    f_s = f_s.clone().requires_grad_()
    value = rkd_loss(f_s, f_t)
    return value.detach(), torch.autograd.grad(value, f_s)[0]


def huber(x: float) -> float:
    return x * x / 2 if abs(x) < 1 else abs(x) - 0.5


def slow_loss(f_s: Tensor, f_t: Tensor, w_d: float, w_a: float) -> float:
    """The paper's potentials, pair by pair and triple by triple, with RepDistiller's means over all B^2 and B^3."""
    n = len(f_s)
    relative, angles = [], []
    for f in (f_s.numpy(), f_t.numpy()):
        d = {(i, j): max(np.linalg.norm(f[i] - f[j]), 1e-6) for i, j in itertools.permutations(range(n), 2)}
        relative.append({pair: value / np.mean(list(d.values())) for pair, value in d.items()})
        angle = {}
        for i, j, k in itertools.product(range(n), repeat=3):
            a, b = f[j] - f[i], f[k] - f[i]
            norms = np.linalg.norm(a) * np.linalg.norm(b)
            angle[i, j, k] = a @ b / norms if norms else 0.0
        angles.append(angle)
    distance = sum(huber(relative[0][pair] - relative[1][pair]) for pair in relative[0]) / n**2
    angle = sum(huber(angles[0][triple] - angles[1][triple]) for triple in angles[0]) / n**3
    return w_d * distance + w_a * angle


def test_it_is_repdistillers_in_value_and_gradient(losses):
    check_golden(losses, "rkd", RKDLoss(), "f_s", "f_t")


@pytest.mark.parametrize(("w_d", "w_a"), [(25, 50), (1, 0), (0, 1)])
def test_it_is_the_papers_potentials_pair_by_pair_and_triple_by_triple(w_d, w_a):
    f_s, f_t = embeddings()
    assert rkd_loss(f_s, f_t[:, :3], w_d, w_a).item() == pytest.approx(slow_loss(f_s, f_t[:, :3], w_d, w_a), rel=1e-11)


def test_equal_samples_count_as_in_the_equations():
    f_s, f_t = embeddings()
    f_s[3] = f_s[1]
    f_t[5] = f_t[0]
    assert rkd_loss(f_s, f_t).item() == pytest.approx(slow_loss(f_s, f_t, 25, 50), rel=1e-11)


@pytest.mark.parametrize(("w_d", "w_a"), [(25, 50), (1, 0), (0, 1)])
def test_its_gradients_are_its_derivatives(w_d, w_a):
    f_s, f_t = embeddings(5, 4)
    assert torch.autograd.gradcheck(lambda f: rkd_loss(f, f_t, w_d, w_a), f_s.requires_grad_())


@pytest.mark.parametrize("chunk", [1, 36, 100])
def test_it_does_not_depend_on_how_many_anchors_are_computed_at_once(monkeypatch, chunk):
    f_s, f_t = embeddings()
    value, grad = gradient(f_s, f_t)
    monkeypatch.setitem(rkd_loss.__globals__, "_CHUNK", chunk)
    value_in_chunks, grad_in_chunks = gradient(f_s, f_t)
    torch.testing.assert_close(value_in_chunks, value, rtol=1e-13, atol=0)
    torch.testing.assert_close(grad_in_chunks, grad, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("offset", [0, 10, 1000])
def test_float32_is_accurate_however_much_the_samples_have_in_common(offset):
    f_s, f_t = (f.float() for f in embeddings(64, 256, offset))
    value, grad = gradient(f_s, f_t)
    expected, expected_grad = gradient(f_s.double(), f_t.double())
    assert value.dtype == grad.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    assert (grad - expected_grad).abs().max() < 1e-5 * expected_grad.abs().max()


def test_nothing_larger_than_the_pairs_is_kept_for_the_backward_pass():
    kept = []
    f_s, f_t = embeddings(32, 8)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        rkd_loss(f_s.requires_grad_(), f_t)
    assert max(kept) <= 32 * 32


def test_turning_moving_and_scaling_all_samples_alike_changes_nothing_and_their_order_does_not_matter():
    f_s, f_t = embeddings(8)
    value, grad = gradient(f_s, f_t)
    turn, _ = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    torch.testing.assert_close(rkd_loss(f_s @ turn * 7 + 3, f_t), value, rtol=1e-12, atol=0)
    torch.testing.assert_close(rkd_loss(f_s, f_t @ turn / 7 - 3), value, rtol=1e-12, atol=0)
    torch.testing.assert_close(rkd_loss(f_s + 1e7, f_t), value, rtol=1e-7, atol=0)
    order = torch.tensor([3, 1, 7, 4, 0, 6, 2, 5])
    permuted, permuted_grad = gradient(f_s[order], f_t[order])
    torch.testing.assert_close(permuted, value, rtol=1e-13, atol=0)
    torch.testing.assert_close(permuted_grad, grad[order], rtol=1e-10, atol=1e-14)
    assert not torch.isclose(rkd_loss(f_s[order], f_t), value)


def test_no_gradient_reaches_the_teacher_and_its_embeddings_may_be_of_another_length():
    f_s, f_t = embeddings()
    f_s, f_t = f_s.requires_grad_(), f_t[:, :2].clone().requires_grad_()
    rkd_loss(f_s, f_t).backward()
    assert f_s.grad.abs().max() > 0
    assert f_t.grad is None


def test_equal_student_and_teacher_have_neither_loss_nor_gradient():
    f_s, _ = embeddings()
    value, grad = gradient(f_s, f_s * 2 + 1)
    assert value.item() == pytest.approx(0, abs=1e-25)
    assert grad.abs().max() < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_batches_are_finite(dtype):
    f_s, f_t = (f.to(dtype) for f in embeddings())
    pair = f_s.clone()
    pair[3] = pair[1]
    close = f_s.clone()
    close[3] = close[1] * (1 + 2 * torch.finfo(dtype).eps)
    constant, zero = torch.full_like(f_s, 3.7), torch.zeros_like(f_s)
    for a, b in itertools.product((f_s, pair, close, constant, zero), (f_t, pair, constant, zero)):
        check_finite(rkd_loss, a, b)
        check_finite(rkd_loss, a[:1], b[:1])
        check_finite(rkd_loss, a[:2], b[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_samples_have_no_gradient_from_each_other(dtype):
    """Products of so long rows are not all rounded alike: what is left of a distance would divide the gradient."""
    f_s, f_t = (f.to(dtype) for f in embeddings(64, 250))
    f_s[32:] = f_s[:32]
    value, grad = gradient(f_s, f_t)
    assert value > 0
    assert 0 < grad.abs().max() < 10


def test_a_batch_of_one_has_no_relations():
    f_s, f_t = embeddings(1)
    value, grad = gradient(f_s, f_t)
    assert value == 0
    assert (grad == 0).all()


def test_maps_are_compared_whole_in_any_memory_format():
    maps = torch.randn(2, 4, 3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = rkd_loss(maps[0].reshape(4, -1), maps[1].reshape(4, -1))
    assert torch.equal(rkd_loss(*(x.to(memory_format=torch.channels_last) for x in maps)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_and_autocast_changes_nothing(dtype):
    f_s, f_t = (f.to(dtype) for f in embeddings(16, 8))
    value, grad = gradient(f_s, f_t)
    expected, expected_grad = gradient(f_s.float(), f_t.float())
    assert (value.dtype, grad.dtype) == (torch.float32, dtype)
    assert torch.equal(value, expected)
    torch.testing.assert_close(grad, expected_grad.to(dtype))
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(rkd_loss(f_s.float(), f_t.float()), expected)


def test_its_weights_weigh():
    f_s, f_t = embeddings()
    distance, angle = rkd_loss(f_s, f_t, 1, 0), rkd_loss(f_s, f_t, 0, 1)
    assert RKDLoss()(f_s, f_t).item() == pytest.approx((25 * distance + 50 * angle).item(), rel=1e-14)
    assert RKDLoss(w_d=2, w_a=3)(f_s, f_t).item() == pytest.approx((2 * distance + 3 * angle).item(), rel=1e-14)


def test_three_samples_give_the_angles_of_their_triangle():
    """Right angle with legs 3 and 4 against an equilateral triangle."""
    f_s = torch.tensor([[0.0, 0], [3, 0], [0, 4]], dtype=torch.float64)
    f_t = torch.tensor([[0.0, 0], [1, 0], [0.5, math.sqrt(0.75)]], dtype=torch.float64)
    # Each of the three angles is met twice among the 27 triples.
    expected = 2 * sum(huber(cos - 0.5) for cos in (0, 3 / 5, 4 / 5)) / 27
    assert rkd_loss(f_s, f_t, 0, 1).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shapes", [((4, 8), (3, 8)), ((8,), (8,)), ((4, 8), (4,))])
def test_other_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match="of one batch"):
        rkd_loss(*(torch.ones(shape) for shape in shapes))
