"""The command line: groups of flags that the scripts share, and their checks."""

import argparse
import os

from distiller_zoo import METHODS
from models import check_model_name, model_dict
from models.names import OWN, PUBLISHED, parse_name, short_name

from .augment_options import add_augment_options, resolve_augment
from .data_options import (
    add_data_options,
    add_holdout_option,
    add_label_options,
    add_probe_options,
    check_data,
    check_labels,
    follow_data,
)
from .names import sized_name
from .parser import (
    ListMethods,
    Parser,
    encoder_name,
    epoch_list,
    names_file,
    network_name,
    number,
    positive,
    positive_int,
    queue_rows,
    resume_file,
    run_name,
    teacher_views,
    tracker,
    trial_name,
    weight,
)

# RepDistiller's learning rates of CNNs, students and teachers.
_LEARNING_RATE = 0.05
_LEARNING_RATES = dict.fromkeys(("MobileNetV2", "ShuffleV1", "ShuffleV2"), 0.01)

# AdamW's of a network from scratch (Loshchilov and Hutter, ICLR 2019; DeiT's for small batches).
_ADAMW = {"learning_rate": 1e-3, "weight_decay": 0.05}
_WEIGHT_DECAY = 5e-4

_FEATURE_DIM = 256

# Banks are cheap to build on a GPU; on a CPU a view of CIFAR-100 takes ViT-B/32 half an hour.
AUTO_VIEWS = {"cuda": 16, "cpu": 1}

_ENCODERS = f"OpenAI's {', '.join(PUBLISHED)}, or a checkpoint in its format; open_clip:ARCH/TAG, timm:NAME or "
_ENCODERS += "torchvision:NAME, each with =PATH for local weights; FILE.py:FUNCTION[=PATH], a network of your own"
_LIBRARIES = f"{', '.join(model_dict)}; timm:NAME or torchvision:NAME, any classifier of theirs"
_NETWORKS = f"{_LIBRARIES}; FILE.py:FUNCTION, a network of your own"


def add_run_options(parser: Parser, epochs: int = 240, batch_size: int = 64) -> argparse._ArgumentGroup:
    """Add the flags that every run has; returns the group "speed", which other flags may join."""
    group = parser.add_argument_group("run")
    group.add_argument("--save_dir", default="./save", help="folder of all results")
    group.add_argument(
        "-t", "--trial", type=trial_name, default="1", help="a word that tells otherwise equal runs apart"
    )
    group.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0, help="seed of weights, order and views")
    what = "name of the run's folder; if unset, it depends on every option and file that changes the result"
    group.add_argument("--name", type=run_name, metavar="NAME", help=what)
    what = "auto: go on with the run of this name, if there is one; none: begin anew; PATH: go on from this resume.pth"
    group.add_argument("--resume", type=resume_file, default="auto", metavar="auto|none|PATH", help=what)
    what = "number of training epochs; --name NAME --epochs N goes on with a finished run to epoch N"
    group.add_argument("--epochs", type=positive_int, default=epochs, help=what)
    group.add_argument(
        "--batch_size", type=positive_int, default=batch_size, help="samples per step, of all processes together"
    )
    group.add_argument("--max_steps", type=positive_int, help="at most so many steps per epoch, for trials")
    group.add_argument("--eval_freq", type=positive_int, default=1, help="test after every so many epochs")
    group.add_argument("--print_freq", type=positive_int, default=100, help="print after every so many steps")
    group.add_argument("--save_freq", type=positive_int, default=40, help="keep a checkpoint every so many epochs")
    what = "save every N steps, so that an interrupted run goes on from there; if unset, it goes on from its last epoch"
    group.add_argument("--save_steps", type=positive_int, metavar="N", help=what)
    what = "write a checkpoint after an epoch at most every S seconds; a killed run goes on from its last checkpoint, "
    what += "a run stopped by a signal from its last epoch; 0: after every epoch"
    group.add_argument("--save_seconds", type=number(float, 0), default=30, metavar="S", help=what)
    what = "log to Weights & Biases or to MLflow too, beside TensorBoard; pip install the package first"
    group.add_argument("--log", type=tracker, metavar="wandb|mlflow", help=what)

    group = parser.add_argument_group("speed")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="what to compute on")
    group.add_argument(
        "--amp",
        choices=("auto", "off", "bf16", "fp16"),
        default="auto",
        help="autocast; auto: bf16 where the processor has it; off: float32, on a GPU too, without TF32",
    )
    return group


