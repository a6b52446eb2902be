"""What lies beside an exported student: labels, preprocess.py, config.json for programs, a model card for people."""

import shutil
from pathlib import Path

from dataset import decode
from distiller_zoo import METHODS
from evaluation.student import TrainedStudent
from helper import checkpoint
from models.library import library_options
from models.names import LIBRARIES, OWN, parse_name

from .predict import EXACT_8_BIT

# The options that say how a student was trained; paths are left out, as they are of no use elsewhere.
_TRAINING = ("distill", "model_t", "dataset", "labels", "joint", "gamma", "alpha", "beta", "epochs", "batch_size")
_TRAINING += ("optimizer", "learning_rate", "schedule", "seed", "dataset_sha256", "clip_sha256", "teacher_sha256")

# 8-bit kernels are right where they give at least this share of images (%) the class that float32 gives them.
_RIGHT = 99


def model_config(opened: TrainedStudent, form: str, file: str, takes_pixels: bool) -> dict:
    """What a program has to know about an exported student.

    Args:
        form: 'onnx', 'exported' or 'safetensors'.
        file: its name.
        takes_pixels: whether 8-bit pixels go in.
    """
    name, resolution = parse_name(opened.run.options["model_s"]), opened.network.resolution
    options = {}
    if name.library in LIBRARIES:
        weighted = name.path is not None or opened.run.options["pretrained_s"]
        options = library_options(name, resolution, weighted)
    mean, std = map(list, opened.normalization)
    trained = {key: opened.run.option(key) for key in _TRAINING if opened.run.option(key) is not None}
    config = {
        "format": form,
        "file": file,
        "quantized": None,
        "library": {None: "RepDistiller", **dict.fromkeys(OWN, "own")}.get(name.library, name.library),
        "architecture": name.short if name.library in OWN else name.name,
        "num_classes": len(opened.classes),
        "network_options": options,
        "resolution": resolution,
        "input": {
            "name": "pixels" if takes_pixels else "image",
            "dtype": "uint8" if takes_pixels else "float32",
            "size": opened.image_size,
            "exact_decode": bool(opened.run.option("exact_decode")),
            "stored_size": opened.stored_size,
            "mean": mean,
            "std": std,
        },
        "training": trained | {"epoch": opened.state["epoch"]},
    }
    if name.library == "timm":  # so that timm's own local-dir:FOLDER finds what it needs
        size, share = resolution or opened.image_size, opened.image_size / opened.stored_size
        seen = {"input_size": [3, size, size], "mean": mean, "std": std, "interpolation": "bicubic", "crop_pct": share}
        config |= {"model_args": options, "pretrained_cfg": seen | {"num_classes": len(opened.classes)}}
    return config


def usage(config: dict) -> str:
    """Lines of Python that classify a picture with an exported file, from within its folder."""
    facts, size = config["input"], config["input"]["size"]
    stored, border = facts["stored_size"], (facts["stored_size"] - size) // 2
    centre = f"[{border}:{border + size}, {border}:{border + size}]" if border else ""
    exact = ", exact=True" if facts["exact_decode"] else ""
    read = f'read_square("picture.png", {stored}{exact}){centre}.transpose(2, 0, 1)[None]'
    lines = ["import numpy as np", "from preprocess import read_square"]
    if facts["dtype"] == "uint8":
        first = [f"pixels = np.array({read})"]
    else:
        mean, std = (f"np.float32({values}).reshape(3, 1, 1)" for values in (facts["mean"], facts["std"]))
        first = [f"mean, std = {mean}, {std}", f"image = (np.float32({read}) / 255 - mean) / std"]
    given = facts["name"]
    if config["format"] == "onnx":
        lines += ["import onnxruntime"]
        run, options = [], ""
        if config["quantized"]:
            run = ["options = onnxruntime.SessionOptions()  # exact on every x86 processor"]
            run += ['options.add_session_config_entry("{}", "{}")'.format(*EXACT_8_BIT)]
            options = ", options"
        run += [
            f'session = onnxruntime.InferenceSession("{config["file"]}"{options})',
            f'logits, embedding = session.run(None, {{"{given}": {given}}})',
        ]
    elif config["format"] == "exported":
        lines += ["import torch"]
        run = [
            f'program = torch.export.load("{config["file"]}").module()',
            f"logits, embedding = program(torch.from_numpy({given}))",
        ]
    else:
        run = _network_lines(config, lines)
    last = ['labels = open("labels.txt", encoding="utf-8", newline="\\n").read().split("\\n")']
    last += ["print(labels[int(logits[0].argmax())])"]
    return "\n".join([*lines, "", *first, *run, *last])


