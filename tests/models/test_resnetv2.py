import math

import pytest
import torch

from models.resnetv2 import ResNet, ResNet50


def test_the_modules_of_the_features_give_the_features():
    model = ResNet((1, 2, 1, 1), num_classes=5).eval()
    modules = model.get_feat_modules()
    assert {id(p) for p in model.parameters()} - {id(p) for p in modules.parameters()} == {
        id(p) for p in model.linear.parameters()
    }
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features, _ = model(x, is_feat=True)
        before, _ = model(x, is_feat=True, preact=True)
        conv, norm, *stages = modules
        x = norm(conv(x)).relu()
        assert torch.equal(x, features[0])
        assert torch.equal(x, before[0])
        for expected, expected_before, stage in zip(features[1:-1], before[1:-1], stages, strict=True):
            x, preact = stage(x)
            assert torch.equal(x, expected)
            assert torch.equal(preact, expected_before)
            assert torch.equal(x, preact.relu())
            assert (preact < 0).any()


@pytest.mark.parametrize("stage", range(4))
def test_the_norms_before_each_stages_last_relu_feed_its_preactivation(stage):
    model = ResNet((1, 2, 1, 1), num_classes=0).eval()
    norms = model.get_bn_before_relu()
    assert [norm.num_features for norm in norms] == [256, 512, 1024, 2048]
    with torch.no_grad():
        before, _ = model(torch.ones(1, 3, 16, 16), is_feat=True, preact=True)
        norms[stage].bias += 3
        after, _ = model(torch.ones(1, 3, 16, 16), is_feat=True, preact=True)
    # A stage's pre-activation is its last norm's output plus the shortcut: a shift of the one shifts the other.
    torch.testing.assert_close(after[stage + 1], before[stage + 1] + 3)
    assert all(torch.equal(after[i], before[i]) for i in range(stage + 1))


@pytest.mark.parametrize("num_blocks", [(3, 4, 6), (3, 4, 6, 3, 3), (3, 0, 6, 3)])
def test_block_counts_that_are_not_four_positive_numbers_are_refused(num_blocks):
    with pytest.raises(ValueError, match="four positive numbers"):
        ResNet(num_blocks)


def test_convolutions_start_with_he_initialisation_and_norms_and_classifier_with_torchs():
    torch.manual_seed(0)
    model = ResNet50(num_classes=100)
    last = model.layer4[2]
    assert last.conv2.weight.std().item() == pytest.approx(math.sqrt(2 / (512 * 9)), rel=0.01)
    # Fan-out counts the outputs, not the inputs.
    assert last.conv3.weight.std().item() == pytest.approx(math.sqrt(2 / 2048), rel=0.01)
    # No residual branch starts at zero.
    assert (last.bn3.weight == 1).all()
    assert model.linear.weight.std().item() == pytest.approx(1 / math.sqrt(3 * 2048), rel=0.02)
    assert model.linear.bias.any()
