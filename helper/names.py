"""What runs are called: the folders below SAVE/student_model/ and SAVE/models/."""

import argparse

from dataset import folder_name
from models.names import parse_name


def sized_name(model: str, resolution: int | None) -> str:
    """A student's or a CNN's name in names of runs and files, with the size of its input where it is enlarged."""
    short = parse_name(model).short
    return short if resolution is None else f"{short}@{resolution}px"


def _optimizer_name(opt: argparse.Namespace) -> str:
    """The part of a run's name that tells another optimiser or schedule than the paper's."""
    parts = [opt.optimizer] * (opt.optimizer != "sgd") + [opt.schedule] * (opt.schedule != "step")
    return "".join(f"_{part}" for part in parts)


def data_name(opt: argparse.Namespace) -> str:
    """The part of a run's name that tells what it learns from."""
    name = folder_name(opt.data_dir, opt.image_size) if opt.dataset == "folder" else opt.dataset
    left_out = f"_without{len(opt.leave_out)}" if getattr(opt, "leave_out", None) else ""
    labels = getattr(opt, "labels", 1)
    return name + left_out + (f"_labels{labels:g}" if labels < 1 else "")


def teacher_run_name(opt: argparse.Namespace) -> str:
    """The release's name of a head and RepDistiller's of a CNN, with the seed and the trial."""
    if opt.clip_tn:
        name = f"{opt.model_t}_f{opt.feature_dim}_{data_name(opt)}_lr_{opt.learning_rate:g}"
    else:
        name = f"{opt.model_t}_{data_name(opt)}_lr_{opt.learning_rate:g}_decay_{opt.weight_decay:g}"
    return f"{name}{_optimizer_name(opt)}_seed{opt.seed}_trial{opt.trial}"


def student_run_name(opt: argparse.Namespace) -> str:
    """The release's name of a run, without its colons, with the weight a, the seed and the trial.

    Under RepDistiller's protocol the joint space and EGA's weights are in it for EGA alone.
    """
    space = f"_f{opt.feature_dim}" if opt.clip_tn or opt.distill == "ega" else ""
    space = "_jointteacher" if opt.joint == "teacher" else space
    ega = f"_node{opt.node_weight:g}_edge{opt.edge_weight:g}" if opt.clip_tn or opt.distill == "ega" else ""
    standard = "_logitstandard" if opt.logit_standard else ""
    protocol = "" if opt.clip_tn or opt.distill != "none" else "_cnn"
    start = "_pretrained" if opt.pretrained_s else "" if opt.init_s is None else "_init"
    student = sized_name(opt.model_s, opt.student_resolution) + start
    return (
        f"S{student}_T{opt.model_t}{space}_{data_name(opt)}_{opt.distill}{protocol}{standard}"
        f"_r{opt.gamma:g}_a{opt.alpha:g}_b{opt.beta:g}{ega}"
        f"_batchsize{opt.batch_size}{_optimizer_name(opt)}_seed{opt.seed}_trial{opt.trial}"
    )


def clip_run_name(opt: argparse.Namespace) -> str:
    if isinstance(opt.vision_layers, tuple):
        vision = f"rn{'-'.join(map(str, opt.vision_layers))}"
    else:
        vision = f"vit{opt.vision_layers}-{opt.vision_patch}"
    return (
        f"{vision}_w{opt.vision_width}_px{opt.resolution}_dim{opt.embed_dim}_text{opt.text_layers}-{opt.text_width}"
        f"_{data_name(opt)}_batchsize{opt.batch_size}_seed{opt.seed}_trial{opt.trial}"
    )
