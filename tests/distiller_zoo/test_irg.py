import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.distance import cdist
from torch import Tensor

from conftest import check_finite, check_golden
from distiller_zoo.IRG import IRG, irg_edge_loss, irg_transformation_loss, irg_vertex_loss


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs() -> dict:
    return {
        "f_s": randn(4, 5),
        "f_t": randn(4, 7, seed=1),
        "logit_s": randn(4, 3, seed=2),
        "logit_t": randn(4, 3, seed=3),
        "maps_s": (randn(4, 2, 4, 4, seed=4), randn(4, 4, 2, 2, seed=5)),
        "maps_t": (randn(4, 3, 6, 6, seed=6), randn(4, 6, 3, 3, seed=7)),
    }


def slow_edges(x: Tensor) -> np.ndarray:
    squared = cdist(x.flatten(1).numpy(), x.flatten(1).numpy(), "sqeuclidean")
    return squared / squared.max()


def test_it_is_the_references_in_value_and_gradient(losses):
    names = ("f_s", "f_t", "logit_s", "logit_t")
    check_golden(
        losses, "irg[vert=0.1,edge=5,tran=5]", IRG(), *names, ["map_s1", "map_s_wide"], ["map_t1", "map_t_wide"]
    )
    check_golden(losses, "irg_embedding_only[vert=0.1,edge=5]", IRG(), *names)


def test_vertices_are_the_logits():
    logit_s, logit_t = inputs()["logit_s"], inputs()["logit_t"]
    expected = np.mean((logit_s.numpy() - logit_t.numpy()) ** 2)
    assert irg_vertex_loss(logit_s, logit_t).item() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("shapes", [((6, 5), (6, 9)), ((6, 2, 4, 4), (6, 3, 5, 5)), ((2, 3), (2, 3))])
def test_edges_are_squared_distances_relative_to_the_largest(shapes):
    x_s, x_t = randn(*shapes[0]), randn(*shapes[1], seed=1)
    expected = np.mean((slow_edges(x_s) - slow_edges(x_t)) ** 2)
    assert irg_edge_loss(x_s, x_t).item() == pytest.approx(expected, rel=1e-11, abs=1e-30)


def test_samples_that_are_all_equal_count_as_all_equally_far_from_each_other():
    """As in the reference, where every distance is the least one."""
    x_t = randn(6, 9)
    expected = np.mean((1 - np.eye(6) - slow_edges(x_t)) ** 2)
    for level in (0.0, 3.7):
        x_s = torch.full((6, 5), level, dtype=torch.float64, requires_grad=True)
        value = irg_edge_loss(x_s, x_t)
        assert value.item() == pytest.approx(expected, rel=1e-12)
        assert (torch.autograd.grad(value, x_s)[0] == 0).all()


@pytest.mark.parametrize("offset", [0, 10, 1000])
def test_edges_are_accurate_in_float32_however_much_the_samples_have_in_common(offset):
    x_s, x_t = (randn(64, 256, seed=seed) + offset for seed in (0, 1))
    x_s, x_t = x_s.float().requires_grad_(), x_t.float()
    value = irg_edge_loss(x_s, x_t)
    (grad,) = torch.autograd.grad(value, x_s)
    wide = x_s.detach().double().requires_grad_()
    expected = irg_edge_loss(wide, x_t.double())
    (expected_grad,) = torch.autograd.grad(expected, wide)
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=0)
    assert (grad - expected_grad).abs().max() < 1e-4 * expected_grad.abs().max()


def test_edges_do_not_change_when_all_samples_move_turn_or_grow_alike():
    x_s, x_t = randn(6, 5), randn(6, 9, seed=1)
    turn, _ = torch.linalg.qr(randn(5, 5, seed=2))
    torch.testing.assert_close(irg_edge_loss(x_s @ turn * 7 + 3, x_t), irg_edge_loss(x_s, x_t), rtol=1e-11, atol=0)


def test_the_transformation_averages_neighbouring_channels_and_pixels():
    """Channels: 2 and 4, 6 and 3; sizes: 4 and 2, 3 and 6."""
    before_s, after_s = inputs()["maps_s"]
    before_t, after_t = randn(4, 6, 3, 3), randn(4, 3, 6, 6)
    moved_s = (F.avg_pool2d(before_s, 2) - (after_s[:, 0::2] + after_s[:, 1::2]) / 2).square().sum(dim=(1, 2, 3))
    moved_t = ((before_t[:, 0::2] + before_t[:, 1::2]) / 2 - F.avg_pool2d(after_t, 2)).square().sum(dim=(1, 2, 3))
    expected = (moved_s / moved_s.max() - moved_t / moved_t.max()).square().mean()
    found = irg_transformation_loss((before_s, after_s), (before_t, after_t))
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


