import numpy as np
import pytest
import torch
from scipy.special import softmax

from conftest import check_finite, check_golden
from distiller_zoo.NKD import NKD, nkd_terms


@pytest.mark.parametrize("T", [1, 2])
def test_it_is_the_authors_in_value_and_gradient(newer_losses, T):
    check_golden(newer_losses, f"nkd[T={T},gamma=1.5]", NKD(T), "logit_s", "logit_t", "target")


@pytest.mark.parametrize("classes", [2, 5])
def test_its_parts_are_cross_entropies_of_target_and_rest(classes):
    generator = torch.Generator().manual_seed(0)
    logit_s, logit_t = 3 * torch.randn(2, 4, classes, generator=generator, dtype=torch.float64)
    target = torch.tensor([0, 1, 1, 0])
    first, second = [], []
    for z_s, z_t, y in zip(logit_s.numpy(), logit_t.numpy(), target.tolist(), strict=True):
        first.append(-softmax(z_t)[y] * np.log(softmax(z_s)[y]))
        p_s, p_t = (softmax(np.delete(z, y) / 3) for z in (z_s, z_t))
        second.append(-9 * (p_t * np.log(p_s)).sum())
    found = nkd_terms(logit_s, logit_t, target, T=3)
    assert [x.item() for x in found] == pytest.approx([np.mean(first), np.mean(second)], abs=1e-12)
    loss = NKD(T=3, gamma=2)
    assert loss(logit_s, logit_t, target).item() == pytest.approx(np.mean(first) + 2 * np.mean(second))
    assert set(loss.terms(logit_s, logit_t, target)) == {"target", "others"}


@pytest.mark.parametrize("scale", [0, 1e4])
def test_certain_networks_have_a_finite_loss_and_gradient(scale):
    check_finite(NKD(), scale * torch.eye(3), scale * torch.eye(3).flip(0), torch.arange(3))
