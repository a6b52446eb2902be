import math

import pytest
import torch
from torch import nn

from models.vgg import VGG, vgg8, vgg11


@pytest.mark.parametrize("pixels", [32, 64])
def test_the_modules_of_the_features_with_relu_after_each_block_give_the_features(pixels):
    model = vgg11(num_classes=5).eval()
    modules = model.get_feat_modules()
    assert {id(p) for p in model.parameters()} - {id(p) for p in modules.parameters()} == {
        id(p) for p in model.classifier.parameters()
    }
    x = torch.randn(2, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features, _ = model(x, is_feat=True)
        for i, (block, pool) in enumerate(zip(modules[::2], modules[1::2], strict=True)):
            x = block(x).relu()
            assert torch.equal(x, features[i])
            if i != 3 or pixels == 64:
                x = pool(x)
    assert torch.equal(x.flatten(1), features[-1])


def test_the_norms_before_relu_give_the_preactivations_of_all_blocks_but_the_first():
    model = vgg11(num_classes=0).eval()
    norms, seen = model.get_bn_before_relu(), []
    assert all(isinstance(norm, nn.BatchNorm2d) for norm in norms)
    assert [norm.num_features for norm in norms] == [128, 256, 512, 512]
    for norm in norms:
        norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        plain, _ = model(torch.ones(2, 3, 32, 32), is_feat=True)
        seen.clear()
        before, _ = model(torch.ones(2, 3, 32, 32), is_feat=True, preact=True)
    assert all(torch.equal(b, s) for b, s in zip(before[1:5], seen, strict=True))
    assert all(torch.equal(p, b.relu()) for p, b in zip(plain[1:5], before[1:5], strict=True))
    assert any((b < 0).any() for b in before[1:5])
    assert torch.equal(plain[0], before[0])
    assert torch.equal(plain[5], before[5])


@pytest.mark.parametrize("depth", [0, 9, 12])
def test_a_depth_that_is_no_vggs_is_refused(depth):
    with pytest.raises(ValueError, match=f"8, 11, 13, 16, 19, got {depth}"):
        VGG(depth)


def test_convolutions_start_with_he_initialisation_and_the_classifier_small_both_without_bias():
    torch.manual_seed(0)
    model = vgg8(num_classes=100)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert [conv.out_channels for conv in convolutions] == [64, 128, 256, 512, 512]
    for conv in convolutions[1:]:
        assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (conv.out_channels * 9)), rel=0.01)
    assert not any(conv.bias.any() for conv in convolutions)
    assert model.classifier.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not model.classifier.bias.any()
