import pytest
import torch
import torch.nn.functional as F

from conftest import check_finite, check_golden
from distiller_zoo.ABKD import ABKD, abkd_loss

POWERS = [(0.8, 0.3), (0.5, 0.5), (1, 0), (0, 1), (0.6, -0.6), (0, 0)]


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(2, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(("alpha", "beta"), POWERS)
def test_it_is_the_authors_in_value_and_gradient(newer_losses, alpha, beta):
    check_golden(newer_losses, f"abkd[alpha={alpha},beta={beta},T=4]", ABKD(alpha, beta), "logit_s", "logit_t")


def test_special_cases_are_known_divergences():
    logit_s, logit_t = inputs()
    log_s, log_t = F.log_softmax(logit_s, dim=1), F.log_softmax(logit_t, dim=1)
    p_s, p_t = log_s.exp(), log_t.exp()
    expected = {
        (1, 0): (p_t * (log_t - log_s)).sum(),
        (0, 1): (p_s * (log_s - log_t)).sum(),
        (0.5, 0.5): 2 * (p_t.sqrt() - p_s.sqrt()).square().sum(),
        (1, 1): (p_t - p_s).square().sum() / 2,
    }
    for powers, value in expected.items():
        torch.testing.assert_close(abkd_loss(logit_s, logit_t, *powers, T=1), value / 6)


@pytest.mark.parametrize(("alpha", "beta"), [(1, 0), (0, 1), (0.6, -0.6), (0, 0)])
def test_a_limit_is_what_its_neighbours_come_close_to(alpha, beta):
    logit_s, logit_t = inputs()
    near = abkd_loss(logit_s, logit_t, alpha + 1e-5, beta + 2e-5) * (alpha if alpha == -beta != 0 else 1)
    torch.testing.assert_close(abkd_loss(logit_s, logit_t, alpha, beta), near, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("alpha", "beta"), POWERS)
def test_equal_logits_cost_nothing_and_others_something(alpha, beta):
    logit_s, logit_t = inputs()
    assert abkd_loss(logit_t, logit_t, alpha, beta).abs() < 1e-12 < abkd_loss(logit_s, logit_t, alpha, beta)


@pytest.mark.parametrize(("alpha", "beta"), POWERS)
def test_certain_networks_have_a_finite_loss_and_gradient(alpha, beta):
    check_finite(ABKD(alpha, beta), 50 * torch.eye(3), 50 * torch.eye(3).flip(0))
