import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import check_finite, check_golden
from distiller_zoo.SP import Similarity, similarity_loss


def features(shape_s: tuple[int, ...] = (5, 3, 2, 2), shape_t: tuple[int, ...] = (5, 4, 3, 3)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (shape_s, shape_t))


def slow_similarities(f: Tensor) -> np.ndarray:
    rows = [x.ravel() for x in f.numpy()]
    return np.array([[np.dot(x, y) for y in rows] / np.linalg.norm([np.dot(x, y) for y in rows]) for x in rows])


def test_it_is_repdistillers_in_value_and_gradient(losses):
    check_golden(losses, "similarity", Similarity(), ["map_s2"], ["map_t2"])


@pytest.mark.parametrize(
    "shapes", [((5, 3, 2, 2), (5, 4, 3, 3)), ((6, 7), (6, 7)), ((4, 9), (4, 2, 3, 3)), ((2, 1), (2, 3))]
)
def test_it_is_the_mean_squared_difference_of_similarities_pair_by_pair(shapes):
    f_s, f_t = features(*shapes)
    expected = ((slow_similarities(f_s) - slow_similarities(f_t)) ** 2).mean()
    assert similarity_loss(f_s, f_t).item() == pytest.approx(expected, rel=1e-12)


def test_a_list_of_layers_gives_a_list_of_losses():
    f_s, f_t = features()
    values = Similarity()([f_s, f_s.flatten(1) ** 2], [f_t, f_t])
    assert values == [similarity_loss(f_s, f_t), similarity_loss(f_s**2, f_t)]
    assert all(value.shape == () for value in values)


def test_its_gradients_are_its_derivatives():
    f_s, f_t = (f.requires_grad_() for f in features((3, 2, 2, 1), (3, 5)))
    assert torch.autograd.gradcheck(similarity_loss, (f_s, f_t))


def test_scale_order_of_features_and_order_of_the_batch_do_not_matter():
    f_s, f_t = features((6, 7), (6, 7))
    value = similarity_loss(f_s, f_t)
    torch.testing.assert_close(similarity_loss(f_s * 3, f_t * 0.1), value, rtol=1e-11, atol=0)
    torch.testing.assert_close(similarity_loss(f_s.flip(1), f_t), value, rtol=1e-11, atol=0)
    torch.testing.assert_close(similarity_loss(f_s.flip(0), f_t.flip(0)), value, rtol=1e-11, atol=0)
    assert not torch.isclose(similarity_loss(f_s.flip(0), f_t), value)


def test_a_sample_of_zeros_has_no_similarities_and_an_ordinary_gradient():
    """Dividing its row by a tiny number would give it a huge one; through the others' rows it has one like theirs."""
    f_s, f_t = features((5, 8), (5, 8))
    f_s[2] = 0
    f_s.requires_grad_()
    value = similarity_loss(f_s, f_t)
    value.backward()
    others = torch.tensor([0, 1, 3, 4])
    expected = np.zeros((5, 5))
    expected[np.ix_(others, others)] = slow_similarities(f_s.detach()[others])
    assert value.item() == pytest.approx(((expected - slow_similarities(f_t)) ** 2).mean(), rel=1e-12)
    assert (f_s.grad != 0).any(dim=1).all()
    assert f_s.grad[2].abs().max() < 10 * f_s.grad[others].abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_degenerate_features_give_finite_gradients(dtype):
    f_s, f_t = (f.to(dtype) for f in features((5, 8), (5, 8)))
    zeros, ones = torch.zeros(5, 8, dtype=dtype), torch.ones(5, 8, dtype=dtype)
    dead = f_s * (torch.arange(5)[:, None] > 1)
    for other in (zeros, ones, dead, f_t):
        check_finite(similarity_loss, other, f_t)
        check_finite(similarity_loss, f_s, other)
        check_finite(similarity_loss, other, other.clone())
        check_finite(similarity_loss, other[:1], f_t[:1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_are_computed_in_float32(dtype):
    f_s, f_t = (f.to(dtype) * 300 for f in features())
    expected = similarity_loss(f_s.float(), f_t.float())
    assert torch.equal(similarity_loss(f_s, f_t), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(similarity_loss(f_s.float(), f_t.float()), expected)


def test_the_memory_format_does_not_matter():
    f_s, f_t = features()
    last = similarity_loss(f_s.to(memory_format=torch.channels_last), f_t)
    torch.testing.assert_close(last, similarity_loss(f_s, f_t), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shapes", [((4, 8), (3, 8)), ((8,), (8,)), ((4, 2, 2, 2), (1, 2, 2, 2))])
def test_other_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match="two batches of one size") as error:
        similarity_loss(*(torch.ones(shape) for shape in shapes))
    assert all(str(shape) in str(error.value) for shape in shapes)
