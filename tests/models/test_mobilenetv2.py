import math

import pytest
import torch
from torch import nn

from models import model_dict
from models.mobilenetv2 import MobileNetV2


def images(pixels: int = 32, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 3, pixels, pixels, generator=torch.Generator().manual_seed(0), dtype=dtype)


def build(num_classes: int = 0) -> nn.Module:
    return model_dict["MobileNetV2"](num_classes=num_classes).eval()


def test_the_modules_of_the_features_give_the_features():
    model = build()
    stem, stages = model.get_feat_modules()
    with torch.no_grad():
        features, _ = model(images(), is_feat=True)
        maps = [stem(images())]
        for stage in stages:
            maps.append(stage(maps[-1]))
        # The features are the stem's map and the last one of each resolution.
        assert [m.shape[2] for m in maps] == [16, 16, 16, 8, 4, 4, 2, 2]
        for i, expected in zip([0, 2, 3, 5, 7], features[:-1], strict=True):
            assert torch.equal(maps[i], expected)


def test_the_norms_of_the_features_feed_them():
    model = build()
    norms = model.get_bn_before_relu()
    with torch.no_grad():
        before, _ = model(images(), is_feat=True)
        for i in (4, 3, 2, 1):  # a shift also changes the stages after it
            norms[i - 1].bias += 3
            after, _ = model(images(), is_feat=True)
            torch.testing.assert_close(after[i], before[i] + 3)
            assert all(torch.equal(after[j], before[j]) for j in range(i))
    assert len(norms) == 4


def test_a_map_before_the_last_relu_is_the_map_since_stages_end_in_none():
    model = build(5)
    with torch.no_grad():
        plain, logits = model(images(), is_feat=True)
        before, logits_again = model(images(), is_feat=True, preact=True)
    assert all(torch.equal(p, b) for p, b in zip([*plain, logits], [*before, logits_again], strict=True))
    assert plain[0].min() >= 0
    assert all(f.min() < 0 for f in plain[1:5])


def test_blocks_that_change_the_shape_have_no_shortcut():
    """With its last norm at zero a block is its shortcut, or nothing."""
    model = build()
    x = model.conv1(images())
    with torch.no_grad():
        for stage in model.blocks:
            for i, block in enumerate(stage):
                whole = block(x)
                nn.init.zeros_(block.conv[-1].weight)
                nn.init.zeros_(block.conv[-1].bias)
                assert torch.equal(block(x), x if i > 0 else torch.zeros_like(whole))
                x = whole


def test_channels_last_stays_channels_last_and_changes_no_value():
    model = build(5).double()
    with torch.no_grad():
        expected, expected_logits = model(images(dtype=torch.float64), is_feat=True)
        model.to(memory_format=torch.channels_last)
        features, logits = model(images(dtype=torch.float64).to(memory_format=torch.channels_last), is_feat=True)
    assert all(f.is_contiguous(memory_format=torch.channels_last) for f in features[:-1])
    torch.testing.assert_close([*features, logits], [*expected, expected_logits], rtol=1e-9, atol=1e-12)


def test_pooling_averages_the_whole_map_at_any_size():
    model = build()
    with torch.no_grad():
        features, _ = model(images(pixels=64), is_feat=True)
        last = model.conv2(features[-2])
    assert last.shape == (2, 1280, 4, 4)
    torch.testing.assert_close(features[-1], last.mean(dim=(2, 3)))


def test_weights_start_as_repdistillers():
    """Convolutions normal, of variance 2 / (kernel area x output channels), depthwise ones too; the classifier 0.01."""
    torch.manual_seed(0)
    model = build(100)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            expected = math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels))
            assert module.weight.std().item() == pytest.approx(expected, rel=0.25)
    assert model.classifier[0].weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert model.classifier[0].bias.abs().max() == 0


@pytest.mark.parametrize(("width", "stem", "last", "pooled"), [(0.5, 16, 160, 1280), (1.5, 48, 480, 1920)])
def test_the_width_scales_the_channels_but_never_shrinks_the_last_convolution(width, stem, last, pooled):
    with torch.device("meta"):
        model = MobileNetV2(6, width, num_classes=7)
    assert (model.conv1[0].out_channels, model.conv2[0].in_channels) == (stem, last)
    assert (model.num_features, model.classifier[0].in_features, model.conv2[0].out_channels) == (pooled,) * 3
