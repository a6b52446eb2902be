import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import pearsonr
from torch import Tensor

from distiller_zoo import EGA, ega_terms
from distiller_zoo.EGA import standardize


@pytest.fixture(scope="module")
def reference(golden) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value) for name, value in np.load(golden / "losses.npz").items()}


def embeddings(batch: int = 6, dim: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    f_s, f_t = torch.randn(2, batch, dim, generator=generator, dtype=torch.float64) + 0.3
    return f_s, f_t


def gradients(f_s: Tensor, f_t: Tensor, **weights) -> tuple[Tensor, Tensor, Tensor]:
    f_s, f_t = f_s.clone().requires_grad_(), f_t.clone().requires_grad_()
    loss = EGA(**weights)(f_s, f_t)
    loss.backward()
    return loss.detach(), f_s.grad, f_t.grad


def slow_terms(f_s: Tensor, f_t: Tensor) -> tuple[float, float]:
    """The paper's equations, pair by pair."""
    s, t = f_s.numpy(), f_t.numpy()
    node = edge = 0.0
    for i in range(len(s)):
        for j in range(len(s)):
            node += (pearsonr(t[i], s[j])[0] - (i == j)) ** 2
            edge += (pearsonr(t[i], t[j])[0] - pearsonr(s[i], s[j])[0]) ** 2
    return math.sqrt(node), math.sqrt(edge)


@pytest.mark.parametrize("weights", [(0.8, 0.24), (1.0, 0.3), (1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_it_is_the_releases_in_value_and_gradient(reference, weights, dtype, tolerance):
    entry = "out/ega[node={},edge={}]".format(*weights)
    value, gradient, _ = gradients(
        reference["in/f_s"].to(dtype), reference["in/f_t"].to(dtype), node_weight=weights[0], edge_weight=weights[1]
    )
    assert value.dtype == gradient.dtype == dtype
    torch.testing.assert_close(value.double(), reference[f"{entry}/value"][0], rtol=tolerance, atol=0)
    expected = reference[f"{entry}/grad/f_s"]
    # Relative to the gradient's size: single entries may come close to zero.
    assert (gradient - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize(("batch", "dim"), [(6, 5), (2, 3), (9, 2), (3, 40)])
def test_it_is_the_papers_equations_pair_by_pair(batch, dim):
    f_s, f_t = embeddings(batch, dim)
    node, edge = ega_terms(f_s, f_t)
    expected_node, expected_edge = slow_terms(f_s, f_t)
    assert node.item() == pytest.approx(expected_node, rel=1e-12)
    assert edge.item() == pytest.approx(expected_edge, rel=1e-12)


def direct_terms(f_s: Tensor, f_t: Tensor) -> tuple[Tensor, Tensor]:
    """The paper's equations on whole matrices, as they stand."""
    z_s, z_t = (F.normalize(f - f.mean(dim=1, keepdim=True)) for f in (f_s, f_t))
    node = z_t @ z_s.T - torch.eye(len(f_s), dtype=f_s.dtype)
    return node.norm(), (z_t @ z_t.T - z_s @ z_s.T).norm()


@pytest.mark.parametrize("noise", [None, 1.0, 0.1, 0.005])
@pytest.mark.parametrize("batch", [2, 7, 8, 31, 32, 33, 200, 1500])
def test_in_float32_it_is_the_direct_formula_in_float64_to_a_ten_thousandth(batch, noise):
    """On both sides of B = D, from an unrelated student to one within half a per cent of its teacher."""
    generator = torch.Generator().manual_seed(batch)
    f_t, other = torch.randn(2, batch, 32, generator=generator)
    f_s = other if noise is None else f_t + noise * other
    found, expected = [], []
    for terms, dtype, results in ((ega_terms, torch.float32, found), (direct_terms, torch.float64, expected)):
        inputs = f_s.to(dtype, copy=True).requires_grad_(), f_t.to(dtype, copy=True).requires_grad_()
        for value in terms(*inputs):
            results += [value.detach(), *torch.autograd.grad(value, inputs, retain_graph=True)]
    for value, reference in zip(found, expected, strict=True):
        assert (value.double() - reference).norm() < 1e-4 * reference.norm()


def test_a_teacher_that_needs_no_gradient_changes_nothing_for_the_student():
    for batch in (4, 12):
        f_s, f_t = embeddings(batch, 6)
        _, both, _ = gradients(f_s, f_t)
        student = f_s.clone().requires_grad_()
        (alone,) = torch.autograd.grad(EGA()(student, f_t), student)
        assert torch.equal(alone, both)


def test_its_weights_weigh_and_its_terms_sum_up():
    f_s, f_t = embeddings()
    node, edge = ega_terms(f_s, f_t)
    loss = EGA(3, 0.5)
    assert loss.terms(f_s, f_t) == {"node": 3 * node, "edge": 0.5 * edge}
    assert loss(f_s, f_t) == 3 * node + 0.5 * edge
    assert EGA()(f_s, f_t) == 0.8 * node + 0.24 * edge


@pytest.mark.parametrize("weights", [(0.8, 0.24), (1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize(("batch", "dim"), [(4, 6), (5, 5), (13, 5)])
def test_its_gradients_are_its_derivatives(weights, batch, dim):
    f_s, f_t = (f.requires_grad_() for f in embeddings(batch, dim))
    assert torch.autograd.gradcheck(EGA(*weights), (f_s, f_t))


def test_the_order_of_the_batch_does_not_matter():
    f_s, f_t = embeddings(8)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    value, grad_s, grad_t = gradients(f_s, f_t)
    permuted, permuted_s, permuted_t = gradients(f_s[order], f_t[order])
    torch.testing.assert_close(permuted, value, rtol=1e-13, atol=0)
    torch.testing.assert_close(permuted_s, grad_s[order], rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(permuted_t, grad_t[order], rtol=1e-10, atol=1e-14)
    assert not torch.isclose(gradients(f_s[order], f_t)[0], value)


def test_a_rows_scale_and_offset_do_not_matter_but_its_sign_does():
    f_s, f_t = embeddings(8)
    scale, offset = torch.rand(2, 8, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 50 + 0.1
    value = EGA()(f_s, f_t)
    torch.testing.assert_close(EGA()(f_s * scale + offset, f_t), value, rtol=1e-11, atol=0)
    torch.testing.assert_close(EGA()(f_s, f_t * scale - offset), value, rtol=1e-11, atol=0)
    assert not torch.isclose(EGA()(f_s * -1, f_t), value)


def test_only_the_node_term_depends_on_who_is_whose_partner():
    """Turning all student embeddings round alike keeps the edges among them."""
    f_s, f_t = embeddings(8)
    node, edge = ega_terms(f_s, f_t)
    flipped_node, flipped_edge = ega_terms(-f_s, f_t)
    torch.testing.assert_close(flipped_edge, edge, rtol=1e-12, atol=0)
    assert flipped_node > node + 0.1 or flipped_node < node - 0.1


def test_equal_student_and_teacher_have_no_edge_loss_and_no_gradient_from_it():
    f, _ = embeddings()
    node, edge = ega_terms(f, f.clone())
    assert edge == 0
    assert node.isfinite()
    value, grad_s, grad_t = gradients(f, f.clone(), node_weight=0, edge_weight=1)
    assert (value, grad_s.abs().max(), grad_t.abs().max()) == (0, 0, 0)
    total, grad_s, _ = gradients(f, f.clone())
    alone, grad_alone, _ = gradients(f, f.clone(), edge_weight=0)
    assert total == alone
    assert torch.equal(grad_s, grad_alone)


def test_perfect_nodes_have_no_loss_and_no_gradient():
    """Orthogonal centred rows, the same for both: every correlation is 0 or 1, exactly."""
    f = torch.tensor([[1.0, -1, 0, 0], [0, 0, 1, -1]], dtype=torch.float64)
    f = f * 2  # each row's norm is the square root of 8
    value, grad_s, grad_t = gradients(f, f)
    assert value.item() == pytest.approx(0, abs=1e-15)
    assert grad_s.isfinite().all()
    assert grad_t.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("whose", ["student", "teacher", "both"])
@pytest.mark.parametrize("level", [0.0, 1.0, -3.7, 1e4, 0.1])
def test_a_constant_row_counts_as_uncorrelated_and_gets_no_gradient(dtype, whose, level):
    f_s, f_t = (f.to(dtype) for f in embeddings())
    if whose != "teacher":
        f_s[2] = level
    if whose != "student":
        f_t[2] = level
    value, grad_s, grad_t = gradients(f_s, f_t)
    assert value.isfinite()
    assert grad_s.isfinite().all()
    assert grad_t.isfinite().all()
    for f, grad, constant in ((f_s, grad_s, whose != "teacher"), (f_t, grad_t, whose != "student")):
        assert (standardize(f)[2] == 0).all() == constant
        assert (grad[2] == 0).all() == constant
        assert (grad[[0, 1, 3, 4, 5]] != 0).any(dim=1).all()


def test_the_value_with_a_constant_row_is_that_of_the_equations_with_zeros():
    f_s, f_t = embeddings()
    f_s[2] = 5.0
    corr = np.corrcoef(np.concatenate([f_s.numpy()[[0, 1, 3, 4, 5]], f_t.numpy()]))
    z = np.zeros((12, 12))
    present = [0, 1, 3, 4, 5, *range(6, 12)]
    z[np.ix_(present, present)] = corr
    edges_s, edges_t, nodes = z[:6, :6], z[6:, 6:], z[6:, :6]
    node, edge = ega_terms(f_s, f_t)
    assert node.item() == pytest.approx(np.linalg.norm(nodes - np.eye(6)), rel=1e-12)
    assert edge.item() == pytest.approx(np.linalg.norm(edges_t - edges_s), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_rows_constant_is_finite_without_a_gradient(dtype):
    f = torch.full((4, 8), 2.0, dtype=dtype)
    value, grad_s, grad_t = gradients(f, f)
    assert value.item() == pytest.approx(0.8 * 2)  # the node term is the norm of a 4 x 4 identity
    assert (grad_s == 0).all()
    assert (grad_t == 0).all()


@pytest.mark.parametrize(("share", "constant"), [(0.5e-6, True), (0.9e-6, True), (1.1e-6, False), (1e-5, False)])
def test_a_row_is_constant_up_to_a_millionth_of_its_norm(share, constant):
    f_s, f_t = embeddings(4, 8)
    wave = torch.tensor([1.0, -1.0] * 4, dtype=torch.float64)
    f_s[1] = 3.0 + 3.0 * share * wave  # centred norm / norm = share, but for its square
    value, grad_s, grad_t = gradients(f_s, f_t)
    assert value.isfinite()
    assert grad_t.isfinite().all()
    if constant:
        assert (standardize(f_s)[1] == 0).all()
        assert (grad_s[1] == 0).all()
    else:
        torch.testing.assert_close(standardize(f_s)[1], wave / math.sqrt(8), rtol=1e-4, atol=0)
        assert grad_s[1].abs().max() > 0
        assert grad_s.isfinite().all()


def test_a_tiny_row_that_varies_is_not_constant():
    f_s, f_t = embeddings()
    torch.testing.assert_close(EGA()(f_s * 1e-30, f_t), EGA()(f_s, f_t), rtol=1e-12, atol=0)


def test_a_batch_of_one_works():
    f_s, f_t = embeddings(1, 8)
    value, grad_s, grad_t = gradients(f_s, f_t)
    correlation = pearsonr(f_s[0].numpy(), f_t[0].numpy())[0]
    assert value.item() == pytest.approx(0.8 * (1 - correlation), rel=1e-9)  # one edge, to itself: 1 on both sides
    assert grad_s.isfinite().all()
    assert grad_t.isfinite().all()
    for f in (f_s, torch.zeros(1, 8, dtype=torch.float64)):
        value, grad_s, grad_t = gradients(f, f)
        assert value.isfinite()
        assert grad_s.isfinite().all()
        assert grad_t.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    f_s, f_t = (f.to(dtype) for f in embeddings(32, 64))
    value, gradient, _ = gradients(f_s, f_t)
    assert (value.dtype, gradient.dtype) == (torch.float32, dtype)
    expected, expected_gradient, _ = gradients(f_s.float(), f_t.float())
    assert torch.equal(value, expected)
    torch.testing.assert_close(gradient, expected_gradient.to(dtype))


def test_a_student_in_half_precision_meets_a_teacher_in_float32():
    f_s, f_t = embeddings()
    assert torch.equal(EGA()(f_s.bfloat16(), f_t.float()), EGA()(f_s.bfloat16().float(), f_t.float()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_around_it_changes_nothing(dtype):
    f_s, f_t = (f.float().requires_grad_() for f in embeddings(32, 64))
    plain = EGA()(f_s, f_t)
    with torch.autocast("cpu", dtype=dtype):
        under = EGA()(f_s, f_t)
    assert torch.equal(under, plain)
    pairs = zip(torch.autograd.grad(under, (f_s, f_t)), torch.autograd.grad(plain, (f_s, f_t)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("shapes", [((4, 8), (4, 9)), ((4, 8), (3, 8)), ((4, 8, 1), (4, 8, 1)), ((8,), (8,))])
def test_other_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match=r"two \(B, D\) tensors"):
        EGA()(*(torch.ones(shape) for shape in shapes))
