"""The maps of a library's network: the last one at each resolution, before or after the activation that ends it."""

import copy
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from errors import InputError

# Stages are told apart on a picture of this size: no stage's map is then a single pixel, as pooled features are.
_LARGE = 256

_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Hardswish, nn.SiLU, nn.GELU)
_ACTIVATION_FUNCTIONS = (F.relu, F.relu6, torch.relu, F.leaky_relu, F.hardswish, F.silu, F.gelu)


def take_maps(label: str, net: nn.Module, preact: bool) -> "Intermediates | Graph":
    """A function that gives a network's maps and its pooled features in one forward pass.

    Args:
        label: the network's name, for messages.
        net: a network of timm or torchvision, without its classifier.
        preact: give the maps as they are before their last activation, where a stage ends in one.

    Raises:
        InputError: the network has no maps, or last activations that cannot be taken apart.
    """
    if not preact and _is_timm(net) and hasattr(net, "forward_intermediates"):
        return Intermediates(net)
    return Graph(label, net, preact)


def _is_timm(net: nn.Module) -> bool:
    return type(net).__module__.startswith("timm.")


class Intermediates:
    """timm's own maps, the stem's first: one per resolution; a transformer gives those of five evenly spaced blocks."""

    def __init__(self, net: nn.Module):
        stages = getattr(net, "feature_info", [])
        reductions = [stage["reduction"] for stage in getattr(stages, "info", stages)]
        self.indices = None
        if len(reductions) > 5 and len(set(reductions)) == 1:
            self.indices = [round(i * (len(reductions) - 1) / 4) for i in range(5)]

    def __call__(self, net: nn.Module, x: Tensor) -> tuple[list[Tensor], Tensor]:
        x, maps = net.forward_intermediates(x, indices=self.indices, output_fmt="NCHW")
        return list(maps), net.forward_head(x)


class _InseparableError(Exception):
    """A stage ends in an activation that is no node of its own."""


class Graph:
    """Maps by torch.fx: the last one at each resolution; with ``preact`` before the activation that ends it.

    Training and evaluation have a graph each. The graphs name the network's modules and hold none of them, so that the
    network can be moved, copied, and given other norms.

    Attributes:
        norms: names of the batch norms that end the maps' stages, or None.
    """

    def __init__(self, label: str, net: nn.Module, preact: bool):
        for module in net.modules():
            if preact and getattr(module, "inplace", False):
                module.inplace = False  # an in-place activation would change the map
        stages = _stages(net)
        if len(stages) < 2:
            raise InputError(f"{label} gives no maps of its stages; use a method that needs none (see --list)")
        mode = net.training
        try:
            self.norms, training = _trace(net.train(), stages, preact)
            self.graphs = {True: training, False: _trace(net.eval(), stages, preact)[1]}
            if preact:
                self._check_signs(net)
        except _InseparableError:
            raise InputError(
                f"{label}: a stage ends in an activation that cannot be taken apart, as this method needs; use another"
            ) from None
        except Exception as error:  # torch.fx raises whatever a network's control flow makes of its proxies
            raise InputError(
                f"{label}: its maps cannot be taken out of its forward pass; use a method that needs none (see --list)"
            ) from error
        net.train(mode)

    @torch.no_grad()
    def _check_signs(self, net: nn.Module) -> None:
        net = copy.deepcopy(net).eval()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)  # a zero weight would leave only the shortcut, which has no sign
        generator = torch.Generator().manual_seed(0)
        maps, _ = self(net, torch.randn(1, 3, _LARGE, _LARGE, generator=generator))
        if any((x >= 0).all() for x in maps[1:]):
            raise _InseparableError

    def __call__(self, net: nn.Module, x: Tensor) -> tuple[list[Tensor], Tensor]:
        *maps, pooled = fx.Interpreter(net, graph=self.graphs[net.training]).run(x)
        return maps, pooled


