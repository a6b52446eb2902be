"""The table of methods. A new one is one file beside this and one row of ``METHODS``.

Classes and functions of the losses are imported from here: ``from distiller_zoo import EGA, DistillKL``. Only that
imports their file, and with it torch: a command line needs the table alone.
"""

from __future__ import annotations

import importlib
import re
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING

from errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

# The files of classes and functions that are not named as their file is.
_FILES = {
    "ABLoss": "AB",
    "Attention": "AT",
    "ContrastiveRelation": "CLIPKD",
    "CosineSmoothL1": "UNIC",
    "Correlation": "CC",
    "CRDLoss": "CRD",
    "DistillKL": "KD",
    "FactorTransfer": "FT",
    "FeatureMimicry": "CLIPKD",
    "HCL": "ReviewKD",
    "HintLoss": "FitNet",
    "InteractiveContrastive": "CLIPKD",
    "NCELoss": "NCE",
    "NSTLoss": "NST",
    "RKDLoss": "RKD",
    "Similarity": "SP",
    "Standardize": "UNIC",
    "VIDLoss": "VID",
    "WKDFeature": "WKD",
    "WKDLogit": "WKD",
    "ega_terms": "EGA",
    "kd_loss": "KD",
    "cka_loss": "CKA",
    "skd_direction": "SKD",
    "phi_standardizer": "UNIC",
    "simkd_loss": "SimKD",
    "simkd_projector": "SimKD",
    "queue_kl": "RRD",
    "standardize_logits": "KD",
    "wkd_cost": "WKD",
}
_CONNECTED = ("Boundaries", "EmbeddedCorrelation", "Factor", "Flow", "Hint", "InstanceGraph", "LayerwiseVID", "OfLast")
_FILES |= dict.fromkeys(
    (*_CONNECTED, "Overhaul", "ProjectedDirection", "ProjectedWKD", "Regression", "Review", "TwoStage"), "_connected"
)


class _Zoo(ModuleType):
    """This package; it finds the file of a name that it does not know yet."""

    def __getattr__(self, name: str):
        file = _FILES.get(name, name)
        if file.startswith("__") or find_spec(f"{__name__}.{file}") is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{file}"), name)

    def __setattr__(self, name: str, value: object) -> None:
        # Python puts an imported file here under the file's name; this name has to mean the class.
        super().__setattr__(name, getattr(value, name, value) if isinstance(value, ModuleType) else value)


zoo = sys.modules[__name__]
zoo.__class__ = _Zoo


@dataclass(frozen=True)
class Networks:
    """The facts about student and teacher that a method may ask for when its loss is built.

    Attributes:
        shapes_s, shapes_t: shapes of the features of a batch of two: stem, stages, pooled. A frozen encoder has its
            embedding alone.
        s_dim, t_dim: widths of f_s and f_t.
        targets: (N,) class of every training row that the loss will see, -1 for the rows that are held out; each image
            without a label is its own class.
        model_t: a CNN teacher's backbone; None with a frozen encoder.
        headless: whether the joint space is the frozen encoder's own.
        num_classes: number of classes.
    """

    shapes_s: list[tuple[int, ...]]
    shapes_t: list[tuple[int, ...]]
    s_dim: int
    t_dim: int
    targets: Tensor
    model_t: nn.Module | None = None
    headless: bool = False
    num_classes: int = 0

    @property
    def own_dims(self) -> tuple[int, int]:
        """Widths of own_s and own_t."""
        return self.s_dim if self.headless else self.shapes_s[-1][1], self.shapes_t[-1][1]


@dataclass(frozen=True)
class Needs:
    """The tensors that a method needs from the two networks, which are built to give them.

    Attributes:
        joint: embeddings in the joint space.
        maps: the stages' maps.
        preact_s, preact_t: the maps as they are before their last ReLU.
        reuses: a student that ends in the teacher's classifier.
    """

    joint: bool = True
    maps: bool = False
    preact_s: bool = False
    preact_t: bool = False
    reuses: bool = False


Build = Callable[[Namespace, Networks], "nn.Module"]


