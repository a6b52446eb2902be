import math

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy

from conftest import check_finite, check_golden
from distiller_zoo import DistillKL, kd_loss
from distiller_zoo.KD import standardize_logits


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


def standard_kd(logit_s: torch.Tensor, logit_t: torch.Tensor) -> torch.Tensor:
    return kd_loss(standardize_logits(logit_s), standardize_logits(logit_t), 2.0)


def test_of_standardized_logits_it_is_the_published_one_in_value_and_gradient(losses):
    check_golden(losses, "logit_standard_kd[T=2]", standard_kd, "logit_s", "logit_t")


def test_standardized_rows_are_centred_and_have_unbiased_deviation_one():
    logit_s, _ = logits()
    x = logit_s.numpy()
    expected = (x - x.mean(1, keepdims=True)) / (x.std(1, ddof=1, keepdims=True) + 1e-7)
    np.testing.assert_allclose(standardize_logits(logit_s).numpy(), expected, rtol=1e-12)


def test_standardizing_makes_a_rows_scale_and_offset_irrelevant_but_not_its_sign():
    logit_s, logit_t = logits()
    value = standard_kd(logit_s, logit_t)
    scale = torch.arange(1, 6, dtype=torch.float64)[:, None]
    torch.testing.assert_close(standard_kd(logit_s * scale - 7, logit_t), value, rtol=1e-6, atol=0)
    torch.testing.assert_close(standard_kd(logit_s, logit_t / scale + 3), value, rtol=1e-6, atol=0)
    assert not torch.isclose(standard_kd(-logit_s, logit_t), value)


def test_the_gradients_of_standardizing_are_its_derivatives():
    logit_s, _ = logits(3, 4)
    assert torch.autograd.gradcheck(standardize_logits, logit_s.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", [0.0, 0.1, -3.7, 1e4])
def test_a_constant_row_is_standardized_to_zero_and_gets_no_gradient(dtype, level):
    logit_s, logit_t = logits().to(dtype)
    logit_s[2] = level
    assert (standardize_logits(logit_s)[2] == 0).all()
    check_finite(standard_kd, logit_s, logit_t)
    check_finite(standard_kd, logit_t, logit_s)
    logit_s.requires_grad_()
    standard_kd(logit_s, logit_t).backward()
    assert (logit_s.grad[2] == 0).all()
    assert (logit_s.grad[[0, 1, 3, 4]] != 0).any(dim=1).all()


def test_a_single_class_is_standardized_to_zero_and_what_is_no_number_stays_so():
    assert (standardize_logits(torch.tensor([[3.0], [-2.0]])) == 0).all()
    assert standardize_logits(torch.tensor([[1.0, 2.0], [torch.nan, 1.0]]))[1].isnan().all()
