import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import check_finite, check_golden
from distiller_zoo.FT import FactorTransfer, factor_loss


def maps(shape_s: tuple[int, ...] = (3, 4, 2, 2), shape_t: tuple[int, ...] = (3, 5, 2, 2)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (shape_s, shape_t))


def slow_factor(f: np.ndarray, p1: float) -> np.ndarray:
    """One sample's factor, pixel by pixel."""
    channels, height, width = f.shape
    factor = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            factor[y, x] = sum(f[c, y, x] ** p1 for c in range(channels)) / channels
    return factor / np.sqrt((factor**2).sum())


def halved(f: Tensor) -> Tensor:
    """The mean of every two by two pixels."""
    n, c, h, w = f.shape
    return f.reshape(n, c, h // 2, 2, w // 2, 2).mean(dim=(3, 5))


def test_it_is_repdistillers_in_value_and_gradient(losses):
    check_golden(losses, "factor", FactorTransfer(), "map_s2", "map_t2")
    check_golden(losses, "factor_mixed", FactorTransfer(2, 1), "map_s_big", "map_t_small")


@pytest.mark.parametrize(("p1", "p2"), [(2, 1), (1, 1), (2, 2), (3, 4)])
@pytest.mark.parametrize("size", [(2, 2), (3, 5)])
def test_it_is_the_mean_power_of_the_difference_of_factors_pixel_by_pixel(p1, p2, size):
    f_s, f_t = maps((3, 4, *size), (3, 7, *size))
    differences = [slow_factor(s, p1) - slow_factor(t, p1) for s, t in zip(f_s.numpy(), f_t.numpy(), strict=True)]
    expected = (np.abs(differences) ** p2).mean()
    assert factor_loss(f_s, f_t, p1, p2).item() == pytest.approx(expected, rel=1e-11)
    assert FactorTransfer(p1, p2)(f_s, f_t) == factor_loss(f_s, f_t, p1, p2)


def test_the_larger_maps_are_averaged_to_the_size_of_the_smaller():
    f_s, f_t = maps((3, 4, 4, 8), (3, 5, 2, 4))
    torch.testing.assert_close(factor_loss(f_s, f_t), factor_loss(halved(f_s), f_t), rtol=1e-12, atol=0)
    torch.testing.assert_close(factor_loss(f_t, f_s), factor_loss(f_t, halved(f_s)), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("p1", "p2"), [(2, 1), (1, 2), (3, 2)])
def test_its_gradients_are_its_derivatives(p1, p2):
    f_s, f_t = (f.requires_grad_() for f in maps((2, 2, 2, 4), (2, 3, 1, 2)))
    assert torch.autograd.gradcheck(lambda s, t: factor_loss(s, t, p1, p2), (f_s, f_t))


def test_a_samples_scale_and_the_order_of_channels_do_not_matter():
    f_s, f_t = maps()
    value = factor_loss(f_s, f_t)
    scale = torch.tensor([0.1, 2, 30], dtype=torch.float64)[:, None, None, None]
    torch.testing.assert_close(factor_loss(f_s * scale, f_t / scale), value, rtol=1e-11, atol=0)
    torch.testing.assert_close(factor_loss(f_s.flip(1), f_t.flip(1)), value, rtol=1e-11, atol=0)
    assert not torch.isclose(factor_loss(f_s.flip(2), f_t), value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p2", [1, 2])
def test_degenerate_maps_give_finite_gradients(dtype, p2):
    f_s, f_t = (f.to(dtype) for f in maps((3, 4, 2, 2), (3, 4, 2, 2)))
    dead = f_s * (torch.arange(3)[:, None, None, None] > 0)
    loss = FactorTransfer(2, p2)
    for other in (torch.zeros_like(f_s), torch.ones_like(f_s), dead, f_s * 1e-20):
        check_finite(loss, other, f_t)
        check_finite(loss, f_s, other)
        check_finite(loss, other, other.clone())
        check_finite(loss, other[:1], f_t[:1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    f_s, f_t = (f.to(dtype) * 300 for f in maps((3, 4, 4, 4)))
    assert torch.equal(factor_loss(f_s, f_t), factor_loss(f_s.float(), f_t.float()))


def test_the_memory_format_does_not_matter():
    f_s, f_t = maps((3, 4, 4, 4))
    last = factor_loss(*(f.to(memory_format=torch.channels_last) for f in (f_s, f_t)))
    torch.testing.assert_close(last, factor_loss(f_s, f_t), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shapes", [((4, 2, 2, 2), (3, 2, 2, 2)), ((4, 8), (4, 8)), ((4, 2, 2, 2), (4, 8))])
def test_other_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match=r"two \(B, C, H, W\) tensors") as error:
        factor_loss(*(torch.ones(shape) for shape in shapes))
    assert all(str(shape) in str(error.value) for shape in shapes)
