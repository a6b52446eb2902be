import itertools

import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy
from torch import Tensor

from conftest import check_finite, check_golden
from distiller_zoo.CCL import CCL, ccl_loss
from distiller_zoo.NCE import nce_loss

TARGET = torch.tensor([0, 1, 0, 2, 1, 1])


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    f_s, f_t = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
    logit_s, logit_t = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64) * 3
    return f_s, f_t, TARGET, logit_s, logit_t


def test_it_is_the_releases_in_value_and_gradient(losses):
    check_golden(losses, "ccl", CCL(), "f_s", "f_t", "target", "logit_s", "logit_t")


@pytest.mark.parametrize("temperature", [0.1, 1])
@pytest.mark.parametrize("target", [TARGET, torch.zeros_like(TARGET)])
def test_it_is_nce_and_the_mean_of_both_divergences(temperature, target):
    f_s, f_t, _, logit_s, logit_t = inputs()
    p_s, p_t = softmax(logit_s.numpy(), axis=1), softmax(logit_t.numpy(), axis=1)
    divergence = (entropy(p_t, p_s, axis=1) + entropy(p_s, p_t, axis=1)).mean() / 2
    expected = nce_loss(f_s, f_t, target, temperature).item() + divergence
    assert ccl_loss(f_s, f_t, target, logit_s, logit_t, temperature).item() == pytest.approx(expected, rel=1e-12)


def test_nce_has_temperature_a_tenth():
    assert CCL()(*inputs()) == ccl_loss(*inputs(), temperature=0.1)


def test_its_gradients_are_its_derivatives():
    f_s, f_t, target, logit_s, logit_t = (x.requires_grad_() if x.is_floating_point() else x for x in inputs())
    assert torch.autograd.gradcheck(
        lambda *x: ccl_loss(*x[:2], target, *x[2:], temperature=0.5), (f_s, f_t, logit_s, logit_t)
    )


def test_equal_logits_leave_nce_alone():
    f_s, f_t, target, logit_s, _ = inputs()
    logit_s.requires_grad_()
    value = ccl_loss(f_s, f_t, target, logit_s, logit_s.detach())
    value.backward()
    assert value == nce_loss(f_s, f_t, target)
    assert logit_s.grad.abs().max() < 1e-15


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_batches_are_finite(dtype):
    f_s, f_t, target, logit_s, logit_t = (x.to(dtype) if x.is_floating_point() else x for x in inputs())
    dead, constant, zero = f_s.clone(), torch.full_like(f_s, 3.7), torch.zeros_like(f_s)
    dead[2] = 0
    for a, b in itertools.product((f_s, dead, constant, zero), (f_t, dead, constant, zero)):
        check_finite(CCL(), a, b, target, logit_s, logit_t)
        check_finite(CCL(), a, b, torch.zeros_like(target), torch.zeros_like(logit_s), logit_t * 1e4)
        check_finite(CCL(), a[:1], b[:1], target[:1], logit_s[:1], logit_t[:1])


def test_a_zero_embedding_gets_no_gradient():
    f_s, *others = inputs()
    f_s[2] = 0
    f_s.requires_grad_()
    CCL()(f_s, *others).backward()
    assert (f_s.grad[2] == 0).all()
    assert (f_s.grad[[0, 1, 3, 4, 5]] != 0).any(dim=1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_and_autocast_changes_nothing(dtype):
    half = [x.to(dtype) if x.is_floating_point() else x for x in inputs()]
    single = [x.float() if x.is_floating_point() else x for x in half]
    expected = CCL()(*single)
    assert torch.equal(CCL()(*half), expected)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(CCL()(*single), expected)


@pytest.mark.parametrize(
    ("position", "shape"), [(0, (5, 5)), (1, (6, 4)), (2, (5,)), (3, (5, 4)), (4, (6, 3)), (4, (6,))]
)
def test_other_shapes_are_refused(position, shape):
    wrong = list(inputs())
    wrong[position] = torch.ones(shape)
    with pytest.raises(ValueError, match="CCL needs .* got"):
        CCL()(*wrong)


def test_logits_of_another_batch_are_refused():
    f_s, f_t, target, logit_s, logit_t = inputs()
    with pytest.raises(ValueError, match=r"logits of 6 samples, got \(5, 4\) and \(5, 4\)"):
        CCL()(f_s, f_t, target, logit_s[:5], logit_t[:5])
