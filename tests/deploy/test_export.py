"""export.py: what it writes, in the runtimes that it is for; few exports, of which each takes seconds."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import torchvision
from PIL import Image, ImageOps
from safetensors.torch import load_file

import dataset
import deploy.export
import deploy.predict
import export
import train_student
from conftest import make_dataset, snapshot
from dataset.views import normalize
from deploy.model_card import card, processors
from deploy.predict import onnx_session
from evaluation import load_student
from evaluation.student import open_student
from helper import checkpoint
from models import model_dict


@pytest.fixture(scope="module")
def run(finished, tmp_path_factory):
    """A copy of a run, which may be written to."""
    folder = tmp_path_factory.mktemp("export") / "save" / "student_model" / "run"
    shutil.copytree(finished["ega"], folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def data():
    """The run's data set, for the whole module."""
    made = make_dataset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dataset.DATASETS, "tiny", lambda data_dir: made)
        yield made


def export_to(out, run, *options) -> str:
    """Run export.py; gives what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        export.main([str(run), "--out", str(out), *options])
    return printed.getvalue()


@pytest.fixture(scope="module")
def onnx(run):
    """The run as ONNX: its folder, and what was printed."""
    return run.parent / "onnx", export_to(run.parent / "onnx", run)


@pytest.fixture
def untimed(monkeypatch):
    """Nothing is timed, and no teacher is exported for that."""
    monkeypatch.setattr("deploy.costs.save_onnx", lambda network, example, path, outputs: path.touch())
    monkeypatch.setattr("deploy.costs.milliseconds", lambda *_: 1.0)


@pytest.fixture
def without_onnx(untimed, monkeypatch):
    """Without ONNX, which other formats are timed by alone."""
    monkeypatch.setattr("deploy.export.save_onnx", lambda network, example, path, outputs: path.touch())


def check_beside(folder, classes, accuracy):
    assert (folder / "labels.txt").read_text().splitlines() == classes
    config = json.loads((folder / "config.json").read_text())
    assert (folder / config["file"]).is_file()
    assert config["accuracy"] == pytest.approx(accuracy)
    beside = {"labels.txt", "preprocess.py", "config.json", "README.md"}
    assert {path.name for path in folder.iterdir()} == beside | {config["file"]}
    return config


def test_onnx_gives_the_student_s_logits_and_embeddings_for_any_batch(run, onnx, data):
    folder, printed = onnx
    net, _, classes = load_student(run)
    image = normalize(data.test.images, open_student(run).normalization)
    with torch.no_grad():
        logits, embedding = net(image), net.embed(image)
    accuracy = 100 * float((logits.argmax(1) == data.test.targets).float().mean())
    config = check_beside(folder, classes, accuracy)
    assert config["input"] | {"mean": 0, "std": 0} == {
        "name": "image", "dtype": "float32", "size": 32, "stored_size": 32, "mean": 0, "std": 0,
        "exact_decode": False,
    }  # fmt: skip

    session = onnxruntime.InferenceSession(folder / "model.onnx")
    for count in (1, 7):
        found = session.run(["logits", "embedding"], {"image": image[:count].numpy()})
        for x, wanted in zip(found, (logits, embedding), strict=True):
            np.testing.assert_allclose(x, wanted[:count].numpy(), rtol=1e-5, atol=1e-5)

    stages = [line for line in printed.split("\n") if re.match("opening|writing|checking|timing", line)]
    assert stages == [
        "opening the run's data set",
        "writing model.onnx",
        "checking model.onnx, on 20 test images",
        "writing teacher.onnx, to be timed",
        "timing teacher.onnx",
        "timing model.onnx",
    ]
    (difference,) = re.findall(r"on 20 test images (\S+); accuracy", printed)
    assert 0 < float(difference) < 1e-5
    assert f"accuracy {accuracy:.2f}, the student's {accuracy:.2f}" in printed
    table = [line for line in printed.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table[2:]] == ["teacher: tiny_clip", "resnet8"]
    parameters = sum(p.numel() for p in net.parameters())
    assert table[3].split("|")[2].strip() == f"{parameters:,}"


def card_code(folder) -> str:
    """The lines of Python in a model card."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return code


