import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from models import create_student, model_dict

REFERENCE = json.loads((Path(__file__).parents[1] / "golden" / "models.json").read_text())
NAMES = ["resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "resnet8x4", "resnet32x4"]


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


def test_all_of_repdistillers_resnets_are_there():
    assert [name for name in REFERENCE if name.startswith("resnet")] == NAMES
    assert set(NAMES) <= set(model_dict)


@pytest.mark.parametrize("name", NAMES)
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
    assert not torch.equal(means(features), means(before))


@pytest.mark.parametrize("name", ["resnet8", "resnet8x4"])
def test_without_is_feat_it_gives_the_logits_alone(name):
    model = model_dict[name](num_classes=7).eval()
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features, logits = model(x, is_feat=True)
        assert torch.equal(model(x), logits)
    assert logits.shape == (3, 7)
    torch.testing.assert_close(logits, features[-1] @ model.fc.weight.T + model.fc.bias)


@pytest.mark.parametrize("name", ["resnet20", "resnet8x4"])
def test_without_a_classifier_the_logits_are_the_pooled_features(name):
    bare, full = model_dict[name](num_classes=0), model_dict[name](num_classes=10)
    assert [key for key in full.state_dict() if not key.startswith("fc.")] == list(bare.state_dict())
    features, logits = bare(torch.ones(2, 3, 32, 32), is_feat=True)
    assert torch.equal(logits, features[-1])
    assert features[-1].shape == (2, bare.num_features)
    assert bare.num_features == full.fc.in_features


def test_it_takes_images_of_64_pixels():
    features, logits = model_dict["resnet8"](num_classes=200)(torch.ones(2, 3, 64, 64), is_feat=True)
    assert [tuple(f.shape[1:]) for f in features] == [(16, 64, 64), (16, 64, 64), (32, 32, 32), (64, 16, 16), (64,)]
    assert logits.shape == (2, 200)


@pytest.mark.parametrize("name", ["resnet14", "resnet8x4"])
def test_the_modules_of_the_features_give_the_features(name):
    model = model_dict[name](num_classes=5).eval()
    modules = model.get_feat_modules()
    own = [*model.conv1.parameters(), *model.bn1.parameters()]
    own += [p for stage in (model.layer1, model.layer2, model.layer3) for p in stage.parameters()]
    assert {id(p) for p in modules.parameters()} == {id(p) for p in own}
    assert {id(p) for p in model.parameters()} - {id(p) for p in own} == {id(p) for p in model.fc.parameters()}

    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features, _ = model(x, is_feat=True)
        for expected, module in zip(features, [modules[:3], *modules[3:]], strict=False):
            for part in module if isinstance(module, nn.ModuleList) else [module]:
                x = part(x)
            x = x[0] if isinstance(x, tuple) else x
            assert torch.equal(x, expected)


def test_the_norms_before_each_stages_last_relu_feed_its_preactivation():
    model = model_dict["resnet14"](num_classes=0).eval()
    norms, seen = model.get_bn_before_relu(), []
    assert [norm.num_features for norm in norms] == [16, 32, 64]
    for norm in norms:
        norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        plain, _ = model(torch.ones(1, 3, 32, 32), is_feat=True)
        before, _ = model(torch.ones(1, 3, 32, 32), is_feat=True, preact=True)
        shifted = norms[-1].bias.data.add_(3.0)
        after, _ = model(torch.ones(1, 3, 32, 32), is_feat=True, preact=True)
    assert len(seen) == 9
    assert shifted.shape == (64,)
    # A stage's pre-activation is its last norm's output plus the shortcut: a shift of the one shifts the other.
    torch.testing.assert_close(after[3], before[3] + 3)
    assert all(torch.equal(after[i], before[i]) for i in range(3))
    assert all(torch.equal(p, b.relu()) for p, b in zip(plain[1:4], before[1:4], strict=True))


def test_a_depth_that_is_no_resnets_is_refused():
    from models.resnet import ResNet

    with pytest.raises(ValueError, match="6n \\+ 2"):
        ResNet(9, [16, 16, 32, 64])


def test_convolutions_start_with_he_initialisation():
    torch.manual_seed(0)
    weight = model_dict["resnet32x4"](num_classes=0).layer3[2].conv1.weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (256 * 9)), rel=0.01)


@pytest.mark.parametrize(("classes", "dim"), [(10, 64), (100, 256), (200, 512)])
def test_a_student_projects_pooled_features_and_classifies_the_projection(classes, dim):
    student = create_student("resnet8x4", dim, classes).eval()
    with torch.no_grad():
        out = student(torch.ones(2, 3, 32, 32))
    assert (out.embedding.shape, out.logits.shape) == ((2, dim), (2, classes))
    layers = student.head.state_dict()
    assert list(layers) == ["fit_dim_Net.weight", "fit_dim_Net.bias", "cl_Net.weight", "cl_Net.bias"]
    embedding = out.features[-1] @ layers["fit_dim_Net.weight"].T + layers["fit_dim_Net.bias"]
    torch.testing.assert_close(out.embedding, embedding)
    torch.testing.assert_close(out.logits, embedding @ layers["cl_Net.weight"].T + layers["cl_Net.bias"])


def test_an_unknown_student_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown student 'resnet9'.*resnet8,.*resnet32x4"):
        create_student("resnet9", 256, 100)
