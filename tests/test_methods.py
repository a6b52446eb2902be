"""Every method with every kind of teacher that it works with, as users run it: a few steps on tiny data."""

import argparse
import json
from pathlib import Path

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dataset
import evaluate
import train_student
import train_teacher
from conftest import make_dataset
from dataset import ImageDataset
from dataset.loader import Loader
from dataset.views import CIFAR100_NORMALIZATION, normalize
from deploy.export import library_state, save_onnx
from distiller_zoo import EGA, METHODS, Attention, DistillKL
from errors import InputError
from evaluation import load_student
from evaluation.student import open_student
from helper.options import parse_student_options
from helper.run import Run
from models import model_dict
from models.heads import TeacNet

WITH_CLIP = [name for name, method in METHODS.items() if not method.needs_maps]
TWO_STAGE = ["abound", "factor", "fsp"]
BASE = ["--dataset", "tiny", "--device", "cpu", "--amp", "off", "--batch_size", "16", "--max_steps", "2"]


@pytest.fixture
def save_dir(tmp_path) -> Path:
    return tmp_path / "save"


@pytest.fixture(scope="module", autouse=True)
def data():
    """--dataset tiny, for the whole module."""
    made = make_dataset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dataset.DATASETS, "tiny", lambda data_dir: made)
        yield made


@pytest.fixture(scope="module")
def cnn(data, tmp_path_factory) -> Path:
    """The checkpoint of a resnet14 that train_teacher.py trained for two steps."""
    folder = tmp_path_factory.mktemp("teacher")
    train_teacher.main([*BASE, "--model", "resnet14", "--epochs", "1", "--save_dir", str(folder)])
    (path,) = folder.glob("models/*/resnet14_last.pth")
    return path


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> Path:
    """SAVE of all runs that a CLIP teaches: the first one builds their bank."""
    return tmp_path_factory.mktemp("together")


def distil(save_dir: Path, *options) -> Path:
    """Run train_student.py; gives the run's folder."""
    small = [
        "--model_s",
        "resnet8",
        "--feature_dim",
        "8",
        "--feat_dim",
        "8",
        "--nce_k",
        "20",
        "--init_epochs",
        "2",
        "--epochs",
        "2",
    ]
    train_student.main([*BASE, *small, "--save_dir", str(save_dir), *map(str, options)])
    return max((save_dir / "student_model").iterdir(), key=lambda folder: (folder / "resume.pth").stat().st_mtime_ns)


def read_metrics(folder: Path) -> list[dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("seconds", "images_per_second")} for r in records]


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def weights(folder: Path) -> torch.Tensor:
    return torch.cat([x.flatten().double() for x in load(folder / "resnet8_last.pth")["model"].values()])


def check_learned(folder: Path, name: str, alone: Path) -> None:
    """The method's loss was there, and the student differs from the one that learned alone, but for its start."""
    alpha = json.loads((folder / "options.json").read_text())["alpha"]
    for record in read_metrics(folder):
        terms = {term for term in record if term.startswith("loss_")}
        assert ("loss_distill" in terms) == (name not in ("kd", "abound", "fsp"))
        assert ("loss_kd" in terms) == bool(alpha)
    assert weights(folder).isfinite().all()
    assert not torch.equal(weights(folder), weights(alone))


@pytest.fixture(scope="module")
def alone(data, tiny_clip, together) -> dict[str, Path]:
    """The runs of students that learn alone, in the place of those that a CNN and a CLIP teach."""
    options = {"cnn": ("--clip_tn", 0), "clip": ("--clip_mode", tiny_clip)}
    return {teacher: distil(together, "--distill", "none", *given) for teacher, given in options.items()}


@pytest.mark.parametrize("name", [name for name in METHODS if name != "none"])
def test_it_distils_a_cnn(name, cnn, alone, save_dir):
    folder = distil(save_dir, "--distill", name, "--path_t", cnn)
    check_learned(folder, name, alone["cnn"])
    assert (folder / "init" / "metrics.jsonl").exists() == (name in TWO_STAGE)
    options = json.loads((folder / "options.json").read_text())
    assert (options["clip_tn"], options["model_t"]) == (0, "resnet14")
    assert (options["gamma"], options["alpha"], options["beta"]) == METHODS[name].weights


