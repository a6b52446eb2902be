import torch
import torch.nn.functional as F

from conftest import check_finite, check_golden, formula_weights
from distiller_zoo.SRD import SRD, srd_loss


def test_it_is_the_authors_in_value_and_gradient(newer_losses):
    def loss(f_s, f_t):
        return formula_weights(SRD(12, 20).to(f_s.dtype))(f_s, f_t)

    check_golden(newer_losses, "srd[exponent=4,eps=1e-4]", loss, "f_s", "f_t")


def test_it_is_pytorchs_batch_norm_and_a_logarithm():
    z_s, z_t = torch.randn(2, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    n_s, n_t = (F.batch_norm(z, None, None, training=True, eps=0.1) for z in (z_s, z_t))
    torch.testing.assert_close(srd_loss(z_s, z_t, exponent=3, eps=0.1), torch.log((n_s - n_t).abs().pow(3).sum()))


def test_equal_embeddings_and_single_samples_have_a_finite_loss_and_gradient():
    z = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    check_finite(srd_loss, z, z.clone())
    check_finite(SRD(5, 5), z[:1], z[:1])
