import ast
import copy
import functools
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from dataset.loader import Batch
from distiller_zoo import EGA, METHODS, Networks, TwoStage
from errors import InputError
from helper.objective import build_objective
from helper.options import student_parser
from helper.student import reuse
from helper.teacher import CnnTeacher
from models import create_classifier, model_dict
from models.heads import TeacNet

ROOT = Path(__file__).parents[2]
NEED_MAPS = {"attention", "vid", "kdsvd", "fsp", "abound", "factor", "nst", "reviewkd", "ofd", "wkd_feature"}
OPT = student_parser().parse_args(["--feat_dim", "6", "--nce_k", "3", "--queue", "7"])


@functools.cache
def shapes_of_resnet8() -> list[tuple[int, ...]]:
    features, _ = model_dict["resnet8"](num_classes=5)(torch.zeros(2, 3, 32, 32), is_feat=True)
    return [tuple(x.shape) for x in features]


def networks(clip: bool) -> Networks:
    """A resnet8 of 5 classes and a teacher of 9 training images."""
    shapes = shapes_of_resnet8()
    if clip:
        return Networks(shapes, [(2, 64)], 8, 8, torch.arange(9) % 5, num_classes=5)
    return Networks(shapes, shapes, 64, 64, torch.arange(9) % 5, model_dict["resnet8"](num_classes=5), num_classes=5)


def feed(clip: bool) -> dict[str, torch.Tensor | list[torch.Tensor]]:
    """What each name of a feed stands for, with one process."""
    torch.manual_seed(0)
    return copy.deepcopy(feed_once(clip))


@functools.cache
@torch.no_grad()
def feed_once(clip: bool) -> dict[str, torch.Tensor | list[torch.Tensor]]:
    torch.manual_seed(0)
    fed = {"target": torch.arange(4), "label": torch.arange(4), "index": torch.arange(4), "shares": None}
    for whose in "st":
        features, logits = model_dict["resnet8"](num_classes=5)(torch.randn(4, 3, 32, 32), is_feat=True)
        joint = torch.randn(4, 8)
        fed |= {f"f_{whose}": joint if clip else features[-1], f"joint_{whose}": joint, f"logit_{whose}": logits}
        fed[f"own_{whose}"] = torch.randn(4, 64) if clip and whose == "t" else features[-1]
        fed |= {} if clip else {f"maps_{whose}": features[1:-1], f"feat_{whose}": features}
    return fed


# Student, teacher and the images' size: other widths, numbers of stages and sizes of maps; the last pair fits all.
PAIRS = [
    ("resnet8", "resnet8x4", 32),
    ("resnet8x4", "vgg8", 64),
    ("MobileNetV2", "resnet8", 16),
    ("wrn_16_1", "ShuffleV1", 32),
    ("resnet8", "resnet14", 32),
]
FED_MAPS = [name for name, method in METHODS.items() if method.needs(clip=False).maps]
# Those that take no networks of other widths, and those that take no other number of stages.
ONE_WIDTH, ONE_NUMBER = {"kdsvd", "fsp"}, {"abound", "reviewkd", "ofd"}


@pytest.mark.parametrize("name", FED_MAPS)
@pytest.mark.parametrize(("model_s", "model_t", "size"), PAIRS)
def test_a_method_of_maps_takes_a_step_or_is_refused_when_it_is_built(name, model_s, model_t, size):
    method = METHODS[name]
    argv = ["--distill", name, "--model_s", model_s, "--feature_dim", "8"]
    opt = student_parser().parse_args(argv)
    opt.device, opt.amp, opt.clip_tn, opt.beta_warmup = "cpu", "off", 0, 0
    opt.gamma, opt.alpha, opt.beta = method.weights
    needs = method.needs(clip=False)
    student = create_classifier(model_s, 5, 8 if needs.joint else None, needs.preact_s)
    backbone = model_dict[model_t](num_classes=5)
    head = TeacNet(backbone.num_features, 8, 5) if needs.joint else None
    teacher = CnnTeacher(backbone, head, "off", needs.preact_t)
    if method.reuses:
        student = reuse(student, teacher, size, opt.simkd_factor)
    batch = Batch(torch.arange(4), torch.arange(4), torch.randn(4, 3, size, size), torch.zeros(4))
    other_number = (model_s, model_t) in (("resnet8x4", "vgg8"), ("MobileNetV2", "resnet8"))
    loaders = Namespace(image_size=size, targets=batch.target)
    if (name in ONE_WIDTH and model_t != "resnet14") or (name in ONE_NUMBER and other_number):
        with pytest.raises(InputError, match="needs"):
            build_objective(opt, student, teacher, loaders)
        return
    objective = build_objective(opt, student, teacher, loaders)
    out_s, out_t = student.train()(batch.image), teacher("train", batch)
    if isinstance(objective.criterion, TwoStage):
        assert objective.criterion.init_loss(out_s.features, out_t.features).isfinite()
    loss, terms = objective(out_s, out_t, batch)
    assert loss.isfinite()
    assert ("distill" in terms) == bool(objective.feeds)


