import numpy as np
import pytest
import torch

from conftest import check_finite, check_golden, formula_weights
from distiller_zoo.ITRD import ITRD, correlation_loss, mutual_loss


@pytest.mark.parametrize(
    ("entry", "s_dim", "name"),
    [("itrd[alpha=1.5]", 12, "f_s"), ("itrd[alpha=1.01]", 12, "f_s"), ("itrd_equal[alpha=1.5]", 20, "f_s_wide")],
)
def test_it_is_the_authors_in_value_and_gradient(newer_losses, entry, s_dim, name):
    alpha = 1.01 if "1.01" in entry else 1.5

    def loss(f_s, f_t):
        return formula_weights(ITRD(s_dim, 20, alpha).to(f_s.dtype))(f_s, f_t)

    check_golden(newer_losses, entry, loss, name, "f_t")


def embeddings(batch: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    f_t = torch.randn(batch, 6, generator=generator, dtype=torch.float64)
    return f_t + torch.randn(batch, 6, generator=generator, dtype=torch.float64), f_t


def test_the_first_term_is_made_of_correlation_coefficients():
    z_s, z_t = embeddings()
    r = [np.corrcoef(a, b)[0, 1] * 8 / 9 for a, b in zip(z_s.T.numpy(), z_t.T.numpy(), strict=True)]
    expected = np.log2(sum(abs(1 - x) ** 3 for x in r))
    assert correlation_loss(z_s, z_t).item() == pytest.approx(expected)


def test_the_second_term_is_made_of_cosines():
    z_s, z_t = embeddings()
    cosines = [torch.corrcoef(torch.cat([z, -z], dim=1)) for z in (z_s, z_t)]  # rows of mean zero
    joint = cosines[0] * cosines[1]
    expected = sum(sign * (x / x.trace()).square().sum() for sign, x in ((1, cosines[0]), (-1, joint)))
    torch.testing.assert_close(mutual_loss(z_s, z_t), expected)


def test_its_weights_weigh():
    z_s, z_t = embeddings()
    plain, weighed = ITRD(6, 6).double(), ITRD(6, 6, weights=(2, 0.05)).double()
    weighed.load_state_dict(plain.state_dict())
    torch.testing.assert_close(weighed(z_s, z_t), [w * x for w, x in zip((2, 0.05), plain(z_s, z_t), strict=True)])
    assert list(weighed.terms(z_s, z_t).values()) == weighed(z_s, z_t)


def test_a_constant_dimension_counts_as_one_without_correlation():
    z_s, z_t = (torch.tensor([[1.0, 2], [-1, 2], [3, 2]]) * torch.tensor([1.0, 0]) for _ in "st")
    expected = np.log2(abs(1 - 2 / 3) ** 3 + 1)
    assert correlation_loss(z_s, z_t).item() == pytest.approx(expected)
    check_finite(ITRD(2, 2), z_s, z_t)
    check_finite(ITRD(2, 2), z_s[:1], z_t[:1])