def test_maps_of_one_shape_are_compared_as_they_are_and_any_ratio_of_channels_works():
    same = (randn(4, 3, 5, 5), randn(4, 3, 5, 5, seed=1))
    moved = (same[0] - same[1]).square().sum(dim=(1, 2, 3))
    odd = (randn(4, 5, 7, 7), randn(4, 8, 3, 3, seed=1))
    by_hand = F.adaptive_avg_pool1d(odd[1].flatten(2).transpose(1, 2), 5).transpose(1, 2).reshape(4, 5, 3, 3)
    moved_odd = (F.adaptive_avg_pool2d(odd[0], 3) - by_hand).square().sum(dim=(1, 2, 3))
    expected = (moved / moved.max() - moved_odd / moved_odd.max()).square().mean()
    torch.testing.assert_close(irg_transformation_loss(same, odd), expected, rtol=1e-13, atol=0)


def test_its_terms_are_weighted_and_sum_up():
    given = inputs()
    pairs = [(given["f_s"], given["f_t"]), *zip(given["maps_s"], given["maps_t"], strict=True)]
    loss = IRG(2, 3, 4)
    terms = loss.terms(**given)
    torch.testing.assert_close(terms["vertex"], 2 * irg_vertex_loss(given["logit_s"], given["logit_t"]))
    torch.testing.assert_close(terms["edge"], 3 * sum(irg_edge_loss(*pair) for pair in pairs) / 3)
    torch.testing.assert_close(terms["transformation"], 4 * irg_transformation_loss(given["maps_s"], given["maps_t"]))
    assert len(terms) == 3
    assert loss(**given) == sum(terms.values())


def test_a_teacher_without_maps_leaves_vertices_and_the_embeddings_edges():
    given = inputs() | {"maps_t": None}
    terms = IRG().terms(**given)
    assert terms == {
        "vertex": 0.1 * irg_vertex_loss(given["logit_s"], given["logit_t"]),
        "edge": 5 * irg_edge_loss(given["f_s"], given["f_t"]),
    }
    assert IRG()(**given) == sum(terms.values())


def test_its_gradients_are_its_derivatives():
    shapes = [(3, 2), (3, 3), (3, 2), (3, 2), (3, 1, 2, 2), (3, 2, 1, 1), (3, 3, 1, 2), (3, 2, 2, 1)]
    flat = [randn(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(lambda *x: IRG()(*x[:4], x[4:6], x[6:8]), flat)


def test_the_order_of_the_batch_does_not_matter():
    order = torch.tensor([2, 0, 3, 1])
    permuted = {name: tuple(m[order] for m in x) if isinstance(x, tuple) else x[order] for name, x in inputs().items()}
    torch.testing.assert_close(IRG()(**permuted), IRG()(**inputs()), rtol=1e-12, atol=0)


def test_equal_student_and_teacher_have_no_loss():
    given = inputs()
    same = {"f_t": given["f_s"], "logit_t": given["logit_s"], "maps_t": given["maps_s"]}
    assert IRG()(**(given | same)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 4])
def test_degenerate_batches_are_finite(dtype, batch):
    random, zero, constant = (
        randn(batch, 3, 4, 4).to(dtype),
        torch.zeros(batch, 3, 4, 4),
        torch.full((batch, 3, 4, 4), 3.7),
    )
    equal = randn(1, 3, 4, 4, seed=1).to(dtype).expand(batch, -1, -1, -1)
    pair = random.clone()
    pair[-1] = pair[0]
    for x_s, x_t in itertools.product((random, zero.to(dtype), constant.to(dtype), equal, pair), repeat=2):
        f_s, f_t = x_s[:, :, 0, 0], x_t[:, :, 0, 0]
        check_finite(IRG(), f_s, f_t, f_s, f_t)
        check_finite(IRG(), f_s, f_t, f_s, f_t, [x_s, x_t], [x_t, x_s])
        check_finite(IRG(), f_s, f_t, f_s, f_t, [x_s, x_s], [x_t, x_t])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_and_autocast_changes_nothing(dtype):
    def given(dtype: torch.dtype) -> dict:
        return {n: tuple(m.to(dtype) for m in x) if isinstance(x, tuple) else x.to(dtype) for n, x in inputs().items()}

    half = given(dtype)
    single = {n: tuple(m.float() for m in x) if isinstance(x, tuple) else x.float() for n, x in half.items()}
    expected = IRG()(**single)
    assert torch.equal(IRG()(**half), expected)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(IRG()(**single), expected)


def test_the_memory_format_does_not_matter():
    given = inputs()
    last = {name: tuple(m.to(memory_format=torch.channels_last) for m in given[name]) for name in ("maps_s", "maps_t")}
    torch.testing.assert_close(IRG()(**(given | last)), IRG()(**given), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("f_s", randn(3, 5)),
        ("f_t", randn(4)),
        ("logit_s", randn(4, 2)),
        ("maps_s", (randn(3, 2, 4, 4), randn(4, 4, 2, 2))),
        ("maps_t", (randn(4, 2, 4, 4), randn(4, 4))),
    ],
)
def test_other_shapes_are_refused(name, wrong):
    with pytest.raises(ValueError, match="IRG.* got"):
        IRG()(**(inputs() | {name: wrong}))
