import pytest
import torch

from conftest import check_finite, check_golden
from distiller_zoo.DKD import dkd_terms
from distiller_zoo.RLD import RLD, rld_terms


@pytest.mark.parametrize("alpha_T", [1, 4])
def test_it_is_the_authors_in_value_and_gradient(newer_losses, alpha_T):
    entry = f"rld[alpha=1,beta=8,T=4,alpha_T={alpha_T}]"
    check_golden(newer_losses, entry, RLD(alpha_T=alpha_T), "logit_s", "logit_t", "target")


def test_where_the_teacher_is_right_it_is_dkd():
    logit_s, logit_t = 2 * torch.randn(2, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = logit_t.argmax(dim=1)
    for found, expected in zip(
        rld_terms(logit_s, logit_t, target, 4, 4), dkd_terms(logit_s, logit_t, target, 4), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_classes_that_a_wrong_teacher_prefers_to_the_target_are_left_out():
    logit_s, logit_t = torch.tensor([[0.5, 1.0, -1.0, 2.0]]), torch.tensor([[3.0, 1.0, 0.0, -2.0]])
    _, rest = rld_terms(logit_s, logit_t, torch.tensor([1]), T=2)
    p_s, p_t = ((x[:, 2:] / 2).softmax(dim=1) for x in (logit_s, logit_t))
    torch.testing.assert_close(rest, 4 * (p_t * (p_t / p_s).log()).sum())
    moved = logit_s + torch.tensor([[5.0, -3.0, 0.0, 0.0]])
    torch.testing.assert_close(rld_terms(moved, logit_t, torch.tensor([1]), T=2)[1], rest)


def test_a_target_that_the_teacher_finds_least_likely_leaves_nothing():
    logit_s = torch.tensor([[0.5, 1.0, -1.0]], requires_grad=True)
    _, rest = rld_terms(logit_s, torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([2]))
    (gradient,) = torch.autograd.grad(rest, logit_s)
    assert rest == 0 and not gradient.any()


def test_its_weights_weigh():
    logit_s, logit_t = torch.randn(2, 6, 7, generator=torch.Generator().manual_seed(0))
    target = torch.arange(6)
    confidence, rest = rld_terms(logit_s, logit_t, target, 3, 2)
    assert RLD(2, 0.5, 3, 2).terms(logit_s, logit_t, target) == {"confidence": 2 * confidence, "rest": 0.5 * rest}


@pytest.mark.parametrize("scale", [0, 1e4])
def test_certain_networks_have_a_finite_loss_and_gradient(scale):
    check_finite(RLD(), scale * torch.eye(3), scale * torch.eye(3).flip(0), torch.arange(3))
