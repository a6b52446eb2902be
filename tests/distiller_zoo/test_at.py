import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import check_finite, check_golden
from distiller_zoo.AT import Attention, attention_loss

S, T = [["map_s0", "map_s1", "map_s2"], ["map_t0", "map_t1", "map_t2"]]


def maps(shape_s: tuple[int, ...] = (3, 4, 2, 2), shape_t: tuple[int, ...] = (3, 5, 2, 2)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (shape_s, shape_t))


def slow_attention(f: np.ndarray, p: float) -> np.ndarray:
    """One sample's map, pixel by pixel."""
    channels, height, width = f.shape
    attention = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            attention[y, x] = sum(f[c, y, x] ** p for c in range(channels)) / channels
    return attention / np.sqrt((attention**2).sum())


def halved(f: Tensor) -> Tensor:
    """The mean of every two by two pixels."""
    n, c, h, w = f.shape
    return f.reshape(n, c, h // 2, 2, w // 2, 2).mean(dim=(3, 5))


def test_it_is_repdistillers_in_value_and_gradient(losses):
    check_golden(losses, "attention", Attention(), S, T)
    check_golden(losses, "attention_mixed", attention_loss, "map_s_big", "map_t_small")
    check_golden(losses, "attention_mixed", Attention(2), ["map_s_big"], ["map_t_small"])


@pytest.mark.parametrize("p", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(2, 2), (3, 5), (1, 1)])
def test_it_is_the_mean_squared_difference_of_attention_maps_pixel_by_pixel(p, size):
    f_s, f_t = maps((3, 4, *size), (3, 7, *size))
    differences = [slow_attention(s, p) - slow_attention(t, p) for s, t in zip(f_s.numpy(), f_t.numpy(), strict=True)]
    expected = (np.array(differences) ** 2).mean()
    assert attention_loss(f_s, f_t, p).item() == pytest.approx(expected, rel=1e-11)
    assert Attention(p)([f_s], [f_t]) == [attention_loss(f_s, f_t, p)]


def test_the_larger_maps_are_averaged_to_the_size_of_the_smaller():
    f_s, f_t = maps((3, 4, 4, 8), (3, 5, 2, 4))
    torch.testing.assert_close(attention_loss(f_s, f_t), attention_loss(halved(f_s), f_t), rtol=1e-12, atol=0)
    torch.testing.assert_close(attention_loss(f_t, f_s), attention_loss(f_t, halved(f_s)), rtol=1e-12, atol=0)


def test_the_longer_lists_last_layers_are_left_out():
    f_s, f_t = maps()
    assert Attention()([f_s, f_s], [f_t]) == Attention()([f_s], [f_t])


@pytest.mark.parametrize("p", [1, 2, 3])
def test_its_gradients_are_its_derivatives(p):
    f_s, f_t = (f.requires_grad_() for f in maps((2, 2, 2, 4), (2, 3, 1, 2)))
    assert torch.autograd.gradcheck(lambda s, t: attention_loss(s, t, p), (f_s, f_t))


def test_a_samples_scale_and_the_order_of_channels_do_not_matter():
    f_s, f_t = maps()
    value = attention_loss(f_s, f_t)
    scale = torch.tensor([0.1, 2, 30], dtype=torch.float64)[:, None, None, None]
    torch.testing.assert_close(attention_loss(f_s * scale, f_t / scale), value, rtol=1e-11, atol=0)
    torch.testing.assert_close(attention_loss(f_s.flip(1), f_t.flip(1)), value, rtol=1e-11, atol=0)
    assert not torch.isclose(attention_loss(f_s.flip(2), f_t), value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_maps_give_finite_gradients(dtype):
    f_s, f_t = (f.to(dtype) for f in maps((3, 4, 2, 2), (3, 4, 2, 2)))
    dead = f_s * (torch.arange(3)[:, None, None, None] > 0)
    for other in (torch.zeros_like(f_s), torch.ones_like(f_s), dead, f_s * 1e-20):
        check_finite(attention_loss, other, f_t)
        check_finite(attention_loss, f_s, other)
        check_finite(attention_loss, other, other.clone())
        check_finite(attention_loss, other[:1], f_t[:1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    f_s, f_t = (f.to(dtype) * 300 for f in maps((3, 4, 4, 4)))
    assert torch.equal(attention_loss(f_s, f_t), attention_loss(f_s.float(), f_t.float()))


def test_the_memory_format_does_not_matter():
    f_s, f_t = maps((3, 4, 4, 4))
    last = attention_loss(*(f.to(memory_format=torch.channels_last) for f in (f_s, f_t)))
    torch.testing.assert_close(last, attention_loss(f_s, f_t), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shapes", [((4, 2, 2, 2), (3, 2, 2, 2)), ((4, 8), (4, 8)), ((4, 2, 2, 2), (4, 8))])
def test_other_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match=r"two \(B, C, H, W\) tensors") as error:
        Attention()(*([torch.ones(shape)] for shape in shapes))
    assert all(str(shape) in str(error.value) for shape in shapes)
