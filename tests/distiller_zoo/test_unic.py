import pytest
import torch
import torch.nn.functional as F

from conftest import check_finite, check_golden
from distiller_zoo.UNIC import UNIC, CosineSmoothL1, Standardize, _spreading_matrix, phi_standardizer


def test_the_loss_is_the_authors_in_value_and_gradient(newer_losses):
    check_golden(newer_losses, "cosine_smooth_l1[cos=0.5,l1=0.5]", CosineSmoothL1(), "f_s_wide", "f_t")


def test_the_running_standardiser_is_the_authors(newer_losses):
    f_t, entry = newer_losses["in/f_t"], "out/standardize[momentum=1,0.1]"
    standardize = Standardize(20).double()
    found = torch.stack([standardize(f_t, 1), standardize(2 * f_t.flip(0) + 1, 0.1)])
    for name, x in (("value", found), ("mean", standardize.mean), ("std", standardize.std)):
        torch.testing.assert_close(x, newer_losses[f"{entry}/{name}"], rtol=1e-9, atol=1e-12)


def test_phi_s_is_the_authors(newer_losses):
    x = newer_losses["in/phi_features"]
    mean, matrix = phi_standardizer(x)
    reference = {name: newer_losses[f"out/phi_s/{name}"] for name in ("mean", "gram", "variance", "value")}
    torch.testing.assert_close(mean, reference["mean"])
    torch.testing.assert_close(matrix @ matrix.T, reference["gram"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(((x - mean) @ matrix.T).var(dim=0), reference["variance"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(matrix @ matrix.T, reference["value"] * torch.eye(16), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dim", [1, 2, 8, 12, 20, 28, 36, 384, 640, 768, 1280])
def test_axes_are_spread_evenly_by_hadamard_matrices(dim):
    spread = _spreading_matrix(dim)
    torch.testing.assert_close(spread @ spread.T, torch.eye(dim, dtype=torch.float64))
    torch.testing.assert_close(spread.abs(), torch.full((dim, dim), dim**-0.5, dtype=torch.float64))


@pytest.mark.parametrize("dim", [3, 10, 52])
def test_other_widths_are_rotated(dim):
    spread = _spreading_matrix(dim)
    torch.testing.assert_close(spread @ spread.T, torch.eye(dim, dtype=torch.float64))
    assert torch.equal(spread, _spreading_matrix(dim))


@pytest.mark.parametrize("phi", [False, True])
def test_it_compares_with_standardised_embeddings(phi):
    generator = torch.Generator().manual_seed(0)
    f_t = 3 * torch.randn(40, 4, generator=generator) @ torch.randn(4, 4, generator=generator) + 5
    f_s = torch.randn(40, 6, generator=generator)
    loss = UNIC(6, 4, phi)
    loss.acquaint(f_t, None, None)
    z_t = loss.standardize(f_t)
    torch.testing.assert_close(z_t.mean(dim=0), torch.zeros(4), rtol=0, atol=1e-4)
    torch.testing.assert_close(z_t.var(dim=0), torch.ones(4), rtol=1e-3, atol=0)
    z_s = loss.embed(f_s)
    expected = (1 - F.cosine_similarity(z_s, z_t)).mean() / 2 + F.smooth_l1_loss(z_s, z_t) / 2
    torch.testing.assert_close(loss(f_s, f_t), expected)


@pytest.mark.parametrize("phi", [False, True])
def test_in_the_teachers_own_space_a_student_that_equals_the_teacher_is_perfect(phi):
    f_t = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)) + 2
    loss = UNIC(4, 4, phi, project=False)
    loss.acquaint(f_t, None, None)
    assert loss(f_t, f_t) == pytest.approx(0, abs=1e-6) and not list(loss.parameters())
    check_finite(loss, f_t, torch.zeros(9, 4))
