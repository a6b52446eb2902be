"""Files of weights as training scripts leave them: each is read as the network's own state dict."""

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path

import clip
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import nn
from torch.optim.swa_utils import AveragedModel

from conftest import TINY_VIT
from distiller_zoo import Needs
from errors import InputError
from helper.teacher import load_cnn
from models import create_model
from models.clip_teacher import load_clip
from models.library import library_network, load_into
from models.names import parse_name
from models.weights import load_weights, read_state


def network() -> nn.Module:
    torch.manual_seed(0)
    return create_model("resnet8", 5)


def other(net: nn.Module) -> dict:
    """The weights of a network that is not asked for."""
    return {name: torch.zeros_like(x) for name, x in net.state_dict().items()}


def averaged(net: nn.Module) -> dict:
    """As torchvision's training script keeps its average: below module., beside a counter."""
    return AveragedModel(net).state_dict()


def prefixed(prefix: str, net: nn.Module) -> dict:
    return {prefix + name: x for name, x in net.state_dict().items()}


OPTIONS = argparse.Namespace(lr=0.1, classes=["a"])

SAVED: dict[str, Callable[[nn.Module], dict]] = {
    "the state dict itself": lambda net: net.state_dict(),
    "torchvision's training script": lambda net: {"model": net.state_dict(), "epoch": 1, "args": OPTIONS},
    "torchvision's, averaged": lambda net: {"model": other(net), "model_ema": averaged(net), "args": OPTIONS},
    "timm's training script": lambda net: {"arch": "resnet8", "state_dict": net.state_dict(), "args": OPTIONS},
    "timm's, averaged": lambda net: {"state_dict": other(net), "state_dict_ema": net.state_dict(), "args": OPTIONS},
    "timm's, where nothing was averaged": lambda net: {"state_dict": net.state_dict(), "state_dict_ema": None},
    "pytorch-cifar's": lambda net: {"net": prefixed("module.", net), "acc": 93.5, "epoch": 3},
    "a NumPy number and a path beside them": lambda net: {
        "state_dict": net.state_dict(),
        "best_acc": np.float64(71.5),
        "step": np.int64(3),
        "args": argparse.Namespace(out=Path("out")),
    },
    "RepDistiller's": lambda net: {"opt": OPTIONS, "model": net.state_dict()},
    "the recipe of PyTorch's tutorials": lambda net: {
        "epoch": 3,
        "model_state_dict": net.state_dict(),
        "optimizer_state_dict": torch.optim.Adam(net.parameters()).state_dict(),
        "loss": torch.tensor(0.1),
    },
    "nested": lambda net: {"ema": {"model": net.state_dict(), "decay": 0.999}, "model": other(net)},
    "DataParallel": lambda net: {"state_dict": prefixed("module.", net)},
    "torch.compile": lambda net: prefixed("_orig_mod.", net),
    "torch.compile of parts": lambda net: {
        name.replace("layer1.", "layer1._orig_mod."): x for name, x in net.state_dict().items()
    },
    "compiled, then DataParallel, then a module of one's own": lambda net: prefixed("model.module._orig_mod.", net),
    "Lightning": lambda net: {
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {**prefixed("model.", net), "criterion.weight": torch.ones(5), "metric.total": torch.tensor(1)},
    },
    "without counters of batches": lambda net: {
        name: x for name, x in net.state_dict().items() if not name.endswith("num_batches_tracked")
    },
}


@pytest.mark.parametrize("saved", SAVED)
def test_every_training_script_s_weights_are_read(saved, tmp_path, capsys):
    net = network()
    torch.save(SAVED[saved](net), tmp_path / "net.pth")
    found, wanted = read_state(tmp_path / "net.pth"), net.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert ("averaged" in capsys.readouterr().out) == (
        ("averaged" in saved and "nothing" not in saved) or saved == "nested"
    )


def test_options_of_more_than_plain_data_are_refused(tmp_path):
    torch.save({"state_dict": network().state_dict(), "args": argparse.Namespace(run=print)}, tmp_path / "net.pth")
    with pytest.raises(InputError, match=r"more than plain data \(builtins.print\): save the network's state_dict"):
        read_state(tmp_path / "net.pth")


def test_a_number_of_numpy_s_is_no_larger_than_its_bytes(tmp_path):
    """A kind may claim any size: the number's bytes decide."""

    class Liar:
        def __reduce__(self):
            return np.float64(0).__reduce__()[0], (np.dtype("S1000000"), b"few")

    torch.save({"state_dict": network().state_dict(), "best": Liar()}, tmp_path / "net.pth")
    with pytest.raises(InputError, match="corrupt"):
        read_state(tmp_path / "net.pth")


@pytest.mark.parametrize("name", ["net.safetensors", "net.pth", "net.bin"])
def test_safetensors_are_known_by_their_content(name, tmp_path):
    net = network()
    safetensors.torch.save_file(prefixed("module.", net), tmp_path / name)
    found = read_state(tmp_path / name)
    assert all(torch.equal(found[key], x) for key, x in net.state_dict().items())
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:50])
    with pytest.raises(InputError, match="corrupt"):
        read_state(tmp_path / name)


def test_what_holds_no_network_is_refused(tmp_path):
    torch.save({"epoch": 1, "optimizer": torch.optim.SGD(network().parameters(), 0.1).state_dict()}, tmp_path / "x.pth")
    with pytest.raises(InputError, match="holds no named tensors alone but epoch, optimizer"):
        read_state(tmp_path / "x.pth")


