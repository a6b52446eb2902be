"""Networks of one's own: FILE.py:FUNCTION, and modules that a program gives."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from errors import InputError
from models import check_model_name, create_classifier, create_encoder, create_student, encoder_sha256
from models.names import Name, parse_name
from models.own import check_own_model, create_own_model, give, own_encoder

CODE = """
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Widths:  # dataclasses look their module up
    stem: int = 8
    last: int = 16


class Net(nn.Module):
    def __init__(self, num_classes, bias=True):
        super().__init__()
        widths = Widths()
        self.stem = nn.Conv2d(3, widths.stem, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(8, widths.last, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.fc = nn.Linear(widths.last, num_classes, bias)

    def pooled(self, x):
        return self.body(F.relu(self.stem(x))).mean((2, 3))

    def forward(self, x):
        return self.fc(self.pooled(x))


class Softmax(Net):
    def forward(self, x):
        return super().forward(x).log_softmax(1)


class Wide(Net):
    def forward(self, x):
        return self.fc(torch.cat([self.pooled(x)] * 2, 1))


class Broken(Net):
    def forward(self, x):
        return self.fc(x.image)


class Convolutional(nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(nn.Conv2d(3, num_classes, 32), nn.Flatten())


def without_bias(num_classes):
    return Net(num_classes, bias=False)


def ten(num_classes):
    return Net(10)


def raises(num_classes=0):
    raise KeyError("why")


def ends(num_classes=0):
    raise SystemExit(0)


def number(num_classes=0):
    return 3


class Encoder(nn.Module):
    resolution, mean, std = 16, [0.5] * 3, [0.25] * 3

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, 4)

    def forward(self, x):
        return self.patches(x).mean((2, 3))


class Tokens(Encoder):
    def forward(self, x):
        return self.patches(x).flatten(2)


class Told(Encoder):
    dim = 13
"""


@pytest.fixture
def code(tmp_path) -> Path:
    (tmp_path / "net.py").write_text(CODE)
    return tmp_path / "net.py"


def test_names_are_parsed(code):
    assert parse_name("some/net.py:tiny") == Name("file", "some/net.py:tiny", None)
    assert parse_name("some/net.py:tiny=a=b.pth") == Name("file", "some/net.py:tiny", "a=b.pth")
    assert parse_name("timm:x=some/net.py:tiny").library == "timm"
    assert parse_name("some/net.py") == Name(None, "some/net.py", None)  # a checkpoint, whatever it is called
    for text in ("net.py:tiny", "a/net.py:tiny=x", "timm:a=b", "ViT-B/32", "module:Net-1a"):
        assert str(parse_name(text)) == text
    assert parse_name("some/net.py:tiny").short == "net-tiny" and parse_name("module:Net-1a").short == "Net"
    for text in ("net.py:", "net.py:a b", ".py:tiny", "net.py:tiny="):
        with pytest.raises(InputError, match="FILE.py:FUNCTION"):
            parse_name(text)
    check_model_name(f"{code}:anything")  # the file is not run


def net_of(code: Path, name: str = "Net", *args) -> nn.Module:
    """What the file's class gives, without any code of the project."""
    space = {"__name__": "builtins"}  # a module that is there
    exec(compile(code.read_text(), str(code), "exec"), space)
    torch.manual_seed(0)
    return space[name](*args)


@pytest.mark.parametrize("name", ["Net", "without_bias"])
def test_a_classifier_keeps_its_weights_and_gives_its_features(code, name):
    expected = net_of(code, name, 5).eval()
    torch.manual_seed(0)
    student = create_classifier(f"{code}:{name}", 5).eval()
    image = torch.randn(2, 3, 32, 32)
    out = student(image)
    assert torch.equal(out.logits, expected(image)) and torch.equal(out.embedding, expected.pooled(image))
    again = net_of(code, name, 5)
    again.load_state_dict(student.backbone.library_state())
    check_own_model(student.backbone, parse_name(f"{code}:{name}"), 32)


def test_a_student_has_the_head_of_the_project_in_the_classifier_s_place(code):
    torch.manual_seed(0)
    expected = net_of(code, "Net", 1000).eval()
    torch.manual_seed(0)
    student = create_student(f"{code}:Net", 8, 5).eval()
    out = student(torch.ones(2, 3, 32, 32))
    assert out.embedding.shape == (2, 8) and out.logits.shape == (2, 5)
    assert torch.equal(out.features[-1], expected.pooled(torch.ones(2, 3, 32, 32)))
    assert not any("fc" in name for name in student.state_dict())


def test_maps_are_those_of_its_stages(code):
    net = create_classifier(f"{code}:Net", 5, maps=True)
    features = net(torch.randn(2, 3, 32, 32)).features
    assert [tuple(x.shape) for x in features] == [(2, 8, 32, 32), (2, 16, 16, 16), (2, 16)]


def test_a_module_stands_for_itself(code):
    module = net_of(code, "Net", 5)
    name, same = give(module), give(copy.deepcopy(module))
    assert name == same and name.startswith("module:Net-")
    nn.init.zeros_(module.fc.weight)  # what is done to it later changes nothing
    assert give(module) != name
    student = create_classifier(name, 5)
    assert student.backbone.classifier.weight.abs().sum() > 0
    with pytest.raises(InputError, match="gives 5 classes, not 7"):
        create_classifier(name, 7)
    with pytest.raises(InputError, match="load_student"):
        create_classifier("module:Net-0123", 5)


def test_an_encoder_says_how_it_is_fed(code, tmp_path):
    encoder = create_encoder(f"{code}:Encoder", ".")
    assert (encoder.resolution, encoder.dim, encoder.name) == (16, 12, "net-Encoder")
    assert encoder.normalization == ((0.5,) * 3, (0.25,) * 3) and encoder.interpolation == "bicubic"
    expected = net_of(code, "Encoder")
    torch.testing.assert_close(encoder(torch.ones(2, 3, 16, 16)), expected(torch.ones(2, 3, 16, 16)).detach())
    assert create_encoder(f"{code}:Encoder", ".", resolution=32).resolution == 32
    # Weights that are drawn at random are the same every time, whatever was drawn before.
    torch.rand(3)
    assert encoder.sha256 == encoder_sha256(f"{code}:Encoder", ".") == create_encoder(f"{code}:Encoder", ".").sha256
    torch.save({"state_dict": {name: x + 1 for name, x in expected.state_dict().items()}}, tmp_path / "w.pth")
    other = create_encoder(f"{code}:Encoder={tmp_path / 'w.pth'}", ".")
    assert torch.equal(other.net.patches.weight, expected.patches.weight + 1)
    assert other.sha256 == encoder_sha256(f"{code}:Encoder={tmp_path / 'w.pth'}", ".") != encoder.sha256
    code.write_text(CODE + "# other code\n")
    assert encoder_sha256(f"{code}:Encoder", ".") != encoder.sha256
    given = create_encoder(give(expected), ".")
    assert torch.equal(given.net.patches.weight, expected.patches.weight) and given.resolution == 16


def test_an_encoder_that_says_nothing_is_fed_as_on_imagenet():
    encoder = create_encoder(give(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())), ".")
    assert (encoder.resolution, encoder.dim) == (224, 3)
    assert encoder.normalization == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("nothing", "has no function nothing; it has Widths, Net"),
        ("raises", r"line \d+: raises\(1000\) failed \(KeyError: 'why'\)"),
        ("ends", r"line \d+: ends\(1000\) failed \(SystemExit: 0\)"),
        ("number", "gives no nn.Module, but int"),
        ("Convolutional", "has no linear layer"),
        ("Softmax", r"its last linear layer gives, which is fc, for features \(2, 16\); in its place comes \(2, 16\)"),
        ("Wide", r"for features \(2, 16\); in its place comes \(2, 32\)"),
        ("Broken", r"line \d+: forward of images of 32 pixels failed"),
    ],
)
def test_a_network_that_is_no_student_is_refused(code, function, words):
    name = parse_name(f"{code}:{function}")
    with pytest.raises(InputError, match=words) as found:
        check_own_model(create_own_model(name, 0, maps=False, preact=False), name, 32)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("Net", r"Net\(\) failed \(TypeError"),
        ("number", "gives no nn.Module, but int"),
        ("Tokens", r"embeddings \(2, D\), but give \(2, 12, 16\)"),
        ("Told", r"embeddings \(2, 13\), but give \(2, 12\)"),
    ],
)
def test_a_network_that_is_no_encoder_is_refused(code, function, words):
    with pytest.raises(InputError, match=words):
        own_encoder(parse_name(f"{code}:{function}"), None)


def test_files_that_cannot_be_used_are_refused(code, tmp_path):
    with pytest.raises(InputError, match="no such file"):
        check_model_name(f"{tmp_path / 'nowhere.py'}:Net")
    with pytest.raises(InputError, match="--init_s"):
        check_model_name(f"{code}:Net=weights.pth")
    with pytest.raises(InputError, match="gives 10 classes, not 5"):
        create_classifier(f"{code}:ten", 5)
    torch.save({"x": torch.ones(1)}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="does not fit"):
        create_encoder(f"{code}:Encoder={tmp_path / 'w.pth'}", ".")
    code.write_text("import nothing_of_this_name\n")
    with pytest.raises(InputError, match="line 1: running the file failed"):
        create_classifier(f"{code}:Net", 5)
    code.write_text("def Net(\n")
    with pytest.raises(InputError, match="running the file failed .SyntaxError.*line 1"):
        create_classifier(f"{code}:Net", 5)
