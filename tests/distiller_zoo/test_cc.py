import pytest
import torch
from torch import Tensor

from conftest import check_finite, check_golden
from distiller_zoo.CC import Correlation, correlation_loss


def embeddings(batch: int = 6, dim: int = 5) -> tuple[Tensor, Tensor]:
    f_s, f_t = torch.randn(2, batch, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return f_s, f_t


def test_it_is_repdistillers_in_value_and_gradient(losses):
    check_golden(losses, "correlation", Correlation(), "f_s", "f_t")


@pytest.mark.parametrize(("batch", "dim"), [(6, 5), (2, 3), (3, 1)])
def test_it_is_the_mean_over_neighbours_of_the_product_of_their_errors(batch, dim):
    f_s, f_t = embeddings(batch, dim)
    s, t = f_s.tolist(), f_t.tolist()
    total = 0.0
    for i in range(batch - 1):
        for d in range(dim):
            total += abs(s[i][d] - t[i][d]) * abs(s[i + 1][d] - t[i + 1][d])
    assert correlation_loss(f_s, f_t).item() == pytest.approx(total / (batch - 1), rel=1e-12)


def test_its_gradients_are_its_derivatives():
    assert torch.autograd.gradcheck(correlation_loss, tuple(f.requires_grad_() for f in embeddings(4, 3)))


def test_the_batch_turned_round_is_the_same_and_otherwise_the_order_counts():
    f_s, f_t = embeddings()
    value = correlation_loss(f_s, f_t)
    torch.testing.assert_close(correlation_loss(f_s.flip(0), f_t.flip(0)), value, rtol=1e-12, atol=0)
    order = torch.tensor([0, 2, 1, 3, 4, 5])
    assert not torch.isclose(correlation_loss(f_s[order], f_t[order]), value)


def test_a_batch_of_one_has_no_pair_and_no_loss():
    f_s, f_t = embeddings(1)
    assert correlation_loss(f_s, f_t) == 0
    check_finite(correlation_loss, f_s, f_t)


def test_degenerate_embeddings_give_finite_gradients():
    f_s, _ = embeddings()
    check_finite(correlation_loss, f_s, f_s.clone())
    check_finite(correlation_loss, torch.zeros(3, 4), torch.zeros(3, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    f_s, f_t = (f.to(dtype) * 300 for f in embeddings())
    assert torch.equal(correlation_loss(f_s, f_t), correlation_loss(f_s.float(), f_t.float()))


@pytest.mark.parametrize("shapes", [((4, 8), (4, 9)), ((4, 8), (1, 8)), ((4, 8, 1), (4, 8, 1)), ((8,), (8,))])
def test_other_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match=r"two \(B, D\) tensors") as error:
        correlation_loss(*(torch.ones(shape) for shape in shapes))
    assert all(str(shape) in str(error.value) for shape in shapes)