@dataclass(frozen=True)
class Method:
    """One row: how a method's loss is built, and its arguments.

    The arguments may be, of student (``_s``) and teacher (``_t``):

    - f: embeddings (B, D), projected to the joint space with a frozen encoder, the pooled features with a CNN;
    - joint: embeddings projected to the joint space, with either teacher;
    - own: embeddings that no head has projected: pooled features, and a frozen encoder's embedding. Where the joint
      space is the encoder's own, the student's is its embedding in that space;
    - maps: the maps of the stages, a list of (B, C, H, W); feat: stem, stages and pooled features, a list;
    - logit: (B, classes);

    and target and index, (B,), label, which is a target that may be -1, for a class that is not known, and shares
    (``ega_terms``). The loss gives a scalar, or a list of scalars to add up.

    A loss with a method ``acquaint(f_t, target, names)`` learns about the teacher before training. It is given own_t of
    all training images, each in its test view, (N, D); their classes, (N,), -1 where one is not known; and a function
    that gives a CLIP's embeddings of the classes' captions, (classes, captions, D), and None for another teacher.

    Attributes:
        build: turns options and networks into the loss that ``--beta`` weighs; None for a method without one.
        feeds: names of the loss's arguments in order; empty for a method that has a first stage only.
        weights: the defaults of (--gamma, --alpha, --beta) with a CNN teacher, RepDistiller's or the paper's.
        citation: where the method comes from.
        clip: (build, feeds) with a frozen encoder, if they differ; by default the same, unless maps are needed.
        preact: the sides, 's' and 't', that give their maps before the last ReLU.
        beta_warmup: epochs over which beta grows to its value, by default.
        relational: whether the loss compares the samples of a batch with one another, and is no mean over them. With
            many processes it then gets all their samples, unless it asks for the shares.
        waits: whether the loss waits for the device, as PyTorch's decompositions do; its step cannot be captured.
        reuses: whether the student ends in a projector to the teacher's features and in the teacher's classifier. Its
            features in ``maps`` and ``own`` are then the projected ones. A frozen encoder needs a trained head.
        clip_weights: the defaults of the weights with a frozen encoder, for a method with a loss.
        by_class: tells from the options whether the loss needs every sample's class besides its ``target``.
    """

    build: Build | None
    feeds: tuple[str, ...]
    weights: tuple[float, float, float]
    citation: str
    clip: tuple[Build, tuple[str, ...]] | None = None
    preact: str = ""
    beta_warmup: int = 0
    relational: bool = False
    waits: bool = False
    reuses: bool = False
    clip_weights: tuple[float, float, float] = (1, 0, 1)
    by_class: Callable[[Namespace], bool] = lambda opt: False

    @property
    def year(self) -> str:
        """The year of its citation."""
        return next((word for word in re.findall(r"\d+", self.citation) if len(word) == 4), "")

    @property
    def needs_maps(self) -> bool:
        """Whether the method works with CNN teachers alone."""
        return self.clip is None and self.needs(clip=False).maps

    def needs_labels(self, opt: Namespace) -> bool:
        """Whether the loss, with these options, needs a class for every sample."""
        fed = self.with_teacher(bool(opt.clip_tn))[1]
        return bool(opt.beta and ("target" in fed or self.by_class(opt)))

    def compares_logits(self, opt: Namespace) -> bool:
        """Whether KD or the loss, with these options, compares the student's logits with the teacher's."""
        return bool(opt.alpha or (opt.beta and "logit_t" in self.with_teacher(bool(opt.clip_tn))[1]))

    def needs(self, clip: bool) -> Needs:
        """The method's needs, with a frozen encoder or a CNN as the teacher."""
        build, feeds = self.with_teacher(clip)
        first_stage_only = build is not None and not feeds
        maps = first_stage_only or not {"maps_s", "feat_s"}.isdisjoint(feeds)
        return Needs(clip or "joint_s" in feeds, maps, "s" in self.preact, "t" in self.preact, self.reuses)

    def with_teacher(self, clip: bool) -> tuple[Build | None, tuple[str, ...]]:
        """``build`` and ``feeds`` with a frozen encoder or a CNN as the teacher."""
        return self.clip if clip and self.clip is not None else (self.build, self.feeds)

    def default_weights(self, clip: bool) -> tuple[float, float, float]:
        """(gamma, alpha, beta) with a frozen encoder or a CNN as the teacher."""
        return self.clip_weights if clip and self.build is not None else self.weights


_F, _JOINT, _OWN, _MAPS, _FEAT = (
    tuple(f"{what}_{whose}" for whose in "st") for what in ("f", "joint", "own", "maps", "feat")
)
_LOGIT = ("logit_s", "logit_t")


