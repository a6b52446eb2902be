import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import truncnorm
from torch import nn

from conftest import check_finite, check_golden
from distiller_zoo.OFD import OFD, ofd_loss, ofd_margin

MARGIN = "ofd_feature[margin=-0.3]"


def pair(*shape: int) -> torch.Tensor:
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def margins(channels: int) -> torch.Tensor:
    return -torch.linspace(0.1, 1.0, channels, dtype=torch.float64)


def batch_norm(weight: list[float], bias: list[float]) -> nn.BatchNorm2d:
    bn = nn.BatchNorm2d(len(weight)).double()
    bn.weight.data, bn.bias.data = torch.tensor([weight, bias], dtype=torch.float64)
    return bn


def slow_loss(f_s: np.ndarray, f_t: np.ndarray, margin: np.ndarray) -> float:
    """The three cases in which a response counts, one by one."""
    total = 0.0
    for n, c, h, w in np.ndindex(f_s.shape):
        s, t, m = f_s[n, c, h, w], f_t[n, c, h, w], margin[c]
        if t > 0 or (m < t < s):
            total += (s - t) ** 2
        elif t <= m < s:
            total += (s - m) ** 2
    return total / len(f_s)


def test_it_is_the_published_one_in_value_and_gradient(losses):
    check_golden(losses, MARGIN, lambda s, t: ofd_loss(s, t, -0.3), "map_s1", "map_t1")
    margin = torch.full((8,), -0.3, dtype=torch.float64)
    check_golden(losses, MARGIN, lambda s, t: ofd_loss(s, t, margin), "map_s1", "map_t1")
    check_golden(losses, MARGIN, lambda s, t: OFD([margin])([s], [t]), "map_s1", "map_t1")


def test_each_channel_has_its_margin():
    f_s, f_t = pair(3, 4, 5, 2)
    margin = margins(4)
    expected = slow_loss(f_s.numpy(), f_t.numpy(), margin.numpy())
    assert ofd_loss(f_s, f_t, margin).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("s", "t", "expected"),
    [
        (0.5, 2.0, 1.5**2),
        (-3.0, 2.0, 5.0**2),
        (-0.6, -0.2, 0),  # below a teacher that a ReLU cuts off anyway
        (-0.6, 0.0, 0),
        (-0.1, -0.2, 0.1**2),
        (0.7, -0.2, 0.9**2),
        (-2.0, -5.0, 0),
        (0.7, -5.0, 1.7**2),  # the teacher's is raised to the margin
    ],
)
def test_what_counts_is_a_positive_teacher_or_a_student_above_it(s, t, expected):
    f_s, f_t = (torch.full((1, 1, 1, 1), value, dtype=torch.float64) for value in (s, t))
    assert ofd_loss(f_s, f_t, -1.0).item() == pytest.approx(expected)


def test_its_gradients_are_its_derivatives():
    f_s, f_t = (f.requires_grad_() for f in pair(2, 3, 2, 2))
    assert torch.autograd.gradcheck(lambda s, t: ofd_loss(s, t, margins(3)), (f_s, f_t))


@pytest.mark.parametrize("larger", ["student", "teacher"])
def test_the_larger_map_is_average_pooled_to_the_smaller(larger):
    large, other = pair(2, 3, 4, 4)
    small = other[:, :, ::2, ::2]
    halved = large.reshape(2, 3, 2, 2, 2, 2).mean(dim=(3, 5))
    if larger == "student":
        found, expected = ofd_loss(large, small, -0.5), ofd_loss(halved, small, -0.5)
    else:
        found, expected = ofd_loss(small, large, -0.5), ofd_loss(small, halved, -0.5)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


def test_neither_the_memory_format_nor_the_batchs_order_matters():
    f_s, f_t = pair(4, 3, 5, 5)
    value = ofd_loss(f_s, f_t, margins(3))
    last = (f.contiguous(memory_format=torch.channels_last) for f in (f_s, f_t))
    torch.testing.assert_close(ofd_loss(*last, margins(3)), value, rtol=1e-13, atol=0)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(ofd_loss(f_s[order], f_t[order], margins(3)), value, rtol=1e-13, atol=0)


