"""Tiny things that many tests use: a CLIP of a few thousand weights, a data set of a few images."""

import functools
import os
import socket
import threading
from collections.abc import Callable
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dataset
import train_student
from benchmarks.random_clip import write_archive
from dataset import ImageDataset, Split

# Tensors here are tiny: with two threads, one waits for the other, on a busy machine for most of the time.
torch.set_num_threads(1)

# embed_dim, image_resolution, vision_layers, vision_width, vision_patch_size, context_length, vocab_size,
# transformer_width, transformer_heads, transformer_layers
TINY_VIT = (16, 32, 1, 64, 16, 77, 49408, 64, 1, 1)
TINY_RESNET = (16, 32, (1, 1, 1, 1), 8, None, 77, 49408, 64, 1, 1)


class Code:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory):
    """The path of a tiny CLIP with random weights, a TorchScript archive in fp16 as the published ones are."""
    path = tmp_path_factory.mktemp("clip") / "tiny_clip.pt"
    write_archive(path, TINY_VIT)
    return path


def make_dataset(num_train: int = 70, num_test: int = 20, num_classes: int = 5) -> ImageDataset:
    """Images whose mean colour tells their class, under noise."""
    rng = np.random.default_rng(0)
    colours = rng.integers(40, 216, (num_classes, 3, 1, 1))

    def split(count: int) -> Split:
        targets = np.arange(count) % num_classes
        images = np.clip(colours[targets] + rng.normal(0, 30, (count, 3, 32, 32)), 0, 255).astype(np.uint8)
        return Split(torch.from_numpy(images), torch.from_numpy(targets))

    return ImageDataset("tiny", [f"colour {i}" for i in range(num_classes)], split(num_train), split(num_test))


@pytest.fixture
def tiny_dataset(monkeypatch):
    """``make_dataset()``, and ``--dataset tiny`` to name it by."""
    made = make_dataset()
    monkeypatch.setitem(dataset.DATASETS, "tiny", lambda data_dir: made)
    return made


@pytest.fixture
def train(tiny_dataset, tiny_clip, tmp_path):
    """Run train_student.py with these options besides; gives the run's folder."""

    def run(*options, save_dir=tmp_path / "save", script=train_student, joint=False):
        base = ["--dataset", "tiny", "--save_dir", str(save_dir), "--device", "cpu", "--amp", "off"]
        base += ["--batch_size", "16"] + ([] if joint else ["--feature_dim", "8"])
        if script is train_student:
            base += ["--clip_mode", str(tiny_clip), "--model_s", "resnet8"]
        else:
            base += ["--model", str(tiny_clip)]
        script.main([*base, *map(str, options)])
        kind = "student_model" if script is train_student else "models"
        return max((save_dir / kind).iterdir(), key=lambda folder: (folder / "resume.pth").stat().st_mtime_ns)

    return run


@pytest.fixture(scope="session")
def finished(tmp_path_factory, tiny_clip) -> dict[str, Path]:
    """Finished runs of three methods, one of them without a teacher: {method: folder}. Not to be written to."""
    root = tmp_path_factory.mktemp("finished")
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        made = make_dataset()
        patch.setitem(dataset.DATASETS, "tiny", lambda data_dir: made)
        for method in ("none", "kd", "ega"):
            options = {
                "--distill": method,
                "--dataset": "tiny",
                "--clip_mode": tiny_clip,
                "--model_s": "resnet8",
                "--save_dir": root,
                "--device": "cpu",
                "--amp": "off",
                "--feature_dim": 8,
                "--batch_size": 32,
                "--epochs": 2,
            }
            train_student.main([str(word) for pair in options.items() for word in pair])
            (folders[method],) = (root / "student_model").glob(f"*_{method}_*")
    return folders


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of the reference values."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def losses(golden) -> dict[str, Tensor]:
    """The reference values of the losses, in float64: in/NAME, out/METHOD/value, out/METHOD/grad/NAME."""
    return {name: torch.from_numpy(value) for name, value in np.load(golden / "losses.npz").items()}


@pytest.fixture(scope="session")
def newer_losses(golden) -> dict[str, Tensor]:
    """As ``losses``, of methods since 2022."""
    return {name: torch.from_numpy(value) for name, value in np.load(golden / "losses2.npz").items()}


