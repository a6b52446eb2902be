import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import model_dict
from models.ShuffleNetv1 import channel_shuffle

FORMATS = [torch.contiguous_format, torch.channels_last]
NAMES = ["ShuffleV1", "ShuffleV2"]


def images(pixels: int = 32, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 3, pixels, pixels, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_channels_are_dealt_out_one_group_after_the_other(groups, memory_format):
    x = torch.randn(2, 12, 3, 4).to(memory_format=memory_format).requires_grad_()
    each = 12 // groups
    source = [group * each + i for i in range(each) for group in range(groups)]
    shuffled = channel_shuffle(x, groups)
    assert shuffled.is_contiguous(memory_format=memory_format)
    assert torch.equal(shuffled, torch.stack([x[:, c] for c in source], dim=1))

    weight = torch.randn(2, 12, 3, 4)
    (gradient,) = torch.autograd.grad((shuffled * weight).sum(), x)
    for place, c in enumerate(source):
        assert torch.equal(gradient[:, c], weight[:, place])


@pytest.mark.parametrize("memory_format", FORMATS)
def test_a_shuffle_takes_a_part_of_a_tensor(memory_format):
    x = torch.randn(2, 12, 5, 5).to(memory_format=memory_format)[:, 4:10, 1:, :3]
    assert torch.equal(channel_shuffle(x, 2), x[:, [0, 3, 1, 4, 2, 5]])


@pytest.mark.parametrize("name", NAMES)
def test_the_modules_of_the_features_give_the_features(name):
    model = model_dict[name](num_classes=5).eval()
    conv1, bn1, *stages = model.get_feat_modules()
    assert stages == [model.layer1, model.layer2, model.layer3]
    with torch.no_grad():
        features, _ = model(images(), is_feat=True)
        x = bn1(conv1(images())).relu()
        assert torch.equal(x, features[0])
        for stage, expected in zip(stages, features[1:4], strict=True):
            x = stage(x)[0]
            assert torch.equal(x, expected)


def test_the_norms_before_each_stages_last_relu_feed_its_preactivation():
    model = model_dict["ShuffleV1"](num_classes=0).eval()
    norms = model.get_bn_before_relu()
    with torch.no_grad():
        plain, _ = model(images(), is_feat=True)
        before, _ = model(images(), is_feat=True, preact=True)
        for stage in (3, 2, 1):  # a shift also changes the stages after it
            norms[stage - 1].bias += 3
            after, _ = model(images(), is_feat=True, preact=True)
            torch.testing.assert_close(after[stage], before[stage] + 3)
            assert all(torch.equal(after[i], before[i]) for i in range(stage))
    assert torch.equal(plain[0], before[0])
    assert all(torch.equal(p, b.relu()) for p, b in zip(plain[1:4], before[1:4], strict=True))


def test_the_first_convolution_after_the_stem_alone_has_one_group():
    model = model_dict["ShuffleV1"](num_classes=0)
    blocks = [block for stage in (model.layer1, model.layer2, model.layer3) for block in stage]
    assert [block.conv1.groups for block in blocks] == [1] + [3] * 15
    assert {block.conv3.groups for block in blocks} == {3}


def test_a_second_shufflenets_preactivation_is_rectified_and_shuffled_to_its_map():
    model = model_dict["ShuffleV2"](num_classes=0).eval()
    with torch.no_grad():
        plain, _ = model(images(), is_feat=True)
        before, _ = model(images(), is_feat=True, preact=True)
    assert torch.equal(plain[0], before[0])
    for p, b in zip(plain[1:4], before[1:4], strict=True):
        assert torch.equal(channel_shuffle(b.relu(), 2), p)
        kept, fresh = b.chunk(2, dim=1)
        assert kept.min() >= 0 > fresh.min()


def test_a_second_shufflenet_has_no_norm_of_a_whole_map():
    with pytest.raises(ValueError, match="^no norm of ShuffleV2 covers all channels.*needs one.*$"):
        model_dict["ShuffleV2"](num_classes=0).get_bn_before_relu()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("preact", [False, True])
def test_channels_last_stays_channels_last_and_changes_no_value(name, preact):
    model = model_dict[name](num_classes=5).double().eval()
    with torch.no_grad():
        expected, expected_logits = model(images(dtype=torch.float64), is_feat=True, preact=preact)
        model.to(memory_format=torch.channels_last)
        x = images(dtype=torch.float64).to(memory_format=torch.channels_last)
        features, logits = model(x, is_feat=True, preact=preact)
    assert all(f.is_contiguous(memory_format=torch.channels_last) for f in features[:-1])
    torch.testing.assert_close([*features, logits], [*expected, expected_logits], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_pooling_averages_the_whole_map_at_any_size(name):
    model = model_dict[name](num_classes=0).eval()
    with torch.no_grad():
        features, _ = model(images(pixels=64), is_feat=True)
        last = features[-2] if name == "ShuffleV1" else F.relu(model.bn2(model.conv2(features[-2])))
    assert last.shape[2:] == (8, 8)
    torch.testing.assert_close(features[-1], last.mean(dim=(2, 3)))


@pytest.mark.parametrize("name", NAMES)
def test_convolutions_start_with_pytorchs_own_initialisation(name):
    torch.manual_seed(0)
    model = model_dict[name](num_classes=0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            scaled = module.weight.detach() * math.sqrt(module.weight[0].numel())  # uniform within -1 and 1
            assert scaled.abs().max() <= 1 + 1e-6
            assert scaled.std().item() == pytest.approx(1 / math.sqrt(3), rel=0.2)
