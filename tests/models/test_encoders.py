import json
import pickle
import warnings
from pathlib import Path

import clip
import huggingface_hub.constants
import open_clip
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor, nn

from conftest import TINY_VIT, Code
from errors import InputError
from models import create_encoder, create_student, create_text_encoder
from models.encoders import CPU_BATCH, _open_clip_settings
from models.heads import check_image_size
from models.names import parse_name
from models.weights import sha256_of

TINY_TOWER = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
}


def images(size: int, count: int = 3) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def save(state: dict[str, Tensor], path: Path) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.fixture(scope="session")
def tower(tmp_path_factory):
    """The name of a tiny CLIP that open_clip knows."""
    path = tmp_path_factory.mktemp("open_clip") / "tiny-tower.json"
    path.write_text(json.dumps(TINY_TOWER))
    open_clip.add_model_config(path)
    return "tiny-tower"


@pytest.fixture
def make(tower, tmp_path):
    """A library's own network with random weights, the name that gives them by path, and its own embedding."""

    def made(library: str, suffix: str = ".pth"):
        torch.manual_seed(0)
        path = tmp_path / f"{library}{suffix}"
        if library == "open_clip":
            net = open_clip.create_model(tower).eval()
            save(net.state_dict(), path)
            return net, f"open_clip:{tower}={path}", net.encode_image
        if library == "torchvision":
            net = torchvision.models.mobilenet_v3_small(weights=None).eval()
            save(net.state_dict(), path)
            net.classifier[-1] = nn.Identity()
            return net, f"torchvision:mobilenet_v3_small={path}", net
        net = timm.create_model("test_vit" if library == "timm" else "test_resnet").eval()
        save(net.state_dict(), path)
        name = f"timm:{net.pretrained_cfg['architecture']}={path}"
        net.reset_classifier(0)
        return net, name, net

    return made


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("library", "resolution", "interpolation"),
    [
        ("open_clip", 32, "bicubic"),
        ("torchvision", 224, "bilinear"),
        ("timm", 160, "bicubic"),
        ("timm resnet", 160, "bilinear"),
    ],
)
def test_it_encodes_as_the_librarys_own_network(make, library, suffix, resolution, interpolation):
    _, name, embed = make(library, suffix)
    encoder = create_encoder(name, "unused")
    assert (encoder.resolution, encoder.interpolation, encoder.antialias) == (resolution, interpolation, True)
    with torch.no_grad():
        expected = embed(images(resolution))
    assert encoder.dim == expected.shape[1]
    torch.testing.assert_close(encoder(images(resolution)), expected)
    assert encoder.sha256 == sha256_of(name.partition("=")[2])
    mean = {
        "open_clip": open_clip.OPENAI_DATASET_MEAN,
        "torchvision": timm.data.IMAGENET_DEFAULT_MEAN,
    }.get(library, timm.data.IMAGENET_INCEPTION_MEAN)
    assert encoder.normalization[0] == pytest.approx(mean)
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder.train().net.training


@pytest.mark.parametrize(("library", "other"), [("open_clip", 48), ("torchvision", 64), ("timm", 64)])
def test_it_takes_another_resolution_as_the_library_does(make, library, other):
    own, name, _ = make(library)
    encoder = create_encoder(name, "unused", resolution=other)
    if library == "timm":
        path = name.partition("=")[2]
        cfg = {"file": path, "num_classes": 1000}
        own = timm.create_model("test_vit", img_size=other, pretrained=True, pretrained_cfg_overlay=cfg).eval()
        own.reset_classifier(0)
    elif library == "open_clip":
        own = open_clip.create_model("tiny-tower", pretrained=name.partition("=")[2], force_image_size=other).visual
        own.eval()
    with torch.no_grad():
        expected = own(images(other))
    assert encoder.resolution == other
    torch.testing.assert_close(encoder(images(other)), expected)


def test_a_large_batch_is_encoded_as_the_library_does_in_its_order(make):
    _, name, embed = make("timm resnet")
    large = images(64, CPU_BATCH + 3)
    with torch.no_grad():
        expected = embed(large)
    torch.testing.assert_close(create_encoder(name, "unused", resolution=64)(large), expected)


