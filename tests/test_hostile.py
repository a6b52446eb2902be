"""Files from a stranger, in every place where one is read: nothing in them runs, and memory stays bounded."""

import contextlib
import io
import json
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import train_teacher
from conftest import Code
from helper import checkpoint
from helper.records import read_run
from helper.teacher import architecture
from models import create_encoder, create_model
from models.clip_teacher import load_clip
from models.library import library_network
from models.names import parse_name
from models.weights import load_plain, load_torchscript, read_state

# Bytes that a bomb would take, and those that reading anything may take.
BOMB, BOUND = 256 << 20, 64 << 20

# Everything that reads a file of torch's: from the loaders up to the names of networks.
READERS: dict[str, Callable[[Path], object]] = {
    "a checkpoint": checkpoint.load,
    "weights": read_state,
    "a CLIP": load_clip,
    "--path_t": lambda path: architecture(str(path)),
    "timm:NAME=PATH": lambda path: library_network(parse_name(f"timm:test_resnet={path}")),
    "torchvision:NAME=PATH": lambda path: library_network(parse_name(f"torchvision:resnet18={path}")),
    "open_clip:NAME=PATH": lambda path: create_encoder(f"open_clip:RN50={path}", "", torch.float32, None),
}


def rewritten(path: Path, change: Callable[[str, bytes], bytes], **options) -> None:
    """The archive again, with its members changed; options are a new archive's."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in members.items():
            archive.writestr(name, change(name, content))


def pickled_code(path: Path, trap: Path) -> None:
    path.write_bytes(pickle.dumps(Code(trap), protocol=2))


def code_in_an_archive(path: Path, trap: Path) -> None:
    torch.save({"model": {"weight": torch.ones(2)}, "more": Code(trap)}, path)


def code_in_a_torchscript_archive(path: Path, trap: Path) -> None:
    save_module(torch.nn.Linear(2, 2), path)
    rewritten(path, lambda name, old: pickle.dumps(Code(trap), protocol=2) if name.endswith("/data.pkl") else old)


def compressed(path: Path, trap: Path) -> None:
    """A quarter of a megabyte that unpacks to a thousand times as much."""
    torch.save({"weight": torch.ones(2)}, path)
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("bomb/data/1", "w") as member,
    ):
        block = bytes(1 << 24)
        for _ in range(BOMB >> 24):
            member.write(block)


def overlapping(path: Path, trap: Path) -> None:
    """A member of a megabyte that its table of contents lists two hundred and fifty-six times."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("bomb/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr("bomb/data/0", bytes(1 << 20))
        kernel = archive.filelist[-1]
        for number in range(1, BOMB >> 20):
            info = zipfile.ZipInfo(f"bomb/data/{number}")
            for name in ("header_offset", "file_size", "compress_size", "CRC"):
                setattr(info, name, getattr(kernel, name))
            archive.filelist.append(info)
    path.write_bytes(buffer.getvalue())


def endless_tensor(path: Path, trap: Path) -> None:
    """2**50 numbers, all of them the same one."""
    torch.save({"model": {"weight": torch.ones(1).expand(2**50)}}, path)


def undeclared_size(path: Path, trap: Path) -> None:
    """A tensor whose storage is said to have 2**50 numbers, and has four."""
    torch.save({"model": {"weight": torch.arange(4.0)}}, path)
    large = b"\x8a\x08" + struct.pack("<q", 2**50)
    rewritten(path, lambda name, old: old.replace(b"K\x04", large) if name.endswith("/data.pkl") else old)


def large_in_the_old_format(path: Path, trap: Path) -> None:
    torch.save({"model": {"weight": torch.arange(4.0)}}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"K\x04", b"\x8a\x08" + struct.pack("<q", 2**50)))


ATTACKS = [
    pickled_code,
    code_in_an_archive,
    code_in_a_torchscript_archive,
    compressed,
    overlapping,
    endless_tensor,
    undeclared_size,
    large_in_the_old_format,
]


def save_module(module: torch.nn.Module, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(module), str(path))


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """What is done in it takes little at its highest."""

    def kilobytes(what: str) -> int:
        said = Path("/proc/self/status").read_text()
        return int(re.search(rf"{what}:\s+(\d+) kB", said)[1])

    Path("/proc/self/clear_refs").write_text("5")  # the highest becomes what it is now
    before = kilobytes("VmHWM")
    yield
    assert (kilobytes("VmHWM") - before) << 10 < BOUND


@pytest.fixture(scope="module", params=ATTACKS, ids=lambda attack: attack.__name__)
def hostile(request, tmp_path_factory) -> tuple[Path, Path]:
    """The file, and what its code would make."""
    folder = tmp_path_factory.mktemp("hostile")
    path, trap = folder / "file.pth", folder / "ran"
    request.param(path, trap)
    assert path.stat().st_size < 8 << 20
    return path, trap


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_it_is_refused_and_nothing_runs(hostile, reader):
    path, trap = hostile
    before = {entry.name for entry in path.parent.iterdir()}
    with little_memory(), pytest.raises(ValueError, match="file.pth"):
        reader(path)
    assert not trap.exists()
    assert {entry.name for entry in path.parent.iterdir()} == before


