"""Tables of what ``benchmarks.on_gpu`` has measured: ``python -m report.gpu FOLDER``."""

import json
from pathlib import Path

from errors import InputError
from evaluation.tables import markdown, mean_and_deviation, title
from helper.exits import exit_on_bad_input
from helper.parser import Parser

# How far a mode's loss may be from the CPU's, relative to it.
_NEAR = {"off": 1e-4, "bf16": 1e-2, "fp16": 1e-2}

_EPOCHS = 240  # of the paper


def _read(folder: Path, step: str) -> dict:
    path = folder / f"{step}.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise InputError(f"{path} is corrupt: delete it, and run its step again") from error


def _number(value: float | str | None) -> str:
    """Three significant digits; a dash where nothing was measured."""
    return "–" if value is None else value if isinstance(value, str) else f"{float(f'{value:.3g}'):g}"


def _named(results: dict, key: str) -> dict[str, dict]:
    """The parts that have a value of this name."""
    return {name: part for name, part in results.items() if key in part}


def _distance(losses: list[float], reference: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True))


def runs_table(results: dict, reference: str = "on the CPU") -> list[tuple]:
    """Rows: each mode, whether its steps were captured, and how far its losses are from a reference's."""
    modes = _named(results, "losses")
    rows = [("20 steps of EGA", "captured", f"loss, from that {reference}, at most", "as near as it should be")]
    expected = modes.pop(reference, {}).get("losses", [])
    for name, part in modes.items():
        # The first steps of fp16 may overflow, and are then left out.
        count = 1 if name.startswith("fp16") else min(len(expected), len(part["losses"]))
        far = _distance(part["losses"][:count], expected[:count]) if expected else None
        near = None if far is None else "yes" if far <= _NEAR.get(name[:4].rstrip(","), 1e-4) else "NO"
        rows.append((name, "yes" if part["captured"] else "no", _number(far), near or "–"))
    return rows


def speed_table(results: dict) -> list[tuple]:
    """Rows: each mode's images per second, against the release's recipe and the bare student."""
    release = results.get("the release's recipe", {}).get("images/s")
    rows = [("training", "images/s", "times the release's recipe", "share of the bare student", "peak MiB")]
    for name, part in _named(results, "images/s").items():
        if not name.endswith("side by side"):
            rate, bare = part["images/s"], part.get("bare student, images/s")
            times, share = rate / release if release else None, f"{rate / bare:.0%}" if bare else None
            rows.append((name, f"{rate:.0f}", _number(times), share or "–", _number(part.get("peak MiB"))))
    return rows


def beside_table(results: dict) -> list[tuple]:
    """Rows: images per second of several runs at the same time, together."""
    found = {name: part for name, part in _named(results, "images/s").items() if name.endswith("side by side")}
    alone = found.get("1 side by side", {}).get("images/s")
    rows = [("runs", "images/s, together", "times one run")]
    return rows + [
        (name.split()[0], f"{part['images/s']:.0f}", _number(part["images/s"] / alone if alone else None))
        for name, part in found.items()
    ]


def epochs_table(results: dict) -> list[tuple]:
    """Rows: whole epochs of train_student.py, with test pass and checkpoint."""
    rows = [("train_student.py", "epoch", "seconds", "images/s in training")]
    for name, part in _named(results, "images_per_second").items():
        for number, (seconds, rate) in enumerate(
            zip(part["seconds_of_epochs"], part["images_per_second"], strict=True)
        ):
            rows.append((name, f"{number + 1}", _number(seconds), f"{rate:.0f}"))
    return rows


def kernels_table(part: dict) -> list[tuple]:
    """Rows: milliseconds of a step in each kernel."""
    total = sum(part["ms"].values())
    rows = [("kernel", "ms per step", "share")]
    return rows + [(name[:80].replace("|", "/"), f"{ms:.3f}", f"{ms / total:.1%}") for name, ms in part["ms"].items()]


def bank_table(results: dict) -> list[tuple]:
    """Rows: images per second that are encoded, by chunks of a launch; minutes for 16 views of CIFAR-100 from that."""
    rows = [("encoder", "chunks of 128 in a launch", "images/s", "16 views of CIFAR-100, minutes")]
    for name, part in _named(results, "images/s").items():
        encoder, _, chunks = name.rpartition(", ")
        rows.append((encoder, chunks, f"{part['images/s']:.0f}", _number(810_000 / part["images/s"] / 60)))
    return rows


def losses_table(results: dict) -> list[tuple]:
    """Rows: each method's step."""
    rows = [("method", "a step of 64, ms", "captured")]
    return rows + [(name, _number(part["ms"]), part["captured"]) for name, part in _named(results, "ms").items()]