def formula_weights(module: nn.Module) -> nn.Module:
    """Give a module the weights that the reference values were computed with."""
    for p, (name, parameter) in enumerate(module.named_parameters()):
        wave = torch.sin(0.37 * torch.arange(1, parameter.numel() + 1, dtype=torch.float64) + p)
        value = 0.2 * wave if parameter.dim() > 1 else 0.1 * wave + name.endswith("weight")
        parameter.data = value.view(parameter.shape).to(parameter.dtype)
    return module


def check_golden(
    losses: dict[str, Tensor], entry: str, loss: Callable[..., Tensor | list[Tensor]], *names: str | list[str]
) -> None:
    """Value and every gradient of a reference entry to 1e-9 in float64, and to 1e-4 in float32.

    Args:
        losses: the fixture of that name.
        entry: 'pkt', say.
        loss: called with the inputs; a tensor, or a list of one per layer.
        names: of the inputs, without in/; a list of names for a list of tensors.
    """
    gradients = {name.split("/")[-1]: x for name, x in losses.items() if name.startswith(f"out/{entry}/grad/")}
    assert gradients
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        inputs = {name: losses[f"in/{name}"] for arg in names for name in ([arg] if isinstance(arg, str) else arg)}
        inputs = {name: x.to(dtype, copy=True) if x.is_floating_point() else x for name, x in inputs.items()}
        for name in gradients:
            inputs[name].requires_grad_()
        value = loss(*(inputs[arg] if isinstance(arg, str) else [inputs[name] for name in arg] for arg in names))
        value = torch.stack(list(value)) if isinstance(value, (list, tuple)) else value.reshape(1)
        assert value.dtype == dtype
        torch.testing.assert_close(value.double(), losses[f"out/{entry}/value"], rtol=tolerance, atol=0)
        found = torch.autograd.grad(value.sum(), [inputs[name] for name in gradients])
        for gradient, expected in zip(found, gradients.values(), strict=True):
            # Relative to the gradient's size: single entries may come close to zero.
            assert (gradient - expected).abs().max() < tolerance * expected.abs().max()


def check_finite(loss: Callable[..., Tensor | list[Tensor]], *inputs: Tensor | list[Tensor]) -> None:
    """Loss and gradients are finite with respect to all inputs that are floating point."""
    flat = [x for arg in inputs for x in ([arg] if isinstance(arg, Tensor) else arg) if x.is_floating_point()]
    copies = {id(x): x.detach().clone().requires_grad_() for x in flat}

    def copy(x: Tensor) -> Tensor:
        return copies.get(id(x), x)

    value = loss(*(copy(arg) if isinstance(arg, Tensor) else [copy(x) for x in arg] for arg in inputs))
    value = sum(value) if isinstance(value, (list, tuple)) else value
    assert value.shape == ()
    assert value.isfinite()
    for gradient in torch.autograd.grad(value, list(copies.values()), allow_unused=True):
        assert gradient is None or gradient.isfinite().all()


@pytest.fixture(scope="session")
def clip_archives(tmp_path_factory, tiny_clip) -> dict[str, Path]:
    """Tiny CLIPs of both kinds, in the published format."""
    resnet = tmp_path_factory.mktemp("clip") / "tiny_resnet.pt"
    write_archive(resnet, TINY_RESNET)
    return {"vit": tiny_clip, "resnet": resnet}


@pytest.fixture
def web_server(tmp_path):
    """(folder, URL): what lies in the folder is served on localhost."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    folder = tmp_path / "served"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def dead_url() -> str:
    """A URL on localhost that refuses connections: as good as no network."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def noise_dataset() -> ImageDataset:
    """300 training and 70 test images of noise: three chunks of the bank, the last one smaller, and one."""

    def split(count: int, seed: int) -> Split:
        images = np.random.default_rng(seed).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
        return Split(torch.from_numpy(images), torch.arange(count) % 5)

    return ImageDataset("noise", ["a", "b", "c", "d", "e"], split(300, 0), split(70, 1))


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and its content, but for empty lock files."""
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files if p.stat().st_size or "lock" not in p.name}


@pytest.fixture(scope="module", params=[2, 3])
def job(request):
    """So many processes, which call what they are given."""
    from processes import Job  # here, for those who import this file and are no tests

    job = Job(request.param)
    yield job
    job.end()