@pytest.fixture(scope="module")
def head(data, tiny_clip, tmp_path_factory) -> Path:
    """The file of a CLIP's head that train_teacher.py trained for two steps."""
    folder = tmp_path_factory.mktemp("head")
    wide = ["--feature_dim", "8", "--epochs", "1", "--save_dir", str(folder)]
    train_teacher.main([*BASE, "--model", str(tiny_clip), *wide])
    (path,) = folder.glob("models/*/tiny_clip_last.pth")
    return path


@pytest.mark.parametrize("name", [name for name in WITH_CLIP if name != "none"])
def test_it_distils_a_clip(name, alone, tiny_clip, head, together):
    trained = ("--path_t", head) if METHODS[name].reuses else ()
    folder = distil(together, "--distill", name, "--clip_mode", tiny_clip, *trained)
    check_learned(folder, name, alone["clip"])
    options = json.loads((folder / "options.json").read_text())
    expected = {"kd": (0.1, 0.9, 0), "simkd": (0, 0, 1)}.get(name, (1, 0, 1))
    assert (options["gamma"], options["alpha"], options["beta"]) == expected


@pytest.mark.parametrize("name", [name for name in METHODS if name not in WITH_CLIP])
def test_a_method_that_needs_maps_is_refused_with_a_clip(name, tiny_clip, save_dir, capsys):
    with pytest.raises(SystemExit) as stopped:
        distil(save_dir, "--distill", name, "--clip_mode", tiny_clip)
    assert stopped.value.code == 2
    line = capsys.readouterr().err
    assert "needs feature maps" in line
    assert line.count("\n") == 1
    assert all(f" {other}," in line or line.endswith(f" {other}\n") for other in WITH_CLIP)
    assert not save_dir.exists()


@pytest.mark.parametrize("teacher", ["cnn", "head"])
def test_a_student_with_its_teachers_classifier_resumes_and_is_used_as_any(teacher, cnn, head, tiny_clip, tmp_path):
    path = {"cnn": cnn, "head": head}[teacher]
    options = ["--distill", "simkd", "--clip_mode", tiny_clip, "--path_t", path]
    whole = distil(tmp_path / "whole", *options)
    distil(tmp_path / "parts", *options, "--epochs", 1, "--name", "parts")
    parts = distil(tmp_path / "parts", *options, "--name", "parts")
    assert read_metrics(whole) == read_metrics(parts)
    last = load(whole / "resnet8_last.pth")
    if teacher == "cnn":
        assert torch.equal(last["layer"]["classifier.weight"], load(path)["model"]["fc.weight"])
    net, _, _ = load_student(whole, "last")
    images = make_dataset().test
    logits = net(normalize(images.images, last["normalization"]))
    accuracy = 100 * (logits.argmax(1) == images.targets).float().mean()
    assert float(accuracy) == pytest.approx(read_metrics(whole)[-1]["test_acc"])
    evaluate.main([str(whole)])
    image = torch.randn(3, 3, 32, 32)
    save_onnx(net, torch.zeros(2, 3, 32, 32), tmp_path / "student.onnx", ["logits"])
    (logits,) = onnxruntime.InferenceSession(tmp_path / "student.onnx").run(None, {"image": image.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), net(image), rtol=1e-3, atol=1e-4)
    with pytest.raises(InputError, match="no library's network has"):
        library_state(open_student(whole))


def test_a_student_takes_no_classifier_from_a_head_that_is_not_trained(tiny_clip, save_dir, capsys):
    with pytest.raises(SystemExit):
        distil(save_dir, "--distill", "simkd", "--clip_mode", tiny_clip)
    assert "name it by --path_t" in capsys.readouterr().err


