import math

import pytest
import torch
from torch import nn

from models import create_student, model_dict


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
    with pytest.raises(ValueError, match="unknown model 'resnet9'.*resnet8,.*resnet32x4"):
        create_student("resnet9", 256, 100)