def test_dead_maps_equal_maps_and_a_batch_of_one_are_finite():
    f_s, f_t = pair(1, 3, 2, 2)
    zeros = torch.zeros_like(f_s)
    for s, t in itertools.product((f_s, f_t, zeros), repeat=2):
        check_finite(lambda s, t: ofd_loss(s, t, margins(3)), s, t)
    assert ofd_loss(f_t, f_t, -10.0) == 0


def test_a_map_in_half_precision_is_summed_in_float32():
    """100 000 pixels of error 1: more than float16 can hold."""
    f = torch.ones(1, 10, 100, 100, dtype=torch.float16)
    value = ofd_loss(f + 1, f, torch.full((10,), -0.5))
    assert value == 100_000
    assert value.dtype == torch.float32


@pytest.mark.parametrize(
    ("shape_s", "shape_t", "margin", "message"),
    [
        ((2, 3, 4, 4), (2, 5, 4, 4), -1.0, r"\(2, 3, 4, 4\) and \(2, 5, 4, 4\)"),
        ((2, 3, 4, 4), (1, 3, 4, 4), -1.0, r"\(2, 3, 4, 4\) and \(1, 3, 4, 4\)"),
        ((2, 3), (2, 3), -1.0, r"\(2, 3\) and \(2, 3\)"),
        ((2, 3, 4, 4), (2, 3, 4, 4), torch.zeros(4), r"\(4,\) for maps \(2, 3, 4, 4\)"),
    ],
)
def test_other_shapes_are_refused(shape_s, shape_t, margin, message):
    with pytest.raises(ValueError, match=f"OFD needs .*{message}"):
        ofd_loss(torch.zeros(shape_s), torch.zeros(shape_t), margin)


def test_the_margin_is_the_mean_of_a_normal_response_cut_off_at_zero():
    weight, bias = [1.0, -0.5, 2.0, 0.3, 1.5], [0.0, 0.7, -1.5, 0.6, -9.0]
    margin = ofd_margin(batch_norm(weight, bias))
    expected = [truncnorm.mean(-np.inf, -m / abs(s), loc=m, scale=abs(s)) for s, m in zip(weight, bias, strict=True)]
    np.testing.assert_allclose(margin.numpy(), expected, rtol=1e-12)
    assert margin.dtype == torch.float64
    assert not margin.requires_grad


def test_a_channel_that_is_hardly_ever_negative_has_a_margin_of_three_deviations():
    """A normal response with its mean 3.09 deviations above zero is negative once in a thousand."""
    margin = ofd_margin(batch_norm([2.0, 2.0, -2.0, 1.0], [6.17, 6.19, 6.19, 50.0]))
    assert margin[1:].tolist() == [-6, -6, -3]
    assert -1 < margin[0] < 0


def test_a_batch_norm_without_spread_has_its_own_mean_as_margin_or_zero():
    assert ofd_margin(batch_norm([0.0, 0.0, 0.0], [-1.5, 0.0, 2.0])).tolist() == [-1.5, 0, 0]


def test_later_stages_weigh_more():
    pairs = [pair(2, c, 3, 3) for c in (2, 3, 4)]
    stages = [margins(c) for c in (2, 3, 4)]
    loss = OFD(stages)
    each = [ofd_loss(*maps, margin) for maps, margin in zip(pairs, stages, strict=True)]
    value = loss([s for s, _ in pairs], [t for _, t in pairs])
    torch.testing.assert_close(value, each[0] / 4 + each[1] / 2 + each[2], rtol=1e-14, atol=0)


def test_its_margins_move_with_it_and_are_saved():
    loss = OFD([margins(2), margins(3)])
    assert list(loss.state_dict()) == ["margin1", "margin2"]
    assert not list(loss.parameters())
    assert loss.to(torch.float32).margin2.dtype == torch.float32


@pytest.mark.parametrize(("num_s", "num_t"), [(1, 2), (2, 1), (3, 3), (0, 0)])
def test_another_number_of_maps_than_of_margins_is_refused(num_s, num_t):
    f = torch.zeros(1, 2, 2, 2)
    with pytest.raises(ValueError, match=f"got {num_s} and {num_t} maps for 2 margins"):
        OFD([margins(2), margins(2)])([f] * num_s, [f] * num_t)
    assert math.isfinite(OFD([margins(2), margins(2)])([f] * 2, [f] * 2))
