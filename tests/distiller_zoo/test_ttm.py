import pytest
import torch

from conftest import check_finite, check_golden
from distiller_zoo.KD import kd_loss
from distiller_zoo.TTM import TTM, ttm_loss


@pytest.mark.parametrize("gamma", [0.1, 0.25])
@pytest.mark.parametrize("weighted", [False, True])
def test_it_is_the_authors_in_value_and_gradient(newer_losses, gamma, weighted):
    entry = f"{'wttm' if weighted else 'ttm'}[gamma={gamma}]"
    check_golden(newer_losses, entry, TTM(gamma, weighted), "logit_s", "logit_t")


def test_with_a_power_of_one_it_is_kd_at_temperature_one():
    logit_s, logit_t = torch.randn(2, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = kd_loss(logit_s, logit_t, T=1)
    torch.testing.assert_close(ttm_loss(logit_s, logit_t, gamma=1), expected)
    torch.testing.assert_close(ttm_loss(logit_s, logit_t, gamma=1, weighted=True), expected)


def test_the_weighted_loss_counts_a_smooth_teacher_more():
    logit_s, flat, sharp = torch.tensor([[1.0, 0, 0]]), torch.tensor([[0.0, 0.1, 0]]), torch.tensor([[0.0, 9, 0]])
    ratios = [ttm_loss(logit_s, x, 0.5, weighted=True) / ttm_loss(logit_s, x, 0.5) for x in (flat, sharp)]
    assert ratios[0] > ratios[1] > 1


@pytest.mark.parametrize("scale", [0, 1e4])
@pytest.mark.parametrize("weighted", [False, True])
def test_certain_networks_have_a_finite_loss_and_gradient(scale, weighted):
    check_finite(TTM(weighted=weighted), scale * torch.eye(3), scale * torch.eye(3).flip(0))
