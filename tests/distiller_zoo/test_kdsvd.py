import math

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import check_finite
from distiller_zoo.KDSVD import KDSVD, kdsvd_loss, singular_vectors

# More pixels than channels, as many, and fewer.
SHAPES = [(2, 5, 3, 3), (2, 6, 3, 2), (2, 7, 2, 3)]


def maps(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    """A teacher's maps, and a student's like them."""
    f_t, noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return f_t + 0.5 * noise, f_t


def layers(shapes: list[tuple[int, ...]]) -> tuple[list[Tensor], list[Tensor]]:
    g_s, g_t = zip(*(maps(shape, seed) for seed, shape in enumerate(shapes)), strict=True)
    return list(g_s), list(g_t)


def with_singular_values(values: list[float], shape: tuple[int, ...], noise: float = 0.3) -> tuple[Tensor, Tensor]:
    """A student's maps whose matrices have these singular values, then zeros, and a teacher's near its first vector."""
    samples, channels, height, width = shape
    generator = torch.Generator().manual_seed(0)
    u, _, vh = torch.linalg.svd(
        torch.randn(samples, height * width, channels, generator=generator, dtype=torch.float64), full_matrices=False
    )
    scale = torch.zeros(u.shape[2], dtype=torch.float64)
    scale[: len(values)] = torch.tensor(values, dtype=torch.float64)
    f_s = ((u * scale) @ vh).mT.reshape(shape)
    f_t = ((u[..., :1]) @ vh[:, :1]).mT.reshape(shape)
    return f_s, f_t + noise * torch.randn(shape, generator=generator, dtype=torch.float64) / math.sqrt(channels)


def numpy_vectors(f: Tensor) -> list[tuple[np.ndarray, np.ndarray]]:
    """Singular values and right singular vectors, as columns, sample by sample."""
    found = []
    for sample in f.numpy():
        _, values, rows = np.linalg.svd(sample.reshape(len(sample), -1).T, full_matrices=False)
        found.append((values, rows.T))
    return found


def test_it_is_repdistillers_in_value_and_gradient(losses):
    """In float64, where LAPACK's choice of signs has been seen to be the same in several builds."""
    g_s, g_t = ([losses[f"in/map_{who}{i}"] for i in range(3)] for who in "st")
    g_s[1] = g_s[1].clone().requires_grad_()
    values = torch.stack(KDSVD()(g_s, g_t))
    torch.testing.assert_close(values.detach(), losses["out/kdsvd/value"], rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(values.sum(), g_s[1])
    expected = losses["out/kdsvd/grad/map_s1"]
    assert (gradient - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_directions_are_numpys_sample_by_sample(shape, k):
    f_s, f_t = maps(shape)
    v_s, v_t = (v.numpy() for v in singular_vectors(f_s, f_t, k))
    for sample, ((_, of_s), (values, of_t)) in enumerate(zip(numpy_vectors(f_s), numpy_vectors(f_t), strict=True)):
        scale = values[:k] / np.sqrt((values[:k] ** 2).sum())
        for j in range(k):
            sign = np.sign(v_t[sample, :, j] @ of_t[:, j])
            np.testing.assert_allclose(v_t[sample, :, j], sign * scale[j] * of_t[:, j], atol=1e-12)
            candidates = [of_s[:, i] for i in range(min(k + 3, of_s.shape[1]))]
            closest = max(candidates, key=lambda v: abs(v @ v_t[sample, :, j]))
            closest = closest * np.sign(closest @ v_t[sample, :, j])
            np.testing.assert_allclose(v_s[sample, :, j], scale[j] * closest, atol=1e-12)


def test_the_loss_is_the_squared_difference_of_the_functions_pair_by_pair():
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 2), (2, 4, 2)] * 2
    bottom_s, top_s, bottom_t, top_t = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    total = 0.0
    for n in range(2):
        for i in range(4):
            for j in range(3):
                for d in range(2):
                    s = math.exp(-((top_s[n, i, d] - bottom_s[n, j, d]) ** 2) / 8)
                    t = math.exp(-((top_t[n, i, d] - bottom_t[n, j, d]) ** 2) / 8)
                    total += (s - t) ** 2 / 2
    assert kdsvd_loss(bottom_s, top_s, bottom_t, top_t).item() == pytest.approx(total, rel=1e-12)


def test_there_is_one_loss_for_each_two_layers_in_a_row():
    g_s, g_t = layers(SHAPES)
    values = KDSVD(k=2)(g_s, g_t)
    assert len(values) == 2
    for i, value in enumerate(values):
        (bottom_s, bottom_t), (top_s, top_t) = (singular_vectors(g_s[j], g_t[j], 2) for j in (i, i + 1))
        assert value == kdsvd_loss(bottom_s, top_s, bottom_t, top_t)
    assert KDSVD(k=2)([*g_s, g_s[0]], g_t) == values


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_its_gradient_is_its_derivative_and_the_teacher_has_none(shape, k):
    g_s, g_t = layers([(2, 4, 2, 2), (2, *shape[1:])])
    for f in g_s + g_t:
        f.requires_grad_()
    assert torch.autograd.gradcheck(lambda *g: KDSVD(k)(g, g_t), g_s, fast_mode=True)
    assert torch.autograd.grad(sum(KDSVD(k)(g_s, g_t)), g_t, allow_unused=True) == (None, None)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("values", [[2], [3, 1, 1, 1], [3, 2, 1], [2, 1, 1, 0.5, 0.5]])
def test_its_gradient_is_its_derivative_where_other_singular_values_are_repeated_or_zero(shape, values):
    """The first vector still has a derivative, which autograd's own formula misses: it divides by zero."""
    f_s, f_t = with_singular_values(values, shape)
    bottom_s, bottom_t = singular_vectors(*maps((2, 4, 2, 2)))

    def loss(f: Tensor) -> Tensor:
        top_s, top_t = singular_vectors(f, f_t)
        return kdsvd_loss(bottom_s, top_s, bottom_t, top_t)

    f_s.requires_grad_()
    assert torch.autograd.gradcheck(loss, f_s, fast_mode=True)
    (gradient,) = torch.autograd.grad(loss(f_s), f_s)
    assert gradient.abs().max() > 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_maps_that_are_constant_over_pixels_have_the_derivative_too(shape):
    """One singular value, its vector the channels' levels."""
    f_t = maps(shape)[1] * 0.1 + 1
    f_s = (f_t.mean(dim=(2, 3), keepdim=True) + 0.3 * maps(shape)[0][..., :1, :1]).expand(shape).clone()
    levels = f_s[..., 0, 0] / f_s[..., 0, 0].norm(dim=1, keepdim=True)
    v_s, v_t = singular_vectors(f_s, f_t)
    torch.testing.assert_close(v_s[..., 0], levels * (levels * v_t[..., 0]).sum(1, keepdim=True).sign())
    assert torch.autograd.gradcheck(lambda f: singular_vectors(f, f_t)[0], f_s.requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 1, 3, 3), (2, 4, 1, 1), (1, 4, 2, 2)])
