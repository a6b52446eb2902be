import pytest
import torch

from conftest import check_finite, check_golden
from distiller_zoo.CKA import CKA, cka_loss


def test_it_is_the_reference_in_value_and_gradient(newer_losses):
    check_golden(newer_losses, "cka", CKA(), "f_s", "f_t")


@pytest.mark.parametrize("batch", [3, 4, 7])
def test_a_rotation_a_shift_and_a_scale_cost_nothing(batch):
    f_t = torch.randn(batch, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    assert cka_loss(3 * f_t @ rotation + 2, f_t) == pytest.approx(0, abs=1e-12)
    assert cka_loss(f_t.flip(0), f_t) > 0.1


def test_a_single_sample_has_a_finite_loss_and_gradient():
    check_finite(cka_loss, torch.ones(1, 4), torch.ones(1, 5))
