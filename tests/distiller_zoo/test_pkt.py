import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import check_finite, check_golden
from distiller_zoo.PKT import PKT, pkt_loss


def embeddings(batch: int = 6, dim: int = 5) -> tuple[Tensor, Tensor]:
    f_s, f_t = torch.randn(2, batch, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return f_s, f_t


def slow_loss(f_s: Tensor, f_t: Tensor, eps: float = 1e-7) -> float:
    """Neighbour by neighbour."""
    n = len(f_s)
    p = []
    for f in (f_s.numpy(), f_t.numpy()):
        unit = [row / (np.linalg.norm(row) + eps) for row in f]
        similarity = [[(a @ b + 1) / 2 for b in unit] for a in unit]
        p.append([[value / sum(row) for value in row] for row in similarity])
    pairs = itertools.product(range(n), repeat=2)
    return sum(p[1][i][j] * np.log((p[1][i][j] + eps) / (p[0][i][j] + eps)) for i, j in pairs) / n**2


def test_it_is_repdistillers_in_value_and_gradient(losses):
    check_golden(losses, "pkt", PKT(), "f_s", "f_t")


def test_it_is_the_divergence_of_the_neighbours_one_by_one():
    f_s, f_t = embeddings()
    assert pkt_loss(f_s, f_t[:, :3]).item() == pytest.approx(slow_loss(f_s, f_t[:, :3]), rel=1e-11)


def test_its_gradients_are_its_derivatives():
    f_s, f_t = (f.requires_grad_() for f in embeddings(4, 3))
    assert torch.autograd.gradcheck(pkt_loss, (f_s, f_t))


def test_it_leaves_its_inputs_as_they_are():
    f_s, f_t = embeddings()
    f_s[1] = 0
    before = f_s.clone(), f_t.clone()
    PKT()(f_s, f_t)
    assert torch.equal(f_s, before[0])
    assert torch.equal(f_t, before[1])


def test_the_order_of_the_batch_and_the_scale_of_a_sample_do_not_matter():
    f_s, f_t = embeddings()
    value = pkt_loss(f_s, f_t)
    order = torch.tensor([3, 1, 4, 0, 2, 5])
    torch.testing.assert_close(pkt_loss(f_s[order], f_t[order]), value, rtol=1e-12, atol=0)
    assert not torch.isclose(pkt_loss(f_s[order], f_t), value)
    scale = torch.arange(1, 7, dtype=torch.float64)[:, None] * 1e3
    torch.testing.assert_close(pkt_loss(f_s * scale, f_t * scale), value, rtol=1e-5, atol=0)


def test_equal_student_and_teacher_have_neither_loss_nor_gradient():
    f_s, _ = embeddings()
    f_t = f_s.clone()
    f_s.requires_grad_()
    value = pkt_loss(f_s, f_t)
    value.backward()
    assert value == 0
    assert f_s.grad.abs().max() < 1e-8  # of the order of eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_batches_are_finite(dtype):
    f_s, f_t = (f.to(dtype) for f in embeddings())
    dead, constant, zero = f_s.clone(), torch.full_like(f_s, 3.7), torch.zeros_like(f_s)
    dead[2] = 0
    for a, b in itertools.product((f_s, dead, constant, zero), (f_t, dead, constant, zero)):
        check_finite(pkt_loss, a, b)
        check_finite(pkt_loss, a[:1], b[:1])


def test_opposite_samples_are_finite_in_float32():
    """Rounding takes some of these pairs' cosines so far below -1 that the logarithm would be NaN."""
    f = torch.randn(200, 256, generator=torch.Generator().manual_seed(0))
    for row in f:
        check_finite(pkt_loss, torch.stack([row, -row]), torch.stack([row, row]))


def test_a_zero_row_is_as_near_to_all_and_gets_no_gradient():
    f_s, f_t = embeddings()
    f_s[2] = 0
    f_s.requires_grad_()
    value = pkt_loss(f_s, f_t)
    value.backward()
    assert value.item() == pytest.approx(slow_loss(f_s.detach(), f_t), rel=1e-11)
    assert (f_s.grad[2] == 0).all()
    assert (f_s.grad[[0, 1, 3, 4, 5]] != 0).any(dim=1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_and_autocast_changes_nothing(dtype):
    f_s, f_t = (f.to(dtype) for f in embeddings(16, 8))
    expected = pkt_loss(f_s.float(), f_t.float())
    assert torch.equal(pkt_loss(f_s, f_t), expected)
    assert torch.equal(pkt_loss(f_s, f_t.float()), expected)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(pkt_loss(f_s.float(), f_t.float()), expected)


@pytest.mark.parametrize("shapes", [((4, 8), (3, 8)), ((8,), (8,)), ((4, 8, 1), (4, 8))])
def test_other_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match="of one batch"):
        pkt_loss(*(torch.ones(shape) for shape in shapes))
