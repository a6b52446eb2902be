"""Time and memory of every method's loss, forward and backward, against its formula: ``python -m benchmarks.zoo``."""

import argparse
import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import distiller_zoo as losses
from benchmarks import zoo_references as references
from benchmarks.common import available_memory, machine, median_seconds, peak_memory, print_table, three_digits
from benchmarks.release_recipe import direct_ega
from distiller_zoo._connected import LayerwiseVID, Regression
from helper.exits import exit_on_bad_input
from helper.parser import number, positive, positive_int
from helper.runtime import resolve_device


@dataclass(frozen=True)
class Sizes:
    """The sizes that decide shapes, beside the batch; by default those of resnet32x4 and resnet8x4 on CIFAR-100.

    Attributes:
        channels: channels of the first stage's 32 x 32 maps; each next stage has twice as many, of half the size.
        classes: number of classes.
        feat_dim: dimension of the embeddings of ``crd``, ``correlation`` and ``rrd``.
        n_data: number of training samples.
        nce_k: CRD's negatives per sample, and the rows of RRD's queue.
    """

    channels: int = 64
    classes: int = 100
    feat_dim: int = 128
    n_data: int = 50_000
    nce_k: int = 16_384

    def maps(self, batch: int) -> list[tuple[int, int, int, int]]:
        """Shapes of the stages' maps."""
        return [(batch, self.channels << i, 32 >> i, 32 >> i) for i in range(3)]


class LastMap(nn.Module):
    """Gives a loss the last of two lists of maps."""

    def __init__(self, loss: nn.Module):
        super().__init__()
        self.loss = loss

    def forward(self, maps_s: list[Tensor], maps_t: list[Tensor]) -> Tensor:
        return self.loss(maps_s[-1], maps_t[-1])


@dataclass(frozen=True)
class Case:
    """A method's loss and its reference.

    Attributes:
        build: makes the loss.
        reference: the same function; it is called with the loss's arguments and its state.
        feeds: names of the arguments in ``make_inputs``.
        state: the loss's parameters and buffers that the reference needs.
        large: about the number of elements of the reference's large temporaries at one time.
    """

    build: Callable[[Sizes], nn.Module]
    reference: Callable[..., Tensor | list[Tensor]]
    feeds: tuple[str, ...]
    state: Callable[[nn.Module], tuple] = lambda loss: ()
    large: Callable[[Sizes, int], int] = lambda sizes, batch: 0


