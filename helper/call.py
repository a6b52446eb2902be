"""A script's options as keywords of Python."""

import difflib
import os
from typing import TYPE_CHECKING

from dataset import DATASETS, FROM_FILES
from errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from .parser import Parser


def command_line(parser: "Parser", keywords: dict) -> list[str]:
    """The arguments that say the same as keywords.

    Args:
        parser: of the script.
        keywords: options by name, as 'batch_size' or 'b'. True stands for a flag alone, None and False for nothing; a
            list is several values, with commas between them where the option is one word.

    Raises:
        InputError: the parser has no such option.
    """
    actions = {}
    for action in parser._actions:
        if action.dest in ("help", "list"):  # these print and exit
            continue
        for name in (action.dest, *(text.lstrip("-") for text in action.option_strings)):
            actions.setdefault(name, action)
    argv = []
    for key, value in keywords.items():
        if key not in actions:
            close = difflib.get_close_matches(key, actions, n=1)
            raise InputError(f"there is no option {key}" + (f"; did you mean {close[0]}?" if close else ""))
        if value is None or value is False:
            continue
        action = actions[key]
        flag = next(text for text in action.option_strings if text.startswith("--"))
        if action.nargs == 0:
            argv.append(flag)
        elif isinstance(value, list | tuple):
            texts = [*map(str, value)]
            argv += [flag, *texts] if action.nargs else [f"{flag}={','.join(texts)}"]
        else:
            argv.append(f"{flag}={value}")
    return argv


def data_options(data: str | os.PathLike | list | tuple | None) -> dict:
    """The options of a data set's name, or of folders of images."""
    if data is None:
        return {}
    if isinstance(data, str) and data in (*DATASETS, *FROM_FILES):
        return {"dataset": data}
    return {"dataset": "folder", "data_dir": data}


def network_option(network: "str | os.PathLike | nn.Module | None") -> str | None:
    """A network's name; one for a module, see ``models.own.give``."""
    if network is None or isinstance(network, str | os.PathLike):
        return network and str(network)
    from models.own import give  # here, as it imports torch

    return give(network)