@pytest.mark.parametrize("saved", ["timm's training script", "torchvision's, averaged", "Lightning", "torch.compile"])
def test_library_s_networks_take_them(saved, tmp_path):
    net = timm.create_model("test_resnet", num_classes=7)
    torch.save(SAVED[saved](net), tmp_path / "net.pth")
    found = library_network(parse_name(f"timm:test_resnet={tmp_path / 'net.pth'}")).net.state_dict()
    assert all(torch.equal(x, net.state_dict()[name]) for name, x in found.items())


def test_a_fine_tuned_clip_is_read_to_the_last_bit(tmp_path):
    """As in the recipe for OpenAI's code that is copied everywhere: trained in float32, saved beside its optimiser."""
    torch.manual_seed(0)
    tuned = clip.model.CLIP(*TINY_VIT).float()
    saved = {"epoch": 2, "model_state_dict": tuned.state_dict(), "optimizer_state_dict": {}, "loss": torch.tensor(1.0)}
    torch.save(saved, tmp_path / "tuned.pt")
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(load_clip(tmp_path / "tuned.pt").encode_image(image), tuned.encode_image(image))


def published(name: str, net: nn.Module) -> dict:
    """A state dict as torchvision publishes it: its DenseNets have names that no module may have any more."""
    state = dict(net.state_dict())
    if name.startswith("densenet"):
        for part in ("norm", "conv"):
            for place in "12":
                state = {key.replace(f".{part}{place}.", f".{part}.{place}."): x for key, x in state.items()}
        assert any(".norm.1." in key for key in state)
    return state


@pytest.fixture
def only_names_and_shapes(monkeypatch):
    """Networks are built on the meta device, where a tensor has no numbers, and nothing draws any."""
    real = torchvision.models.regnet.BlockParams.from_init_params

    def on_cpu(*args, **options):  # its widths are computed with tensors
        with torch.device("cpu"):
            return real(*args, **options)

    monkeypatch.setattr(torchvision.models.regnet.BlockParams, "from_init_params", on_cpu)
    for name in [name for name in vars(nn.init) if name.endswith("_") and not name.startswith("_")]:
        monkeypatch.setattr(nn.init, name, lambda tensor, *args, **options: tensor)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("name", torchvision.models.list_models(module=torchvision.models))
def test_every_classifier_of_torchvision_loads_by_name(name, monkeypatch, only_names_and_shapes):
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    state = published(name, torchvision.models.get_model_builder(name)(weights=None, **options))
    weights = type(torchvision.models.get_model_weights(name).DEFAULT)
    monkeypatch.setattr(weights, "get_state_dict", lambda self, **options: state)
    if name.startswith("squeezenet"):
        with pytest.raises(InputError, match="has no linear classifier"):
            library_network(parse_name(f"torchvision:{name}"), pretrained=True)
        return
    net = library_network(parse_name(f"torchvision:{name}"), pretrained=True).net
    left = state.keys() - published(name, net).keys()
    assert all(key.startswith(("fc.", "classifier.", "head.", "heads.", "aux", "AuxLogits.")) for key in left), left


@pytest.mark.parametrize(
    ("name", "layer"), [("mnasnet0_5", "layers.0"), ("densenet121", "features.denseblock1.denselayer1.conv1")]
)
def test_weights_of_torchvision_s_odd_ones_arrive(name, layer, tmp_path):
    torch.manual_seed(0)
    net = torchvision.models.get_model(name)
    state = published(name, net)
    for path, save in (("net.pth", torch.save), ("net.safetensors", safetensors.torch.save_file)):
        save(dict(state), tmp_path / path)
        student = create_model(f"torchvision:{name}", 10)
        assert all(key.startswith("classifier") for key in load_into(student, read_state(tmp_path / path)))
        for found in (student.net, library_network(parse_name(f"torchvision:{name}={tmp_path / path}")).net):
            assert torch.equal(found.get_submodule(layer).weight, net.get_submodule(layer).weight)


def test_named_tensors_alone_load_into_a_network_with_versions():
    torch.manual_seed(0)
    one, two = (torchvision.models.mnasnet0_5() for _ in range(2))
    load_weights(two, dict(one.state_dict()))
    assert all(torch.equal(x, two.state_dict()[name]) for name, x in one.state_dict().items())


@pytest.mark.parametrize("saved", ["RepDistiller's", "DataParallel", "the recipe of PyTorch's tutorials", "nested"])
def test_a_cnn_teacher_is_read_from_each(saved, tmp_path):
    net = network()
    torch.save(SAVED[saved](net), tmp_path / "resnet8_vanilla.pth")
    found, _ = load_cnn(str(tmp_path / "resnet8_vanilla.pth"), 5, Needs())
    assert all(torch.equal(x, net.state_dict()[name]) for name, x in found.state_dict().items())


def test_weights_below_an_unknown_name_are_refused_with_that_name():
    net = network()
    with pytest.raises(InputError, match=r"conv1.weight is missing \(the file begins with encoder.conv1.weight\)"):
        load_into(net, prefixed("encoder.", net))


def test_a_cnn_teacher_is_read_from_safetensors(tmp_path):
    net = network()
    safetensors.torch.save_file(net.state_dict(), tmp_path / "resnet8_vanilla.safetensors")
    found, _ = load_cnn(str(tmp_path / "resnet8_vanilla.safetensors"), 5, Needs())
    assert all(torch.equal(x, net.state_dict()[name]) for name, x in found.state_dict().items())


def test_a_teacher_that_timm_trained_tells_its_architecture(tmp_path):
    net = timm.create_model("test_resnet", num_classes=5)
    saved = {"arch": "test_resnet", "args": argparse.Namespace(model="test_resnet"), "state_dict": net.state_dict()}
    torch.save(saved, tmp_path / "model_best.pth.tar")
    found, _ = load_cnn(str(tmp_path / "model_best.pth.tar"), 5, Needs())
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(found.eval()(image), net.eval()(image))
