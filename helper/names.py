"""The names of runs: their folders below SAVE/student_model/, SAVE/models/ and SAVE/clip/."""

import argparse

from models.names import LIBRARIES, parse_name

from .records import hash_of, settings

# The longest name, in bytes.
_LONGEST = 72


def sized_name(model: str, resolution: int | None) -> str:
    """A student's or a CNN's name in file names, with the size of its input where that is enlarged."""
    short = parse_name(model).short
    return short if resolution is None else f"{short}@{resolution}px"


def student_run_name(opt: argparse.Namespace, data: str, identity: dict[str, str]) -> str:
    """The name of a run of train_student.py: student, teacher, data, method, seed, trial and a hash.

    The hash has six characters. It tells apart runs that differ in any option that changes the result, or in the
    content of their files. The options count as they are given: one command has one name on every machine, whatever
    ``auto`` means there. A name that would be too long loses the ends of its longest parts.

    Args:
        opt: the parsed options; ``opt.name`` is the name, where it is set.
        data: the data set's name.
        identity: the hashes of data and weights.
    """
    return opt.name or _name([opt.stem, opt.model_t, data, opt.distill], opt, identity)


def teacher_run_name(opt: argparse.Namespace, data: str, identity: dict[str, str]) -> str:
    """The name of a run of train_teacher.py: teacher, data, seed, trial and a hash, see ``student_run_name``."""
    return opt.name or _name([opt.model_t, data], opt, identity)


def clip_run_name(opt: argparse.Namespace, data: str, identity: dict[str, str]) -> str:
    """The name of a run of pretrain_clip.py: image encoder, data, seed, trial and a hash, see ``student_run_name``."""
    if isinstance(opt.vision_layers, tuple):
        vision = f"rn{'-'.join(map(str, opt.vision_layers))}"
    else:
        vision = f"vit{opt.vision_layers}-{opt.vision_patch}"
    return opt.name or _name([vision, data], opt, identity)


def _name(parts: list[str], opt: argparse.Namespace, identity: dict[str, str]) -> str:
    parts = [_plain(part) for part in parts]
    fixed = f"seed{opt.seed}_trial{{}}_{hash_of(settings(vars(opt) | identity))[:6]}"
    parts.append(opt.trial)
    while len(name := "_".join([*parts[:-1], fixed.format(parts[-1])]).encode()) > _LONGEST:
        longest = max(range(len(parts)), key=lambda place: len(parts[place]))
        parts[longest] = parts[longest][:-1]
    return name.decode()


def _plain(part: str) -> str:
    """A network's or a data set's name without the library and the size in pixels, in characters of a folder's name."""
    for library in LIBRARIES:
        part = part.removeprefix(f"{library}-")
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in part.partition("@")[0]).lstrip("-.")