def add_optimizer_options(parser: Parser, learning_rate: str) -> argparse._ArgumentGroup:
    """Add the flags of the optimiser and its schedule; the defaults are the paper's.

    Args:
        learning_rate: what it trains, and its value when it is unset.
    """
    group = parser.add_argument_group("optimisation")
    add = group.add_argument
    add("--optimizer", choices=("sgd", "adamw"), default="sgd", help="sgd, with momentum, is the paper's")
    add("--learning_rate", type=positive, help=f"that of the {learning_rate}; adamw {_ADAMW['learning_rate']}")
    add("--schedule", choices=("step", "cosine"), default="step", help="cosine: from the learning rate to zero")
    add("--lr_decay_epochs", type=epoch_list, default="150,180,210", help="step: decay after these epochs")
    add("--lr_decay_rate", type=positive, default=0.1, help="step: factor of each decay")
    add("--warmup_epochs", type=number(int, 0), default=0, help="the learning rate first grows over so many epochs")
    add("--weight_decay", type=weight, help=f"if unset, {_WEIGHT_DECAY}; adamw {_ADAMW['weight_decay']}")
    add("--momentum", type=number(float, 0, 1), default=0.9, help="sgd: momentum")
    return group


def _resolve_optimizer(parser: Parser, opt: argparse.Namespace, learning_rate: float) -> None:
    """Fill in the learning rate and the weight decay where they are unset."""
    defaults = {"learning_rate": learning_rate, "weight_decay": _WEIGHT_DECAY}
    for name, default in (_ADAMW if opt.optimizer == "adamw" else defaults).items():
        if getattr(opt, name) is None:
            setattr(opt, name, default)
    if opt.warmup_epochs >= opt.epochs and opt.warmup_epochs:
        parser.error(f"--warmup_epochs {opt.warmup_epochs} leaves none of --epochs {opt.epochs} at the learning rate")


def add_bank_options(group: argparse._ArgumentGroup) -> None:
    """Add the flags of the frozen encoder's weights, its input and the bank of its embeddings."""
    group.add_argument("--clip_root", default="./CLIP", help="folder of OpenAI's published weights")
    group.add_argument(
        "--teacher_resolution", type=positive_int, metavar="R", help="input of the teacher in pixels; if unset, its own"
    )
    group.add_argument(
        "--teacher_views",
        type=teacher_views,
        default="auto",
        metavar="auto|0|N|all",
        help="views of each image that the teacher encodes once; 0: it encodes every batch; auto: "
        f"{AUTO_VIEWS['cuda']} on CUDA, {AUTO_VIEWS['cpu']} on a CPU",
    )


def add_training_speed_options(speed: argparse._ArgumentGroup, what: str, graph: bool = True) -> None:
    """Add ``--compile``, ``--graph`` and ``--sync_bn``.

    Args:
        what: the network that is compiled.
        graph: whether steps can be replayed.
    """
    speed.add_argument(
        "--compile",
        choices=("auto", "on", "off"),
        default="auto",
        help=f"torch.compile {what}; auto: where it is faster and the run is long enough to earn it back",
    )
    if graph:
        what = "replay a step as one CUDA graph; auto: on CUDA, in one process, where no step waits for the GPU"
        speed.add_argument("--graph", choices=("auto", "on", "off"), default="auto", help=what)
    speed.add_argument(
        "--sync_bn",
        action="store_true",
        help="batch norm over the samples of all processes, not of each alone; needs CUDA",
    )


