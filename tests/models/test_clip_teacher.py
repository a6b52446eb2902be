import pickle
import shutil
import struct
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import clip
import pytest
import torch

from conftest import Code, snapshot
from models.clip_teacher import ImageEncoder, load_clip
from models.names import PUBLISHED, short_name
from models.published import URLS, fetch_clip
from models.weights import sha256_of

KINDS = ["vit", "resnet"]
NAME = "ViT-B/32"


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def published(clip_archives, web_server, monkeypatch) -> Path:
    """A tiny CLIP is served as the published ViT-B/32; the path of the served file."""
    folder, url = web_server
    digest = sha256_of(clip_archives["vit"])
    served = folder / digest / "ViT-B-32.pt"
    served.parent.mkdir()
    shutil.copy(clip_archives["vit"], served)
    monkeypatch.setitem(URLS, NAME, f"{url}/{digest}/ViT-B-32.pt")
    return served


@pytest.fixture
def no_network(clip_archives, dead_url, monkeypatch):
    digest = sha256_of(clip_archives["vit"])
    monkeypatch.setitem(URLS, NAME, f"{dead_url}/{digest}/ViT-B-32.pt")


def test_all_nine_published_models_are_known():
    assert list(PUBLISHED) == clip.available_models()
    assert clip.clip._MODELS == URLS
    assert len({short_name(name) for name in PUBLISHED}) == 9
    assert not any(set(short_name(name)) & set("/:\\") for name in PUBLISHED)
    assert short_name("some/where/my-clip.pt") == "my-clip"


@pytest.mark.parametrize("kind", KINDS)
def test_it_encodes_as_openais_own_loader_does(clip_archives, kind):
    encoder = ImageEncoder(str(clip_archives[kind]), "unused")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference, _ = clip.load(str(clip_archives[kind]), device="cpu")
    with torch.no_grad():
        expected = reference.encode_image(images())
    assert (encoder.resolution, encoder.dim) == (32, 16)
    result = encoder(images())
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(result[0], result[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("widened", [False, True])
def test_a_plain_state_dict_gives_the_same_encoder(clip_archives, tmp_path, kind, widened):
    archive = ImageEncoder(str(clip_archives[kind]), "unused")
    state = torch.jit.load(clip_archives[kind]).state_dict()
    path = tmp_path / "plain.pt"
    torch.save({k: v.float() if widened and v.is_floating_point() else v for k, v in state.items()}, path)
    plain = ImageEncoder(str(path), "unused")
    assert torch.equal(plain(images()), archive(images()))
    assert plain.sha256 == sha256_of(path) != archive.sha256
    assert plain.name == "plain"


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_frozen_and_stays_in_evaluation_mode(clip_archives, kind):
    encoder = ImageEncoder(str(clip_archives[kind]), "unused")
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    first = encoder(images())
    holder = torch.nn.ModuleList([encoder])
    holder.train()
    encoder.train(True)
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    again = encoder(images().requires_grad_())
    assert not again.requires_grad
    assert torch.equal(first, again)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_around_it_changes_nothing(clip_archives, kind):
    encoder = ImageEncoder(str(clip_archives[kind]), "unused")
    plain = encoder(images())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(encoder(images()), plain)


def test_bf16_weights_give_nearly_the_same_in_float32(clip_archives):
    exact = ImageEncoder(str(clip_archives["vit"]), "unused")(images())
    rough = ImageEncoder(str(clip_archives["vit"]), "unused", torch.bfloat16)(images())
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    assert torch.cosine_similarity(rough, exact).min() > 0.999


def test_loading_needs_neither_gradients_nor_another_precision(clip_archives):
    model = load_clip(clip_archives["vit"])
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.visual.conv1.weight.dtype == torch.float16
    assert model.visual.ln_pre.weight.dtype == torch.float32


def test_a_published_one_is_downloaded_once_and_checked(published, tmp_path, dead_url, monkeypatch):
    root = tmp_path / "new" / "CLIP"
    path, digest = fetch_clip(NAME, str(root))
    assert path == root / "ViT-B-32.pt"
    assert path.read_bytes() == published.read_bytes()
    assert digest == sha256_of(path) == published.parent.name
    monkeypatch.setitem(URLS, NAME, f"{dead_url}/{digest}/ViT-B-32.pt")
    encoder = ImageEncoder(NAME, str(root))
    assert (encoder.sha256, encoder.name) == (digest, "vit32")
    assert list(snapshot(root)) == ["ViT-B-32.pt"]


def test_many_that_want_the_same_one_download_it_once(published, tmp_path, monkeypatch):
    """In threads, which a lock on a file keeps apart as it does processes; each download takes a while."""
    root, downloads, real = tmp_path / "CLIP", [], torch.hub.download_url_to_file

    def slow(url, target, hash_prefix):
        downloads.append(target)
        time.sleep(0.2)
        real(url, target, hash_prefix, progress=False)

    monkeypatch.setattr(torch.hub, "download_url_to_file", slow)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: fetch_clip(NAME, str(root)), range(4)))
    assert found == [(root / "ViT-B-32.pt", published.parent.name)] * 4
    assert downloads == [str(root / "ViT-B-32.pt")]
    assert list(snapshot(root)) == ["ViT-B-32.pt"]


