"""The linear probe and nearest neighbours against scikit-learn's."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

import dataset
from conftest import make_dataset
from dataset import Split
from dataset.splits import holdout_rows
from evaluation import probe


@pytest.fixture(scope="module")
def features():
    """5 overlapping classes, in 12 dimensions of very different scale and one that is constant."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(5, 12, generator=generator)
    targets = torch.arange(400) % 5
    x = centres[targets] + 1.5 * torch.randn(400, 12, generator=generator)
    x = x * torch.logspace(-2, 3, 12) + 7
    x[:, 3] = 4
    return x[:250], targets[:250], x[250:], targets[250:]


@pytest.mark.parametrize("strength", [1e-1, 1e-3])
def test_the_logistic_regression_is_scikit_learn_s(features, strength):
    train, targets, test, _ = features
    x, y = probe.standardize_columns(train, test)
    scaler = StandardScaler().fit(train.double().numpy())
    np.testing.assert_allclose(y.numpy(), scaler.transform(test.double().numpy()), atol=1e-4)
    weight = probe.fit_logistic(x, targets, 5, strength)
    model = LogisticRegression(C=1 / (strength * len(x)), tol=1e-8, max_iter=2000)
    model.fit(x.double().numpy(), targets.numpy())
    expected = model.predict_proba(y.double().numpy())
    np.testing.assert_allclose(probe.logits(weight, y).softmax(1).numpy(), expected, atol=2e-3)


def test_the_strength_is_the_best_on_a_hold_out(features):
    train, targets, test, _ = features
    predicted, strength = probe.linear_probe(train, targets, test, 5)
    kept, held = holdout_rows(targets, 0.2)
    right = {}
    for candidate in probe.STRENGTHS:
        x, y = probe.standardize_columns(train[kept], train[held])
        weight = probe.fit_logistic(x, targets[kept], 5, candidate)
        right[candidate] = int((probe.logits(weight, y).argmax(1) == targets[held]).sum())
    assert len(set(right.values())) > 2
    assert strength == max(right, key=right.get)  # the strongest of equals
    x, y = probe.standardize_columns(train, test)
    assert predicted.tolist() == probe.logits(probe.fit_logistic(x, targets, 5, strength), y).argmax(1).tolist()


def test_nearest_neighbours_are_scikit_learn_s_where_votes_are_not_equal(features):
    train, targets, test, _ = features
    found = probe.nearest_neighbours(train, targets, test, 5)
    for k in (1, 5, 20):
        model = KNeighborsClassifier(k, metric="cosine").fit(train.double().numpy(), targets.numpy())
        votes = np.sort(model.predict_proba(test.double().numpy()), axis=1)
        clear = votes[:, -1] > votes[:, -2]
        assert clear.sum() > 50
        assert found[k].numpy()[clear].tolist() == model.predict(test.double().numpy())[clear].tolist()


def test_of_equally_many_votes_the_nearer_ones_win():
    train = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.6, 0.8], [0.5, 0.8]])
    found = probe.nearest_neighbours(train, torch.tensor([1, 1, 0, 0]), torch.tensor([[1.0, 0.05]]), 2, (4,))
    assert found[4].tolist() == [1]


def test_images_without_a_label_are_left_out_and_none_is_copied(monkeypatch, tmp_path):
    made = make_dataset()
    targets = torch.where(torch.arange(70) % 7 == 3, -1, made.train.targets)
    partly = dataclasses.replace(made, train=Split(made.train.images, targets, mapped=True), sha256="0" * 64)
    monkeypatch.setitem(dataset.DATASETS, "partly", lambda data_dir: partly)
    found = probe.Transfer(SimpleNamespace(probe="partly", probe_dir=".", image_size=None), str(tmp_path)).dataset
    assert found.train.images.images.data_ptr() == made.train.images.data_ptr()
    assert torch.equal(found.train.images[:], made.train.images[targets >= 0])
    assert torch.equal(found.train.targets, targets[targets >= 0])
    assert found.train.mapped and found.test is partly.test
    assert found.fingerprint() != partly.fingerprint()
