import pytest
import torch
import torch.nn.functional as F

from conftest import check_finite, check_golden
from distiller_zoo.VkD import VkD


def test_it_is_the_authors_in_value_and_gradient(newer_losses):
    def loss(f_s, f_t):
        vkd = VkD(12, 20).to(f_s.dtype)
        vkd.projector.weight = newer_losses["in/orthogonal_weight"].to(f_s.dtype)
        return vkd(f_s, f_t)

    check_golden(newer_losses, "vkd", loss, "f_s", "f_t")


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize(("s_dim", "t_dim"), [(5, 8), (8, 8), (8, 5)])
def test_its_projection_stays_orthogonal(optimizer, s_dim, t_dim):
    torch.manual_seed(0)
    vkd = VkD(s_dim, t_dim)
    f_s, f_t = torch.randn(16, s_dim), torch.randn(16, t_dim)
    before = vkd.projector.weight.detach().clone()
    step, losses = optimizer(vkd.parameters(), 0.1, weight_decay=0.1), []
    for _ in range(30):
        losses.append(vkd(f_s, f_t))
        step.zero_grad()
        losses[-1].backward()
        step.step()
    weight = vkd.projector.weight.detach()
    small = weight.T @ weight if t_dim >= s_dim else weight @ weight.T
    torch.testing.assert_close(small, torch.eye(min(s_dim, t_dim)), rtol=0, atol=1e-5)
    assert losses[-1] < losses[0] and (weight - before).norm() > 0.1


def test_it_regresses_layer_normalised_embeddings():
    torch.manual_seed(0)
    vkd, f_s, f_t = VkD(4, 6), torch.randn(3, 4), torch.randn(3, 6)
    centred = f_t - f_t.mean(dim=1, keepdim=True)
    normed = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(vkd(f_s, f_t), F.smooth_l1_loss(f_s @ vkd.projector.weight.T, normed))
    check_finite(vkd, f_s, torch.zeros(3, 6))