def ega_table(results: dict) -> list[tuple]:
    """Rows: EGA's loss by batch, as ``benchmarks.ega_loss`` prints them."""
    parts = [part for part in results.values() if "direct, ms" in part]
    columns = [key for key in parts[0] if key != "seconds"] if parts else ["batch"]
    return [tuple(columns), *(tuple(part[key] for key in columns) for part in parts)]


def accuracy_table(results: dict) -> list[tuple]:
    """Rows: each method's accuracy after all epochs; of runs under way, how far they are."""
    rows = [("method", "seeds", "best epoch", "last epoch", "minutes of a run", "under way: epochs done")]
    for method in dict.fromkeys(name.partition("_seed")[0] for name in results):
        runs = [run for name, run in results.items() if name.partition("_seed")[0] == method and run["history"]]
        curves = [[x["test_acc"] for x in run["history"] if "test_acc" in x] for run in runs if run["finished"]]
        minutes = [sum(x["seconds"] for x in run["history"]) / 60 for run in runs if run["finished"]]
        best, last = (
            mean_and_deviation([pick(c) for c in curves]) if curves else "–" for pick in (max, lambda c: c[-1])
        )
        open_ = ", ".join(f"{len(run['history'])}" for run in runs if not run["finished"])
        took = _number(max(minutes)) if minutes else "–"
        rows.append((title(method), f"{len(curves)}", best, last, took, open_ or "none"))
    return rows


def aims(speed: dict, bank: dict) -> list[tuple]:
    """Rows: what was aimed at on one H100, and what was measured."""

    def rate(results: dict, name: str) -> float | None:
        return results.get(name, {}).get("images/s")

    def over(a: float | None, b: float | None) -> float | None:
        return a / b if a and b else None

    own = max((rate(speed, name) or 0 for name in ("captured", "compiled and captured")), default=0)
    seconds = speed.get("two epochs", {}).get("seconds_of_epochs", [])[1:]
    vit = max((part["images/s"] for name, part in _named(bank, "images/s").items() if "ViT" in name), default=None)
    found = (
        (
            f"{_EPOCHS} epochs of EGA with test passes, minutes",
            3,
            _EPOCHS * seconds[0] / 60 if seconds else None,
            False,
        ),
        ("times the release's recipe", 25, over(own, rate(speed, "the release's recipe")), True),
        (
            "eight runs side by side, runs' worth",
            2.5,
            over(rate(speed, "8 side by side"), rate(speed, "captured")),
            True,
        ),
        ("16 views of CIFAR-100 by ViT-B/32, minutes", 2, over(810_000 / 60, vit), False),
    )
    rows = [("aim", "at least or at most", "measured", "met")]
    for name, aim, value, more in found:
        met = "–" if value is None else "yes" if (value >= aim) == more or value == aim else "no"
        rows.append((name, _number(aim), "not measured" if value is None else _number(value), met))
    return rows


def report(folder: Path) -> str:
    """All tables, in Markdown.

    Raises:
        InputError: the folder holds no results.
    """
    steps = {name: _read(folder, name) for name in ("runs", "speed", "bank", "losses", "collectives", "table")}
    if not any(steps.values()):
        raise InputError(f"{folder} holds no results of benchmarks.on_gpu")
    about = steps["runs"].get("machine", {})
    lines = [", ".join(str(about[key]) for key in ("machine", "driver", "capability") if about.get(key))]
    tables = {
        "Aims": aims(steps["speed"], steps["bank"]),
        "It runs": runs_table(steps["runs"]),
        "In a process group of one": runs_table(steps["collectives"], "alone"),
        "Steps": speed_table(steps["speed"]),
        "Side by side": beside_table(steps["speed"]),
        "Epochs": epochs_table(steps["speed"]),
        "The bank": bank_table(steps["bank"]),
        "EGA's loss": ega_table(steps["losses"]),
        "Methods": losses_table({name: part for name, part in steps["losses"].items() if "captured" in part}),
        "Accuracy": accuracy_table(steps["table"]),
    }
    tables |= {name: kernels_table(part) for name, part in steps["speed"].items() if isinstance(part.get("ms"), dict)}
    for name, rows in tables.items():
        if len(rows) > 1:
            lines += [f"## {name}", markdown(rows)]
    failed = [
        f"- {step}, {name}: {part['error']}"
        for step, results in steps.items()
        for name, part in results.items()
        if part.get("error")
    ]
    return "\n\n".join(lines + (["## What failed", "\n".join(failed)] if failed else []))


def main(argv: list[str] | None = None) -> None:
    parser = Parser("report.gpu", "Print tables of what benchmarks.on_gpu has measured.")
    parser.add_argument("folder", type=Path, help="its --out")
    args = parser.parse_args(argv)
    with exit_on_bad_input(parser.prog):
        print(report(args.folder))


if __name__ == "__main__":
    main()
