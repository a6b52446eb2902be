import pytest
import torch

from conftest import check_finite, check_golden, formula_weights
from distiller_zoo.PEFD import PEFD


def test_it_is_the_authors_in_value_and_gradient(newer_losses):
    def loss(f_s, f_t):
        return formula_weights(PEFD(12, 20).to(f_s.dtype))(f_s, f_t)

    check_golden(newer_losses, "pefd[n=3]", loss, "f_s", "f_t")


@pytest.mark.parametrize("relu", [False, True])
def test_it_is_the_cosine_distance_of_the_projections_mean(relu):
    torch.manual_seed(0)
    loss, f_s, f_t = PEFD(4, 6, projectors=2, relu=relu), torch.randn(3, 4), torch.randn(3, 6)
    first, second = (x.clamp_min(0) if relu else x for x in (projector(f_s) for projector in loss.projectors))
    mean = first + second
    cosine = (mean * f_t).sum(dim=1) / (mean.norm(dim=1) * f_t.norm(dim=1))
    torch.testing.assert_close(loss(f_s, f_t), 1 - cosine.mean())
    check_finite(loss, torch.zeros(3, 4), torch.zeros(3, 6))
