"""The command line: groups of flags that the scripts share, their checks, and the runs' names."""

import argparse
import math
import sys
from collections.abc import Callable

from dataset import DATASETS
from dataset.views import NUM_VIEWS
from distiller_zoo import METHODS, method_table
from models import model_dict
from models.clip_teacher import PUBLISHED, short_name

from . import distributed
from .runtime import AUTO_VIEWS
from .teacher import architecture

# RepDistiller's learning rates of CNNs, students and teachers.
_LEARNING_RATE = 0.05
_LEARNING_RATES = dict.fromkeys(("MobileNetV2", "ShuffleV1", "ShuffleV2"), 0.01)


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Gives each flag's default, where it has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, exit code 2; shows each flag's default in ``--help``."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False, formatter_class=_Formatter)

    def error(self, message: str):
        if distributed.rank() == 0:  # of many processes, all are given the same
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
            bound = f"{'above' if above else 'at least'} {low:g}" + (
                f" and at most {high:g}" if high < math.inf else ""
            )
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


def teacher_views(text: str) -> str:
    """auto, all, or 0 to 162."""
    if text == "all":
        return str(NUM_VIEWS)
    if text != "auto" and not (text.isdigit() and int(text) <= NUM_VIEWS):
        raise argparse.ArgumentTypeError(f"{text!r} is not auto, all, or a number from 0 to {NUM_VIEWS}")
    return text


def trial_name(text: str) -> str:
    """A word that can be part of a folder's name."""
    if not text or not all(c.isalnum() or c in "-_." for c in text):
        raise argparse.ArgumentTypeError(f"{text!r} must be letters, digits, '-', '_' and '.'")
    return text


def add_run_options(parser: Parser, epochs: int = 240, batch_size: int = 64) -> argparse._ArgumentGroup:
    """Where a run is, how long it is, what it prints, and what it computes on; the group of the last."""
    group = parser.add_argument_group("run")
    group.add_argument("--save_dir", default="./save", help="folder of all results")
    group.add_argument(
        "-t", "--trial", type=trial_name, default="1", help="a word that tells otherwise equal runs apart"
    )
    group.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of weights, order and views")
    group.add_argument("--resume", default="auto", metavar="auto|none|PATH", help="auto: go on from the last epoch")
    group.add_argument("--epochs", type=positive_int, default=epochs, help="number of training epochs")
    group.add_argument(
        "--batch_size", type=positive_int, default=batch_size, help="samples per step, of all processes together"
    )
    group.add_argument("--max_steps", type=positive_int, help="at most so many steps per epoch, for trials")
    group.add_argument("--eval_freq", type=positive_int, default=1, help="test after every so many epochs")
    group.add_argument("--print_freq", type=positive_int, default=100, help="print after every so many steps")
    group.add_argument("--save_freq", type=positive_int, default=40, help="keep a checkpoint of every so many epochs")

    group = parser.add_argument_group("speed")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="what to compute on")
    group.add_argument(
        "--amp",
        choices=("auto", "off", "bf16", "fp16"),
        default="auto",
        help="autocast; auto: bf16 where the processor has it",
    )
    return group


def add_data_options(parser: Parser) -> None:
    """The data set and where it lies."""
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=tuple(DATASETS), default="cifar100", help="data set")
    group.add_argument("--data_dir", default="./data", help="folder of the data sets")


def add_sgd_options(parser: Parser, learning_rate: str) -> argparse._ArgumentGroup:
    """The paper's optimiser and schedule.

    Args:
        learning_rate: whose it is, and what it becomes when it is unset.
    """
    group = parser.add_argument_group("optimisation")
    group.add_argument("--learning_rate", type=positive, help=f"of the {learning_rate}")
    group.add_argument("--lr_decay_epochs", type=epoch_list, default="150,180,210", help="decay after these epochs")
    group.add_argument("--lr_decay_rate", type=positive, default=0.1, help="factor of each decay")
    group.add_argument("--weight_decay", type=weight, default=5e-4, help="weight decay")
    group.add_argument("--momentum", type=number(float, 0, 1), default=0.9, help="momentum")
    return group