def _network_lines(config: dict, imports: list[str]) -> list[str]:
    """Lines that build a library's network and load the weights; their imports are added to ``imports``."""
    name, file, size = config["architecture"], config["file"], config["resolution"]
    options = "".join(f", {key}={value!r}" for key, value in config["network_options"].items())
    options = f"num_classes={config['num_classes']}{options}"
    imports += ["import torch"]
    if config["library"] == "timm":
        imports += ["import timm"]
        run = [f'network = timm.create_model("{name}", {options}, checkpoint_path="{file}").eval()']
    elif config["library"] == "torchvision":
        imports += ["import torchvision", "from safetensors.torch import load_file"]
        run = [f'network = torchvision.models.get_model("{name}", {options}).eval()']
        run += ["state = network.state_dict()  # with the versions of its layers, which the file lacks"]
        run += [f'state.update(load_file("{file}"))', "network.load_state_dict(state)"]
    else:
        imports += ["from safetensors.torch import load_file", "from models import model_dict  # RepDistiller's"]
        run = [f'network = model_dict["{name}"]({options}).eval()', f'network.load_state_dict(load_file("{file}"))']
    given = "torch.from_numpy(image)"
    if size not in (None, config["input"]["size"]):
        run += [f'image = torch.nn.functional.interpolate({given}, ({size}, {size}), mode="bilinear")']
        given = "image"
    return [*run, f"logits = network({given})"]


def processors(config: dict) -> str:
    """On which processors the accuracy of an 8-bit file holds.

    Args:
        config: the content of config.json.
    """
    measured, same = config["processor"], f"{config['same_class']:.2f} %"
    if config["same_class"] < _RIGHT:
        return f"The accuracy holds for {measured} alone: it gives only {same} of the images the class of float32."
    return (
        f"The file was checked on {measured}. Its accuracy holds on x86 processors with VNNI. On those without, it "
        f"needs the session entry {' = '.join(EXACT_8_BIT)}: onnxruntime's sums of products saturate there otherwise."
    )


def card(config: dict, table: str) -> str:
    """The model card, in Markdown.

    Args:
        config: the content of config.json.
        table: see ``costs.cost_table``.
    """
    trained, facts = config["training"], config["input"]
    source = "" if config["library"] in ("RepDistiller", "own") else f" of {config['library']}"
    taught = "trained without a teacher"
    if trained["distill"] != "none":
        taught = f"taught by {trained['model_t']} ({METHODS[trained['distill']].citation})"
    labels = "" if trained["labels"] == 1 else f", a share of {trained['labels']:g} of its images labelled"
    accuracy = "not measured: there were no labels" if config["accuracy"] is None else f"{config['accuracy']:.2f} %"
    if config["quantized"]:
        accuracy += f"\n- **Processors**: {processors(config)}"
    what = f"(pixels / 255 − mean) / std, mean {facts['mean']}, std {facts['std']}"
    if facts["dtype"] == "uint8":
        what = "8-bit pixels (B, 3, H, W), RGB"
    outputs = "logits (B, classes)"
    if config["format"] != "safetensors":
        outputs += " and embeddings (B, D)"
    return f"""# {config["architecture"]} on {trained["dataset"]}

A {config["architecture"]}{source} for {config["num_classes"]} classes (`labels.txt`), {taught}.

- **Training**: {trained["dataset"]}{labels}, {trained["epochs"]} epochs of batches of {trained["batch_size"]},
  {trained["optimizer"]}, learning rate {trained["learning_rate"]:g}, seed {trained["seed"]}; this is epoch
  {trained["epoch"]}.
- **Accuracy** (top-1, the test split of {trained["dataset"]}): {accuracy}
- **Input**: pictures of {facts["size"]} × {facts["size"]} pixels: {what}. `preprocess.py` reads a
  picture as it has to be: upright, 16 bits scaled to 8, white behind transparency, the short side resized, the centre
  cut out.
- **Output**: {outputs}
- **Meant for** pictures like those it was trained on; how it does on others was not measured.

```python
{usage(config)}
```

{table}
"""


def write_beside(folder: Path, config: dict, classes: list[str], table: str) -> None:
    """Write labels.txt, preprocess.py, README.md and config.json."""
    shutil.copyfile(decode.__file__, folder / "preprocess.py")
    (folder / "labels.txt").write_text("".join(f"{name}\n" for name in classes), encoding="utf-8", newline="\n")
    (folder / "README.md").write_text(card(config, table), encoding="utf-8")
    checkpoint.write_json(config, folder / "config.json")