def imports(path: Path) -> set[str]:
    """The modules that a file imports, wherever in it; relative ones begin with dots."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def house(folder: str) -> set[str]:
    """What of the house the files of a folder import."""
    names = {path.parent.name for path in ROOT.glob("*/__init__.py")} | {path.stem for path in ROOT.glob("*.py")}
    modules = set().union(*(imports(path) for path in (ROOT / folder).rglob("*.py")))
    return {module.split(".")[0] for module in modules} & names


BELOW = {
    "dataset": {"dataset"},
    "models": {"models"},
    "distiller_zoo": {"distiller_zoo", "models"},
    "helper": {"helper", "distiller_zoo", "models", "dataset"},
    "evaluation": {"evaluation", "helper", "distiller_zoo", "models", "dataset"},
    "deploy": {"deploy", "evaluation", "helper", "distiller_zoo", "models", "dataset"},
}


@pytest.mark.parametrize("folder", BELOW)
def test_imports_run_one_way(folder):
    assert house(folder) <= BELOW[folder] | {"errors"}


def test_what_is_exported_is_made_without_training():
    found = set().union(*(imports(path) for path in (ROOT / "deploy").glob("*.py")))
    helpers = {module.split(".")[1] for module in found if module.startswith("helper.")}
    assert helpers == {"checkpoint", "parser", "util"}


@pytest.mark.parametrize("path", sorted((ROOT / "distiller_zoo").glob("[!_]*.py")), ids=lambda path: path.name)
def test_a_losss_file_imports_torch_alone(path):
    found = {module.split(".")[0] for module in imports(path)}
    assert found - set(sys.stdlib_module_names) == {"torch"}


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_a_methods_row_says_what_its_loss_is_fed(name, clip):
    method = METHODS[name]
    assert method.citation
    assert all(weight >= 0 for weight in method.weights)
    build, feeds = method.with_teacher(clip)
    assert method.needs_maps == (name in NEED_MAPS)
    if clip and method.needs_maps:
        return
    if build is None:
        assert not feeds
        assert method.default_weights(clip)[2] == 0
        return
    assert method.default_weights(clip)[2] > 0
    loss, fed = build(OPT, networks(clip)), feed(clip)
    if not feeds:
        assert isinstance(loss, TwoStage)
        return
    value = loss(*(fed[name] for name in feeds))
    value = sum(value) if isinstance(value, (list, tuple)) else value
    assert value.shape == ()
    assert value.isfinite()
    if hasattr(loss, "terms"):
        torch.testing.assert_close(sum(loss.terms(*(fed[name] for name in feeds)).values()), value)


def part(fed: dict, rows: slice) -> dict:
    """What a loss is fed of these samples."""
    return {
        name: [y[rows] for y in x] if isinstance(x, list) else x if x is None else x[rows] for name, x in fed.items()
    }


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_a_loss_is_a_mean_over_samples_unless_its_row_says_that_it_is_relational(name, clip):
    """What many processes rely on: a batch's loss is then the mean of its parts', weighed by their sizes."""
    method = METHODS[name]
    build, feeds = method.with_teacher(clip)
    if not feeds or (clip and method.needs_maps):
        return
    loss, fed = build(OPT, networks(clip)).eval(), feed(clip)
    state = {key: value.clone() for key, value in loss.state_dict().items()}

    def value(rows: slice) -> torch.Tensor:
        torch.manual_seed(0)
        loss.load_state_dict(state)
        found = loss(*(part(fed, rows)[name] for name in feeds))
        return (sum(found) if isinstance(found, (list, tuple)) else found).detach()

    parts = 0.25 * value(slice(1)) + 0.75 * value(slice(1, 4))
    assert torch.isclose(parts, value(slice(4)), rtol=1e-5, atol=0) != method.relational


def degenerate(fed: dict, kind: str) -> dict:
    """What a loss is fed, turned into a batch of this kind."""
    if kind == "one sample":
        return part(fed, slice(1))
    if kind == "one class":
        return fed | dict.fromkeys(("target", "label"), torch.zeros_like(fed["target"]))
    if kind == "equal":
        return {name: fed[name.removesuffix("_t") + "_s"] if name.endswith("_t") else x for name, x in fed.items()}

    def constant(x: torch.Tensor) -> torch.Tensor:
        level = 0.0 if kind == "a row of zeros" else 2.0
        return torch.cat([torch.full_like(x[:1], level), x[1:]])

    names = [name for name in fed if name not in ("target", "label", "index", "shares")]
    return fed | {n: [constant(y) for y in fed[n]] if isinstance(fed[n], list) else constant(fed[n]) for n in names}


@pytest.mark.parametrize("kind", ["one sample", "one class", "equal", "a row of zeros", "a constant row"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_a_degenerate_batch_gives_a_finite_loss_and_gradient_or_is_refused(name, clip, kind):
    method = METHODS[name]
    build, feeds = method.with_teacher(clip)
    if build is None or (clip and method.needs_maps):
        return
    loss = build(OPT, networks(clip))
    fed = degenerate(feed(clip), kind)
    leaves = []

    def leaf(x):
        x = x if x is None else x.detach().clone()
        if x is not None and x.is_floating_point():
            leaves.append(x.requires_grad_())
        return x

    fed = {key: [leaf(y) for y in x] if isinstance(x, list) else leaf(x) for key, x in fed.items()}
    if name == "reviewkd" and kind == "one sample":
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            loss(*(fed[key] for key in feeds))
        return
    value = loss(*(fed[key] for key in feeds)) if feeds else loss.init_loss(fed["feat_s"], fed["feat_t"])
    value = sum(value) if isinstance(value, (list, tuple)) else value
    assert value.isfinite()
    learned = [parameter for parameter in loss.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(value, [*leaves, *learned], allow_unused=True)
    assert any(gradient is not None for gradient in gradients)
    assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)


@pytest.mark.parametrize("name", ["abound", "fsp", "factor"])
def test_a_two_stage_methods_first_stage_has_a_loss_and_what_it_trains(name):
    loss = METHODS[name].build(OPT, networks(clip=False))
    student = model_dict["resnet8"](num_classes=5)
    trained = loss.init_modules(student)
    features, _ = student(torch.randn(4, 3, 32, 32), is_feat=True)
    value = loss.init_loss(features, feed(clip=False)["feat_t"])
    value.backward()
    assert value > 0
    of_the_student = {id(p) for p in student.parameters()} & {id(p) for p in trained.parameters()}
    assert bool(of_the_student) == (name != "factor")
    # The stem's convolution comes before every map.
    assert all(p.grad is not None for p in trained.parameters() if id(p) not in of_the_student)
    assert loss.init_learning_rate("resnet8", 0.05) == (0.01 if name == "factor" else 0.05)
    assert loss.init_learning_rate("vgg8", 0.05) == 0.05


def test_a_hint_layer_beyond_the_networks_is_refused():
    shapes = [(2, 16, 32, 32), (2, 32, 16, 16), (2, 32)]
    with pytest.raises(ValueError, match="--hint_layer 3"):
        METHODS["hint"].build(Namespace(hint_layer=3), Networks(shapes, shapes, 32, 32, torch.arange(9)))


def test_a_hint_of_the_pooled_features_is_regressed_linearly():
    loss = METHODS["hint"].build(Namespace(hint_layer=4), networks(clip=False))
    fed = feed(clip=False)
    expected = torch.nn.functional.mse_loss(loss.regressor(fed["f_s"]), fed["f_t"])
    torch.testing.assert_close(loss(fed["feat_s"], fed["feat_t"]), expected)


def test_egas_weights_are_the_options():
    loss = METHODS["ega"].build(Namespace(node_weight=0.5, edge_weight=0.25), None)
    assert isinstance(loss, EGA)
    assert (loss.node_weight, loss.edge_weight) == (0.5, 0.25)
    assert METHODS["ega"].feeds == ("joint_s", "joint_t", "shares")