def student_parser(raises: bool = False) -> Parser:
    """The command line of train_student.py; ``raises``: see ``Parser``."""
    what = "Distil a frozen teacher, an encoder such as CLIP or a CNN, into a small student."
    parser = Parser("train_student.py", what, raises)
    group = parser.add_argument_group("method")
    group.add_argument("--distill", choices=tuple(METHODS), default="ega", help="distillation method")
    group.add_argument("--list", action=ListMethods, help="print the table of methods and exit")
    for short, name, what in (
        ("-r", "gamma", "classification"),
        ("-a", "alpha", "KD on the logits"),
        ("-b", "beta", "the method's own loss"),
    ):
        group.add_argument(short, f"--{name}", type=weight, help=f"weight of {what}; if unset, the method's own")
    group.add_argument("-node", "--node_weight", type=weight, default=0.8, help="EGA: weight of node matching")
    group.add_argument("-edge", "--edge_weight", type=weight, default=0.24, help="EGA: weight of edge matching")
    group.add_argument("--kd_T", type=positive, default=4, help="temperature of KD, DKD, DIST, RLD, ABKD and SKD")
    group.add_argument(
        "--logit_standard", action="store_true", help="standardise the logits that KD and the method compare"
    )
    group.add_argument(
        "--beta_warmup",
        "--warmup",
        type=number(int, 0),
        metavar="N",
        help="epochs over which -b grows to its value; if unset, the method's own",
    )
    group.add_argument(
        "--init_epochs", type=positive_int, default=30, help="abound, factor, fsp: epochs of the first stage"
    )
    group.add_argument("--hint_layer", type=int, choices=range(5), default=2, help="hint: which features, stem first")
    group.add_argument(
        "--feat_dim", type=positive_int, default=128, help="crd, correlation, rrd: dimension of the embeddings"
    )
    group.add_argument(
        "--mode", choices=("exact", "relax"), default="exact", help="crd: positives are the image itself, or its class"
    )
    group.add_argument("--nce_k", type=positive_int, default=16384, help="crd: negatives per image")
    group.add_argument("--nce_t", type=positive, default=0.07, help="crd: temperature")
    group.add_argument("--nce_m", type=number(float, 0, 1), default=0.5, help="crd: momentum of the memory")
    group.add_argument("--dkd_alpha", type=weight, default=1, help="dkd: weight of the target class")
    group.add_argument("--dkd_beta", type=weight, default=8, help="dkd: weight of the other classes")
    what = "simkd: what the projector is narrower by than the teacher"
    group.add_argument("--simkd_factor", type=positive_int, default=2, help=what)
    group.add_argument("--itrd_alpha", type=positive, default=1.5, help="itrd: order of the correlation's term")
    group.add_argument("--itrd_mutual", type=weight, default=0.05, help="itrd: weight of the Gram matrices' term")
    group.add_argument("--ofa_eps", type=positive, default=1, help="ofa: power that raises the target's probability")
    group.add_argument("--nkd_T", type=positive, default=3, help="nkd: temperature of the other classes")
    group.add_argument("--nkd_gamma", type=weight, default=3.5, help="nkd: weight of the other classes")
    group.add_argument("--ttm_gamma", type=positive, default=0.1, help="ttm, wttm: the teacher's power")
    group.add_argument("--wkd_T", type=positive, default=8, help="wkd: temperature of the transport")
    group.add_argument("--wkd_gamma", type=weight, default=600, help="wkd: weight of the transport")
    what = "wkd: cost between classes, from the teacher's embeddings of their images, or of their names by a CLIP"
    group.add_argument("--wkd_cost", choices=("images", "names"), default="images", help=what)
    what = "unic: each dimension by its own deviation, or all by one rotation and scale (PHI-S)"
    group.add_argument("--standardize", choices=("std", "phi"), default="std", help=what)
    what = "rrd: number of the teacher's past embeddings; bank: those of all training images, in the test view"
    group.add_argument("--queue", type=queue_rows, default=16384, metavar="N|bank", help=what)
    group.add_argument("--rrd_T_s", type=positive, default=0.1, help="rrd: temperature of the student's similarities")
    group.add_argument("--rrd_T_t", type=positive, default=0.02, help="rrd: temperature of the teacher's similarities")
    group.add_argument("--rld_alpha", type=weight, default=1, help="rld: weight of the confidence")
    group.add_argument("--rld_beta", type=weight, default=8, help="rld: weight of the other classes")
    group.add_argument(
        "--abkd_alpha", type=number(float, -4, 4), default=0.8, help="abkd: power of the teacher's probabilities"
    )
    group.add_argument(
        "--abkd_beta", type=number(float, -4, 4), default=0.3, help="abkd: power of the student's probabilities"
    )

    group = parser.add_argument_group("student")
    group.add_argument(
        "--model_s", type=network_name, default="resnet8x4", metavar="NAME", help=f"student's backbone: {_NETWORKS}"
    )
    group.add_argument("--pretrained_s", action="store_true", help="start from the library's own weights")
    group.add_argument("--init_s", metavar="PATH", help="start from these weights of the same backbone")
    group.add_argument(
        "--student_resolution", type=positive_int, metavar="R", help="enlarge the student's images to so many pixels"
    )
    group.add_argument("--feature_dim", type=positive_int, default=_FEATURE_DIM, help="dimension of the joint space")

    group = parser.add_argument_group("teacher")
    group.add_argument(
        "--joint",
        choices=("projected", "teacher"),
        help="projected: each side has a head that leads to the joint space; teacher: the joint space is the frozen "
        "encoder's own, and the teacher has no head and needs no label; if unset, projected, or teacher where no "
        "picture has a label",
    )
    group.add_argument(
        "--clip_mode", type=encoder_name, default="ViT-B/32", metavar="NAME|PATH", help=f"frozen encoder: {_ENCODERS}"
    )
    group.add_argument(
        "--clip_tn",
        type=int,
        choices=(0, 1),
        default=1,
        help="1: a frozen encoder, unless --path_t is a CNN; 0: insist on a CNN",
    )
    group.add_argument(
        "--path_t",
        help="checkpoint of a CNN teacher, or of a frozen encoder's head that train_teacher.py trained; if unset, the "
        "head is trained with the student",
    )
    add_bank_options(group)
    group.add_argument(
        "--views",
        choices=("independent", "shared"),
        default="independent",
        help="shared: student and encoder see the same view, one of the encoder's (--teacher_views N, all or 0); with "
        "a CNN they always do",
    )

    add_data_options(parser).add_argument(
        "--leave_out",
        type=names_file,
        metavar="FILE",
        help="leave out the images of the classes that this file names, one a line; evaluate.py --zero_shot then tells "
        "how well the student recognises classes that it has never seen",
    )
    add_label_options(parser, "the student learns from the others by distillation alone")
    add_holdout_option(parser)
    add_probe_options(parser)
    add_augment_options(parser)
    group = add_optimizer_options(parser, f"student; if unset, {_LEARNING_RATE}, {' and '.join(_LEARNING_RATES)} 0.01")
    group.add_argument(
        "--learning_rate_t", type=positive, default=0.01, help="that of the teacher's head; it never decays"
    )
    add_training_speed_options(add_run_options(parser), "the student")
    return parser


