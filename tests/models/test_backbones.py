import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from models import model_dict

REFERENCE = json.loads((Path(__file__).parents[1] / "golden" / "models.json").read_text())


def fill(model: nn.Module) -> None:
    """The formula weights of the reference, which depend on an entry's position in the state dict."""
    state = model.state_dict()
    for i, (name, entry) in enumerate(state.items()):
        if not entry.is_floating_point():
            continue
        t = torch.arange(1, entry.numel() + 1, dtype=torch.float64)
        if name.endswith("running_var"):
            values = 1 + 0.5 * torch.sin(0.7 * t + i)
        elif name.endswith("running_mean"):
            values = 0.1 * torch.sin(0.7 * t + i)
        elif entry.dim() == 1 and name.endswith("weight"):
            values = 1 + 0.2 * torch.sin(0.7 * t + i)
        elif entry.dim() == 1:
            values = 0.1 * torch.sin(0.7 * t + i)
        else:
            # From left to right as the reference did: at these arguments the last bit of t * t * 0.7 shows.
            values = math.sqrt(2 / entry[0].numel()) * torch.sin(0.7 * t * t + i)
        entry.copy_(values.view_as(entry))


def formula_input() -> torch.Tensor:
    k = torch.arange(1, 2 * 3 * 32 * 32 + 1, dtype=torch.float64)
    return torch.sin(0.01 * k**1.1).view(2, 3, 32, 32)


def close(found, expected) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-9)


def means(features: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([f.mean() for f in features])


# The classifier's entries begin with this.
CLASSIFIER = {
    **dict.fromkeys(REFERENCE, "fc."),
    **{name: "classifier." for name in REFERENCE if name.startswith(("vgg", "Mobile"))},
    **{name: "linear." for name in REFERENCE if name.startswith(("Shuffle", "ResNet"))},
}


def test_they_are_all_of_repdistillers():
    assert sorted(model_dict) == sorted(REFERENCE)


@pytest.mark.parametrize("name", REFERENCE)
def test_it_is_repdistillers_in_names_shapes_features_and_logits(name):
    reference = REFERENCE[name]
    model = model_dict[name](num_classes=100)
    state = [[key, list(value.shape)] for key, value in model.state_dict().items()]
    assert state == [[key, list(shape)] for key, shape in reference["state"]]
    assert sum(p.numel() for p in model.parameters()) == reference["params"]

    model.double().eval()
    fill(model)
    with torch.no_grad():
        features, logits = model(formula_input(), is_feat=True)
        before, logits_again = model(formula_input(), is_feat=True, preact=True)
    assert [list(f.shape) for f in features] == reference["feature_shapes"]
    close(means(features), reference["feature_means"])
    close(means(before), reference["preact_means"])
    close(logits[:, :10], reference["logits"])
    close(logits.sum(), reference["logits_sum"])
    assert torch.equal(logits, logits_again)


@pytest.mark.parametrize("name", REFERENCE)
@pytest.mark.parametrize("pixels", [32, 64])
def test_it_takes_images_of_32_and_64_pixels_and_any_number_of_classes(name, pixels):
    model = model_dict[name](num_classes=7).eval()
    x = torch.randn(2, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features, logits = model(x, is_feat=True)
        assert torch.equal(model(x), logits)
    assert logits.shape == (2, 7)
    assert features[-1].shape == (2, model.num_features)
    maps = [list(f.shape) for f in features[:-1]]
    expected = [[n, c, h * pixels // 32, w * pixels // 32] for n, c, h, w in REFERENCE[name]["feature_shapes"][:-1]]
    if name.startswith("vgg"):  # RepDistiller's pool once more before the last stage at 64 pixels
        expected[-1] = REFERENCE[name]["feature_shapes"][-2]
    assert maps == expected


@pytest.mark.parametrize("name", REFERENCE)
def test_without_a_classifier_the_logits_are_the_pooled_features(name):
    bare, full = model_dict[name](num_classes=0), model_dict[name](num_classes=10)
    assert [key for key in full.state_dict() if not key.startswith(CLASSIFIER[name])] == list(bare.state_dict())
    assert len(bare.state_dict()) < len(full.state_dict())
    features, logits = bare.eval()(torch.ones(2, 3, 32, 32), is_feat=True)
    assert torch.equal(logits, features[-1])
    assert features[-1].shape == (2, bare.num_features)


@pytest.mark.parametrize("name", REFERENCE)
def test_every_weight_but_the_classifiers_is_in_the_modules_of_the_features_or_after_them(name):
    """The features' modules hold the model's own weights, and all that the maps depend on."""
    model = model_dict[name](num_classes=5)
    features, _ = model(torch.randn(2, 3, 32, 32), is_feat=True)
    sum(f.square().sum() for f in features[:-1]).backward()
    within = {id(p) for p in model.get_feat_modules().parameters()}
    assert within <= {id(p) for p in model.parameters()}
    assert {id(p) for p in model.parameters() if p.grad is not None} <= within
