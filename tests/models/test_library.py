import copy

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from dataset.views import normalize
from models import create_classifier, create_model, create_student
from models.heads import check_image_size
from models.library import create_library_model, library_network, load_into, synchronize_norms
from models.names import parse_name


def images(size: int = 64, count: int = 2) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def library(text: str, **options) -> nn.Module:
    """The library's own network."""
    name = parse_name(text)
    if name.library == "timm":
        return timm.create_model(name.name, **options)
    return torchvision.models.get_model(name.name, weights=None, **options)


CLASSIFIERS = [
    "timm:mobilenetv3_small_050",
    "timm:resnet10t",
    "timm:vit_tiny_patch16_224",
    "timm:convnext_atto",
    "torchvision:resnet18",
    "torchvision:mobilenet_v3_small",
    "torchvision:shufflenet_v2_x0_5",
    "torchvision:densenet121",
]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_it_is_the_librarys_own_network_under_its_own_names(name):
    model = create_model(name, 7).eval()
    own = library(name, num_classes=7).eval()
    own.load_state_dict(model.library_state())
    x = images(224 if "vit" in name else 64)
    with torch.no_grad():
        features, logits = model(x, is_feat=True)
        torch.testing.assert_close(logits, own(x))
    assert features[-1].shape == (2, model.num_features)
    torch.testing.assert_close(model.classifier(features[-1]), logits)
    assert torch.equal(model(x), logits)


def test_without_a_classifier_the_logits_are_the_pooled_features():
    features, logits = create_model("torchvision:resnet18", 0)(images(), is_feat=True)
    assert torch.equal(features[-1], logits)
    assert logits.shape == (2, 512)


@pytest.mark.parametrize("preact", [False, True])
@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet18"])
def test_maps_are_what_the_stages_give_before_or_after_the_last_relu(name, preact):
    model = create_model(name, 7, maps=True, preact=preact).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # timm's last of a block begins at zero: it would add nothing
    own = library(name, num_classes=7).eval()
    own.load_state_dict(model.library_state())
    given = []
    relu = own.relu if name.startswith("torchvision") else own.act1
    stem = relu.register_forward_hook(lambda module, args, output: given.append(output))
    for stage in (own.layer1, own.layer2, own.layer3, own.layer4):
        stage.register_forward_hook(lambda module, args, output: given.append(output))
    with torch.no_grad():
        logits = own(images())
        stem.remove()
        features, found = model(images(), is_feat=True)
    torch.testing.assert_close(found, logits)
    assert len(features) == 6
    for x, expected in zip(features[:-1], given, strict=True):
        assert bool((x < 0).any()) == preact
        torch.testing.assert_close(x.relu(), expected)


def test_timms_maps_are_those_of_its_own_feature_extractor():
    model = create_model("timm:mobilenetv3_small_050", 7, maps=True).eval()
    own = library("timm:mobilenetv3_small_050", features_only=True).eval()
    own.load_state_dict(model.library_state(), strict=False)
    with torch.no_grad():
        features, _ = model(images(), is_feat=True)
        for x, expected in zip(features[:-1], own(images()), strict=True):
            torch.testing.assert_close(x, expected)


def test_a_transformers_maps_are_evenly_spaced_blocks():
    model = create_model("timm:vit_tiny_patch16_224", 7, maps=True, resolution=64).eval()
    features, logits = model(images(64), is_feat=True)
    assert [tuple(x.shape) for x in features] == [(2, 192, 4, 4)] * 5 + [(2, 192)]
    torch.testing.assert_close(model(images(64)), logits)


@pytest.mark.parametrize("name", ["torchvision:resnet18", "torchvision:mobilenet_v2", "timm:resnet18"])
def test_margins_are_taken_of_the_batch_norms_that_end_the_stages(name):
    if name == "torchvision:mobilenet_v2":
        expected = [f"net.features.{i}.conv.3" for i in (3, 6, 13)] + ["net.features.18.1"]
    else:
        expected = [f"net.layer{i}.1.bn2" for i in (1, 2, 3, 4)]
    model = create_model(name, 7, maps=True, preact=True)
    names = {module: path for path, module in model.named_modules()}
    assert [names[norm] for norm in model.get_bn_before_relu()] == expected