def test_a_download_of_another_content_is_refused_and_leaves_nothing(published, tmp_path):
    published.write_bytes(published.read_bytes()[:-1])
    with pytest.raises(OSError, match="could not be downloaded.*hash"):
        fetch_clip(NAME, str(tmp_path / "CLIP"))
    assert snapshot(tmp_path / "CLIP") == {}


def test_a_corrupt_file_is_refused_and_not_overwritten(published, tmp_path):
    root = tmp_path / "CLIP"
    root.mkdir()
    content = bytearray(published.read_bytes())
    content[len(content) // 2] ^= 1
    (root / "ViT-B-32.pt").write_bytes(content)
    with pytest.raises(OSError, match=r"not the published ViT-B/32.*SHA-256 differs.*delete it"):
        fetch_clip(NAME, str(root))
    assert snapshot(root) == {"ViT-B-32.pt": bytes(content)}


def test_missing_without_a_network_says_what_to_do_and_leaves_nothing(no_network, tmp_path):
    with pytest.raises(OSError, match="could not be downloaded.*put ViT-B-32.pt there"):
        fetch_clip(NAME, str(tmp_path / "CLIP"))
    assert snapshot(tmp_path / "CLIP") == {}


def test_neither_a_published_name_nor_a_file_is_refused_with_the_known_names(tmp_path):
    for wrong in ("ViT-B/64", str(tmp_path), str(tmp_path / "none.pt")):
        with pytest.raises(ValueError, match="neither a file nor a published CLIP; known: .*ViT-B/32.*ViT-L/14@336px"):
            fetch_clip(wrong, str(tmp_path))


def test_code_in_a_checkpoint_is_refused_and_not_run(clip_archives, tmp_path):
    state = dict(torch.jit.load(clip_archives["vit"]).state_dict())
    trap, path = tmp_path / "ran", tmp_path / "clip.pt"
    torch.save({**state, "extra": Code(trap)}, path)
    with pytest.raises(ValueError, match="more than plain data"):
        load_clip(path)
    path.write_bytes(pickle.dumps(Code(trap), protocol=2))
    with pytest.raises(ValueError, match="more than plain data"):
        load_clip(path)
    assert not trap.exists()
    pickle.loads(path.read_bytes())
    assert trap.exists()  # the trap does work


def _written(path: Path, value) -> Path:
    torch.save(value, path)
    return path


@pytest.mark.parametrize("extra", [{"epoch": 3}, {"name": "clip"}, {"nested": {"weight": torch.ones(1)}}])
def test_a_dictionary_of_more_than_tensors_is_refused(clip_archives, tmp_path, extra):
    state = dict(torch.jit.load(clip_archives["vit"]).state_dict())
    with pytest.raises(ValueError, match="holds no named tensors alone"):
        load_clip(_written(tmp_path / "clip.pt", state | extra))


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"weight": torch.ones(3)},
        {"visual.proj": torch.ones(3)},
        {"visual.layer1.0.conv1.weight": torch.ones(1)},
        [torch.ones(2)],
        torch.ones(2),
    ],
)
def test_tensors_that_are_not_a_clip_are_refused(tmp_path, value):
    with pytest.raises(ValueError, match="not a CLIP|no file of weights"):
        load_clip(_written(tmp_path / "clip.pt", value))


@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_that_lacks_a_tensor_or_has_one_of_another_shape_is_refused(clip_archives, tmp_path, kind):
    state = dict(torch.jit.load(clip_archives[kind]).state_dict())
    for name in ("text_projection", "visual.conv1.weight", "ln_final.bias", "positional_embedding"):
        with pytest.raises(ValueError, match="not a CLIP|no file of weights"):
            load_clip(_written(tmp_path / "less.pt", {k: v for k, v in state.items() if k != name}))
    other = state | {"ln_final.bias": torch.zeros(3)}
    with pytest.raises(ValueError, match="not a CLIP|no file of weights"):
        load_clip(_written(tmp_path / "other.pt", other))


def test_another_torchscript_module_is_refused(tmp_path):
    path = tmp_path / "linear.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), str(path))
    with pytest.raises(ValueError, match="not a CLIP|no file of weights"):
        load_clip(path)


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("form", ["archive", "state dict"])
def test_a_truncated_file_is_refused(clip_archives, tmp_path, share, form):
    path = clip_archives["vit"]
    if form == "state dict":
        path = _written(tmp_path / "whole.pt", dict(torch.jit.load(path).state_dict()))
    content = path.read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="not a CLIP|no file of weights"):
        load_clip(tmp_path / "cut.pt")


# An archive's last record, which speaks of one file, with nothing where that should be described.
BROKEN_ZIP = bytes(46) + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, 46, 0, 0)


@pytest.mark.parametrize(
    "content", [b"hello", b"\x89PNG\r\n", b"PK\x03\x04" + bytes(100), b"\x80\x02}.", b"\x80", BROKEN_ZIP]
)
def test_another_kind_of_file_is_refused(tmp_path, content):
    (tmp_path / "clip.pt").write_bytes(content)
    with pytest.raises(ValueError, match="not a CLIP|no file of weights"):
        load_clip(tmp_path / "clip.pt")
