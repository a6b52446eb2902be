import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis

from conftest import check_finite, check_golden
from distiller_zoo.SKD import SKD, skd_direction


def test_it_is_the_authors_in_value_and_gradient(newer_losses):
    check_golden(newer_losses, "skd[T=4,tikhonov=0.1]", SKD(), "logit_s", "logit_t")
    check_golden(newer_losses, "skd_direction[tikhonov=0.1]", skd_direction, "logit_s", "logit_t")


def test_the_direction_is_scipys_mahalanobis_distance():
    logit_s, logit_t = torch.randn(2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cosines = [np.corrcoef(np.hstack([x, -x])) for x in (logit_s.numpy(), logit_t.numpy())]  # rows of mean zero
    difference = (cosines[0] - cosines[1]) / 4
    inverse = np.linalg.inv(np.cov(difference.T) + 0.2 * np.eye(6))
    expected = np.mean([mahalanobis(row, np.zeros(6), inverse) for row in difference])
    assert skd_direction(logit_s, logit_t, 0.2).item() == pytest.approx(expected)


def test_equal_and_certain_networks_have_a_finite_loss_and_gradient():
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    check_finite(SKD(), logits, logits.clone())
    check_finite(SKD(), 1e4 * torch.eye(3), 1e4 * torch.eye(3).flip(0))