@pytest.mark.parametrize("batch_size", [69, 23])
def test_a_last_image_alone_joins_the_step_before_it(cnn, save_dir, batch_size):
    """70 images; reviewkd normalises pooled features, of a value in each channel of an image."""
    folder = distil(save_dir, "--distill", "reviewkd", "--path_t", cnn, "--batch_size", batch_size, "--max_steps", 9)
    assert weights(folder).isfinite().all()


def test_steps_of_one_image_are_refused_where_batch_norm_cannot_take_them(cnn, save_dir, capsys):
    one = ("--batch_size", 1, "--max_steps", 1, "--epochs", 1)
    with pytest.raises(SystemExit) as stopped:
        distil(save_dir, "--distill", "reviewkd", "--path_t", cnn, *one)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "use --batch_size 2 or more" in said and said.count("\n") == 1
    distil(save_dir / "other", "--distill", "attention", "--path_t", cnn, *one)


def reference_epoch(data: ImageDataset, cnn: Path, name: str) -> tuple[dict, dict]:
    """One epoch from a CNN written down step by step, with plain SGD, from the same start."""
    torch.manual_seed(0)
    head = TeacNet(64, 8, 5) if name == "ega" else nn.Linear(1, 1)
    tutor = model_dict["resnet14"](num_classes=5)
    tutor.load_state_dict(load(cnn)["model"])
    tutor.eval()
    torch.manual_seed(0)
    student = model_dict["resnet8"](num_classes=5)
    projection = nn.Linear(64, 8)
    if name != "ega":
        projection.requires_grad_(False)
    settings = {"momentum": 0.9, "weight_decay": 5e-4}
    optimizer = torch.optim.SGD([*student.parameters(), *projection.parameters()], 0.02, **settings)
    optimizer_t = torch.optim.SGD(head.parameters(), 0.01, **settings)
    loader = Loader(data.train, "train", 16, torch.device("cpu"), training=True, normalization=CIFAR100_NORMALIZATION)
    for batch in loader.epoch(1):
        feat_s, logit_s = student(batch.image, is_feat=True)
        with torch.no_grad():
            feat_t, logit_t = tutor(batch.image, is_feat=True)
        loss = F.cross_entropy(logit_s, batch.target)
        if name == "ega":
            joint_t, head_logits = head(feat_t[-1])
            optimizer_t.zero_grad()
            F.cross_entropy(head_logits, batch.target).backward()
            loss = loss + EGA(0.8, 0.24)(projection(feat_s[-1]), joint_t.detach())
            optimizer_t.step()
        elif name == "kd":
            loss = 0.1 * loss + 0.9 * DistillKL(4)(logit_s, logit_t)
        else:
            loss = loss + 1000 * sum(Attention()(feat_s[1:-1], feat_t[1:-1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student.state_dict(), projection.state_dict()


@pytest.mark.parametrize("name", ["kd", "attention", "ega"])
def test_an_epoch_equals_repdistillers_steps_written_out(name, cnn, data, save_dir):
    options = ["--distill", name, "--path_t", cnn, "--learning_rate", 0.02, "--epochs", 1, "--max_steps", 9]
    last = load(distil(save_dir, *options) / "resnet8_last.pth")
    student, projection = reference_epoch(data, cnn, name)
    for key, value in student.items():
        torch.testing.assert_close(last["model"][key], value, rtol=1e-3, atol=2e-4)
    for key, value in last["layer"].items():
        torch.testing.assert_close(value, projection[key.removeprefix("fit_dim_Net.")], rtol=1e-3, atol=2e-4)
    assert bool(last["layer"]) == (name == "ega")


@pytest.mark.parametrize("name", ["kd", "ccl", "irg", "dkd", "dist"])
def test_logit_standardisation_composes_with_the_methods_on_logits(name, cnn, save_dir):
    plain = distil(save_dir, "--distill", name, "--path_t", cnn)
    standard = distil(save_dir, "--distill", name, "--path_t", cnn, "--logit_standard")
    assert plain != standard
    assert not torch.equal(weights(plain), weights(standard))


def test_logit_standardisation_is_refused_where_no_logits_are_compared(cnn, save_dir, capsys):
    with pytest.raises(SystemExit):
        distil(save_dir, "--distill", "pkt", "--path_t", cnn, "--logit_standard")
    assert "compares no logits" in capsys.readouterr().err
    distil(save_dir, "--distill", "pkt", "--path_t", cnn, "--logit_standard", "-a", 1)


@pytest.mark.parametrize("name", ["crd", "factor", "vid", "ega", "dkd", "rrd", "vkd"])
def test_a_resumed_run_is_bit_identical(name, cnn, tmp_path):
    options = ["--distill", name, "--path_t", cnn]
    whole = distil(tmp_path / "whole", *options, "--epochs", 3)
    options += ["--name", "parts"]
    distil(tmp_path / "parts", *options, "--epochs", 1)
    parts = distil(tmp_path / "parts", *options, "--epochs", 3)
    assert read_metrics(whole) == read_metrics(parts)
    assert torch.equal(weights(whole), weights(parts))
    states = [load(folder / "resume.pth")["state"]["criterion"] for folder in (whole, parts)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    if name == "crd":
        assert states[0]["loss.contrast.memory_v1"].shape == (70, 8)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rrd", ["--queue", "bank"]),
        ("unic", ["--standardize", "phi", "--joint", "teacher", "--labels", 0, "-r", 0]),
        ("wkd", ["--wkd_cost", "names"]),
    ],
)
def test_what_a_loss_learns_about_its_teacher_survives_a_resumed_run(name, options, tiny_clip, tmp_path):
    options = ["--distill", name, "--clip_mode", tiny_clip, *options]
    if "--joint" in options:
        options += ["--feature_dim", 256]
    whole = distil(tmp_path / "whole", *options, "--epochs", 2)
    distil(tmp_path / "parts", *options, "--epochs", 1, "--name", "parts")
    parts = distil(tmp_path / "parts", *options, "--epochs", 2, "--name", "parts")
    assert read_metrics(whole) == read_metrics(parts)
    assert torch.equal(weights(whole), weights(parts))


@pytest.mark.parametrize("mode", ["exact", "relax"])
def test_crd_takes_both_samplings(mode, tiny_clip, together):
    folder = distil(together, "--distill", "crd", "--clip_mode", tiny_clip, "--mode", mode, "--nce_k", 100)
    assert read_metrics(folder)[-1]["loss_distill"] > 0


@pytest.mark.parametrize("name", TWO_STAGE)
def test_a_first_stage_that_was_interrupted_goes_on(name, cnn, tmp_path, monkeypatch):
    options = ["--distill", name, "--path_t", cnn, "--epochs", 1, "--init_epochs", 3]
    whole = distil(tmp_path / "whole", *options)
    with monkeypatch.context() as patch:
        end_epoch = Run.end_epoch

        def interrupted(self, record, *args):
            end_epoch(self, record, *args)
            raise KeyboardInterrupt

        patch.setattr(Run, "end_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            distil(tmp_path / "parts", *options)
    (folder,) = (tmp_path / "parts" / "student_model").iterdir()
    assert [record["epoch"] for record in read_metrics(folder / "init")] == [1]
    assert not (folder / "resume.pth").exists()
    assert distil(tmp_path / "parts", *options) == folder
    assert read_metrics(whole / "init") == read_metrics(folder / "init")
    assert torch.equal(weights(whole), weights(folder))
    assert [r["init_train_loss"] >= 0 for r in read_metrics(folder / "init")] == [True] * 3
    # Neither the second stage nor its resuming takes the first one's events away.
    distil(tmp_path / "parts", *options, "--epochs", 2, "--name", folder.name)
    assert list(tmp_path.glob(f"parts/student_tensorboards/{folder.name}/init/events.*"))


@pytest.mark.parametrize(("name", "changed"), [("abound", True), ("fsp", True), ("factor", False)])
def test_the_first_stage_trains_the_students_features_or_the_paraphraser(name, changed, cnn, save_dir):
    folder = distil(save_dir, "--distill", name, "--path_t", cnn, "--epochs", 1)
    after = load(folder / "init" / "resnet8_last.pth")["model"]
    torch.manual_seed(0)
    before = model_dict["resnet8"](num_classes=5).state_dict()
    assert torch.equal(after["fc.weight"], before["fc.weight"])
    for key in ("conv1.weight", "layer1.0.conv1.weight", "bn1.running_mean"):
        assert torch.equal(after[key], before[key]) != changed


# ---- RepDistiller's checkpoints and commands


def repdistillers(folder: Path, name: str, **more) -> Path:
    """A file as RepDistiller writes and names it."""
    folder.mkdir()
    torch.manual_seed(0)
    state = {"epoch": 240, "model": model_dict[name](num_classes=5).state_dict(), "accuracy": torch.tensor(79.4)}
    torch.save(state | more, folder / "ckpt_epoch_240.pth", _use_new_zipfile_serialization=not more)
    return folder / "ckpt_epoch_240.pth"


@pytest.mark.parametrize("name", ["resnet14", "resnet8x4", "wrn_16_1", "vgg8", "ShuffleV2", "MobileNetV2"])
def test_repdistillers_checkpoints_teach(name, save_dir, tmp_path):
    path = repdistillers(tmp_path / f"{name}_vanilla", name)
    folder = distil(save_dir, "--distill", "kd", "--path_t", path, "-r", 0.1, "-a", 0.9, "-b", 0, "--epochs", 1)
    assert json.loads((folder / "options.json").read_text())["model_t"] == name


def test_its_options_namespace_and_its_old_format_are_read(save_dir, tmp_path):
    opt = argparse.Namespace(model="wrn_16_1", lr_decay_epochs=[150], momentum=0.9)
    path = repdistillers(tmp_path / "wrn_16_1_vanilla", "wrn_16_1", opt=opt)
    folder = distil(save_dir, "--distill", "attention", "--path_t", path, "-a", 0, "-b", 1000, "--epochs", 1)
    assert folder.name.startswith("resnet8_wrn_16_1_tiny_attention_")


# -a and -b of each line of its scripts/run_cifar_distill.sh; kd's has -r 0.1 besides.
COMMANDS = """
kd 0.9 0, hint 0 100, attention 0 1000, similarity 0 3000, correlation 0 0.02, vid 0 1, rkd 0 1, pkt 0 30000,
abound 0 1, factor 0 200, fsp 0 50, nst 0 50, crd 0 0.8, crd 1 0.8
"""


@pytest.mark.parametrize("command", COMMANDS.replace("\n", " ").strip().split(", "))
def test_its_own_commands_are_taken_and_its_weights_are_the_defaults(command, tmp_path):
    path = tmp_path / "resnet32x4_vanilla" / "ckpt_epoch_240.pth"
    path.parent.mkdir()
    torch.save({"model": {"weight": torch.ones(1)}}, path)  # whether they fit is seen later
    distill, a, b = command.split()
    argv = ["--path_t", str(path), "--distill", distill, "--model_s", "resnet8x4", "--trial", "1"]
    given = parse_student_options([*argv, "-a", a, "-b", b, *(["-r", "0.1"] if distill == "kd" else [])])
    unset = parse_student_options([*argv, *(["-a", "1"] if a == "1" else [])])
    assert vars(given) == vars(unset)
    assert (given.model_t, given.clip_tn, given.beta) == ("resnet32x4", 0, float(b))


@pytest.mark.parametrize(
    ("folder", "words"),
    [("mystery", "which CNN it holds"), ("resnet8_vanilla", "another shape"), ("wrn_vanilla", "which CNN it holds")],
)
def test_a_checkpoint_that_does_not_tell_its_architecture_is_refused(folder, words, save_dir, tmp_path, capsys):
    path = repdistillers(tmp_path / folder, "resnet14")
    with pytest.raises(SystemExit) as stopped:
        distil(save_dir, "--distill", "kd", "--path_t", path)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_a_cnn_student_teaches_in_its_turn_but_one_of_a_clip_does_not(cnn, tiny_clip, save_dir, tmp_path, capsys):
    first = distil(save_dir, "--distill", "kd", "--path_t", cnn, "--epochs", 1) / "resnet8_last.pth"
    folder = distil(save_dir, "--distill", "kd", "--path_t", first, "--epochs", 1)
    assert folder.name.startswith("resnet8_resnet8_tiny_kd_")
    bare = distil(save_dir, "--distill", "kd", "--clip_mode", tiny_clip, "--epochs", 1) / "resnet8_last.pth"
    with pytest.raises(SystemExit):
        distil(save_dir, "--distill", "kd", "--path_t", bare, "--trial", "bare")
    assert "no classifier of its own" in capsys.readouterr().err


def test_the_head_of_a_clip_is_no_cnn(tiny_clip, save_dir, tmp_path, capsys):
    teacher_dir = str(tmp_path / "teacher")
    train_teacher.main([*BASE, "--model", str(tiny_clip), "--epochs", "1", "--save_dir", teacher_dir])
    (path,) = Path(teacher_dir).glob("models/*/tiny_clip_last.pth")
    with pytest.raises(SystemExit):
        distil(save_dir, "--path_t", path, "--clip_tn", 0)
    assert "is the head of a frozen encoder" in capsys.readouterr().err


def test_a_cnn_teacher_trains_resumes_and_learns(tmp_path):
    def train(save_dir: str, epochs: int, *named: str) -> Path:
        base = [
            "--dataset",
            "tiny",
            "--device",
            "cpu",
            "--amp",
            "off",
            "--batch_size",
            "10",
            "--model",
            "resnet8",
            "--print_freq",
            "7",
        ]
        train_teacher.main([*base, "--epochs", str(epochs), "--save_dir", str(tmp_path / save_dir), *named])
        (folder,) = (tmp_path / save_dir / "models").iterdir()
        return folder

    whole, parts = train("whole", 4), train("parts", 2, "--name", "parts")
    assert train("parts", 4, "--name", "parts") == parts
    assert whole.name[:-6] == "resnet8_tiny_seed0_trial1_"
    assert read_metrics(whole) == read_metrics(parts)
    assert torch.equal(weights(whole), weights(parts))
    records = read_metrics(whole)
    assert records[-1]["train_acc"] > 60  # of five classes
    assert records[-1]["train_loss"] < records[0]["train_loss"]


@pytest.mark.parametrize("name", model_dict)
def test_every_backbone_is_a_student(name, tiny_clip, together):
    options = ["--distill", "ega", "--clip_mode", tiny_clip, "--model_s", name, "--epochs", 1, "--batch_size", 4]
    folder = distil(together, *options, "--max_steps", 1, "--holdout", 0.1, "--momentum", 0)
    state = load(folder / f"{name}_last.pth")
    with torch.device("meta"):  # no weights are drawn for a number
        width = model_dict[name](num_classes=0).num_features
    assert state["layer"]["fit_dim_Net.weight"].shape == (8, width)
    lr = 0.01 if name in ("MobileNetV2", "ShuffleV1", "ShuffleV2") else 0.05
    assert read_metrics(folder)[0]["lr"] == lr


@pytest.mark.parametrize(("argv", "lr"), [("--model_s ShuffleV1 --learning_rate 0.07", 0.07), ("--model_s vgg8", 0.05)])
def test_a_learning_rate_that_is_given_is_never_overridden(argv, lr):
    assert train_student.parse_student_options(argv.split()).learning_rate == lr


def test_the_list_of_methods_has_a_row_for_each(capsys):
    with pytest.raises(SystemExit) as stopped:
        train_student.main(["--list"])
    assert stopped.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split("|")[1].strip(): line for line in lines[2:]}
    assert list(rows) == list(METHODS)
    assert len({len(line) for line in lines}) == 1
    for name, method in METHODS.items():
        assert method.citation in rows[name]
        assert ("needs maps" in rows[name]) == method.needs_maps
