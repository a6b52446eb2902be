import pytest
import torch
from torch import Tensor

from conftest import check_finite, check_golden
from distiller_zoo.AB import ABLoss, ab_loss

S, T = [["map_s0", "map_s1", "map_s2"], ["map_t0", "map_t1", "map_t2"]]


def maps(*shape: int) -> tuple[Tensor, Tensor]:
    f_s, f_t = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    return f_s, f_t


def slow_loss(f_s: Tensor, f_t: Tensor, margin: float) -> float:
    """Neuron by neuron."""
    total = 0.0
    for s, t in zip(f_s.flatten().tolist(), f_t.flatten().tolist(), strict=True):
        if t > 0 and s < margin:
            total += (s - margin) ** 2
        if t <= 0 and s > -margin:
            total += (s + margin) ** 2
    return total / len(f_s)


def test_it_is_repdistillers_in_value_and_gradient(losses):
    check_golden(losses, "abound", ABLoss(3), S, T)


@pytest.mark.parametrize("margin", [0.0, 0.5, 1.0, 3.0, -0.5])
def test_it_is_the_squared_distance_from_the_margin_neuron_by_neuron(margin):
    f_s, f_t = maps(3, 4, 5, 5)
    assert ab_loss(f_s, f_t, margin).item() == pytest.approx(slow_loss(f_s, f_t, margin), rel=1e-12)


def test_layers_weigh_less_the_further_they_are_from_the_last():
    g_s, g_t = zip(*(maps(3, 4, size, size) for size in (4, 2, 1)), strict=True)
    loss = ABLoss(3, margin=0.5)
    assert (loss.w, loss.margin) == ([0.25, 0.5, 1], 0.5)
    for value, weight, f_s, f_t in zip(loss(g_s, g_t), (0.25, 0.5, 1), g_s, g_t, strict=True):
        assert value.item() == pytest.approx(weight * 3 / 1000 * slow_loss(f_s, f_t, 0.5), rel=1e-12)


@pytest.mark.parametrize("margin", [1.0, 0.3])
def test_its_gradient_is_its_derivative_and_the_teacher_has_none(margin):
    f_s, f_t = (f.requires_grad_() for f in maps(2, 3, 2, 2))
    assert torch.autograd.gradcheck(lambda s: ab_loss(s, f_t, margin), f_s)
    assert torch.autograd.grad(ab_loss(f_s, f_t), f_t, allow_unused=True) == (None,)


def test_a_neuron_beyond_the_margin_has_no_loss_and_no_gradient_and_zero_is_not_active():
    f_t = torch.tensor([[3.0, 0.1, -0.1, 0.0, -5.0, 2.0]])
    f_s = torch.tensor([[1.0, 4.0, -1.0, -2.0, -1.5, 0.5]], requires_grad=True)
    value = ab_loss(f_s, f_t)
    value.backward()
    assert value == 0.25  # the last alone: active in the teacher, half a margin short
    assert torch.equal(f_s.grad, torch.tensor([[0.0, 0, 0, 0, 0, -1]]))


def test_only_the_teachers_signs_count():
    f_s, f_t = maps(3, 4, 2, 2)
    assert torch.equal(ab_loss(f_s, f_t), ab_loss(f_s, f_t.sign() * 7))
    assert torch.equal(ab_loss(-f_s, -f_t), ab_loss(f_s, f_t))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_maps_give_finite_gradients(dtype):
    f_s, f_t = (f.to(dtype) for f in maps(3, 4, 2, 2))
    for other in (torch.zeros_like(f_s), torch.ones_like(f_s), -torch.ones_like(f_s)):
        check_finite(ab_loss, other, f_t)
        check_finite(ab_loss, f_s, other)
        check_finite(ab_loss, other, other.clone())
        check_finite(ab_loss, other[:1], f_t[:1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    f_s, f_t = (f.to(dtype) * 300 for f in maps(3, 4, 4, 4))
    assert torch.equal(ab_loss(f_s, f_t), ab_loss(f_s.float(), f_t.float()))


def test_the_memory_format_does_not_matter():
    f_s, f_t = maps(3, 4, 4, 4)
    last = ab_loss(f_s.to(memory_format=torch.channels_last), f_t)
    torch.testing.assert_close(last, ab_loss(f_s, f_t), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shapes", [((4, 2, 2, 2), (4, 1, 2, 2)), ((4, 2, 2, 2), (4, 2, 1, 1)), ((4, 8), (8,))])
def test_different_shapes_are_refused_even_where_they_would_broadcast(shapes):
    with pytest.raises(ValueError, match="two tensors of one shape") as error:
        ab_loss(*(torch.ones(shape) for shape in shapes))
    assert all(str(shape) in str(error.value) for shape in shapes)


@pytest.mark.parametrize(("student", "teacher"), [(2, 3), (3, 2), (2, 2), (4, 4)])
def test_another_number_of_layers_is_refused(student, teacher):
    f_s, f_t = maps(2, 3)
    with pytest.raises(ValueError, match=f"built for 3 layers, got {student} and {teacher}"):
        ABLoss(3)([f_s] * student, [f_t] * teacher)
