"""A parser that says what is wrong in one line, and the types of its arguments."""

import argparse
import importlib.util
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

from distiller_zoo import method_table
from errors import InputError
from models import check_model_name
from models.names import parse_name

from . import launch


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Gives each flag's default, where it has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, exit code 2; shows each flag's default in ``--help``.

    Args:
        prog: the script's name.
        description: says what it does.
        raises: raise what is wrong as an InputError, and end nothing.
    """

    def __init__(self, prog: str, description: str, raises: bool = False):
        super().__init__(prog, description=description, allow_abbrev=False, formatter_class=_Formatter)
        self.raises = raises

    def _get_value(self, action: argparse.Action, arg_string: str) -> object:
        """Refuse an empty text, which is a shell's unset variable and would be the present folder as a path."""
        if not arg_string.strip() and action.type in (None, Path):
            raise argparse.ArgumentError(action, "an empty text; give a value, or leave the option out")
        return super()._get_value(action, arg_string)

    def error(self, message: str):
        if self.raises:
            raise InputError(message)
        if launch.rank() == 0:  # all processes have the same arguments
            print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise SystemExit(2)


def number(kind: type, low: float, high: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """A parser of finite numbers from ``low`` (or strictly above it) to ``high``."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value > high or value < low or (above and value == low):
            least, most = (x if kind is int else f"{x:g}" for x in (low, high))
            bound = f"{'above' if above else 'at least'} {least}" + (f" and at most {most}" if high < math.inf else "")
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} {bound}")
        return value

    return parse


positive_int = number(int, 1)
positive = number(float, 0, above=True)
weight = number(float, 0)


def epoch_list(text: str) -> list[int]:
    """'150,180,210' to [150, 180, 210]; the empty string to no decay at all."""
    try:
        epochs = [int(part) for part in text.split(",")] if text.strip() else []
    except ValueError:
        epochs = [-1]
    if any(epoch < 1 for epoch in epochs):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of epochs such as 150,180,210")
    return epochs


def queue_rows(text: str) -> int | str:
    """The number of rows of a queue, or 'bank'."""
    if text != "bank" and not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is neither bank nor a number from 1 on")
    return text if text == "bank" else int(text)


def teacher_views(text: str) -> str | int:
    """auto, all, or a number from 0 on; only the data set tells how many views there are."""
    if text not in ("auto", "all") and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not auto, all, or a number from 0 on")
    return text if text in ("auto", "all") else int(text)


def resume_file(text: str) -> str:
    """auto, none, or the path of a file."""
    if text not in ("auto", "none") and not os.path.isfile(text):
        raise argparse.ArgumentTypeError(f"{text}: no such file (auto, none, or the path of a resume.pth)")
    return text


def network_name(text: str) -> str:
    """A student or a CNN: one of the house's, ``timm:NAME``, ``torchvision:NAME`` or ``FILE.py:FUNCTION``.

    Only the library knows whether it has such a network: see ``check_model_name``.
    """
    in_library = text.startswith(("timm:", "torchvision:")) or ".py:" in text
    return _checked(parse_name if in_library else check_model_name, text)


def encoder_name(text: str) -> str:
    """A frozen encoder's name, or the path of one; loading it shows whether it exists."""
    return _checked(parse_name, text)


def _checked(check: Callable[[str], object], text: str) -> str:
    try:
        check(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def names_file(text: str) -> list[str]:
    """The names in a text file, one a line; empty lines do not count, and only a line break ends a line."""
    try:
        names = [line.strip() for line in Path(text).read_text(encoding="utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be read as a file of names, one a line") from error
    names = [name for name in names if name]
    if not names:
        raise argparse.ArgumentTypeError(f"{text} holds no name; one a line is expected")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise argparse.ArgumentTypeError(f"{text} names {', '.join(repeated)} more than once")
    return names


def trial_name(text: str) -> str:
    """A word that can be part of a folder's name."""
    if not text or not all(c.isalnum() or c in "-_." for c in text):
        raise argparse.ArgumentTypeError(f"{text!r} must be letters, digits, '-', '_' and '.'")
    return text


def tracker(text: str) -> str:
    """A tracker of experiments, which has to be installed."""
    if text not in ("wandb", "mlflow"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither wandb nor mlflow")
    if importlib.util.find_spec(text) is None:
        raise argparse.ArgumentTypeError(f"{text} is not installed: pip install {text}")
    return text


def run_name(text: str) -> str:
    """A folder's name, at most 200 bytes long."""
    if text.startswith((".", "-")) or len(trial_name(text).encode()) > 200:
        raise argparse.ArgumentTypeError(f"{text!r} must begin with a letter or a digit, and be at most 200 bytes long")
    return text


class ListMethods(argparse.Action):
    """Prints the table of methods and exits."""

    def __init__(self, option_strings, dest, help):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser, namespace, values, option_string=None):
        print(method_table())
        parser.exit()