def parse_student_options(argv: list[str] | None = None, raises: bool = False) -> argparse.Namespace:
    """Parse and check train_student.py's options; unset ones get the values of the method and the teacher.

    Args:
        raises: see ``Parser``.
    """
    parser = student_parser(raises)
    opt = parser.parse_args(argv)
    check_data(parser, opt)
    _resolve_teacher(parser, opt)
    opt.stem = sized_name(opt.model_s, opt.student_resolution)  # begins the names of its files of weights
    follow_data(parser, opt)
    method, clip = METHODS[opt.distill], bool(opt.clip_tn)
    if clip and method.needs_maps:
        able = ", ".join(name for name, other in METHODS.items() if not other.needs_maps)
        parser.error(
            f"--distill {opt.distill} needs feature maps, which a frozen encoder does not give; use a CNN teacher "
            f"(--path_t), or one of {able}"
        )
    if clip and method.reuses and opt.path_t is None:
        parser.error(
            f"--distill {opt.distill} gives the student the teacher's classifier: train the encoder's head with "
            "train_teacher.py first, and name it by --path_t"
        )
    for name, default in zip(("gamma", "alpha", "beta"), method.default_weights(clip), strict=True):
        if getattr(opt, name) is None:
            setattr(opt, name, default)
    if opt.beta_warmup is None:
        opt.beta_warmup = method.beta_warmup
    _resolve_optimizer(parser, opt, _LEARNING_RATES.get(opt.model_s, _LEARNING_RATE))
    if opt.pretrained_s and opt.init_s is not None:
        parser.error("--pretrained_s and --init_s both say what the student starts from; leave one of them out")
    if opt.pretrained_s and parse_name(opt.model_s).library not in ("timm", "torchvision"):
        parser.error(f"--pretrained_s: {opt.model_s} is no timm:NAME or torchvision:NAME; use --init_s PATH")

    if not opt.gamma and not opt.alpha and not opt.beta:
        why = ", as no picture has a label" if opt.labels == 0 and opt.distill == "none" else ""
        parser.error(f"-r, -a and -b are all 0{why}: nothing would be trained")
    if opt.distill == "kd" and not opt.alpha:
        parser.error("--distill kd with -a 0 distils nothing; set -a (0.9, with -r 0.1) or use --distill none")
    if method.build is None and opt.beta:
        parser.error(f"--distill {opt.distill} has no loss for -b {opt.beta:g} to weigh; leave -b at 0")
    if opt.distill == "none" and opt.alpha:
        parser.error("--distill none trains the student alone, without the teacher that -a needs; use --distill kd")
    if opt.distill == "ega" and opt.beta and not opt.node_weight and not opt.edge_weight:
        parser.error("--node_weight and --edge_weight are both 0: EGA would distil nothing; use --distill none")
    if opt.distill == "wkd" and opt.wkd_cost == "names" and not understands_text(opt):
        parser.error("--wkd_cost names needs a CLIP as the teacher, which embeds names: use --wkd_cost images")
    if opt.logit_standard and not method.compares_logits(opt):
        parser.error(f"--logit_standard: --distill {opt.distill} compares no logits; set -a, or use another method")
    _check_joint(parser, opt)
    resolve_augment(parser, opt)
    try:
        check_labels(opt, opt.labels)
    except ValueError as error:
        parser.error(str(error))
    _check_network(parser, "--model_s", opt.model_s)
    return opt