@pytest.mark.parametrize("k", [1, 2])
def test_degenerate_maps_give_finite_gradients(shape, dtype, k):
    f_s, f_t = maps(shape)
    constant = f_s[..., :1, :1].expand(shape).clone()
    repeated = with_singular_values([2] * min(shape[1], shape[2] * shape[3]), shape)[0]
    others = (
        torch.zeros(shape),
        torch.ones(shape),
        constant,
        repeated,
        f_s * (torch.arange(shape[1]) > 0)[:, None, None],
    )
    f_s, f_t = f_s.to(dtype), f_t.to(dtype)
    for other in (f.to(dtype) for f in others):
        check_finite(KDSVD(k), [f_s, other], [f_t, f_t])
        check_finite(KDSVD(k), [other, f_s], [other.clone(), f_t])
        check_finite(KDSVD(k), [f_s, f_t], [other, other.clone()])


@pytest.mark.parametrize("shape", SHAPES)
def test_maps_of_zeros_have_no_direction_and_no_gradient(shape):
    f_s, f_t = maps(shape)
    zeros = torch.zeros_like(f_s).requires_grad_()
    v_s, v_t = singular_vectors(zeros, f_t)
    assert (v_s == 0).all()
    assert (v_t != 0).any()
    (gradient,) = torch.autograd.grad(v_s.sum(), zeros)
    assert (gradient == 0).all()
    assert all((v == 0).all() for v in singular_vectors(f_s, zeros))


def test_equal_student_and_teacher_have_no_loss_and_no_gradient():
    g, _ = layers(SHAPES)
    copies = [f.clone().requires_grad_() for f in g]
    total = sum(KDSVD()(copies, g))
    assert total.item() == pytest.approx(0, abs=1e-20)
    assert all(gradient.abs().max() < 1e-9 for gradient in torch.autograd.grad(total, copies))


def test_the_students_sign_scale_and_order_of_pixels_do_not_matter():
    g_s, g_t = layers(SHAPES)
    values = KDSVD()(g_s, g_t)
    for changed in ([-f for f in g_s], [f * 3 for f in g_s], [f.flip(2) for f in g_s]):
        torch.testing.assert_close(KDSVD()(changed, g_t), values, rtol=1e-9, atol=0)
    assert not torch.isclose(KDSVD()([f.flip(1) for f in g_s], g_t)[0], values[0])


def test_float32_is_close_to_float64():
    """On maps of one sign, where LAPACK's signs are the same in both."""
    g_s, g_t = ([f.relu() + 0.1 for f in g] for g in layers([(4, 8, 6, 6), (4, 16, 5, 5)]))
    (value,) = KDSVD()([f.float() for f in g_s], [f.float() for f in g_t])
    torch.testing.assert_close(value.double(), KDSVD()(g_s, g_t)[0], rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_are_computed_in_float32(dtype):
    g_s, g_t = ([f.to(dtype) * 300 for f in g] for g in layers(SHAPES))
    g_s32, g_t32 = [f.float() for f in g_s], [f.float() for f in g_t]
    expected = KDSVD()(g_s32, g_t32)
    assert KDSVD()(g_s, g_t) == expected
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert KDSVD()(g_s32, g_t32) == expected


def test_the_memory_format_does_not_matter():
    g_s, g_t = layers(SHAPES)
    last = KDSVD()([f.to(memory_format=torch.channels_last) for f in g_s], g_t)
    torch.testing.assert_close(last, KDSVD()(g_s, g_t), rtol=1e-9, atol=0)


@pytest.mark.parametrize("shapes", [((4, 2, 2, 2), (3, 2, 2, 2)), ((4, 2, 2, 2), (4, 3, 2, 2)), ((4, 8), (4, 8))])
def test_other_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match=r"two \(B, C, H, W\) tensors") as error:
        KDSVD()(*([torch.ones(shape)] * 2 for shape in shapes))
    assert all(str(shape) in str(error.value) for shape in shapes)
