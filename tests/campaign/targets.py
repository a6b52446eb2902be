"""What faults meet: commands and files, a row each, and the inputs that they are given."""

from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from PIL import Image

import pretrain_clip
import train_student
import train_teacher
from benchmarks.random_clip import write_archive
from conftest import TINY_VIT, make_dataset
from models import create_model

# It knows few words: a teacher of images needs none.
SMALL_VIT = (*TINY_VIT[:6], 100, *TINY_VIT[7:])

COMMON = ["--dataset", "tiny", "--device", "cpu", "--amp", "off", "--batch_size", "16"]
STUDENT = ["--model_s", "resnet8", "--epochs", "3"]
EGA = [*STUDENT, "--clip_mode", "{clip}", "--feature_dim", "8"]
CNN = [*STUDENT, "--path_t", "{cnn}"]
VIT = ["--vision_layers", "1", "--vision_width", "64", "--vision_patch", "16", "--text_layers", "1", "--embed_dim"]
SAVE_STEPS = ["--save_steps", "2"]
SHORT = ["--epochs", "1", "--max_steps", "1"]
FOLDER = [*STUDENT, "--distill", "none", "--dataset", "folder", "--data_dir", "{images}", "--image_size", "32", *SHORT]


class Target(NamedTuple):
    """A command whose end is compared; {clip} and the like stand for files that the campaign makes first."""

    script: ModuleType
    options: list[str]
    processes: int = 1


# What is killed and stopped. A new script is a row here.
TARGETS = {
    "train_student, CLIP": Target(train_student, [*EGA, "--teacher_views", "2"]),
    "train_student, CNN": Target(train_student, [*CNN, "--distill", "hint"]),
    "train_student, CRD": Target(
        train_student, [*EGA, "--teacher_views", "2", "--distill", "crd", "--nce_k", "20", "--feat_dim", "8"]
    ),
    "train_student, first stage": Target(
        train_student, [*CNN, "--distill", "fsp", "--learning_rate", "0.001", "--init_epochs", "2"]
    ),
    "train_teacher, head": Target(
        train_teacher, ["--model", "{clip}", "--feature_dim", "8", "--teacher_views", "2", "--epochs", "6"]
    ),
    "train_teacher, CNN": Target(train_teacher, ["--model", "resnet8", "--epochs", "3"]),
    "pretrain_clip": Target(pretrain_clip, [*VIT, "16", "--epochs", "3"]),
    "the bank": Target(train_student, [*EGA, "--teacher_views", "60", *SHORT]),
    "the images": Target(train_student, FOLDER),
    "train_student, CLIP, two processes": Target(train_student, [*EGA, "--teacher_views", "2"], processes=2),
    "train_teacher, CNN, two processes": Target(train_teacher, ["--model", "resnet8", "--epochs", "3"], processes=2),
    "pretrain_clip, two processes": Target(pretrain_clip, [*VIT, "16", "--epochs", "3"], processes=2),
    "the bank, two processes": Target(train_student, [*EGA, "--teacher_views", "60", *SHORT], processes=2),
    "the images, two processes": Target(train_student, FOLDER, processes=2),
}


class Damage(NamedTuple):
    """A file that is damaged, and the command that meets it.

    options: of the command, which is train_student.py.
    pattern: of a file that an earlier, shorter run left, which the command goes on with; None for an input.
    input: the name of an input instead.
    """

    options: list[str]
    pattern: str | None
    input: str | None = None


RESUMED = [*EGA, "--teacher_views", "2"]

# What is flipped and cut. A new kind of file is a row here.
FILES = {
    "resume.pth": Damage(RESUMED, "save/student_model/*/resume.pth"),
    "MODEL_last.pth": Damage(RESUMED, "save/student_model/*/resnet8_last.pth"),
    "options.json": Damage(RESUMED, "save/student_model/*/options.json"),
    "metrics.jsonl": Damage(RESUMED, "save/student_model/*/metrics.jsonl"),
    "the bank's rows": Damage(RESUMED, "save/teacher_bank/*/embeddings.fp16"),
    "the bank's checksums": Damage(RESUMED, "save/teacher_bank/*/crc32.u32"),
    "bank.json": Damage(RESUMED, "save/teacher_bank/*/bank.json"),
    "the images' rows": Damage(FOLDER, "save/images/*/images.u8"),
    "the images' checksums": Damage(FOLDER, "save/images/*/crc32.u32"),
    "images.json": Damage(FOLDER, "save/images/*/images.json"),
    "--clip_mode, TorchScript": Damage(RESUMED, None, "clip"),
    "--clip_mode, state dict": Damage(
        [*STUDENT, "--clip_mode", "{clip_state}", "--feature_dim", "8"], None, "clip_state"
    ),
    "--path_t, CNN": Damage([*CNN, "--distill", "kd"], None, "cnn"),
    "--path_t, head": Damage([*RESUMED, "--path_t", "{head}"], None, "head"),
    "--init_s": Damage([*STUDENT, "--distill", "none", "--init_s", "{weights}"], None, "weights"),
}


def write_inputs(paths: dict[str, Path]) -> None:
    """Write those that no command makes: a CLIP as an archive and as a state dict, a student's weights, pictures."""
    write_archive(paths["clip"], SMALL_VIT)
    torch.save(dict(torch.jit.load(paths["clip"]).state_dict()), paths["clip_state"])
    torch.manual_seed(0)
    torch.save(create_model("resnet8", 0).state_dict(), paths["weights"])
    draw_pictures(paths["images"])


def draw_pictures(folder: Path) -> None:
    """A folder of 600 pictures of 3 classes for training, and 30 for tests."""
    data = make_dataset(num_train=600, num_test=30, num_classes=3)
    for name, split in (("train", data.train), ("test", data.test)):
        for number, (image, target) in enumerate(zip(split.images, split.targets.tolist(), strict=True)):
            path = folder / name / f"class_{target}" / f"{number:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).resize((64, 48)).save(path)