def _hint(opt: Namespace, net: Networks) -> nn.Module:
    layer = opt.hint_layer
    if layer >= min(len(net.shapes_s), len(net.shapes_t)):
        raise InputError(
            f"--hint_layer {layer}: the student has {len(net.shapes_s)} layers, the teacher "
            f"{len(net.shapes_t)}, counted from 0"
        )
    return zoo.Hint(net.shapes_s[layer], net.shapes_t[layer], layer)


def _crd(opt: Namespace, net: Networks) -> nn.Module:
    if len(net.targets[net.targets >= 0].unique()) < 2:
        raise InputError("--distill crd has no negatives to draw: all training images are of one class")
    sizes = Namespace(s_dim=net.s_dim, t_dim=net.t_dim, n_data=len(net.targets))
    return zoo.CRD(Namespace(**vars(opt) | vars(sizes)), net.targets)


def _correlation(opt: Namespace, net: Networks) -> nn.Module:
    return zoo.EmbeddedCorrelation(net.s_dim, net.t_dim, opt.feat_dim)


def _vid(opt: Namespace, net: Networks) -> nn.Module:
    channels = [(s[1], t[1]) for s, t in zip(net.shapes_s[1:-1], net.shapes_t[1:-1], strict=False)]
    return zoo.LayerwiseVID(zoo.VIDLoss(s, t, t) for s, t in channels)


def _kdsvd(opt: Namespace, net: Networks) -> nn.Module:
    # Stages are paired from the first on; the longer network's last ones are left out.
    pairs = [(s[1], t[1]) for s, t in zip(net.shapes_s[1:-1], net.shapes_t[1:-1], strict=False)]
    if len(pairs) < 2 or any(s != t for s, t in pairs):
        channels_s, channels_t = ([shape[1] for shape in shapes[1:-1]] for shapes in (net.shapes_s, net.shapes_t))
        raise InputError(
            f"KDSVD needs two or more stages, of the same channels in both networks, got {channels_s} and {channels_t}"
        )
    return zoo.KDSVD()


def _rrd(opt: Namespace, net: Networks) -> nn.Module:
    rows = None if opt.queue == "bank" else opt.queue
    return zoo.RRD(*net.own_dims, opt.feat_dim, rows, opt.rrd_T_s, opt.rrd_T_t)


def _wkd(opt: Namespace, net: Networks) -> nn.Module:
    import torch

    cost = 1 - torch.eye(net.num_classes)
    return zoo.WKDLogit(cost, opt.wkd_T, opt.wkd_gamma, by_names=opt.wkd_cost == "names")


