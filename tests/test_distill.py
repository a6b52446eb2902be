"""train_student.distill: the command line from Python."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import assert_equal_tensors, load, read_metrics
from torch import nn

import evaluate
import export
from errors import InputError, NonFiniteLoss
from evaluation import load_student
from helper.call import command_line
from helper.options import parse_student_options, student_parser
from models import own
from train_student import distill

ROOT = Path(__file__).parents[1]


class Net(nn.Sequential):
    def __init__(self, num_classes: int = 7):
        pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        super().__init__(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), *pool, nn.Linear(8, num_classes))


class Encoder(nn.Sequential):
    resolution = 16

    def __init__(self):
        super().__init__(nn.Conv2d(3, 12, 4, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def seeded(network: type[nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return network()


@pytest.fixture
def options(tiny_dataset, tmp_path) -> dict:
    """What every run here is called with."""
    sizes = {"batch_size": 16, "feature_dim": 8}
    return {"save_dir": tmp_path / "save", "device": "cpu", "amp": "off", "epochs": 2, **sizes}


def test_keywords_say_what_the_flags_say():
    keywords = {"b": 2, "a": 1, "gamma": 0.5, "logit_standard": True, "pretrained_s": False, "init_s": None}
    keywords |= {"lr_decay_epochs": [3, 4], "node": 0.1, "data_dir": "-odd"}
    argv = command_line(student_parser(), keywords)
    flags = "--beta=2 --alpha=1 --gamma=0.5 --logit_standard --lr_decay_epochs=3,4 --node_weight=0.1 --data_dir=-odd"
    assert argv == flags.split()
    opt = parse_student_options(argv)
    assert (opt.beta, opt.gamma, opt.lr_decay_epochs, opt.data_dir) == (2, 0.5, [3, 4], "-odd")
    assert opt.logit_standard and not opt.pretrained_s


def test_it_is_the_run_of_the_command_line(train, options, tiny_clip, capsys):
    folder = train("--epochs", 2)
    capsys.readouterr()
    run = distill("tiny", student="resnet8", teacher=str(tiny_clip), **options)
    assert run.folder == folder and "Epoch" not in capsys.readouterr().out  # it was finished
    assert [record["epoch"] for record in run.metrics] == [1, 2] and run.best in run.metrics
    assert run.options["distill"] == "ega"
    net, transform, classes = run.student("last")
    image = transform(Image.new("RGB", (40, 32), "red"))[None]
    assert torch.equal(net(image), load_student(folder, "last")[0](image)) and len(classes) == 5


def test_modules_are_distilled_and_stay_as_they_are(options, tmp_path, capsys):
    student, teacher = seeded(Net), seeded(Encoder, 1)
    before = {name: x.clone() for name, x in student.state_dict().items()}
    torch.manual_seed(5)
    drawn = torch.get_rng_state()
    run = distill("tiny", student=student, teacher=teacher, **options)
    assert torch.equal(torch.get_rng_state(), drawn)  # the program's random numbers are its own
    assert_equal_tensors(student.state_dict(), before)
    assert run.folder.name.startswith("Net_Encoder_tiny_ega_")
    assert "evaluate.py" not in capsys.readouterr().out
    net, transform, _ = run.student()
    image = transform(Image.new("RGB", (40, 32), "red"))[None]
    evaluate.main([str(run.folder), "--device", "cpu"])  # in this program the module is known
    export.main([str(run.folder), "--out", str(tmp_path / "out")])
    wanted = net(image)
    own._given.clear()  # as in another program
    with pytest.raises(InputError, match=r"load_student\(run, module=...\)"):
        load_student(run.folder)
    again, _, _ = load_student(run.folder, module=Net(3))
    assert torch.equal(again(image), wanted)
    with pytest.raises(InputError, match="is not a file of the student"):
        load_student(run.folder, module=nn.Sequential(nn.Flatten(), nn.Linear(3072, 5)))


def test_a_module_s_weights_are_where_it_starts_and_part_of_the_run(options):
    one, same, other = (distill("tiny", student=seeded(Net, seed), method="none", **options) for seed in (0, 0, 1))
    assert one.folder == same.folder != other.folder
    first = distill("tiny", student=seeded(Net), method="none", learning_rate=1e-30, **options | {"epochs": 1})
    trained = load(first.folder / "Net_last.pth")["model"]
    assert torch.equal(trained["net.0.weight"], seeded(Net)[0].weight)


@pytest.fixture
def ctrl_c():
    """Python's own answer to Ctrl-C, also where a shell started the tests in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupted_run_goes_on_bit_for_bit(options, monkeypatch, ctrl_c):
    whole = distill("tiny", student=seeded(Net), teacher=seeded(Encoder), name="whole", **options)
    before = signal.getsignal(signal.SIGINT)

    def interrupt(record):
        if record["epoch"] == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr("helper.meters.print_record", interrupt)
        with pytest.raises(KeyboardInterrupt) as kept:  # its traceback holds the run, as a notebook's does
            distill("tiny", student=seeded(Net), teacher=seeded(Encoder), name="killed", save_seconds=1000, **options)
    assert signal.getsignal(signal.SIGINT) is before
    killed = distill("tiny", student=seeded(Net), teacher=seeded(Encoder), name="killed", **options)
    assert kept.value is not None
    assert read_metrics(killed.folder) == read_metrics(whole.folder)
    for network in ("model", "teacher_layer"):
        found, wanted = (load(run.folder / "Net_last.pth")[network] for run in (killed, whole))
        assert_equal_tensors(found, wanted)
    with pytest.raises(InputError, match="holds a run with model_s module:Net-.*, not module:Net-"):
        distill("tiny", student=seeded(Net, 9), teacher=seeded(Encoder), name="killed", **options)


def test_it_raises_what_the_command_line_refuses_and_prints_nothing(options, tmp_path, capsys):
    for words, keywords in (
        ("there is no option epoks; did you mean epochs", {"epoks": 3}),
        ("there is no option help$", {"help": True}),
        ("there is no option h$", {"h": True}),
        ("'0' is not a whole number at least 1", {"epochs": 0}),
        ("an nn.Module, not int", {"student": 3}),
        ("no linear layer", {"student": nn.Flatten(), "method": "none"}),
        ("two images have to give embeddings", {"teacher": nn.Identity()}),
        ("known: ega|invalid choice", {"method": "egga"}),
        ("nowhere", {"data": tmp_path / "nowhere", "image_size": 32, "method": "none"}),
    ):
        with pytest.raises(InputError if words != "nowhere" else (InputError, OSError), match=words):
            distill(**{"data": "tiny"} | options | keywords)
        assert capsys.readouterr().err == ""
    with pytest.raises(NonFiniteLoss):
        distill("tiny", student="resnet8", method="none", learning_rate=1e30, **options)


def test_it_works_in_a_thread(options):
    found = []
    thread = threading.Thread(
        target=lambda: found.append(distill("tiny", student=seeded(Net), method="none", **options))
    )
    thread.start()
    thread.join()
    assert len(found[0].metrics) == 2


def test_its_import_needs_no_torch():
    code = "import sys; from train_student import distill; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "False\n"
