import numpy as np
import pytest
import torch

from conftest import check_finite, check_golden
from distiller_zoo.ReviewKD import HCL, hcl_loss

MAPS = [[f"map_{who}{i}" for i in range(3)] for who in "st"]


def maps(*shapes: tuple[int, ...], dtype=torch.float64) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return tuple([torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes] for _ in range(2))


def pooled(f: np.ndarray, size: int) -> np.ndarray:
    """Block means, for sizes that divide the map's."""
    n, c, h, w = f.shape
    return f.reshape(n, c, size, h // size, size, w // size).mean(axis=(3, 5))


def test_it_is_the_published_one_in_value_and_gradient(losses):
    check_golden(losses, "reviewkd_hcl", hcl_loss, *MAPS)
    check_golden(losses, "reviewkd_hcl", HCL(), *MAPS)


@pytest.mark.parametrize(
    ("size", "levels"), [(8, {8: 1, 4: 1 / 2, 2: 1 / 4, 1: 1 / 8}), (4, {4: 1, 2: 1 / 2, 1: 1 / 4}), (1, {1: 1})]
)
def test_a_pairs_loss_is_the_weighted_mean_over_levels_that_are_smaller_than_the_map(size, levels):
    (f_s,), (f_t,) = maps((3, 2, size, size))
    errors = [((pooled(f_s.numpy(), level) - pooled(f_t.numpy(), level)) ** 2).mean() for level in levels]
    expected = np.average(errors, weights=list(levels.values()))
    assert hcl_loss([f_s], [f_t]).item() == pytest.approx(expected, rel=1e-12)


def test_pairs_are_summed_and_their_order_does_not_matter():
    maps_s, maps_t = maps((2, 3, 8, 8), (2, 4, 4, 4), (2, 5))
    expected = sum(hcl_loss([f_s], [f_t]) for f_s, f_t in zip(maps_s, maps_t, strict=True))
    torch.testing.assert_close(hcl_loss(maps_s, maps_t), expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(hcl_loss(maps_s[::-1], maps_t[::-1]), expected, rtol=1e-14, atol=0)


def test_pooled_features_are_a_map_of_one_pixel():
    (f_s,), (f_t,) = maps((3, 7))
    expected = ((f_s - f_t) ** 2).mean()
    torch.testing.assert_close(hcl_loss([f_s], [f_t]), expected)
    torch.testing.assert_close(hcl_loss([f_s[:, :, None, None]], [f_t]), expected)


def test_the_memory_format_does_not_matter():
    maps_s, maps_t = maps((2, 3, 8, 8), (2, 4, 5, 7))
    last = [[f.contiguous(memory_format=torch.channels_last) for f in each] for each in (maps_s, maps_t)]
    torch.testing.assert_close(hcl_loss(*last), hcl_loss(maps_s, maps_t), rtol=1e-14, atol=0)


def test_its_gradients_are_its_derivatives():
    (f_s,), (f_t,) = maps((2, 2, 5, 5))
    assert torch.autograd.gradcheck(lambda s, t: hcl_loss([s], [t]), (f_s.requires_grad_(), f_t.requires_grad_()))


def test_dead_maps_equal_maps_and_a_batch_of_one_are_finite():
    maps_s, maps_t = maps((1, 3, 8, 8), (1, 4, 1, 1))
    zeros = [torch.zeros_like(f) for f in maps_s]
    for pair in ((maps_s, maps_t), (zeros, maps_t), (maps_s, zeros), (zeros, zeros)):
        check_finite(hcl_loss, *pair)
    assert hcl_loss(maps_s, maps_s) == 0


def test_half_precision_is_computed_in_float32():
    maps_s, maps_t = maps((2, 3, 8, 8), dtype=torch.float16)
    full = [[f.float() for f in each] for each in (maps_s, maps_t)]
    assert torch.equal(hcl_loss(maps_s, maps_t), hcl_loss(*full))


@pytest.mark.parametrize(
    ("shapes_s", "shapes_t", "message"),
    [
        ([(2, 3, 4, 4)], [(2, 5, 4, 4)], r"\(2, 3, 4, 4\) and \(2, 5, 4, 4\)"),
        ([(2, 3, 4, 4)], [(2, 3, 8, 8)], r"\(2, 3, 4, 4\) and \(2, 3, 8, 8\)"),
        ([(2, 3, 4)], [(2, 3, 4)], r"\(2, 3, 4\) and \(2, 3, 4\)"),
        ([(2, 3, 4, 4)] * 2, [(2, 3, 4, 4)], "2 and 1"),
        ([], [], "0 and 0"),
    ],
)
def test_other_shapes_and_numbers_of_maps_are_refused(shapes_s, shapes_t, message):
    with pytest.raises(ValueError, match=f"HCL needs .*{message}"):
        hcl_loss(*([torch.zeros(shape) for shape in shapes] for shapes in (shapes_s, shapes_t)))