def _trace(net: nn.Module, stages: list[str], preact: bool) -> tuple[list[str | None], fx.Graph]:
    """The names of the batch norms that end the stages, and the graph of (maps ..., pooled)."""
    from torchvision.models.feature_extraction import NodePathTracer  # here: a student from a CLIP takes no maps

    tracer = NodePathTracer(**_tracing(net))
    graph = tracer.trace(net)
    nodes = [_last_node(graph, tracer.node_to_qualname, stage) for stage in stages]
    if preact:
        nodes = [_before_activation(node, net) for node in nodes]
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    output.args = ((*nodes, output.args[0]),)
    return [_norm(node, net) for node in nodes], graph


def _tracing(net: nn.Module) -> dict:
    """The modules and functions that torch.fx must not look into, if a library names them."""
    if not _is_timm(net):
        return {}
    from timm.models._features_fx import get_notrace_functions, get_notrace_modules

    return {"leaf_modules": list(get_notrace_modules()), "autowrap_functions": list(get_notrace_functions())}


@torch.no_grad()
def _stages(net: nn.Module) -> list[str]:
    """Names of the modules that give each stage's last map, highest resolution first; each stage halves it.

    The search only enters containers: it looks at blocks and stages, not at their parts.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def look(module: nn.Module, prefix: str) -> Iterable[tuple[str, nn.Module]]:
        for name, child in module.named_children():
            if type(child) is nn.Sequential:
                yield from look(child, f"{prefix}{name}.")
            elif not isinstance(child, nn.AdaptiveAvgPool2d):
                yield f"{prefix}{name}", child

    def note(name: str):
        def hook(module, inputs, output):
            if isinstance(output, Tensor) and output.dim() == 4 and output.shape[2] == output.shape[3] > 1:
                shapes.pop(name, None)
                shapes[name] = tuple(output.shape)

        return hook

    hooks = [child.register_forward_hook(note(name)) for name, child in look(net, "")]
    mode = net.training
    try:
        net.eval()(torch.zeros(1, 3, _LARGE, _LARGE))
    except (RuntimeError, AssertionError):  # the network is built for another size: it cuts pictures into patches
        return []
    finally:
        net.train(mode)
        for hook in hooks:
            hook.remove()
    last = {shape[2]: name for name, shape in shapes.items()}
    heights = sorted(last, reverse=True)
    # A convolution without padding takes off a few pixels; this is no new stage.
    return [last[a] for a, b in zip(heights, [*heights[1:], 0], strict=True) if a > 1.5 * b]


def _last_node(graph: fx.Graph, names: dict[fx.Node, str], module: str) -> fx.Node:
    found = [node for node in graph.nodes if f"{names.get(node, '')}.".startswith(f"{module}.")]
    if not found:  # the nodes of a module that is called more than once are numbered
        found = [node for node in graph.nodes if names.get(node, "").rpartition("_")[0] == module]
    return found[-1]


def _before_activation(node: fx.Node, net: nn.Module) -> fx.Node:
    module = net.get_submodule(node.target) if node.op == "call_module" else None
    if isinstance(module, nn.BatchNorm2d) and not isinstance(getattr(module, "act", nn.Identity()), nn.Identity):
        raise _InseparableError
    activates = node.op == "call_module" and isinstance(net.get_submodule(node.target), _ACTIVATIONS)
    activates |= node.op == "call_function" and node.target in _ACTIVATION_FUNCTIONS
    return node.args[0] if activates else node


def _norm(node: fx.Node, net: nn.Module) -> str | None:
    """The name of the batch norm that gave a node, directly or at the end of the longest branch of a sum."""
    depth: dict[fx.Node, int] = {}
    for earlier in node.graph.nodes:
        depth[earlier] = 1 + max((depth[x] for x in earlier.all_input_nodes), default=0)
    while node.all_input_nodes:
        if node.op == "call_module":
            module = net.get_submodule(node.target)
            if isinstance(module, nn.BatchNorm2d):
                return node.target
            if not isinstance(module, (*_ACTIVATIONS, nn.Identity, nn.Dropout)):
                return None
        node = max(node.all_input_nodes, key=depth.__getitem__)
    return None