def understands_text(opt) -> bool:
    """Whether the teacher is a CLIP with a text encoder."""
    return bool(opt.clip_tn) and parse_name(opt.clip_mode).library in (None, "open_clip")


def _check_joint(parser: Parser, opt: argparse.Namespace) -> None:
    """Refuse ``--joint teacher`` without a teacher, or with options that need the teacher's head."""
    if opt.joint == "projected":
        return
    if opt.distill == "none":
        parser.error("--joint teacher needs a teacher, but --distill none has none")
    if opt.path_t is not None:
        parser.error("--joint teacher uses a frozen encoder's own space, without a head: leave --path_t out")
    if METHODS[opt.distill].compares_logits(opt):
        others = {name: x for name, x in METHODS.items() if x.build and not x.needs_maps and not x.reuses}
        fed = {name: x.with_teacher(clip=True)[1] for name, x in others.items()}
        unfit = {"logit_t"} | ({"target"} if opt.labels < 1 else set())
        able = ", ".join(name for name in others if not unfit.intersection(fed[name]))
        projected = "--joint projected, or " if opt.labels else ""  # its head learns from labels
        parser.error(
            f"with --joint teacher the teacher has no classifier, so {'KD (-a)' if opt.alpha else opt.distill} has no "
            f"logits to compare: use {projected}one of {able} with -a 0"
        )
    if opt.feature_dim != _FEATURE_DIM:
        parser.error(f"--feature_dim {opt.feature_dim}: --joint teacher takes the encoder's dimension; leave it out")
    opt.feature_dim = None


def _resolve_teacher(parser: Parser, opt: argparse.Namespace) -> None:
    """Set ``clip_tn``, whether the teacher is a frozen encoder or a CNN, and ``model_t``, its name."""
    arch = None
    if opt.path_t is not None:
        from .teacher import architecture  # here, as it reads the file with torch

        try:
            arch = architecture(opt.path_t)
        except (ValueError, OSError) as error:
            parser.error(" ".join(str(error).split()))
    if opt.clip_tn == 0 and opt.path_t is None and opt.distill != "none":
        parser.error("--clip_tn 0 needs --path_t, the checkpoint of the CNN teacher")
    if opt.clip_tn == 0 and opt.path_t is not None and arch is None:
        parser.error(f"--clip_tn 0 asks for a CNN, but --path_t {opt.path_t} is the head of a frozen encoder")
    if arch is not None:
        opt.clip_tn = 0
    if opt.clip_tn == 0 and (opt.teacher_views != "auto" or opt.views == "shared" or opt.teacher_resolution):
        parser.error(
            "--teacher_views, --views and --teacher_resolution are for a frozen encoder: a CNN teacher always sees the "
            "student's own view, as in its training"
        )
    if opt.views == "shared" and opt.teacher_views == "auto":
        parser.error("--views shared limits the student's views too: set their number by --teacher_views N, all or 0")
    if opt.clip_tn == 0:
        opt.teacher_views = None
    opt.model_t = "none" if opt.distill == "none" else arch and parse_name(arch).short
    if opt.model_t is None:
        opt.model_t = short_name(opt.clip_mode, opt.teacher_resolution)