METHODS = {
    "none": Method(None, (), (1, 0, 0), "student alone"),
    "kd": Method(None, (), (0.1, 0.9, 0), "KD: Hinton et al., 2015, arXiv 1503.02531"),
    "hint": Method(
        _hint,
        _FEAT,
        (1, 0, 100),
        "FitNet: Romero et al., ICLR 2015",
        clip=(lambda opt, net: zoo.HintLoss(), _F),
    ),
    "attention": Method(
        lambda opt, net: zoo.Attention(),
        _MAPS,
        (1, 0, 1000),
        "AT: Zagoruyko and Komodakis, ICLR 2017",
    ),
    "similarity": Method(
        lambda opt, net: zoo.OfLast(zoo.Similarity()),
        _MAPS,
        (1, 0, 3000),
        "SP: Tung and Mori, ICCV 2019",
        clip=(lambda opt, net: zoo.OfLast(zoo.Similarity()), _F),
        relational=True,
    ),
    "correlation": Method(
        _correlation,
        _F,
        (1, 0, 0.02),
        "CC: Peng et al., ICCV 2019",
        clip=(lambda opt, net: zoo.Correlation(), _F),
        relational=True,
    ),
    "vid": Method(_vid, _MAPS, (1, 0, 1), "VID: Ahn et al., CVPR 2019"),
    "crd": Method(
        _crd,
        (*_F, "index"),
        (1, 0, 0.8),
        "CRD: Tian et al., ICLR 2020",
        relational=True,
        by_class=lambda opt: opt.mode == "relax",
    ),
    "kdsvd": Method(_kdsvd, _MAPS, (1, 0, 1), "KD-SVD: Lee et al., ECCV 2018", waits=True),
    "fsp": Method(
        lambda opt, net: zoo.Flow(net.shapes_s, net.shapes_t),
        (),
        (1, 0, 50),
        "FSP: Yim et al., CVPR 2017",
    ),
    "rkd": Method(lambda opt, net: zoo.RKDLoss(), _F, (1, 0, 1), "RKD: Park et al., CVPR 2019", relational=True),
    "pkt": Method(lambda opt, net: zoo.PKT(), _F, (1, 0, 30000), "PKT: Passalis and Tefas, ECCV 2018", relational=True),
    "abound": Method(
        lambda opt, net: zoo.Boundaries(net.shapes_s, net.shapes_t),
        (),
        (1, 0, 1),
        "AB: Heo et al., AAAI 2019",
        preact="st",
    ),
    "factor": Method(
        lambda opt, net: zoo.Factor(net.shapes_s, net.shapes_t),
        _FEAT,
        (1, 0, 200),
        "FT: Kim et al., NeurIPS 2018",
    ),
    "nst": Method(lambda opt, net: zoo.NSTLoss(), _MAPS, (1, 0, 50), "NST: Huang and Wang, 2017, arXiv 1707.01219"),
    "nce": Method(
        lambda opt, net: zoo.NCELoss(0.1),
        (*_JOINT, "target"),
        (1, 0, 1),
        "NCE: in Ma et al., BMVC 2022",
        relational=True,
    ),
    "ccl": Method(
        lambda opt, net: zoo.CCL(),
        (*_JOINT, "target", *_LOGIT),
        (1, 0, 1),
        "CCL: Chen et al., CVPR 2021",
        relational=True,
    ),
    "irg": Method(
        lambda opt, net: zoo.InstanceGraph(),
        (*_JOINT, *_LOGIT, *_MAPS),
        (1, 0, 1),
        "IRG: Liu et al., CVPR 2019",
        clip=(lambda opt, net: zoo.IRG(), (*_JOINT, *_LOGIT)),
        relational=True,
    ),
    "ega": Method(
        lambda opt, net: zoo.EGA(opt.node_weight, opt.edge_weight),
        (*_JOINT, "shares"),
        (1, 0, 1),
        "EGA: Ma et al., BMVC 2022",
        relational=True,
    ),
    "dkd": Method(
        lambda opt, net: zoo.DKD(opt.dkd_alpha, opt.dkd_beta, opt.kd_T),
        (*_LOGIT, "target"),
        (1, 0, 1),
        "DKD: Zhao et al., CVPR 2022",
        beta_warmup=20,
    ),
    "dist": Method(
        lambda opt, net: zoo.DIST(T=opt.kd_T), _LOGIT, (1, 0, 2), "DIST: Huang et al., NeurIPS 2022", relational=True
    ),
    "reviewkd": Method(
        lambda opt, net: zoo.Review(net.shapes_s, net.shapes_t),
        _FEAT,
        (1, 0, 5),
        "ReviewKD: Chen et al., CVPR 2021",
        preact="t",
        beta_warmup=20,
    ),
    "ofd": Method(
        lambda opt, net: zoo.Overhaul(net.shapes_s[1:-1], net.shapes_t[1:-1], net.model_t.get_bn_before_relu()),
        _MAPS,
        (1, 0, 1e-3),
        "OFD: Heo et al., ICCV 2019",
        preact="st",
    ),
    "simkd": Method(
        lambda opt, net: zoo.Regression(),
        _MAPS,
        (0, 0, 1),
        "SimKD: Chen et al., CVPR 2022",
        clip=(lambda opt, net: zoo.Regression(), _OWN),
        reuses=True,
        clip_weights=(0, 0, 1),
    ),
    "pefd": Method(
        lambda opt, net: zoo.PEFD(*net.own_dims),
        _OWN,
        (1, 0, 25),
        "PEFD: Chen et al., NeurIPS 2022",
        clip=(lambda opt, net: zoo.PEFD(*net.own_dims, relu=False), _OWN),
    ),
    "itrd": Method(
        lambda opt, net: zoo.ITRD(*net.own_dims, opt.itrd_alpha, (2, opt.itrd_mutual)),
        _OWN,
        (1, 0, 1),
        "ITRD: Miles et al., BMVC 2022",
        relational=True,
    ),
    "mlld": Method(lambda opt, net: zoo.MLLD(), _LOGIT, (0.1, 0, 0.9), "MLLD: Jin et al., CVPR 2023", relational=True),
    "nd": Method(
        lambda opt, net: zoo.ProjectedDirection(*net.own_dims, net.num_classes),
        (*_OWN, "target"),
        (1, 3.5, 2),
        "KD++: Wang et al., 2023, arXiv 2305.17007",
    ),
    "ofa": Method(
        lambda opt, net: zoo.OFA(opt.ofa_eps), (*_LOGIT, "target"), (1, 0, 1), "OFA: Hao et al., NeurIPS 2023"
    ),
    "clipkd": Method(
        lambda opt, net: zoo.CLIPKD(*net.own_dims),
        (*_OWN, "label"),
        (1, 0, 1),
        "CLIP-KD: Yang et al., CVPR 2024",
        relational=True,
    ),
    "unic": Method(
        lambda opt, net: zoo.UNIC(*net.own_dims, phi=opt.standardize == "phi", project=not net.headless),
        _OWN,
        (1, 0, 1),
        "UNIC: Sariyildiz et al., ECCV 2024",
    ),
    "vkd": Method(lambda opt, net: zoo.VkD(*net.own_dims), _OWN, (1, 0, 1), "VkD: Miles et al., CVPR 2024"),
    "rrd": Method(_rrd, _OWN, (1, 0, 1), "RRD: Giakoumoglou and Stathaki, 2024, arXiv 2407.12073", relational=True),
    "nkd": Method(
        lambda opt, net: zoo.NKD(opt.nkd_T, opt.nkd_gamma),
        (*_LOGIT, "target"),
        (1, 0, 1),
        "NKD: Yang et al., ICCV 2023",
    ),
    "ttm": Method(lambda opt, net: zoo.TTM(opt.ttm_gamma), _LOGIT, (1, 0, 45), "TTM: Zheng and Yang, ICLR 2024"),
    "wttm": Method(
        lambda opt, net: zoo.TTM(opt.ttm_gamma, weighted=True), _LOGIT, (1, 0, 4), "WTTM: Zheng and Yang, ICLR 2024"
    ),
    "srd": Method(
        lambda opt, net: zoo.SRD(*net.own_dims),
        _OWN,
        (1, 0, 2),
        "SRD: Miles and Mikolajczyk, AAAI 2024",
        relational=True,
    ),
    "rld": Method(
        lambda opt, net: zoo.RLD(opt.rld_alpha, opt.rld_beta, opt.kd_T),
        (*_LOGIT, "target"),
        (1, 0, 1),
        "RLD: Sun et al., ICCV 2025",
        beta_warmup=20,
    ),
    "wkd": Method(
        _wkd,
        (*_LOGIT, "target"),
        (1, 0, 1),
        "WKD on logits: Lv et al., NeurIPS 2024",
    ),
    "wkd_feature": Method(
        lambda opt, net: zoo.ProjectedWKD(net.shapes_s[-2], net.shapes_t[-2]),
        _MAPS,
        (1, 0, 0.08),
        "WKD on features: Lv et al., NeurIPS 2024",
    ),
    "abkd": Method(
        lambda opt, net: zoo.ABKD(opt.abkd_alpha, opt.abkd_beta, opt.kd_T),
        _LOGIT,
        (1, 0, 32),
        "ABKD: Wang et al., ICML 2025",
    ),
    "skd": Method(
        lambda opt, net: zoo.SKD(opt.kd_T), _LOGIT, (1, 0, 0.5), "SKD: Jeong et al., CVPR 2026", relational=True
    ),
    "cka": Method(lambda opt, net: zoo.CKA(), _OWN, (1, 0, 1), "CKA: Kornblith et al., ICML 2019", relational=True),
}


def method_table() -> str:
    """Markdown: each method's year, what it needs, its feeds, its default weights, and its source."""
    facts = ("method", "year", "labels", "maps", "relational")
    header = (*facts, "arguments, CNN teacher", "arguments, frozen encoder", "r a b, CNN", "encoder", "source")
    rows = [header]
    for name, method in METHODS.items():
        told = ("target" in method.feeds, method.needs_maps, method.relational)
        fed = ["first stage only" if method.build and not method.feeds else " ".join(method.feeds)]
        fed.append("needs maps" if method.needs_maps else " ".join(method.with_teacher(clip=True)[1]))
        weights = [" ".join(f"{weight:g}" for weight in method.default_weights(clip)) for clip in (False, True)]
        marks = ("yes" if fact else "" for fact in told)
        own = "" if method.needs_maps else weights[1]
        rows.append((name, method.year, *marks, *fed, weights[0], own, method.citation))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, tuple("-" * width for width in widths))
    return "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows)
