import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import check_finite, check_golden
from distiller_zoo.NST import NSTLoss, nst_loss

S, T = [["map_s0", "map_s1", "map_s2"], ["map_t0", "map_t1", "map_t2"]]

# Many pixels and few channels, and the other way round: the sums are taken over the fewer.
SHAPES = [
    ((3, 4, 3, 3), (3, 4, 3, 3)),
    ((3, 2, 3, 2), (3, 5, 3, 2)),
    ((3, 6, 2, 2), (3, 3, 2, 2)),
    ((2, 3, 1, 1), (2, 9, 1, 1)),
]


def maps(shape_s: tuple[int, ...], shape_t: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (shape_s, shape_t))


def slow_kernel(a: np.ndarray, b: np.ndarray) -> float:
    """Mean of the kernel over samples and pairs of channels."""
    values = []
    for sample_a, sample_b in zip(a, b, strict=True):
        for x in sample_a:
            for y in sample_b:
                values.append((np.sum(x * y) / (np.linalg.norm(x) * np.linalg.norm(y))) ** 2)
    # Each sample has as many pairs.
    return float(np.mean(values))


def test_it_is_repdistillers_in_value_and_gradient(losses):
    check_golden(losses, "nst", NSTLoss(), S, T)
    check_golden(losses, "nst_mixed", nst_loss, "map_s_big", "map_t_small")


@pytest.mark.parametrize("shapes", SHAPES)
def test_it_is_the_discrepancy_of_the_kernel_pair_by_pair(shapes):
    f_s, f_t = maps(*shapes)
    s, t = f_s.numpy(), f_t.numpy()
    expected = slow_kernel(s, s) + slow_kernel(t, t) - 2 * slow_kernel(s, t)
    assert nst_loss(f_s, f_t).item() == pytest.approx(expected, rel=1e-10, abs=1e-15)
    assert NSTLoss()([f_s], [f_t]) == [nst_loss(f_s, f_t)]


def test_the_larger_maps_are_averaged_to_the_size_of_the_smaller():
    f_s, f_t = maps((3, 4, 4, 8), (3, 5, 2, 4))
    pooled = f_s.reshape(3, 4, 2, 2, 4, 2).mean(dim=(3, 5))
    torch.testing.assert_close(nst_loss(f_s, f_t), nst_loss(pooled, f_t), rtol=1e-11, atol=0)
    torch.testing.assert_close(nst_loss(f_t, f_s), nst_loss(f_t, pooled), rtol=1e-11, atol=0)


def test_the_longer_lists_last_layers_are_left_out():
    f_s, f_t = maps(*SHAPES[0])
    assert NSTLoss()([f_s, f_s], [f_t]) == NSTLoss()([f_s], [f_t])


@pytest.mark.parametrize("shapes", [*SHAPES[:3], ((2, 2, 2, 4), (2, 3, 1, 2))])
def test_its_gradients_are_its_derivatives(shapes):
    assert torch.autograd.gradcheck(nst_loss, tuple(f.requires_grad_() for f in maps(*shapes)))


@pytest.mark.parametrize("shapes", SHAPES[:3])
def test_the_scale_sign_and_order_of_channels_do_not_matter_and_the_place_of_pixels_does(shapes):
    f_s, f_t = maps(*shapes)
    value = nst_loss(f_s, f_t)
    scale = torch.randn(f_s.shape[:2], generator=torch.Generator().manual_seed(1), dtype=torch.float64)[..., None, None]
    torch.testing.assert_close(nst_loss(f_s * scale, f_t), value, rtol=1e-10, atol=0)
    torch.testing.assert_close(nst_loss(f_s.flip(1), f_t), value, rtol=1e-10, atol=0)
    torch.testing.assert_close(nst_loss(f_s.flip(2), f_t.flip(2)), value, rtol=1e-10, atol=0)
    assert not torch.isclose(nst_loss(f_s.flip(2), f_t), value)


@pytest.mark.parametrize("shapes", SHAPES)
def test_equal_student_and_teacher_have_no_loss_and_no_gradient(shapes):
    f, _ = maps(*shapes)
    twice = f.repeat(1, 2, 1, 1)  # every channel twice is the same distribution
    f.requires_grad_()
    for other in (f.detach().clone(), twice):
        value = nst_loss(f, other)
        (gradient,) = torch.autograd.grad(value, f)
        assert value.item() == pytest.approx(0, abs=1e-14)
        assert gradient.abs().max() < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [2, 6])
def test_degenerate_maps_give_finite_gradients_and_a_dead_channel_none(dtype, channels):
    f_s, f_t = (f.to(dtype) for f in maps((3, channels, 2, 2), (3, channels, 2, 2)))
    dead = f_s * (torch.arange(channels)[:, None, None] > 0)
    for other in (torch.zeros_like(f_s), torch.ones_like(f_s), dead, f_s * 1e-20):
        check_finite(nst_loss, other, f_t)
        check_finite(nst_loss, f_s, other)
        check_finite(nst_loss, other, other.clone())
        check_finite(nst_loss, other[:1], f_t[:1])
    dead.requires_grad_()
    (gradient,) = torch.autograd.grad(nst_loss(dead, f_t), dead)
    assert (gradient[:, 0] == 0).all()
    assert (gradient[:, 1:] != 0).any()


@pytest.mark.parametrize("shapes", SHAPES[:3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_are_computed_in_float32(dtype, shapes):
    f_s, f_t = (f.to(dtype) * 300 for f in maps(*shapes))
    expected = nst_loss(f_s.float(), f_t.float())
    assert torch.equal(nst_loss(f_s, f_t), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nst_loss(f_s.float(), f_t.float()), expected)


@pytest.mark.parametrize("shapes", SHAPES[:3])
def test_the_memory_format_does_not_matter(shapes):
    f_s, f_t = maps(*shapes)
    last = nst_loss(*(f.to(memory_format=torch.channels_last) for f in (f_s, f_t)))
    torch.testing.assert_close(last, nst_loss(f_s, f_t), rtol=1e-11, atol=0)


@pytest.mark.parametrize("shapes", [((4, 2, 2, 2), (3, 2, 2, 2)), ((4, 8), (4, 8)), ((4, 2, 2, 2), (4, 8))])
def test_other_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match=r"two \(B, C, H, W\) tensors") as error:
        nst_loss(*(torch.ones(shape) for shape in shapes))
    assert all(str(shape) in str(error.value) for shape in shapes)
