import math

import pytest
import torch

from models.wrn import WideResNet, wrn_16_1, wrn_16_2


def image() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


# Stage 1 of wrn_16_1 keeps the stem's 16 channels, so its first shortcut is no convolution.
@pytest.mark.parametrize("build", [wrn_16_1, wrn_16_2])
def test_the_modules_of_the_features_give_the_features(build):
    model = build(num_classes=5).eval()
    modules, x = model.get_feat_modules(), image()
    after = {id(p) for p in [*model.bn1.parameters(), *model.fc.parameters()]}
    assert {id(p) for p in model.parameters()} - {id(p) for p in modules.parameters()} == after
    with torch.no_grad():
        features, _ = model(x, is_feat=True)
        for expected, module in zip(features[:-1], modules, strict=True):
            x = module(x)
            assert torch.equal(x, expected)


def test_the_norms_before_relu_read_the_stages_maps_and_give_their_preactivations():
    model = wrn_16_2(num_classes=0).eval()
    norms, read = model.get_bn_before_relu(), []
    assert [norm.num_features for norm in norms] == [32, 64, 128]
    for norm in norms:
        torch.nn.init.normal_(norm.bias)
        norm.register_forward_hook(lambda module, inputs, output: read.append((inputs[0], output)))
    with torch.no_grad():
        plain, _ = model(image(), is_feat=True)
        seen = read[:]
        before, _ = model(image(), is_feat=True, preact=True)
    assert len(seen) == 3
    for i, (given, normed) in enumerate(seen, start=1):
        assert torch.equal(given, plain[i])
        torch.testing.assert_close(before[i], normed)
    # The stem's map has no ReLU after it; the pooled features are those of the last norm's ReLU.
    assert torch.equal(before[0], plain[0])
    torch.testing.assert_close(before[3].relu().mean(dim=(2, 3)), plain[4])


@pytest.mark.parametrize("depth", [4, 15, 20])
def test_a_depth_that_is_no_wide_resnets_is_refused(depth):
    with pytest.raises(ValueError, match=f"6n \\+ 4, got {depth}"):
        WideResNet(depth)


def test_convolutions_start_with_he_initialisation_and_the_classifier_without_bias():
    torch.manual_seed(0)
    model = wrn_16_2(num_classes=100)
    last = model.block3.layer[1].conv2.weight
    assert last.std().item() == pytest.approx(math.sqrt(2 / (128 * 9)), rel=0.01)
    # Fan-out counts the outputs, not the inputs.
    assert model.block3.layer[0].conv1.weight.std().item() == pytest.approx(math.sqrt(2 / (128 * 9)), rel=0.01)
    assert not model.fc.bias.any()
    # The classifier's weights keep torch's uniform start.
    assert model.fc.weight.std().item() == pytest.approx(1 / math.sqrt(3 * 128), rel=0.02)
