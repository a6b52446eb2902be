import math
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from helper import optim
from helper.optim import adjust_learning_rate, build_optimizer, learning_rate, sgd
from models import create_student


def test_the_learning_rate_decays_after_its_epochs():
    """Paper: lr 0.05, times 0.1 from epochs 151, 181 and 211 on."""
    opt = Namespace(learning_rate=0.05, lr_decay_rate=0.1, lr_decay_epochs=[150, 180, 210], warmup_epochs=0)
    opt.schedule = "step"
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), 1.0)
    for epoch, expected in ((1, 0.05), (150, 0.05), (151, 5e-3), (180, 5e-3), (181, 5e-4), (211, 5e-5), (240, 5e-5)):
        assert adjust_learning_rate(epoch, opt, optimizer) == pytest.approx(expected)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)


def test_a_cosine_falls_from_the_learning_rate_towards_zero_after_a_linear_warmup():
    """Against torch's own schedulers."""
    opt = Namespace(learning_rate=0.4, schedule="cosine", warmup_epochs=3, epochs=13)
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    found = [learning_rate(epoch, opt) for epoch in range(1, 14)]
    assert found[:3] == pytest.approx([0.1, 0.2, 0.3])
    for lr in found[3:]:
        assert lr == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cosine.step()
    assert found[-1] == pytest.approx(0.4 * (1 + math.cos(0.9 * math.pi)) / 2)


def test_adamw_decays_matrices_and_leaves_gains_and_biases_alone():
    """A step without gradients' pull: only what is decayed shrinks."""
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    before = {name: x.clone() for name, x in net.named_parameters()}
    opt = Namespace(optimizer="adamw", learning_rate=0.1, weight_decay=0.5)
    optimizer = build_optimizer([net], opt)
    for x in net.parameters():
        x.grad = torch.zeros_like(x)
    optimizer.step()
    for name, x in net.named_parameters():
        factor = 1 - 0.1 * 0.5 if x.dim() > 1 else 1
        torch.testing.assert_close(x.detach(), before[name] * factor)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "mobilenetv3_small_050"])
def test_adamw_leaves_alone_what_timm_does(name):
    student = create_student(f"timm:{name}", 8, 5)
    net = student.backbone.net
    names = net.no_weight_decay() if hasattr(net, "no_weight_decay") else ()
    timms = param_groups_weight_decay(net, 0.5, no_weight_decay_list=names)
    decayed = {id(x) for group in timms if group["weight_decay"] for x in group["params"]}
    opt = Namespace(optimizer="adamw", learning_rate=0.1, weight_decay=0.5)
    found, others = build_optimizer([student, nn.Linear(3, 3)], opt).param_groups
    assert (found["weight_decay"], others["weight_decay"]) == (0.5, 0)
    mine = {id(x) for x in found["params"]} & {id(x) for x in net.parameters()}
    assert mine == decayed
    assert len(found["params"]) == len(mine) + 3  # both layers of the head, and the other module's
    assert {id(x) for x in net.parameters()} <= mine | {id(x) for x in others["params"]}


def test_the_teachers_head_keeps_the_papers_sgd():
    opt = Namespace(optimizer="adamw", momentum=0.9, weight_decay=0.05)
    (group,) = sgd(nn.Linear(2, 2).parameters(), 0.01, opt).param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.01, 0.9, 5e-4)


def test_gradients_that_overflow_in_the_first_step_leave_no_trace():
    """As fp16's may, while its scale is still too large; against the same steps without that one."""
    results = []
    for gradients in ([1.0, 2.0], [math.inf, 1.0, 2.0]):
        x = nn.Parameter(torch.full((3, 5), 4.0))
        optimizer = sgd([x], 0.5, Namespace(optimizer="sgd", momentum=0.9, weight_decay=0.1))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        for gradient in gradients:
            x.grad = torch.full_like(x, gradient) * scaler.scale(torch.ones(()))
            scaler.step(optimizer)
            scaler.update()
        results.append(x.detach())
    assert torch.equal(*results)


def test_the_first_step_is_pytorchs_own():
    opt = Namespace(optimizer="sgd", momentum=0.9, weight_decay=0.1)
    ours, plain = (nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2))
    optimizers = [sgd([ours], 0.5, opt), torch.optim.SGD([plain], 0.5, momentum=0.9, weight_decay=0.1, fused=True)]
    for step in range(4):
        for x, optimizer in zip((ours, plain), optimizers, strict=True):
            x.grad = torch.sin(x.detach() * 10 + step)
            optimizer.step()
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_an_optimiser_that_imports_no_compiler_steps_as_pytorchs_own(name):
    own, light = getattr(torch.optim, name), getattr(optim, name)
    options = {"lr": 0.1, "weight_decay": 0.01, "fused": True} | ({"momentum": 0.9} if name == "SGD" else {})
    networks = []
    for kind in (own, light):
        torch.manual_seed(0)
        network = torch.nn.Linear(3, 2)
        optimizer = kind(network.parameters(), **options)
        for _ in range(3):
            optimizer.zero_grad(set_to_none=True)
            network(torch.ones(4, 3)).square().sum().backward()
            optimizer.step()
            again = kind(network.parameters(), **options)
            again.load_state_dict(optimizer.state_dict())
            optimizer = again
        networks.append(network)
    assert all(torch.equal(a, b) for a, b in zip(*(x.parameters() for x in networks), strict=True))


def test_a_step_imports_no_compiler():
    code = """
import sys
import torch
from helper.optim import SGD
layer = torch.nn.Linear(2, 2)
optimizer = SGD(layer.parameters(), 0.1, fused=True)
layer(torch.ones(1, 2)).sum().backward()
optimizer.step()
optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
sys.exit("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