def parse_teacher_options(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse train_teacher.py's options."""
    what = "Train a teacher: a head (projection and classifier) on a frozen encoder, or a CNN from scratch."
    parser = Parser("train_teacher.py", what)
    group = parser.add_argument_group("teacher")
    group.add_argument(
        "--model",
        type=encoder_name,
        default="ViT-B/32",
        metavar="NAME|PATH",
        help=f"frozen encoder: {_ENCODERS}; CNN: {_LIBRARIES}",
    )
    group.add_argument(
        "--clip_tn",
        type=int,
        choices=(0, 1),
        help="1: a head on the frozen encoder; 0: a CNN from scratch; if unset, 0 for this project's own CNNs, else 1",
    )
    group.add_argument(
        "--feature_dim", type=positive_int, default=_FEATURE_DIM, help="head: dimension of the joint space"
    )
    add_bank_options(group)
    add_data_options(parser)
    add_label_options(parser, "the others are left out", low=0)
    add_holdout_option(parser)
    slow = " and ".join(_LEARNING_RATES)
    add_optimizer_options(parser, f"head or the CNN; if unset, head 0.01, CNN {_LEARNING_RATE}, {slow} 0.01")
    add_training_speed_options(add_run_options(parser), "a CNN")
    opt = parser.parse_args(argv)
    check_data(parser, opt)
    opt.path_t, opt.joint = None, "projected"  # the head, or the CNN, is trained here
    follow_data(parser, opt)
    if opt.clip_tn is None:
        opt.clip_tn = int(opt.model not in model_dict)
    if opt.clip_tn:
        if parse_name(opt.model).library is None and opt.model not in PUBLISHED and not os.path.isfile(opt.model):
            encoders = f"{', '.join(PUBLISHED)}, open_clip:NAME, timm:NAME, torchvision:NAME"
            known = f"{', '.join(model_dict)}; frozen encoders: {encoders}"
            parser.error(f"--model {opt.model}: no CNN, neither a file nor a published CLIP; CNNs: {known}")
        opt.clip_mode, opt.model_t = opt.model, short_name(opt.model, opt.teacher_resolution)
        if opt.compile == "on":
            parser.error("--compile on: a head is two linear layers, which compiling makes no faster; leave it at auto")
        if opt.graph == "on":
            parser.error("--graph on: only a student's and a CNN's steps are replayed, not a head's; leave it at auto")
        opt.compile = opt.graph = "off"
        _resolve_optimizer(parser, opt, 0.01)
        return opt
    if opt.teacher_views != "auto":
        parser.error("--teacher_views is for a frozen encoder: a CNN sees every view")
    if parse_name(opt.model).library in OWN:
        parser.error(f"--model {opt.model}: a network of your own is a frozen encoder here; leave --clip_tn at 1")
    opt.model_t, opt.teacher_views = sized_name(opt.model, opt.teacher_resolution), None
    _resolve_optimizer(parser, opt, _LEARNING_RATES.get(opt.model, _LEARNING_RATE))
    _check_network(parser, "--model", opt.model)
    return opt


def _check_network(parser: Parser, flag: str, model: str) -> None:
    """Refuse a network that does not exist. This comes last, as it may import the network's library."""
    try:
        check_model_name(model)
    except ValueError as error:
        parser.error(f"{flag}: {error}")


def recorded_options(opt: argparse.Namespace) -> dict:
    """The options that a run records: all but ``name`` and ``resume``."""
    return {name: value for name, value in vars(opt).items() if name not in ("name", "resume")}
