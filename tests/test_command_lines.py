"""Random command lines: each starts to train or is refused in one line, and nothing is written where it is refused."""

import argparse
import contextlib
import gc
import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torchvision import datasets

import dataset
import pretrain_clip
import train_student
import train_teacher
from conftest import make_dataset, snapshot
from helper import clip_options, options
from helper.parser import Parser
from helper.run import Run
from models import create_model

# A run starts from the last of these that is given; the student and the steps are small.
BASE = {
    train_student: ["--clip_mode", "{clip}", "--model_s", "resnet8"],
    train_teacher: ["--model", "{clip}"],
    pretrain_clip: ["--vision_layers", "1", "--vision_width", "64", "--vision_patch", "16", "--text_layers", "1"],
}

# Sizes in between would be taken, and take the memory and the time that they need.
NUMBERS = ["-1", "0", "1", "2", "3", "16", "33", "64", "1000000000000", "9" * 30, "0.1", "0.5", "1.5", "1e-3", "1e400"]
WORDS = ["", " ", "nan", "inf", "-inf", "auto", "all", "none", "teacher", "0x10", "1_0", "é", "a b", "../..", "x" * 300]
WORDS += ["--epochs", "1,2", "3,x", "1,1,1,1", "\u0663", "\x00"]
NAMES = ["resnet8", "resnet20", "vgg8", "ShuffleV2", "ViT-B/32", "timm:test_vit", "timm:", "timm:no", "torchvision:=x"]
NAMES += ["torchvision:squeezenet1_1", "open_clip:RN50/none", "open_clip:RN50", "timm:test_resnet={weights}"]
PATHS = ["{clip}", "{cnn}", "{weights}", "{folder}", "{folder}/none", "{text}", "/dev/null", "/proc/self/mem"]
JUNK = [*NUMBERS, *WORDS, *NAMES, *PATHS]

# What they are about, so that most values make sense.
OWN = {
    "model_s": NAMES,
    "model": [*NAMES, *PATHS],
    "clip_mode": [*NAMES, *PATHS],
    **dict.fromkeys(("path_t", "init_s", "resume", "clip_root"), PATHS),
    "data_dir": ["{folder}/none", "{text}"],
}


class Started(Exception):
    """All checks are done, and training would begin."""


def actions(script: ModuleType) -> list[argparse.Action]:
    """The flags of a script."""
    caught = []

    def catch(parser: Parser, argv: list[str] | None) -> None:
        caught.append(parser)
        raise Started

    parse = {
        train_student: options.parse_student_options,
        train_teacher: options.parse_teacher_options,
        pretrain_clip: clip_options.parse_clip_options,
    }
    with mock.patch.object(Parser, "parse_args", catch), contextlib.suppress(Started):
        parse[script]([])
    return [action for action in caught[0]._actions if action.dest != "save_dir"]


@st.composite
def command_lines(draw) -> tuple[ModuleType, list[str]]:
    """A script and its options, of which most are well-formed."""
    script = draw(st.sampled_from(list(BASE)))
    argv = list(BASE[script])
    for action in draw(st.lists(st.sampled_from(actions(script)), max_size=6)):
        flag = draw(st.sampled_from(action.option_strings))
        own = OWN.get(action.dest) or ([str(choice) for choice in action.choices] if action.choices else NUMBERS)
        value = draw(st.sampled_from(own) | st.sampled_from(own) | st.sampled_from(JUNK))
        argv += [flag] if action.nargs == 0 else draw(st.sampled_from([[flag, value], [f"{flag}={value}"]]))
    return script, argv


def no_network(*args, **kwargs):
    raise OSError("no network in this test")


@contextlib.contextmanager
def surroundings(clip: Path) -> Iterator[dict[str, str]]:
    """Files to name, no network, and training that stops where it would begin; what stands in braces."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        weights = create_model("resnet8", 0).state_dict()
        torch.save(weights, folder / "weights.pth")
        torch.save({"model": create_model("resnet14", 5).state_dict(), "arch": "resnet14"}, folder / "cnn.pth")
        (folder / "text").write_text("text")
        stack.enter_context(mock.patch.dict(dataset.DATASETS, tiny=lambda data_dir: make_dataset()))
        stack.enter_context(mock.patch.dict("os.environ", HF_HUB_OFFLINE="1"))
        stack.enter_context(mock.patch.object(torch.hub, "download_url_to_file", no_network))
        stack.enter_context(mock.patch.object(datasets.CIFAR100, "download", no_network))
        stack.enter_context(mock.patch.object(Run, "start", side_effect=Started))
        places = {"weights": "weights.pth", "cnn": "cnn.pth", "text": "text", "folder": "."}
        yield {"clip": str(clip)} | {word: str(folder / place) for word, place in places.items()}


def check(script: ModuleType, argv: list[str], names: dict[str, str]) -> str:
    """Run it; 'started', 'told' (--help and the like) or 'refused'."""
    with tempfile.TemporaryDirectory() as save_dir:
        argv = [word.replace("{", "%(").replace("}", ")s") % names if "{" in word else word for word in argv]
        argv = ["--dataset", "tiny", "--device", "cpu", *argv, "--save_dir", save_dir]
        before = snapshot(Path(names["folder"]))
        error = io.StringIO()
        try:
            with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
                script.main(argv)
            outcome = "told"
        except Started:
            outcome = "started"
        except SystemExit as stopped:
            outcome = {0: "told", None: "told", 2: "refused", 5: "too large"}[stopped.code]
        if outcome in ("refused", "too large"):
            lines = [line for line in error.getvalue().splitlines() if line and "chunk" not in line]
            assert len(lines) == 1 and ".py: error: " in lines[0], lines
        gc.collect()
        written = [name for name in snapshot(Path(save_dir)) if not name.startswith("teacher_bank")]
        assert not written, written
        assert snapshot(Path(names["folder"])) == before
    return outcome


def fuzz(clip: Path, examples: int, number: int | None = None) -> dict[str, int]:
    """Try so many command lines; how many had which outcome.

    Args:
        number: of the random order; None for the same ones each time.
    """
    counts: dict[str, int] = {}
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]

    def one(names: dict[str, str]) -> Callable[[], None]:
        @settings(
            max_examples=examples, deadline=None, database=None, derandomize=number is None, suppress_health_check=quiet
        )
        @given(command_lines())
        def trial(command: tuple[ModuleType, list[str]]) -> None:
            outcome = check(*command, names)
            counts[outcome] = counts.get(outcome, 0) + 1

        return trial if number is None else seed(number)(trial)

    with surroundings(clip) as names:
        one(names)()
    return counts


def test_random_command_lines_start_or_are_refused_in_one_line(tiny_clip):
    counts = fuzz(tiny_clip, 20)
    assert counts["started"] and counts["refused"]