def test_bf16_is_near_and_keeps_the_norms_in_float32(make):
    _, name, embed = make("timm")
    encoder = create_encoder(name, "unused", torch.bfloat16)
    with torch.no_grad():
        expected = embed(images(160))
    found = encoder(images(160))
    assert found.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in encoder.parameters())
    assert 0 < (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_what_the_embeddings_depend_on_tells_the_encoders_apart(make):
    name = make("timm")[1]
    facts = [create_encoder(name, "unused", resolution=size).facts for size in (None, 160, 64)]
    assert facts[0] == facts[1] != facts[2]
    assert {facts[0]["network"], facts[0]["interpolation"], facts[0]["antialias"]} == {"timm-test_vit", "bicubic", True}


@pytest.mark.parametrize(
    ("library", "resolution"), [("timm", 100), ("timm", 8), ("torchvision", 32)], ids=["cut", "tiny", "small"]
)
def test_a_resolution_that_it_cannot_take_is_refused_in_one_line(make, library, resolution):
    _, name, _ = make(library)
    if library == "torchvision":
        path = save(torchvision.models.inception_v3(init_weights=False).state_dict(), Path(name.partition("=")[2]))
        name = f"torchvision:inception_v3={path}"
    with pytest.raises(ValueError, match=f"{resolution} pixels") as error:
        create_encoder(name, "unused", resolution=resolution)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("library", ["open_clip", "torchvision", "timm"])
def test_weights_of_another_shape_are_refused_in_one_line(make, library, tmp_path):
    _, name, _ = make(library)
    arch = name.partition("=")[0]
    other = save({"some.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth does not fit") as error:
        create_encoder(f"{arch}={other}", "unused")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("library", ["open_clip", "torchvision", "timm"])
@pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors", ".npz"])
def test_code_in_a_file_of_weights_is_not_run(make, library, suffix, tmp_path):
    arch = make(library)[1].partition("=")[0]
    path, trap = tmp_path / f"bomb{suffix}", tmp_path / "trap"
    path.write_bytes(pickle.dumps({"state_dict": Code(trap)}, protocol=2))
    with pytest.raises(ValueError, match="is no file of weights"):
        create_encoder(f"{arch}={path}", "unused")
    assert not trap.exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("timm:tf_efficientnet_lite9", "unknown network of timm .* did you mean tf_efficientnet_lite"),
        ("torchvision:resnet19", "unknown classifier of torchvision .* did you mean resnet1"),
        ("open_clip:ViT-B-33/openai", "unknown architecture of open_clip .* did you mean ViT-B-32"),
        ("open_clip:ViT-B-32", "open_clip:ViT-B-32/TAG with a TAG of openai, "),
        ("open_clip:ViT-B-32/nobody", "open_clip:ViT-B-32/TAG with a TAG of openai, "),
        ("timm:resnet18=nowhere.pth", "no such file of weights"),
        ("timm:", "is no network: write timm:NAME"),
        ("torchvision:squeezenet1_0={path}", "no linear classifier"),
    ],
)
def test_what_is_no_encoder_is_refused_in_one_line(name, words, tmp_path):
    path = save({"x": torch.zeros(3)}, tmp_path / "some.pth")
    with pytest.raises(ValueError, match=words) as error:
        create_encoder(name.format(path=path), "unused")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("package", ["timm", "open_clip"])
def test_a_library_that_is_not_installed_is_told_with_its_package(package, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ValueError, match=f"{package} is not installed: pip install {package}"):
        create_encoder(f"{package}:some/thing", "unused")


