"""Optimisers and learning rates."""

import contextlib
import inspect
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

# The paper's weight decay of the teacher's head; the head's SGD keeps it whatever trains the student.
_HEAD_WEIGHT_DECAY = 5e-4


def _light(optimizer: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """The same optimiser without the import of PyTorch's compiler.

    PyTorch wraps these methods so that torch.compile leaves them alone. The wrappers import the compiler, which takes
    1.6 s of a start of 5 s. Nothing here compiles an optimiser.
    """
    names = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    methods = {name: inspect.unwrap(getattr(optimizer, name)) for name in names}
    methods["step"] = torch.no_grad()(inspect.unwrap(optimizer.step))
    return type(optimizer.__name__, (optimizer,), methods)


SGD, AdamW = _light(torch.optim.SGD), _light(torch.optim.AdamW)


def sgd(parameters: Iterable[nn.Parameter], lr: float, opt) -> torch.optim.SGD:
    """SGD as the paper uses it, with its step fused into one kernel."""
    decay = opt.weight_decay if opt.optimizer == "sgd" else _HEAD_WEIGHT_DECAY
    parameters = list(parameters)
    optimizer = SGD(parameters, lr, momentum=opt.momentum, weight_decay=decay, fused=True)
    if opt.momentum:
        # PyTorch would make the buffers in the first step, and leave them unfilled where that step's gradients are not
        # finite, as fp16's first ones may be.
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def build_optimizer(modules: Iterable[nn.Module], opt) -> torch.optim.Optimizer:
    """The optimiser of these modules that the options describe, at ``opt.learning_rate``.

    AdamW (Loshchilov and Hutter, ICLR 2019) decays matrices and kernels. It exempts gains, biases and the weights that
    a network's own ``no_weight_decay`` names, such as a transformer's positions and its class token. This is the rule
    of ``timm.optim.param_groups_weight_decay``.
    """
    modules = list(modules)
    if opt.optimizer == "sgd":
        return sgd((parameter for module in modules for parameter in module.parameters()), opt.learning_rate, opt)
    decayed, others = [], []
    for module in modules:
        exempt = _exempt(module)
        for name, parameter in module.named_parameters():
            alone = parameter.dim() <= 1 or name.endswith(".bias") or name in exempt
            (others if alone else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": opt.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return AdamW(groups, lr=opt.learning_rate, fused=True)


def _exempt(module: nn.Module) -> set[str]:
    """The names of the parameters that a module's networks exempt from weight decay, as timm's networks do."""
    told = [(path, part.no_weight_decay()) for path, part in module.named_modules() if hasattr(part, "no_weight_decay")]
    return {f"{path}.{name}" if path else name for path, names in told for name in names}


def groups_of(optimizers: Iterable[torch.optim.Optimizer]) -> list[dict]:
    """The groups of parameters of all optimisers, each with its own learning rate."""
    return [group for optimizer in optimizers for group in optimizer.param_groups]


@contextlib.contextmanager
def capturable(optimizers: Iterable[torch.optim.Optimizer], rates: Iterable[Tensor]) -> Iterator[None]:
    """Let the optimisers' steps be captured; a replay reads its learning rates from tensors.

    Adam refuses to be captured unless told, though its fused step is the same either way.

    Args:
        rates: scalars in float32 on the device, one for each group.
    """
    groups = groups_of(optimizers)
    before = [{name: group[name] for name in ("lr", "capturable") if name in group} for group in groups]
    for group, rate in zip(groups, rates, strict=True):
        group |= {"lr": rate} | ({"capturable": True} if "capturable" in group else {})
    try:
        yield
    finally:  # Adam warns of a step that could be captured and is not, and checkpoints go from device to device
        for group, values in zip(groups, before, strict=True):
            group |= values


def learning_rate(epoch: int, opt) -> float:
    """The learning rate of an epoch, counted from 1.

    step: it is multiplied by ``lr_decay_rate`` after each decay epoch. cosine: it falls to zero over half a period
    (Loshchilov and Hutter, ICLR 2017). Over the first ``warmup_epochs`` it grows in equal steps.
    """
    warmup = opt.warmup_epochs
    if epoch <= warmup:
        return opt.learning_rate * epoch / (warmup + 1)
    if opt.schedule == "cosine":
        done = (epoch - 1 - warmup) / (opt.epochs - warmup)
        return opt.learning_rate * (1 + math.cos(math.pi * done)) / 2
    decays = sum(epoch > decay for decay in opt.lr_decay_epochs)
    return opt.learning_rate * opt.lr_decay_rate**decays


def adjust_learning_rate(epoch: int, opt, optimizer: torch.optim.Optimizer) -> float:
    """Set the learning rate of an epoch; see ``learning_rate``."""
    lr = learning_rate(epoch, opt)
    set_learning_rate(lr, optimizer)
    return lr


def set_learning_rate(lr: float, optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