def add_bank_options(group: argparse._ArgumentGroup) -> None:
    """The frozen CLIP's weights and the bank of its embeddings."""
    group.add_argument("--clip_root", default="./CLIP", help="folder of CLIP's published weights")
    group.add_argument(
        "--teacher_views",
        type=teacher_views,
        default="auto",
        metavar="auto|0|N|all",
        help="views of each image that the teacher encodes, once; 0 encodes every batch; auto: "
        f"{AUTO_VIEWS['cuda']} on CUDA, {AUTO_VIEWS['cpu']} on a CPU",
    )


def add_training_speed_options(speed: argparse._ArgumentGroup, what: str) -> None:
    """Whether to compile a network, and what batch norm sees of a batch that is spread over many processes."""
    speed.add_argument(
        "--compile",
        choices=("auto", "on", "off"),
        default="auto",
        help=f"torch.compile {what}; auto: where it is faster and the run is long enough to earn it back",
    )
    speed.add_argument(
        "--sync_bn",
        action="store_true",
        help="batch norm over the samples of all processes, not of each alone; needs CUDA",
    )


class _ListMethods(argparse.Action):
    """Prints the table of methods and exits."""

    def __init__(self, option_strings, dest, help):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser, namespace, values, option_string=None):
        print(method_table())
        parser.exit()


def student_parser() -> Parser:
    """The command line of train_student.py."""
    parser = Parser("Distil a frozen teacher, CLIP or a CNN, into a small student.")
    group = parser.add_argument_group("method")
    group.add_argument("--distill", choices=tuple(METHODS), default="ega", help="distillation method")
    group.add_argument("--list", action=_ListMethods, help="print the table of methods and exit")
    for short, name, what in (
        ("-r", "gamma", "classification"),
        ("-a", "alpha", "KD on the logits"),
        ("-b", "beta", "the method's own loss"),
    ):
        group.add_argument(short, f"--{name}", type=weight, help=f"weight of {what}; if unset, the method's own")
    group.add_argument("-node", "--node_weight", type=weight, default=0.8, help="EGA: weight of node matching")
    group.add_argument("-edge", "--edge_weight", type=weight, default=0.24, help="EGA: weight of edge matching")
    group.add_argument("--kd_T", type=positive, default=4, help="temperature of KD, DKD and DIST")
    group.add_argument(
        "--logit_standard", action="store_true", help="standardise the logits that KD and the method compare"
    )
    group.add_argument(
        "--warmup", type=number(int, 0), help="epochs over which -b grows to its value; if unset, the method's own"
    )
    group.add_argument("--init_epochs", type=positive_int, default=30, help="abound, factor, fsp: of the first stage")
    group.add_argument("--hint_layer", type=int, choices=range(5), default=2, help="hint: which features, stem first")
    group.add_argument(
        "--feat_dim", type=positive_int, default=128, help="crd, correlation: dimension of the embeddings"
    )
    group.add_argument(
        "--mode", choices=("exact", "relax"), default="exact", help="crd: positives are the image, or its class"
    )
    group.add_argument("--nce_k", type=positive_int, default=16384, help="crd: negatives per image")
    group.add_argument("--nce_t", type=positive, default=0.07, help="crd: temperature")
    group.add_argument("--nce_m", type=number(float, 0, 1), default=0.5, help="crd: momentum of the memory")
    group.add_argument("--dkd_alpha", type=weight, default=1, help="dkd: weight of the target class")
    group.add_argument("--dkd_beta", type=weight, default=8, help="dkd: weight of the other classes")

    group = parser.add_argument_group("student")
    group.add_argument("--model_s", choices=tuple(model_dict), default="resnet8x4", help="student's backbone")
    group.add_argument("--feature_dim", type=positive_int, default=256, help="dimension of the joint space")

    group = parser.add_argument_group("teacher")
    group.add_argument(
        "--clip_mode", default="ViT-B/32", metavar="NAME|PATH", help=f"CLIP: {', '.join(PUBLISHED)}, or a checkpoint"
    )
    group.add_argument(
        "--clip_tn", type=int, choices=(0, 1), default=1, help="1: a CLIP, unless --path_t is a CNN; 0: insist on a CNN"
    )
    group.add_argument(
        "--path_t",
        help="checkpoint of a CNN, the teacher; or a CLIP's head that train_teacher.py trained, frozen. If unset, the "
        "CLIP's head is trained jointly",
    )
    add_bank_options(group)
    group.add_argument(
        "--views",
        choices=("independent", "shared"),
        default="independent",
        help="shared: the CLIP sees the student's view (needs --teacher_views all or 0), as a CNN always does",
    )

    add_data_options(parser)
    parser.add_argument_group("selection").add_argument(
        "--holdout",
        type=number(float, 0, 0.5, above=True),
        metavar="F",
        help="hold out this fraction of the training set and choose the best epoch on it, not on the test set",
    )
    group = add_sgd_options(parser, f"student; if unset, {_LEARNING_RATE}, {' and '.join(_LEARNING_RATES)} 0.01")
    group.add_argument("--learning_rate_t", type=positive, default=0.01, help="of the teacher's head; never decayed")
    add_training_speed_options(add_run_options(parser), "the student")
    return parser


