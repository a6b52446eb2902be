import pytest
import torch
import torch.nn.functional as F

from conftest import check_finite, check_golden, formula_weights
from distiller_zoo.SimKD import SimKD, simkd_loss, simkd_projector


@pytest.mark.parametrize(
    ("entry", "map_s", "map_t"), [("simkd", "map_s", "map_t"), ("simkd_small", "map_s_small", "map_t_big")]
)
def test_it_is_the_authors_in_value_gradient_and_logits(newer_losses, entry, map_s, map_t):
    weight, bias = (newer_losses[f"in/classifier_{name}"] for name in ("weight", "bias"))
    entry = f"{entry}[factor=2]"

    def both(x_s, x_t):
        loss = formula_weights(SimKD(6, 10).to(x_s.dtype))
        return loss(x_s, x_t, lambda x: F.linear(x, weight.to(x.dtype), bias.to(x.dtype)))

    check_golden(newer_losses, entry, lambda *maps: both(*maps)[0], map_s, map_t)
    _, logits = both(newer_losses[f"in/{map_s}"], newer_losses[f"in/{map_t}"])
    torch.testing.assert_close(logits, newer_losses[f"out/{entry}/logits"], rtol=1e-9, atol=1e-9)


def test_a_projector_to_an_encoders_embedding_can_be_negative():
    torch.manual_seed(0)
    projector = simkd_projector(5, 3, 4, maps=False)
    assert projector(torch.randn(8, 5)).min() < 0
    assert simkd_projector(5, 3, 4)(torch.randn(8, 5, 2, 2)).min() == 0
    assert [tuple(p.shape) for p in projector.parameters() if p.dim() > 1] == [(3, 5), (3, 3), (4, 3)]


def test_embeddings_and_maps_are_regressed():
    torch.manual_seed(0)
    x_s, x_t = torch.randn(2, 3, 5)
    torch.testing.assert_close(simkd_loss(x_s, x_t), (x_s - x_t).square().mean())
    map_s, map_t = torch.randn(3, 2, 2, 2), torch.randn(3, 2, 4, 4)
    pooled = map_t.view(3, 2, 2, 2, 2, 2).mean(dim=(3, 5))
    torch.testing.assert_close(simkd_loss(map_s, map_t), (map_s - pooled).square().mean())
    check_finite(simkd_loss, map_s, map_t)