def _fsp(sizes: Sizes) -> nn.Module:
    shapes = [(1, sizes.channels // 2, 32, 32), *sizes.maps(1)]
    return losses.FSP(shapes, shapes)


def _crd(sizes: Sizes) -> nn.Module:
    dim = 4 * sizes.channels
    options = {"s_dim": dim, "t_dim": dim, "feat_dim": sizes.feat_dim, "n_data": sizes.n_data}
    return losses.CRDLoss(argparse.Namespace(**options, nce_k=sizes.nce_k, nce_t=0.07, nce_m=0.5))


def _crd_state(loss: nn.Module) -> tuple:
    memory = loss.contrast
    return loss.embed_s.linear, loss.embed_t.linear, memory.memory_v1, memory.memory_v2, memory.params


def _nd(sizes: Sizes) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    return losses.NormDirection(torch.randn(sizes.classes, 4 * sizes.channels, generator=generator))


def _differences(sizes: Sizes, batch: int) -> int:
    return batch**2 * 4 * sizes.channels


def _channel_products(sizes: Sizes, batch: int) -> int:
    # Every stage has as many channels.
    return batch * sizes.channels**2 * 32**2


def _dims(sizes: Sizes) -> tuple[int, int]:
    return 4 * sizes.channels, 4 * sizes.channels


def _pair(name: str) -> tuple[str, str]:
    return f"{name}_s", f"{name}_t"


_F, _JOINT, _LOGIT, _MAPS, _PREACT = (_pair(name) for name in ("f", "joint", "logit", "maps", "preact"))

CASES = {
    "kd": Case(lambda sizes: losses.DistillKL(), references.kd, _LOGIT),
    "hint": Case(lambda sizes: losses.HintLoss(), references.hint, _pair("hint")),
    "attention": Case(lambda sizes: losses.Attention(), references.attention, _MAPS),
    "similarity": Case(lambda sizes: losses.Similarity(), references.similarity, _pair("last_map")),
    "correlation": Case(lambda sizes: losses.Correlation(), references.correlation, _pair("embedding")),
    "vid": Case(
        lambda sizes: LayerwiseVID(losses.VIDLoss(*[shape[1]] * 3) for shape in sizes.maps(1)),
        references.vid,
        _MAPS,
        state=lambda loss: ([(layer.regressor, layer.log_scale) for layer in loss],),
    ),
    "crd": Case(
        _crd,
        references.crd,
        (*_F, "index", "contrast_index"),
        state=_crd_state,
        large=lambda sizes, batch: 2 * batch * (sizes.nce_k + 1) * sizes.feat_dim,
    ),
    "kdsvd": Case(lambda sizes: losses.KDSVD(), references.kdsvd, _MAPS),
    "fsp": Case(_fsp, references.fsp, _pair("flow"), large=lambda *size: 3 * _channel_products(*size) // 2),
    "rkd": Case(
        lambda sizes: losses.RKDLoss(),
        references.rkd,
        _F,
        large=lambda sizes, batch: 4 * _differences(sizes, batch) + 3 * batch**3,
    ),
    "pkt": Case(lambda sizes: losses.PKT(), references.pkt, _F),
    "abound": Case(lambda sizes: losses.ABLoss(3), references.abound, _PREACT),
    "factor": Case(lambda sizes: losses.FactorTransfer(), references.factor, _pair("factor")),
    "nst": Case(
        lambda sizes: losses.NSTLoss(), references.nst, _MAPS, large=lambda *size: 2 * _channel_products(*size)
    ),
    "nce": Case(
        lambda sizes: losses.NCELoss(), references.nce, (*_JOINT, "target"), large=lambda *size: 4 * _differences(*size)
    ),
    "ccl": Case(
        lambda sizes: losses.CCL(),
        references.ccl,
        (*_JOINT, "target", *_LOGIT),
        large=lambda *size: 4 * _differences(*size),
    ),
    "irg": Case(lambda sizes: losses.IRG(), references.irg, (*_JOINT, *_LOGIT, *_pair("last_maps"))),
    "ega": Case(lambda sizes: losses.EGA(), direct_ega, _JOINT),
    "dkd": Case(lambda sizes: losses.DKD(), references.dkd, (*_LOGIT, "target")),
    "dist": Case(lambda sizes: losses.DIST(), references.dist, _LOGIT),
    "reviewkd": Case(lambda sizes: losses.HCL(), references.reviewkd, _pair("review")),
    "ofd": Case(
        lambda sizes: losses.OFD([torch.linspace(-1, 0, shape[1]) for shape in sizes.maps(1)]),
        references.ofd,
        _PREACT,
        state=lambda loss: (list(loss.buffers()),),
    ),
    "simkd": Case(lambda sizes: Regression(), references.simkd, _pair("last_map")),
    "itrd": Case(lambda sizes: losses.ITRD(*_dims(sizes)), references.itrd, _F, state=lambda loss: (loss.embed,)),
    "srd": Case(lambda sizes: losses.SRD(*_dims(sizes)), references.srd, _F, state=lambda loss: (loss.embed,)),
    "clipkd": Case(
        lambda sizes: losses.CLIPKD(*_dims(sizes)),
        references.clipkd,
        (*_F, "target"),
        state=lambda loss: (loss.contrast.scale,),
    ),
    "unic": Case(
        lambda sizes: losses.UNIC(*_dims(sizes)),
        references.unic,
        _F,
        state=lambda loss: (loss.embed, loss.standardize.mean, loss.standardize.std),
    ),
    "vkd": Case(
        lambda sizes: losses.VkD(*_dims(sizes)),
        references.vkd,
        _F,
        state=lambda loss: (loss.projector.parametrizations.weight.original,),
    ),
    "rrd": Case(
        lambda sizes: losses.RRD(*_dims(sizes), sizes.feat_dim, sizes.nce_k),
        references.rrd,
        _F,
        state=lambda loss: (loss.embed_s, loss.embed_t, loss.queue, loss.place),
    ),
    "nkd": Case(lambda sizes: losses.NKD(), references.nkd, (*_LOGIT, "target")),
    "ttm": Case(lambda sizes: losses.TTM(), references.ttm, _LOGIT),
    "wttm": Case(lambda sizes: losses.TTM(weighted=True), references.wttm, _LOGIT),
    "rld": Case(lambda sizes: losses.RLD(), references.rld, (*_LOGIT, "target")),
    "wkd": Case(
        lambda sizes: losses.WKDLogit(1 - torch.eye(sizes.classes)),
        references.wkd,
        (*_LOGIT, "target"),
        state=lambda loss: (loss.cost,),
        large=lambda sizes, batch: 4 * batch * sizes.classes**2,
    ),
    "wkd_feature": Case(lambda sizes: LastMap(losses.WKDFeature()), references.wkd_feature, _pair("last_map")),
    "abkd": Case(lambda sizes: losses.ABKD(), references.abkd, _LOGIT),
    "pefd": Case(lambda sizes: losses.PEFD(*_dims(sizes)), references.pefd, _F, state=lambda loss: (loss.projectors,)),
    "mlld": Case(lambda sizes: losses.MLLD(), references.mlld, _LOGIT),
    "nd": Case(_nd, references.nd, (*_F, "target"), state=lambda loss: (loss.centres,)),
    "ofa": Case(lambda sizes: losses.OFA(), references.ofa, (*_LOGIT, "target")),
    "skd": Case(lambda sizes: losses.SKD(), references.skd, _LOGIT),
    "cka": Case(lambda sizes: losses.CKA(), references.cka, _F),
}


def make_inputs(
    feeds: tuple[str, ...], sizes: Sizes, batch: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> list[Tensor | list[Tensor]]:
    """Random arguments of a loss, by name; the student's end in ``_s`` and require gradients.

    As in training, maps are in channels_last memory format and, but for ``preact``, come after a ReLU. The student is
    neither unrelated to the teacher nor near it.
    """
    generator = torch.Generator().manual_seed(0)
    maps, pooled = sizes.maps(batch), (batch, 4 * sizes.channels)
    shapes = {
        "maps": maps,
        "preact": maps,
        "flow": [(batch, sizes.channels // 2, 32, 32), *maps],
        "review": [*maps, pooled],
        "hint": maps[1],
        "factor": (batch, 2 * sizes.channels, 8, 8),
        "last_map": maps[-1:],
        "last_maps": maps[-2:],
        "f": pooled,
        "joint": pooled,
        "embedding": (batch, sizes.feat_dim),
        "logit": (batch, sizes.classes),
    }

    def make(shape: tuple[int, ...], relu: bool) -> tuple[Tensor, Tensor]:
        f_t = torch.randn(shape, generator=generator, dtype=dtype)
        f_s = f_t + torch.randn(shape, generator=generator, dtype=dtype)
        is_map = len(shape) == 4
        memory_format = torch.channels_last if is_map else torch.contiguous_format
        f_s, f_t = ((f.relu() if relu and is_map else f).to(device, memory_format=memory_format) for f in (f_s, f_t))
        return f_s.requires_grad_(), f_t

    def make_pair(name: str) -> tuple[Tensor | list[Tensor], Tensor | list[Tensor]]:
        if isinstance(shapes[name], tuple):
            return make(shapes[name], name != "preact")
        layers_s, layers_t = zip(*(make(shape, name != "preact") for shape in shapes[name]), strict=True)
        return list(layers_s), list(layers_t)

    inputs = {
        "target": torch.randint(sizes.classes, (batch,), generator=generator).to(device),
        "index": torch.arange(batch, device=device) % sizes.n_data,
    }
    if "contrast_index" in feeds:
        negatives = torch.randint(sizes.n_data, (batch, sizes.nce_k), generator=generator).to(device)
        inputs["contrast_index"] = torch.cat([inputs["index"][:, None], negatives], dim=1)
    for name in (feed.removesuffix("_s") for feed in feeds if feed.endswith("_s")):
        inputs |= zip(_pair(name), make_pair(name), strict=True)
    return [inputs[feed] for feed in feeds]


Step = Callable[[], tuple[Tensor, tuple[Tensor, ...]]]


def make_steps(
    case: Case, sizes: Sizes, batch: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Step, Step]:
    """Forward and backward passes of a case's loss and of its reference, on the same inputs, each with its own state.

    A step gives the loss, summed over layers, and its gradients with respect to the student and to parameters.
    """
    torch.manual_seed(0)
    loss = case.build(sizes).to(device, dtype)
    twin = copy.deepcopy(loss)
    state = case.state(twin)
    inputs = make_inputs(case.feeds, sizes, batch, device, dtype)
    flat = [x for arg in inputs for x in ([arg] if isinstance(arg, Tensor) else arg)]
    student = [x for x in flat if x.requires_grad]

    def step(function: Callable[..., Tensor | list[Tensor]], parameters: Iterable[Tensor]) -> Step:
        wanted = [*student, *(x for x in parameters if x.requires_grad)]

        def run() -> tuple[Tensor, tuple[Tensor, ...]]:
            value = function(*inputs)
            value = value if isinstance(value, Tensor) else sum(value)
            return value.detach(), torch.autograd.grad(value, wanted)

        return run

    return step(loss, loss.parameters()), step(lambda *args: case.reference(*args, *state), twin.parameters())


def compare(method: str, batch: int, sizes: Sizes, budget: float, device: str) -> list[str]:
    """One row: method, batch, ms of both, ratio, MiB of both; a dash where the reference does not fit in memory."""
    case = CASES[method]
    ours, reference = make_steps(case, sizes, batch, device)
    if 4 * case.large(sizes, batch) > 0.9 * available_memory(device):
        (seconds,) = median_seconds([ours], budget, device, repeats=1)
        memory = peak_memory(ours, device) / 2**20
        return [method, f"{batch}", "-", three_digits(1e3 * seconds), "-", "-", three_digits(memory)]
    seconds_reference, seconds = median_seconds([reference, ours], budget, device, repeats=1)
    memory_reference, memory = (peak_memory(function, device) / 2**20 for function in (reference, ours))
    return [
        method,
        f"{batch}",
        three_digits(1e3 * seconds_reference),
        three_digits(1e3 * seconds),
        three_digits(seconds_reference / seconds),
        three_digits(memory_reference),
        three_digits(memory),
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split(":")[0] + ".", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--batch_sizes", nargs="+", type=number(int, 2), default=[64, 512], help="batch sizes")
    parser.add_argument(
        "--methods", nargs="+", choices=tuple(CASES), default=tuple(CASES), metavar="METHOD", help="methods"
    )
    parser.add_argument(
        "--channels", type=number(int, 2), default=Sizes.channels, help="channels of the first stage's maps"
    )
    parser.add_argument("--classes", type=number(int, 2), default=Sizes.classes, help="number of classes")
    parser.add_argument(
        "--feat_dim",
        type=positive_int,
        default=Sizes.feat_dim,
        help="crd, correlation, rrd: embeddings' dimension",
    )
    parser.add_argument("--n_data", type=positive_int, default=Sizes.n_data, help="crd: number of training images")
    parser.add_argument(
        "--nce_k", type=positive_int, default=Sizes.nce_k, help="crd: negatives; rrd: rows of the queue"
    )
    parser.add_argument("--seconds", type=positive, default=2, help="least time to spend on each row")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu", help="what to compute on")
    args = parser.parse_args(argv)
    with exit_on_bad_input("benchmarks.zoo"):
        device = resolve_device(args.device)

    sizes = Sizes(args.channels, args.classes, args.feat_dim, args.n_data, args.nce_k)
    print(f"{machine(device)}; float32, forward and backward\n")
    header = ("method", "batch", "reference, ms", "ours, ms", "times faster", "reference, peak MiB", "ours, peak MiB")
    rows = [(method, batch) for method in args.methods for batch in args.batch_sizes]
    print_table(header, (compare(*row, sizes, args.seconds, device) for row in rows))


if __name__ == "__main__":
    main()