def test_training_reaches_every_weight_through_the_maps_and_moves_the_norms_statistics():
    model = create_model("torchvision:resnet18", 7, maps=True, preact=True)
    before = model.net.layer4[1].bn2.running_mean.clone()
    features, logits = model(images(), is_feat=True)
    (sum(x.square().mean() for x in features) + logits.square().mean()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert not torch.equal(before, model.net.layer4[1].bn2.running_mean)


def test_a_copy_has_its_own_weights():
    model = create_model("torchvision:resnet18", 7, maps=True).eval()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    features, _ = other(images(), is_feat=True)
    assert all(x.abs().sum() > 0 for x in features)


@pytest.mark.parametrize("name", ["timm:mobilenetv3_small_050", "torchvision:resnet18"])
def test_norms_of_many_processes_leave_its_function_as_it_is(name):
    model = create_model(name, 7, maps=True).eval()
    expected, _ = model(images(), is_feat=True)
    synchronized = synchronize_norms(model)
    assert not any(type(module) is nn.BatchNorm2d for module in synchronized.modules())
    for x, y in zip(synchronized(images(), is_feat=True)[0], expected, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("torchvision:squeezenet1_0", {}, "no linear classifier"),
        ("torchvision:vit_b_32", {"maps": True}, "no maps"),
        ("torchvision:densenet121", {"maps": True, "preact": True}, "cannot be taken apart"),
        ("torchvision:resnet19", {}, "unknown classifier of torchvision 'resnet19'; did you mean resnet1"),
        ("timm:resnet19", {}, "unknown network of timm 'resnet19'; did you mean resnet"),
        ("timm:vit_smal", {}, "unknown network of timm 'vit_smal'; did you mean vit_small_patch"),
        ("timm:resnet18=nowhere.pth", {}, "no such file"),
    ],
)
def test_what_a_network_cannot_give_is_refused_in_one_line(name, options, words):
    with pytest.raises(ValueError, match=words) as error:
        create_library_model(parse_name(name), 7, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_an_inception_is_given_images_as_its_published_weights_were(name, tmp_path):
    """torchvision's transform of published weights turns ImageNet's mean and std into 0.5, within the network."""
    torch.manual_seed(0)
    given = torchvision.models.get_model(name, weights=None, init_weights=False, transform_input=True)
    torch.save(given.state_dict(), tmp_path / "given.pth")
    weighted = library_network(parse_name(f"torchvision:{name}={tmp_path / 'given.pth'}"))
    alone = library_network(parse_name(f"torchvision:{name}"))
    alone.net.load_state_dict(weighted.net.state_dict())
    pixels = torch.randint(256, (2, 3, 96, 96), dtype=torch.uint8)
    found, expected = (x.net.eval()(normalize(pixels, x.normalization)) for x in (alone, weighted))
    assert alone.normalization != weighted.normalization
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet18", "did you mean torchvision:resnet18 or timm:resnet18 "),
        ("vit_smal", "did you mean timm:vit_small_patch"),
        ("resnet3", "did you mean resnet32 or resnet32x4 or torchvision:resnet34"),
    ],
)
def test_a_library_s_network_without_its_library_is_refused_with_its_whole_name(name, words):
    with pytest.raises(ValueError, match=words):
        create_model(name, 7)


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
@pytest.mark.parametrize("name", ["timm:resnet10t", "torchvision:resnet18", "torchvision:googlenet"])
def test_local_weights_are_used_but_for_their_classifier(tmp_path, name, kind):
    own = library(name, **({"aux_logits": True, "init_weights": False} if "google" in name else {})).eval()
    path = tmp_path / f"weights.{kind}"
    if kind == "pth":
        torch.save(own.state_dict(), path)
    else:
        safetensors.torch.save_file(own.state_dict(), path)
    model = create_model(f"{name}={path}", 7).eval()
    state = own.state_dict()
    kept = {key: x for key, x in model.library_state().items() if not key.startswith(f"{model.classifier_name}.")}
    assert len(kept) > 50
    assert all(torch.equal(x, state[key]) for key, x in kept.items())


def test_weights_of_another_network_are_refused(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(library("torchvision:resnet34").state_dict(), path)
    with pytest.raises(ValueError, match=r"weights.pth does not fit torchvision:resnet18"):
        library_network(parse_name(f"torchvision:resnet18={path}"))


def test_a_transformers_position_embedding_is_interpolated_as_timm_does(tmp_path):
    path = tmp_path / "vit.safetensors"
    own = library("timm:vit_tiny_patch16_224", num_classes=0)
    safetensors.torch.save_file(own.state_dict(), path)
    expected = timm.create_model(
        "vit_tiny_patch16_224", img_size=96, num_classes=0, pretrained=True, pretrained_cfg_overlay={"file": str(path)}
    )
    found = library_network(parse_name(f"timm:vit_tiny_patch16_224={path}"), resolution=96)
    assert found.size == 96
    assert found.net.pos_embed.shape == (1, 37, 192)
    assert torch.equal(found.net.pos_embed, expected.pos_embed)


@pytest.mark.parametrize("name", ["resnet8x4", "timm:mobilenetv3_small_050", "torchvision:resnet18"])
def test_given_weights_start_a_student_but_for_their_classifier(name):
    torch.manual_seed(0)
    given, model = create_model(name, 9), create_model(name, 7)
    left_out = load_into(model, given.state_dict())
    head = "fc." if name == "resnet8x4" else "classifier."
    assert left_out == [f"{head}weight", f"{head}bias"]
    state = model.state_dict()
    assert all(torch.equal(x, state[key]) for key, x in given.state_dict().items() if not key.startswith(head))
    if name != "resnet8x4":
        fresh = create_model(name, 9)
        assert load_into(fresh, given.library_state()) == []
        assert all(torch.equal(x, fresh.state_dict()[key]) for key, x in given.state_dict().items())


def test_given_weights_of_another_shape_are_refused_by_name():
    with pytest.raises(ValueError, match=r"--init_s: conv1.weight is \(16, 3, 3, 3\), this backbone's"):
        load_into(create_model("resnet8x4", 7), create_model("resnet8", 7).state_dict())


def test_images_are_enlarged_to_the_students_resolution():
    student = create_student("torchvision:resnet18", 16, 7, resolution=64).eval()
    x = images(32)
    enlarged = F.interpolate(x, (64, 64), mode="bilinear", align_corners=False)
    with torch.no_grad():
        torch.testing.assert_close(student(x).features[-1], student.backbone(enlarged, is_feat=True)[0][-1])


def test_a_network_that_cannot_take_the_images_is_told_with_the_flag_that_helps():
    student = create_classifier("torchvision:inception_v3", 7)
    with pytest.raises(ValueError, match=r"inception_v3 cannot take images of 32 pixels .* set --student_resolution"):
        check_image_size(student, "torchvision:inception_v3", 32, "--student_resolution")
    check_image_size(create_classifier("torchvision:inception_v3", 7, resolution=96), "inception_v3", 32, "--x")
