import ast
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from distiller_zoo import EGA, METHODS

ROOT = Path(__file__).parents[2]
FEEDS = {
    "f_s": torch.randn(4, 8),
    "f_t": torch.randn(4, 8),
    "logit_s": torch.randn(4, 5),
    "logit_t": torch.randn(4, 5),
    "target": torch.arange(4),
    "index": torch.arange(4),
}


def imports(path: Path) -> set[str]:
    """The modules that a file imports, wherever in it; relative ones begin with dots."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    return found


def house(folder: str) -> set[str]:
    """What of the house the files of a folder import."""
    names = {path.parent.name for path in ROOT.glob("*/__init__.py")} | {path.stem for path in ROOT.glob("*.py")}
    modules = set().union(*(imports(path) for path in (ROOT / folder).rglob("*.py")))
    return {module.split(".")[0] for module in modules} & names


@pytest.mark.parametrize("folder", ["dataset", "models"])
def test_data_sets_and_models_import_nothing_else_of_the_house(folder):
    assert house(folder) <= {folder}


def test_the_losses_do_not_import_the_scripts_the_helpers_or_the_data():
    assert house("distiller_zoo") <= {"models"}


def test_the_helpers_import_no_script():
    assert house("helper") <= {"helper", "dataset", "models", "distiller_zoo"}


@pytest.mark.parametrize("path", sorted((ROOT / "distiller_zoo").glob("[!_]*.py")), ids=lambda path: path.name)
def test_a_losss_file_imports_torch_alone(path):
    found = {module.split(".")[0] for module in imports(path)}
    assert found - set(sys.stdlib_module_names) == {"torch"}


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_row_says_what_its_loss_is_fed(name):
    method = METHODS[name]
    assert set(method.feeds) <= FEEDS.keys()
    assert (method.build is None) == (not method.feeds)
    assert all(weight >= 0 for weight in method.weights)
    assert method.citation
    if method.build is None:
        assert method.weights[2] == 0
        return
    loss = method.build(Namespace(node_weight=0.8, edge_weight=0.24))
    value = loss(*(FEEDS[feed] for feed in method.feeds))
    assert value.shape == ()
    if hasattr(loss, "terms"):
        assert torch.equal(sum(loss.terms(*(FEEDS[feed] for feed in method.feeds)).values()), value)


def test_egas_weights_are_the_options():
    loss = METHODS["ega"].build(Namespace(node_weight=0.5, edge_weight=0.25))
    assert isinstance(loss, EGA)
    assert (loss.node_weight, loss.edge_weight) == (0.5, 0.25)
    assert METHODS["ega"].feeds == ("f_s", "f_t")
