import numpy as np
import pytest
import torch

from conftest import check_finite, check_golden
from distiller_zoo.WKD import WKDFeature, WKDLogit, wkd_cost, wkd_feature_loss, wkd_terms


@pytest.mark.parametrize(("T", "gamma", "reg", "iters"), [(8, 600, 0.05, 10), (2, 1, 0.2, 3)])
def test_the_loss_on_logits_is_the_authors_in_value_and_gradient(newer_losses, T, gamma, reg, iters):
    def loss(*args):
        return WKDLogit(newer_losses["in/cost"].to(args[0].dtype), T, gamma, reg, iters)(*args)

    entry = f"wkd_logit[T={T},gamma={gamma},reg={reg},iters={iters}]"
    check_golden(newer_losses, entry, loss, "logit_s", "logit_t", "target")


@pytest.mark.parametrize("grid", [1, 2])
def test_the_loss_on_features_is_the_authors_in_value_and_gradient(newer_losses, grid):
    check_golden(newer_losses, f"wkd_feature[ratio=4,grid={grid},eps=1e-05]", WKDFeature(4, grid), "map_p", "map_t_big")


def test_the_cost_is_the_authors(newer_losses):
    found, expected = wkd_cost(newer_losses["in/class_features"]), newer_losses["out/wkd_cost[sharpen=1]/value"]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    logit_s, logit_t = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    cost = torch.rand(4, 4, generator=generator, dtype=torch.float64)
    return logit_s, logit_t, torch.tensor([0, 2, 3]), cost


def test_the_transport_is_sinkhorns_between_the_other_classes():
    """Class by class, with the target's row and column taken out."""
    logit_s, logit_t, target, cost = inputs()
    total = 0
    for z_s, z_t, y in zip(logit_s, logit_t, target.tolist(), strict=True):
        a, b = (np.exp(np.delete(z.numpy(), y)) for z in (z_s, z_t))
        a, b = a / a.sum(), b / b.sum()
        c = np.delete(np.delete(cost.numpy(), y, 0), y, 1)
        kernel, u = np.exp(-c / 0.1), np.full(3, 1 / 3)
        for _ in range(500):
            v = b / (kernel.T @ u)
            u = a / (kernel @ v)
        plan = u[:, None] * kernel * v
        assert plan.sum(axis=0) == pytest.approx(b) and plan.sum(axis=1) == pytest.approx(a)
        total += (plan * c).sum() / 3
    _, transport = wkd_terms(logit_s, logit_t, target, cost, T=1, reg=0.1, iterations=500)
    assert transport.item() == pytest.approx(total, rel=1e-5)


def test_gaussians_of_maps_of_any_size_are_compared():
    generator = torch.Generator().manual_seed(0)
    map_s, map_t = torch.randn(2, 3, 5, 5, generator=generator), torch.randn(2, 3, 2, 4, generator=generator)
    s, t = (x.flatten(2) for x in (map_s, map_t))
    expected = 2 * (s.mean(2) - t.mean(2)).square().sum() + (s.std(2) - t.std(2)).square().sum()
    torch.testing.assert_close(wkd_feature_loss(map_s, map_t, ratio=2, eps=0), expected / 2)
    check_finite(WKDFeature(), map_s[:, :, :1, :1], map_t[:, :, :1, :1])


def test_it_learns_the_cost_from_images_or_from_names():
    generator = torch.Generator().manual_seed(0)
    captions, f_t = torch.randn(3, 4, 5, generator=generator), torch.randn(10, 5, generator=generator)
    target = torch.tensor([2, 0, 1, 2, -1, 0, 1, 2, 2, 1])
    images, names = (WKDLogit(torch.zeros(3, 3), by_names=by_names) for by_names in (False, True))
    for loss in (images, names):
        loss.acquaint(f_t, target, lambda: captions)
    of_classes = torch.stack([f_t[[1, 5]], f_t[[2, 6]], f_t[[0, 3]]])
    torch.testing.assert_close(images.cost, wkd_cost(of_classes))
    torch.testing.assert_close(names.cost, wkd_cost(captions))
    assert "cost" in images.state_dict()


@pytest.mark.parametrize("samples", [0, 1])
def test_classes_of_one_image_or_none_have_a_finite_cost(samples):
    loss = WKDLogit(torch.zeros(2, 2))
    loss.acquaint(torch.randn(3, 4), torch.tensor([0, 0, samples]), lambda: None)
    assert loss.cost.isfinite().all()


@pytest.mark.parametrize("scale", [0, 1e4])
def test_certain_networks_have_a_finite_loss_and_gradient(scale):
    loss = WKDLogit(1 - torch.eye(3))
    check_finite(loss, scale * torch.eye(3), scale * torch.eye(3).flip(0), torch.arange(3))
    assert loss.terms(torch.eye(3), torch.eye(3), torch.arange(3)).keys() == {"target", "transport"}
