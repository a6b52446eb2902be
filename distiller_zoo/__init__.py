"""The table of methods. A new one is one file beside this and one row of ``METHODS``."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from .EGA import EGA, ega_terms
from .KD import DistillKL, kd_loss

__all__ = ["EGA", "METHODS", "DistillKL", "Method", "ega_terms", "kd_loss"]


@dataclass(frozen=True)
class Method:
    """One row: how a method's loss is built and what it is fed.

    Attributes:
        build: options to the module of the loss that ``--beta`` weighs; None for a method without one.
        feeds: the module's arguments in order, of: f_s, f_t, logit_s, logit_t, target, index.
        weights: the defaults of (--gamma, --alpha, --beta) with a CLIP teacher.
        citation: where the method comes from.
    """

    build: Callable[[object], nn.Module] | None
    feeds: tuple[str, ...]
    weights: tuple[float, float, float]
    citation: str


METHODS = {
    "none": Method(None, (), (1, 0, 0), "the student alone"),
    "kd": Method(None, (), (0.1, 0.9, 0), "Hinton et al., 2015, arXiv 1503.02531"),
    "ega": Method(lambda opt: EGA(opt.node_weight, opt.edge_weight), ("f_s", "f_t"), (1, 0, 1), "Ma et al., BMVC 2022"),
}
