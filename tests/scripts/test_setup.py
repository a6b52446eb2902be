import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("torch", "torchvision", "lacks"),
    [
        ("2.11.0", "0.26.0", ""),
        ("2.11.1+cu130", "0.26.1+cu130", ""),
        ("2.14.1", "0.29.1", ""),
        ("2.14.1", "0.26.0", "torchvision==0.29 (it has 0.26.0)"),
        ("2.11.0", "0.29.1", "torchvision==0.26 (it has 0.29.1)"),
        ("2.10.0", "0.25.0", "torch==2.11.0 (it has 2.10.0)"),
        ("3.0.0", "0.41.0", "torch==2.11.0 (it has 3.0.0)"),
    ],
)
def test_torch_comes_with_the_torchvision_of_its_release(tmp_path, torch, torchvision, lacks):
    """The scripts' own question to an interpreter, which is told of other releases than it has."""
    for name, version in (("torch", torch), ("torchvision", torchvision)):
        about = tmp_path / f"{name}-{version}.dist-info" / "METADATA"
        about.parent.mkdir()
        about.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    pins = re.findall(r"^torch.*\n", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    (tmp_path / "requirements.txt").write_text("".join(pins))
    (function,) = re.findall(
        r"^has_requirements\(\) \{\n.*?^\}\n", (ROOT / "scripts" / "setup.sh").read_text(), re.M | re.S
    )
    command = ["bash", "-c", f'{function}has_requirements "$1"', "bash", sys.executable]
    told = os.environ | {"PYTHONPATH": str(tmp_path)}
    said = subprocess.run(command, cwd=tmp_path, env=told, capture_output=True, text=True)
    assert len(pins) == 2
    assert (said.stdout.strip(), said.returncode) == (lacks, int(lacks != ""))
