"""Tiny things that many tests use: a CLIP of a few thousand weights, a data set of a few images."""

import functools
import socket
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

import dataset
import helper.logger  # noqa: F401  (must choose protobuf's implementation before a test imports tensorboard)
from benchmarks.random_clip import write_archive
from dataset import ImageDataset, Split

# Tensors here are tiny: with two threads, one waits for the other, on a busy machine for most of the time.
torch.set_num_threads(1)

# embed_dim, image_resolution, vision_layers, vision_width, vision_patch_size, context_length, vocab_size,
# transformer_width, transformer_heads, transformer_layers
TINY_VIT = (16, 32, 1, 64, 16, 77, 49408, 64, 1, 1)
TINY_RESNET = (16, 32, (1, 1, 1, 1), 8, None, 77, 49408, 64, 1, 1)


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


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of the reference values."""
    return Path(__file__).parent / "golden"


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