def card_prints(folder, monkeypatch, capsys) -> str:
    """What the lines of Python in a model card print, which are run in its folder."""
    code = card_code(folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    capsys.readouterr()
    exec(compile(code, "README.md", "exec"), {})
    return capsys.readouterr().out.strip()


def save_picture(data, path, row=0):
    Image.fromarray(data.test.images[row].permute(1, 2, 0).numpy()).save(path)
    return path


def test_predictions_and_the_card_s_own_lines_need_its_folder_alone(onnx, data, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "moved"
    shutil.copytree(onnx[0], folder)
    picture = save_picture(data, folder / "picture.png")
    monkeypatch.setattr(torch, "load", None)
    export.main(["--out", str(folder), "--predict", str(picture), str(picture)])
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    shares = re.findall(r"(colour \d) (\d+\.\d) %", first)
    assert len(shares) == 3

    config = json.loads((folder / "config.json").read_text())
    normalization = tuple(config["input"]["mean"]), tuple(config["input"]["std"])
    image = normalize(data.test.images[:1], normalization)
    (logits,) = onnxruntime.InferenceSession(folder / "model.onnx").run(["logits"], {"image": image.numpy()})
    wanted = torch.from_numpy(logits)[0].softmax(0).mul(100).topk(3)
    assert [name for name, _ in shares] == [data.classes[place] for place in wanted.indices]
    assert [float(share) for _, share in shares] == pytest.approx(wanted.values.tolist(), abs=0.051)
    assert card_prints(folder, monkeypatch, capsys) == shares[0][0]


def odd_pictures(folder) -> list[str]:
    """Names of pictures of each kind that plain code turns, clips, blackens or squeezes."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (60, 44, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    rgb.save(folder / "turned.jpg", exif=exif)
    Image.fromarray(rng.integers(0, 65536, (50, 50), dtype=np.uint16)).save(folder / "grey16.png")
    rgb.putalpha(Image.fromarray(rng.integers(0, 2, (60, 44), dtype=np.uint8) * 255))
    rgb.save(folder / "transparent.png")
    Image.fromarray(rng.integers(0, 256, (50, 151, 3), dtype=np.uint8)).save(folder / "wide.png")
    return ["turned.jpg", "grey16.png", "transparent.png", "wide.png"]


def test_the_card_prepares_a_picture_as_predict_does(onnx, tmp_path, monkeypatch):
    """Its lines run in a process of their own, in the exported folder, which knows nothing of this project."""
    folder = tmp_path / "moved"
    shutil.copytree(onnx[0], folder)
    config = json.loads((folder / "config.json").read_text())
    config["input"]["stored_size"] = 40  # for 32 pixels, as of a folder of photographs
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text(card(config, ""))
    names = odd_pictures(folder)
    script = f"""
import shutil, sys
import numpy as np
for name in {names}:
    shutil.copy(name, "picture.png")
    values = {{}}
    exec({card_code(folder)!r}, values)
    np.save(name + ".npy", values["logits"])
assert not {{"torch", "torchvision", "dataset", "deploy", "helper"}} & set(sys.modules)
"""
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", script], cwd=folder, env=outside, check=True, capture_output=True)

    seen, real = [], deploy.predict.open_file

    def recording(path, config):
        run = real(path, config)
        return lambda image: seen.append(run(image)) or seen[-1]

    monkeypatch.setattr(deploy.predict, "open_file", recording)
    export.main(["--out", str(folder), "--predict", *(str(folder / name) for name in names)])
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    mean, std = (np.float32(config["input"][name]).reshape(3, 1, 1) for name in ("mean", "std"))
    for name, (logits, _) in zip(names, seen, strict=True):
        np.testing.assert_allclose(np.load(folder / f"{name}.npy"), logits.numpy(), rtol=1e-5, atol=1e-5)
        plain = ImageOps.fit(Image.open(folder / name).convert("RGB"), (40, 40), Image.BICUBIC).crop((4, 4, 36, 36))
        image = (np.float32(plain).transpose(2, 0, 1)[None] / 255 - mean) / std
        (other,) = session.run(["logits"], {"image": image})
        assert np.abs(other - logits.numpy()).max() > 1e-3  # a picture that tells one way from another


EXACT = "session.x64quantprecision"


def is_exact(session: onnxruntime.InferenceSession) -> bool:
    """Whether a session computes 8-bit networks exactly on x86 processors without VNNI too."""
    return session.get_session_options().get_session_config_entry(EXACT) == "1"


def test_every_session_computes_8_bit_networks_exactly(onnx):
    assert all(is_exact(onnx_session(onnx[0] / "model.onnx", optimized)) for optimized in (True, False))
    root = Path(export.__file__).parent
    rooms = ("deploy", "evaluation", "report", "helper", "models", "dataset", "benchmarks")
    files = [path for room in rooms for path in (root / room).rglob("*.py")]
    assert {path.name for path in files if "InferenceSession(" in path.read_text()} == {"predict.py", "model_card.py"}


def test_onnxruntime_knows_the_entry_of_a_session():
    """It ignores words that it does not know."""
    libraries = Path(onnxruntime.__file__).parent.glob("capi/onnxruntime_pybind11_state*")
    assert any(EXACT.encode() + b"\0" in path.read_bytes() for path in libraries)


def test_where_8_bit_kernels_saturate_the_accuracy_holds_on_that_processor_alone():
    config = {"processor": "Some CPU (AVX2)", "same_class": 83.0}
    assert "holds for Some CPU (AVX2) alone: it gives only 83.00 %" in processors(config)
    told = processors(config | {"same_class": 99.5})
    assert "checked on Some CPU (AVX2). Its accuracy holds on x86 processors with VNNI." in told
    assert f"{EXACT} = 1" in told


def test_8_bit_pixels_go_into_an_8_bit_network(run, untimed, data, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    printed = export_to(folder, run, "--with_preprocess", "--quantize", "int8")
    told = r"^model.onnx(.*): largest difference .* accuracy (\S+), the student's (\S+)$"
    before, after = re.findall(told, printed, re.MULTILINE)
    assert before[0] == ""
    assert before[1] == before[2]
    assert after[0] == ", int8"
    stages = printed.partition(before[2])[2]
    for stage in (", calibrated on 70 training images", "checking model.onnx, int8, on 20 test images"):
        assert f"{stage}\n" in stages
        stages = stages.partition(stage)[2]
    assert "checking model.onnx, int8, against itself in float32\n" in stages
    config = check_beside(folder, data.classes, pytest.approx(float(after[1]), abs=0.01))
    assert config["quantized"] == "int8"
    assert config["input"]["dtype"] == "uint8"

    session = onnx_session(folder / "model.onnx")
    (logits,) = session.run(["logits"], {"pixels": data.test.images.numpy()})
    (plain,) = onnx_session(folder / "model.onnx", optimized=False).run(
        ["logits"], {"pixels": data.test.images.numpy()}
    )
    assert np.abs(plain - logits).max() <= 0.01 * np.abs(logits).max()
    assert config["same_class"] == pytest.approx(100 * (logits.argmax(1) == plain.argmax(1)).mean())
    card_text = (folder / "README.md").read_text()
    assert processors(config) in printed and processors(config) in card_text
    save_picture(data, folder / "picture.png")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    lines = {}
    exec(card_code(folder), lines)
    assert is_exact(lines["session"])
    np.testing.assert_allclose(lines["logits"][0], logits[0], rtol=1e-4, atol=1e-4)

    accuracy = 100 * (logits.argmax(1) == data.test.targets.numpy()).mean()
    assert accuracy == pytest.approx(config["accuracy"], abs=0.01)
    net, _, _ = load_student(run)
    with torch.no_grad():
        wanted = net(normalize(data.test.images, open_student(run).normalization)).numpy()
    error = np.abs(logits - wanted).max() / np.abs(wanted).max()
    assert 1e-4 < error < 0.2
    rows = [line for line in printed.splitlines() if line.startswith("| resnet8")]
    sizes = [float(row.split("|")[4]) for row in rows]
    assert sizes[1] < sizes[0] / 1.5


def test_normalised_images_go_into_an_8_bit_network(run, untimed, data, tmp_path):
    folder = tmp_path / "out"
    export_to(folder, run, "--quantize", "int8")
    config = json.loads((folder / "config.json").read_text())
    assert (config["quantized"], config["input"]["dtype"]) == ("int8", "float32")
    image = normalize(data.test.images, open_student(run).normalization).numpy()
    sessions = (onnx_session(folder / "model.onnx", optimized) for optimized in (True, False))
    logits, plain = (session.run(["logits"], {"image": image})[0] for session in sessions)
    assert config["same_class"] == pytest.approx(100 * (logits.argmax(1) == plain.argmax(1)).mean())


def test_a_program_of_torch_export(run, onnx, without_onnx, data, tmp_path):
    folder = tmp_path / "out"
    export_to(folder, run, "--format", "exported")
    net, _, classes = load_student(run)
    check_beside(folder, classes, json.loads((onnx[0] / "config.json").read_text())["accuracy"])
    program = torch.export.load(folder / "model.pt2").module()
    image = normalize(data.test.images, open_student(run).normalization)
    with torch.no_grad():
        torch.testing.assert_close(program(image[:3]), (net(image[:3]), net.embed(image[:3])))


def test_weights_load_into_repdistiller_s_network(run, without_onnx, data, tmp_path):
    """Its head, two linear maps, is then one: the network's own classifier."""
    folder = tmp_path / "out"
    export.main([str(run), "--format", "safetensors", "--out", str(folder)])
    network = model_dict["resnet8"](num_classes=5).eval()
    network.load_state_dict(load_file(folder / "model.safetensors"))
    image = normalize(data.test.images, open_student(run).normalization)
    with torch.no_grad():
        torch.testing.assert_close(network(image), load_student(run)[0](image), rtol=1e-4, atol=1e-5)
    config = json.loads((folder / "config.json").read_text())
    assert (config["library"], config["architecture"]) == ("RepDistiller", "resnet8")


@pytest.mark.parametrize("network", ["timm:test_vit", "torchvision:shufflenet_v2_x0_5", "torchvision:mnasnet0_5"])
def test_weights_load_into_the_library_s_own_network(data, without_onnx, tmp_path, network, monkeypatch, capsys):
    base = ["--dataset", "tiny", "--save_dir", str(tmp_path), "--device", "cpu", "--amp", "off", "--max_steps", "1"]
    options = ["--distill", "none", "--model_s", network, "--student_resolution", "64", "--epochs", "1"]
    train_student.main([*base, *options])
    (run,) = (tmp_path / "student_model").iterdir()
    export.main([str(run), "--format", "safetensors"])
    folder = run / "export" / "safetensors"
    image = torch.nn.functional.interpolate(torch.randn(3, 3, 32, 32), (64, 64), mode="bilinear")
    library, name = network.split(":")
    if library == "timm":
        own = timm.create_model(name, num_classes=5, img_size=64, checkpoint_path=str(folder / "model.safetensors"))
        found = timm.create_model(f"local-dir:{folder}", pretrained=True)
        assert torch.equal(found.eval()(image), own.eval()(image))
    else:
        own = torchvision.models.get_model(name, num_classes=5)
        state = own.state_dict()
        state.update(load_file(folder / "model.safetensors"))
        own.load_state_dict(state)
    student = open_student(run).network
    with torch.no_grad():
        torch.testing.assert_close(own.eval()(image), student(image).logits, rtol=1e-4, atol=1e-5)
    picture = save_picture(data, folder / "picture.png")
    capsys.readouterr()
    export.main([str(run), "--format", "safetensors", "--predict", str(picture)])
    line = capsys.readouterr().out
    assert line.startswith(f"{picture}: {card_prints(folder, monkeypatch, capsys)} ")


def test_classes_with_what_unicode_takes_for_the_end_of_a_line(
    finished, without_onnx, data, tmp_path, monkeypatch, capsys
):
    run = shutil.copytree(finished["none"], tmp_path / "save" / "student_model" / "run")
    state = checkpoint.load(run / "resnet8_best.pth")
    names = ["a\u2028cat", "a\vdog", "a\x85cow", "a\x1cfox", "a bat"]
    checkpoint.save(state | {"classes": names}, run / "resnet8_best.pth")
    folder = tmp_path / "out"
    export_to(folder, run, "--format", "safetensors")
    assert (folder / "labels.txt").read_bytes().decode() == "".join(f"{name}\n" for name in names)
    net, transform, _ = load_student(run)
    rows = {
        int(net(transform(Image.fromarray(image.permute(1, 2, 0).numpy()))[None]).argmax()): row
        for row, image in enumerate(data.test.images)
    }
    for place, row in rows.items():
        picture = save_picture(data, folder / "picture.png", row)
        capsys.readouterr()
        export.main(["--out", str(folder), "--predict", str(picture)])
        assert capsys.readouterr().out.startswith(f"{picture}: {names[place]} ")
        assert card_prints(folder, monkeypatch, capsys) == names[place]
    assert len(rows) > 1 and max(rows) > 0
    with open(folder / "labels.txt", "a") as labels:
        labels.write("one more\n")
    assert_refused(capsys, "labels.txt has 6 names for 5 classes", "--out", folder, "--predict", picture)


# ---- bad input


def assert_refused(capsys, words: str, *argv):
    with pytest.raises(SystemExit) as exit_:
        export.main([str(word) for word in argv])
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def test_bad_input(run, onnx, data, tmp_path, capsys):
    folder = onnx[0]
    before = snapshot(run.parent)
    assert_refused(capsys, "is not the folder of a run", tmp_path)
    assert_refused(capsys, "which RUN?")
    assert_refused(capsys, "holds model.onnx, labels.txt, preprocess.py, README.md, config.json", run, "--out", folder)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "labels.txt").write_text("mine")
    assert_refused(capsys, "holds labels.txt", run, "--out", tmp_path / "one")
    assert_refused(capsys, "is no folder", run, "--out", tmp_path / "one" / "labels.txt")
    assert_refused(capsys, "use --format onnx", run, "--format", "exported", "--quantize", "int8")
    assert_refused(capsys, "--with_preprocess", run, "--format", "safetensors", "--with_preprocess")
    assert_refused(capsys, "holds no exported student", tmp_path, "--predict", "a.png")
    assert_refused(
        capsys,
        "a.png cannot be read as an image (No such file",
        run,
        "--out",
        folder,
        "--predict",
        tmp_path / "a.png",
    )
    (tmp_path / "b.png").write_text("no picture")
    good = save_picture(data, tmp_path / "good.png")
    assert_refused(capsys, "b.png cannot be read", run, "--out", folder, "--predict", good, tmp_path / "b.png")
    shutil.copytree(folder, tmp_path / "damaged")
    (tmp_path / "damaged" / "model.onnx").write_bytes(b"not ONNX")
    assert_refused(capsys, "model.onnx cannot be loaded", "--out", tmp_path / "damaged", "--predict", good)
    (tmp_path / "damaged" / "config.json").write_text("{")
    assert_refused(capsys, "config.json is damaged", "--out", tmp_path / "damaged", "--predict", good)
    (tmp_path / "damaged" / "config.json").write_text("{}")
    assert_refused(capsys, "config.json is", "--out", tmp_path / "damaged", "--predict", good)
    assert capsys.readouterr().out == ""
    assert snapshot(run.parent) == before
    assert (tmp_path / "one" / "labels.txt").read_text() == "mine"


def test_a_file_that_differs_from_its_student_is_not_written(run, without_onnx, tmp_path, capsys, monkeypatch):
    def library_state(opened):
        state = real(opened)
        return state | {"fc.weight": 1.001 * state["fc.weight"]}

    real = deploy.export.library_state
    monkeypatch.setattr(deploy.export, "library_state", library_state)
    assert_refused(capsys, "differs from the student", run, "--format", "safetensors", "--out", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_force_overwrites_and_leaves_other_files(run, without_onnx, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "labels.txt").write_text("old")
    (out / "mine.txt").write_text("mine")
    export.main([str(run), "--format", "safetensors", "--out", str(out), "--force"])
    assert (out / "labels.txt").read_text().splitlines() == make_dataset().classes
    assert (out / "mine.txt").read_text() == "mine"


def test_a_student_without_labels_is_exported_for_its_embeddings(run, without_onnx, tmp_path, capsys):
    run = shutil.copytree(run, tmp_path / "save" / "student_model" / "run")
    state = checkpoint.load(run / "resnet8_best.pth")
    checkpoint.save(state | {"test_acc": None}, run / "resnet8_best.pth")
    export.main([str(run), "--format", "exported"])
    folder = run / "export" / "exported"
    assert json.loads((folder / "config.json").read_text())["accuracy"] is None
    picture = save_picture(make_dataset(), tmp_path / "picture.png")
    capsys.readouterr()
    assert_refused(capsys, "its classifier says nothing", run, "--format", "exported", "--predict", picture)