def parse_student_options(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check train_student.py's options; what is unset becomes the method's and the teacher's own."""
    parser = student_parser()
    opt = parser.parse_args(argv)
    _resolve_teacher(parser, opt)
    method, clip = METHODS[opt.distill], bool(opt.clip_tn)
    if clip and method.needs_maps:
        able = ", ".join(name for name, other in METHODS.items() if not other.needs_maps)
        parser.error(
            f"--distill {opt.distill} needs feature maps, which a CLIP does not give; use a CNN teacher "
            f"(--path_t), or one of {able}"
        )
    for name, default in zip(("gamma", "alpha", "beta"), method.default_weights(clip), strict=True):
        if getattr(opt, name) is None:
            setattr(opt, name, default)
    if opt.warmup is None:
        opt.warmup = method.warmup
    if opt.learning_rate is None:
        opt.learning_rate = _LEARNING_RATES.get(opt.model_s, _LEARNING_RATE)

    if not opt.gamma and not opt.alpha and not opt.beta:
        parser.error("-r, -a and -b are all 0: nothing would be trained")
    if opt.distill == "kd" and not opt.alpha:
        parser.error("--distill kd with -a 0 distils nothing; set -a (0.9, with -r 0.1) or use --distill none")
    if method.build is None and opt.beta:
        parser.error(f"--distill {opt.distill} has no loss for -b {opt.beta:g} to weigh; leave -b at 0")
    if opt.distill == "none" and opt.alpha:
        parser.error("--distill none trains the student alone, without the teacher that -a needs; use --distill kd")
    if opt.distill == "ega" and opt.beta and not opt.node_weight and not opt.edge_weight:
        parser.error("--node_weight and --edge_weight are both 0: EGA would distil nothing; use --distill none")
    sees_logits = opt.alpha or (opt.beta and "logit_s" in method.with_teacher(clip)[1])
    if opt.logit_standard and not sees_logits:
        parser.error(f"--logit_standard: --distill {opt.distill} compares no logits; set -a, or use another method")
    return opt


def _resolve_teacher(parser: Parser, opt: argparse.Namespace) -> None:
    """Whether the teacher is a CLIP or a CNN (``clip_tn``), and its name (``model_t``)."""
    arch = None
    if opt.path_t is not None:
        try:
            arch = architecture(opt.path_t)
        except (ValueError, OSError) as error:
            parser.error(" ".join(str(error).split()))
    if opt.clip_tn == 0 and opt.path_t is None and opt.distill != "none":
        parser.error("--clip_tn 0 needs --path_t, the checkpoint of the CNN to use in CLIP's place")
    if opt.clip_tn == 0 and opt.path_t is not None and arch is None:
        parser.error(f"--clip_tn 0 asks for a CNN, but --path_t {opt.path_t} is the head of a CLIP")
    if arch is not None:
        opt.clip_tn = 0
    if opt.clip_tn == 0 and (opt.teacher_views != "auto" or opt.views == "shared"):
        parser.error("--teacher_views and --views are a CLIP's: a CNN teacher always sees the student's own view")
    if opt.views == "shared" and opt.teacher_views not in ("0", str(NUM_VIEWS)):
        parser.error("--views shared shows the teacher any of the 162 views: it needs --teacher_views all or 0")
    if opt.clip_tn == 0:
        opt.teacher_views = None
    opt.model_t = "none" if opt.distill == "none" else arch or short_name(opt.clip_mode)


def parse_teacher_options(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse train_teacher.py's options."""
    parser = Parser("Train a teacher: a head (projection and classifier) on a frozen CLIP, or a CNN from scratch.")
    group = parser.add_argument_group("teacher")
    group.add_argument(
        "--model",
        default="ViT-B/32",
        metavar="NAME|PATH",
        help=f"CLIP: {', '.join(PUBLISHED)}, or a checkpoint; CNN: {', '.join(model_dict)}",
    )
    group.add_argument("--feature_dim", type=positive_int, default=256, help="CLIP: dimension of the joint space")
    add_bank_options(group)
    add_data_options(parser)
    add_sgd_options(parser, f"head; if unset, 0.01; of a CNN {_LEARNING_RATE}, {' and '.join(_LEARNING_RATES)} 0.01")
    add_training_speed_options(add_run_options(parser), "a CNN")
    opt = parser.parse_args(argv)
    opt.path_t = None  # the teacher is trained here
    opt.clip_tn = int(opt.model not in model_dict)
    if opt.clip_tn:
        opt.clip_mode, opt.model_t = opt.model, short_name(opt.model)
        opt.learning_rate = opt.learning_rate or 0.01
    else:
        opt.model_t = opt.model
        opt.learning_rate = opt.learning_rate or _LEARNING_RATES.get(opt.model, _LEARNING_RATE)
    if opt.clip_tn and opt.compile == "on":
        parser.error("--compile on: a head is two linear layers, which compiling makes no faster; leave it at auto")
    if not opt.clip_tn and opt.teacher_views != "auto":
        parser.error("--teacher_views is a CLIP's: a CNN sees every view")
    if not opt.clip_tn:
        opt.teacher_views = None
    return opt


def teacher_run_name(opt: argparse.Namespace) -> str:
    """The release's name of a head and RepDistiller's of a CNN, with the seed and the trial."""
    if opt.clip_tn:
        name = f"{opt.model_t}_f{opt.feature_dim}_{opt.dataset}_lr_{opt.learning_rate:g}"
    else:
        name = f"{opt.model_t}_{opt.dataset}_lr_{opt.learning_rate:g}_decay_{opt.weight_decay:g}"
    return f"{name}_seed{opt.seed}_trial{opt.trial}"


def student_run_name(opt: argparse.Namespace) -> str:
    """The release's name of a run, without its colons, with the weight a, the seed and the trial.

    Under RepDistiller's protocol the joint space and EGA's weights are in it for EGA alone.
    """
    space = f"_f{opt.feature_dim}" if opt.clip_tn or opt.distill == "ega" else ""
    ega = f"_node{opt.node_weight:g}_edge{opt.edge_weight:g}" if opt.clip_tn or opt.distill == "ega" else ""
    standard = "_logitstandard" if opt.logit_standard else ""
    protocol = "" if opt.clip_tn or opt.distill != "none" else "_cnn"
    return (
        f"S{opt.model_s}_T{opt.model_t}{space}_{opt.dataset}_{opt.distill}{protocol}{standard}"
        f"_r{opt.gamma:g}_a{opt.alpha:g}_b{opt.beta:g}{ega}"
        f"_batchsize{opt.batch_size}_seed{opt.seed}_trial{opt.trial}"
    )
