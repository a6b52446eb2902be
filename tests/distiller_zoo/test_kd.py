import math

import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy

from conftest import check_golden
from distiller_zoo import DistillKL, kd_loss


def logits(batch: int = 5, classes: int = 7) -> torch.Tensor:
    return torch.randn(2, batch, classes, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3


def test_it_is_the_releases_in_value_and_gradient(losses):
    check_golden(losses, "kd[T=4]", DistillKL(4), "logit_s", "logit_t")


@pytest.mark.parametrize("T", [0.5, 1, 4, 20])
def test_it_is_the_mean_divergence_of_the_softened_distributions_times_T_squared(T):
    logit_s, logit_t = logits()
    p_s, p_t = (softmax(logit.numpy() / T, axis=1) for logit in (logit_s, logit_t))
    expected = entropy(p_t, p_s, axis=1).mean() * T**2
    assert kd_loss(logit_s, logit_t, T).item() == pytest.approx(expected, rel=1e-11)


def test_its_gradients_are_its_derivatives():
    logit_s, logit_t = (logit.requires_grad_() for logit in logits(3, 4))
    assert torch.autograd.gradcheck(lambda s, t: kd_loss(s, t, 2.0), (logit_s, logit_t))


def test_a_sample_shifted_by_a_constant_is_the_same_and_the_batchs_order_too():
    logit_s, logit_t = logits()
    value = kd_loss(logit_s, logit_t)
    shift = torch.arange(5, dtype=torch.float64)[:, None] * 10
    torch.testing.assert_close(kd_loss(logit_s + shift, logit_t - shift), value, rtol=1e-12, atol=0)
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(kd_loss(logit_s[order], logit_t[order]), value, rtol=1e-12, atol=0)


def test_equal_logits_have_neither_loss_nor_gradient():
    logit_s, _ = logits()
    logit_s.requires_grad_()
    value = kd_loss(logit_s, logit_s.detach())
    value.backward()
    assert value == 0
    assert logit_s.grad.abs().max() < 1e-15


def test_extreme_logits_are_finite():
    """A teacher that is certain gives some classes probability zero."""
    logit_s = torch.tensor([[0.0, 0.0], [500.0, -500.0]], requires_grad=True)
    value = kd_loss(logit_s, torch.tensor([[1e4, -1e4], [-1e4, 1e4]]), 1.0)
    value.backward()
    assert value.item() == pytest.approx((math.log(2) + 1000) / 2)
    assert logit_s.grad.isfinite().all()