def test_the_traps_do_work(tmp_path):
    for number, attack in enumerate((pickled_code, code_in_an_archive)):
        path, trap = tmp_path / f"{number}.pth", tmp_path / f"ran{number}"
        attack(path, trap)
        with contextlib.suppress(RuntimeError):
            torch.load(path, weights_only=False)
        assert trap.exists()
    path = tmp_path / "large.pth"
    compressed(path, path)
    with pytest.raises(AssertionError), little_memory(), zipfile.ZipFile(path) as archive:
        archive.read("bomb/data/1")


class OpensAFile(torch.nn.Module):
    """Makes a file when torch.jit.load reads it."""

    def __init__(self, path: str):
        super().__init__()
        self.path = path
        self.weight = torch.nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight

    @torch.jit.export
    def __getstate__(self) -> tuple[str, torch.Tensor, bool]:
        return self.path, self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, torch.Tensor, bool]) -> None:
        self.path = state[0]
        self.weight = torch.from_file(state[0], True, 2)
        self.training = state[2]


def test_a_torchscript_archives_code_is_not_run(tmp_path):
    trap = tmp_path / "ran"
    save_module(OpensAFile(str(trap)), tmp_path / "clip.pt")
    with pytest.raises(ValueError, match="not a CLIP|no file of weights"):
        load_clip(tmp_path / "clip.pt")
    assert not trap.exists()
    torch.jit.load(tmp_path / "clip.pt")
    assert trap.exists()  # the trap does work


def test_a_torchscript_archive_gives_what_torch_reads_from_it(clip_archives):
    for path in clip_archives.values():
        found, expected = load_torchscript(path), torch.jit.load(path).state_dict()
        assert found.keys() == expected.keys()
        for name, x in expected.items():
            assert found[name].dtype == x.dtype and torch.equal(found[name], x)


def test_nested_containers_end(tmp_path):
    """A list in itself, and one of two to the fortieth parts that are all the same."""
    loop: list = []
    loop.append(loop)
    for _ in range(40):
        loop = [loop, loop]
    torch.save({"model": loop}, tmp_path / "file.pth")
    load_plain(tmp_path / "file.pth")


@pytest.mark.parametrize(("start", "end"), [(0, 2**50), (0, 2**33), (4, 0), (2**62, 2**63)])
def test_a_safetensors_header_that_lies_is_refused(tmp_path, start, end):
    path = tmp_path / "file.safetensors"
    shape = [(end - start) // 4 if end > start else 1]
    header = json.dumps({"weight": {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(ValueError, match=r"file\.safetensors"):
        read_state(path)
    path.write_bytes(struct.pack("<Q", 2**60) + header)
    with pytest.raises(ValueError, match=r"file\.safetensors"):
        read_state(path)


def test_a_clip_of_absurd_width_takes_no_memory(clip_archives, tmp_path):
    """An empty tensor tells any width, and is stored in no byte."""
    state = load_torchscript(clip_archives["vit"])
    state["ln_final.weight"] = torch.empty(2**17, 0)
    torch.save(state, tmp_path / "clip.pt")
    with little_memory(), pytest.raises(ValueError, match="not a CLIP|no file of weights"):
        load_clip(tmp_path / "clip.pt")


def test_a_bit_that_changed_is_seen_in_weights_of_every_kind(clip_archives, tmp_path):
    weights = create_model("resnet8", 0).state_dict()
    for read, content in ((read_state, weights), (checkpoint.load, {"model": weights})):
        torch.save(content, tmp_path / "file.pth")
        damaged = bytearray((tmp_path / "file.pth").read_bytes())
        place = damaged.index(weights["conv1.weight"].numpy().tobytes())
        damaged[place + 5] ^= 16
        (tmp_path / "file.pth").write_bytes(damaged)
        with pytest.raises(ValueError, match="corrupt"):
            read(tmp_path / "file.pth")
    damaged = bytearray(clip_archives["vit"].read_bytes())
    place = damaged.index(load_torchscript(clip_archives["vit"])["visual.conv1.weight"].numpy().tobytes())
    damaged[place + 5] ^= 16
    (tmp_path / "clip.pt").write_bytes(damaged)
    with pytest.raises(ValueError, match="no file of weights"):
        load_clip(tmp_path / "clip.pt")


@pytest.mark.parametrize("name", ["options.json", "metrics.jsonl"])
def test_json_that_is_nested_without_end_is_refused(train, name):
    folder = train("--epochs", 1, "--distill", "none")
    (folder / name).write_text("[" * 200_000)
    with pytest.raises(ValueError, match="corrupt"):
        read_run(folder)


@pytest.mark.parametrize("option", ["--resume", "--path_t", "--init_s", "--clip_mode", "--model"])
@pytest.mark.parametrize("attack", [pickled_code, code_in_an_archive])
def test_scripts_refuse_it_in_one_line(train, tmp_path, capsys, option, attack):
    path, trap = tmp_path / "file.pth", tmp_path / "ran"
    attack(path, trap)
    script = {"script": train_teacher} if option == "--model" else {}
    with pytest.raises(SystemExit) as stopped:
        train(option, path, **script)
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line and "chunk" not in line]
    assert str(path) in line
    assert not trap.exists()