@pytest.mark.parametrize("name", ["timm:test_vit", "torchvision:mobilenet_v3_small", "open_clip:ViT-B-32/openai"])
def test_without_a_network_the_line_says_what_to_give(name, monkeypatch, dead_url, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path), raising=False)
    weights = torchvision.models.MobileNet_V3_Small_Weights.DEFAULT
    monkeypatch.setattr(type(weights), "url", property(lambda self: f"{dead_url}/weights-01234567.pth"), raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        with pytest.raises(OSError, match=f"{name} could not be downloaded .*with no network, give .*=PATH") as error:
            create_encoder(name, "unused")
    assert "\n" not in str(error.value)
    assert str(error.value).count("could not be downloaded") == 1


def test_the_text_encoder_is_the_library_s(make, tower):
    net, name, _ = make("open_clip")
    encoder = create_text_encoder(name, "unused")
    texts = ["a red circle", "a photo of many things, and of one more"]
    with torch.no_grad():
        expected = net.encode_text(open_clip.get_tokenizer(tower)(texts))
        torch.testing.assert_close(encoder.encode_text(encoder.tokenize(texts)), expected)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_who_has_no_text_encoder_says_so(make, library):
    _, name, _ = make(library)
    with pytest.raises(ValueError, match="understands no text"):
        create_text_encoder(name, "unused")


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("timm:vit_tiny_patch16_224", 150, "the last 6 rows and columns; set --teacher_resolution to 144 or 160"),
        ("timm:test_convnext", 70, "set --teacher_resolution to 64 or 96"),
    ],
)
def test_a_size_at_which_the_teacher_would_not_see_all_is_refused(name, size, words, tmp_path):
    library = name.partition(":")[2]
    path = save(timm.create_model(library).state_dict(), tmp_path / "net.pth")
    with pytest.raises(InputError, match=words):
        create_encoder(f"{name}={path}", "unused", resolution=size)
    create_encoder(f"{name}={path}", "unused", resolution=int(words[-3:]))


def test_a_student_and_a_tower_of_open_clip_that_would_not_see_all_are_refused(make, tmp_path):
    name = make("open_clip")[1]  # in patches of 16 pixels
    with pytest.raises(InputError, match="last 8 rows and columns; set --teacher_resolution to 32 or 48"):
        create_encoder(name, "unused", resolution=40)
    student = create_student("timm:test_convnext", 8, 5, resolution=70)
    with pytest.raises(InputError, match="timm:test_convnext .* set --student_resolution to 64 or 96"):
        check_image_size(student, "timm:test_convnext", 32, "--student_resolution")


# Architecture, tag or None, and what open_clip's own table has: mean, interpolation, approximate GELU.
FED = [
    ("ViT-B-32/openai", 0.48145466, "bicubic", True),
    ("ViT-B-32/laion2b_s34b_b79k", 0.48145466, "bicubic", False),
    ("MobileCLIP-S1", 0.0, "bilinear", False),
    ("ViT-B-16-SigLIP", 0.5, "bicubic", False),
    ("PE-Core-B-16", 0.5, "bilinear", False),
    ("ViT-L-14/datacomp_xl_s13b_b90k", 0.48145466, "bicubic", False),
]


@pytest.mark.parametrize(("name", "mean", "interpolation", "quick"), FED)
def test_a_file_for_open_clip_is_fed_as_the_published_weights_are(name, mean, interpolation, quick, capsys):
    preprocess, quick_gelu = _open_clip_settings(parse_name(f"open_clip:{name}=weights.pth"))
    assert (preprocess["mean"][0], preprocess["interpolation"], quick_gelu) == (mean, interpolation, quick)
    assert capsys.readouterr().out == ""


def test_what_is_assumed_of_a_file_for_open_clip_is_told(tower, capsys):
    assert _open_clip_settings(parse_name("open_clip:ViT-B-32=weights.pth"))[1] is False
    told = capsys.readouterr().out
    assert "takes the architecture's own GELU; the tags of this architecture differ in it" in told
    _open_clip_settings(parse_name("open_clip:ViT-L-14=weights.pth"))
    assert "OpenAI's mean, std and interpolation and the architecture's own GELU" in capsys.readouterr().out
    _open_clip_settings(parse_name(f"open_clip:{tower}=weights.pth"))
    assert "open_clip publishes no weights of it" in capsys.readouterr().out
    with pytest.raises(InputError, match="ViT-B-32/TAG with a TAG of openai"):
        _open_clip_settings(parse_name("open_clip:ViT-B-32/nobody=weights.pth"))


def test_openai_s_weights_get_their_approximate_gelu_in_open_clip(tower, tmp_path, monkeypatch):
    """The embeddings are those of OpenAI's own code."""
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, tower, {"openai": {"quick_gelu": True}})
    torch.manual_seed(0)
    own = clip.model.CLIP(*TINY_VIT).float().eval()
    path = save({"epoch": 1, "model_state_dict": own.state_dict()}, tmp_path / "clip.pt")
    with torch.no_grad():
        expected = own.encode_image(images(32))
        for name in (f"open_clip:{tower}/openai={path}", f"open_clip:{tower}={path}"):
            torch.testing.assert_close(create_encoder(name, "unused")(images(32)), expected)
