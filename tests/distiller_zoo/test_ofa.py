import pytest
import torch
import torch.nn.functional as F

from conftest import check_finite, check_golden
from distiller_zoo.OFA import OFA, ofa_loss


@pytest.mark.parametrize("eps", [1.0, 1.5])
def test_it_is_the_authors_in_value_and_gradient(newer_losses, eps):
    check_golden(newer_losses, f"ofa[eps={eps},T=1]", OFA(eps), "logit_s", "logit_t", "target")


def test_a_power_of_one_is_a_cross_entropy_and_a_larger_one_raises_the_target():
    logit_s, logit_t = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    target = torch.arange(4)
    plain = F.cross_entropy(logit_s / 2, (logit_t / 2).softmax(dim=1))
    torch.testing.assert_close(ofa_loss(logit_s, logit_t, target, T=2), plain)
    p_t, log_s = logit_t.softmax(dim=1), logit_s.log_softmax(dim=1)
    own = F.one_hot(target, 5).bool()
    soft = torch.where(own, (1 + p_t) ** 2 - 1, p_t**2)
    torch.testing.assert_close(ofa_loss(logit_s, logit_t, target, eps=2), -(soft * log_s).sum() / 4)
    check_finite(OFA(1.5), 1e4 * torch.eye(3), 1e4 * torch.eye(3).flip(0), torch.arange(3))
