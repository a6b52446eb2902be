import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import check_finite, check_golden
from distiller_zoo.FSP import FSP, fsp_loss, fsp_matrix

S, T = [["map_s0", "map_s1", "map_s2"], ["map_t0", "map_t1", "map_t2"]]
SHAPES = [(3, 2, 4, 6), (3, 3, 4, 6), (3, 5, 2, 3)]


def layers(shapes: list[tuple[int, ...]] = SHAPES, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def build(g_s: list[Tensor], g_t: list[Tensor]) -> FSP:
    return FSP([f.shape for f in g_s], [f.shape for f in g_t])


def slow_matrix(bottom: np.ndarray, top: np.ndarray) -> np.ndarray:
    """One sample's, entry by entry, of maps of one size."""
    matrix = np.zeros((len(bottom), len(top)))
    for i, x in enumerate(bottom):
        for j, y in enumerate(top):
            matrix[i, j] = (x * y).sum() / x.size
    return matrix


def test_it_is_repdistillers_in_value_and_gradient(losses):
    loss = build([losses[f"in/{name}"] for name in S], [losses[f"in/{name}"] for name in T])
    check_golden(losses, "fsp", loss, S, T)


def test_the_flow_is_the_mean_product_of_channels_entry_by_entry():
    bottom, top, _ = layers()
    expected = [slow_matrix(x, y) for x, y in zip(bottom.numpy(), top.numpy(), strict=True)]
    np.testing.assert_allclose(fsp_matrix(bottom, top).numpy(), expected, rtol=1e-11, atol=1e-14)


def test_the_larger_of_two_layers_is_averaged_to_the_size_of_the_smaller():
    large, small = layers([(3, 2, 4, 8), (3, 5, 2, 4)])
    pooled = large.reshape(3, 2, 2, 2, 4, 2).mean(dim=(3, 5))
    torch.testing.assert_close(fsp_matrix(large, small), fsp_matrix(pooled, small), rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(fsp_matrix(small, large), fsp_matrix(small, pooled), rtol=1e-11, atol=1e-14)


def test_it_is_the_mean_squared_difference_of_each_two_layers_flows():
    g_s, g_t = layers(seed=0), layers([(3, 2, 8, 8), (3, 3, 4, 4), (3, 5, 2, 2)], seed=1)
    values = build(g_s, g_t)(g_s, g_t)
    assert len(values) == 2
    for i, value in enumerate(values):
        difference = fsp_matrix(g_s[i], g_s[i + 1]) - fsp_matrix(g_t[i], g_t[i + 1])
        assert value.item() == pytest.approx((difference.numpy() ** 2).mean(), rel=1e-12)


def test_its_gradients_are_its_derivatives():
    shapes = [(2, 2, 2, 2), (2, 3, 2, 2), (2, 2, 1, 1)]
    flat = [f.requires_grad_() for seed in (0, 1) for f in layers(shapes, seed)]
    assert torch.autograd.gradcheck(lambda *g: fsp_loss(g[:3], g[3:]), flat)


def test_the_order_of_pixels_and_the_sign_of_all_maps_do_not_matter():
    g_s, g_t = layers(seed=0), layers(seed=1)
    values = fsp_loss(g_s, g_t)
    for changed in ([f.flip(3) for f in g_s], [-f for f in g_s]):
        torch.testing.assert_close(fsp_loss(changed, g_t), values, rtol=1e-11, atol=0)
    assert not torch.isclose(fsp_loss([-g_s[0], *g_s[1:]], g_t)[0], values[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_maps_give_finite_gradients(dtype):
    g_s, g_t = ([f.to(dtype) for f in layers(seed=seed)] for seed in (0, 1))
    for other in ([torch.zeros_like(f) for f in g_s], [torch.ones_like(f) for f in g_s]):
        check_finite(fsp_loss, other, g_t)
        check_finite(fsp_loss, g_s, other)
        check_finite(fsp_loss, other, [f.clone() for f in other])
    check_finite(fsp_loss, [f[:1] for f in g_s], [f[:1] for f in g_t])
    check_finite(fsp_loss, g_s, [f.clone() for f in g_s])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_are_computed_in_float32(dtype):
    g_s, g_t = ([f.to(dtype) * 300 for f in layers(seed=seed)] for seed in (0, 1))
    g_s32, g_t32 = [f.float() for f in g_s], [f.float() for f in g_t]
    expected = fsp_loss(g_s32, g_t32)
    assert fsp_loss(g_s, g_t) == expected
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fsp_loss(g_s32, g_t32) == expected


def test_the_memory_format_does_not_matter():
    g_s, g_t = layers(seed=0), layers(seed=1)
    last = fsp_loss([f.to(memory_format=torch.channels_last) for f in g_s], g_t)
    torch.testing.assert_close(last, fsp_loss(g_s, g_t), rtol=1e-12, atol=0)


@pytest.mark.parametrize("t_shapes", [SHAPES[:2], [(3, 2, 4, 6), (3, 4, 4, 6), (3, 5, 2, 3)]])
def test_networks_whose_channels_differ_are_refused_when_it_is_built(t_shapes):
    with pytest.raises(ValueError, match=r"\[2, 3, 5\] and \["):
        FSP(SHAPES, t_shapes)


def test_maps_that_do_not_go_together_are_refused():
    g = layers()
    with pytest.raises(ValueError, match="got 3 and 2"):
        FSP(SHAPES, SHAPES)(g, g[:2])
    with pytest.raises(ValueError, match=r"\(3, 2, 4, 6\) and \(1, 2, 4, 6\)"):
        FSP(SHAPES, SHAPES)(g, [f[:1] for f in g])
    with pytest.raises(ValueError, match=r"\(3, 2, 4, 6\) and \(3, 48\)"):
        FSP(SHAPES, SHAPES)(g, [f.flatten(1) for f in g])
