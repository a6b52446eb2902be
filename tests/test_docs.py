"""README.md and docs/ against the code: their size, their table, their links, and every command line in them."""

import io
import re
import runpy
import shlex
import subprocess
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import pytest
import torch

import distiller_zoo

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("train_student", "train_teacher", "pretrain_clip", "evaluate", "export")
MODULES = ("report", "report.curves", "tests.campaign", "benchmarks.pipeline", "benchmarks.growth", "benchmarks.on_gpu")
# A shell script passes what follows its name on to train_student.py, but for these.
OWN_ARGUMENTS = ("test.sh", "fetch_lite.sh", "run_real_teacher.sh", "run_cifar_vanilla.sh", "prove_gpu.sh")
# Options of torchrun and Slurm.
OTHERS = {"--standalone", "--nproc_per_node", "--max_restarts", "--nnodes", "--signal"}

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning:runpy")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def spans(text: str) -> list[str]:
    """The code inside the lines of a page, each piece in one line."""
    outside = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", outside)]


def command_lines(text: str) -> list[list[str]]:
    """The command lines of a page, each in words: those of its shell blocks, and those in its text."""
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += [span for span in spans(text) if re.search(r"(^| )(python|bash|torchrun|sbatch) ", span)]
    return [shlex.split(line, comments=True) for line in lines]


@cache
def options(program: str) -> frozenset[str]:
    """What ``--help`` of a script or a module lists."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr("sys.argv", [program, "--help"])
        with pytest.raises(SystemExit):
            runpy.run_module(program, run_name="__main__")
    entries = re.findall(r"^  (-\S.*?)(?:  .*)?$", printed.getvalue(), re.MULTILINE)
    return frozenset(option for entry in entries for option in re.findall(r"(?<!\S)--?[a-zA-Z][\w-]*", entry))


def mistakes(text: str) -> list[str]:
    """Which scripts, modules and options of a page's command lines do not exist."""
    wrong = []
    for line in command_lines(text):
        known = None  # of the program that the words now belong to
        for previous, word in zip(["", *line], line, strict=False):
            if previous == "-m" and re.match(r"(benchmarks|report|tests)\b", word):
                known = options(word)
            elif re.search(r"\.(py|sh|sbatch)$", word):
                path = ROOT / word
                if not path.is_file():
                    wrong.append(word)
                elif path.name not in OWN_ARGUMENTS:
                    known = options(path.stem if path.suffix == ".py" else "train_student")
            elif known and re.match(r"--?[a-zA-Z]", word) and word.split("=")[0].rstrip(";") not in known:
                wrong.append(word)
            if word in ("|", "&&") or word.endswith((";", ")")):
                known = None
    return wrong


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    outside = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", outside, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_front_pages_are_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160
    assert (ROOT / "README.md").stat().st_size <= 10 * 1024
    assert (ROOT / "docs" / "results.md").stat().st_size <= 8 * 1024


def test_the_table_of_methods_is_what_list_prints():
    page = (ROOT / "docs" / "methods.md").read_text()
    assert f"\n\n{distiller_zoo.method_table().strip()}\n\n" in page, "python train_student.py --list prints the table"


@each_page
def test_links_and_pictures_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


@each_page
def test_command_lines_name_what_exists(page):
    assert mistakes(page.read_text()) == []


def test_a_command_line_that_does_not_exist_is_found():
    text = "Once `python gone.py --any`.\n```bash\npython train_student.py --gone 3 -b 1   # --comment\n"
    text += "for x in a b; do python -m report --gone=3 RUN; done\n```\n"
    assert mistakes(text) == ["--gone", "--gone=3", "gone.py"]


def test_the_readmes_method_is_a_file_and_a_row(tmp_path, monkeypatch):
    section = (ROOT / "README.md").read_text().partition("## Add a method")[2].partition("\n## ")[0]
    module, row = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (tmp_path / "MyLoss.py").write_text(module)
    monkeypatch.setattr(distiller_zoo, "__path__", [*distiller_zoo.__path__, str(tmp_path)])
    (method,) = eval(f"{{{row}}}", vars(distiller_zoo).copy()).values()
    assert set(method.feeds) <= {name for other in distiller_zoo.METHODS.values() for name in other.feeds}
    student, teacher = torch.randn(2, 4, 8)
    loss = method.build(None, None)
    torch.testing.assert_close(loss(student, student), torch.tensor(0.0), atol=1e-6, rtol=0)
    assert loss(student, teacher) > 0.1


@each_page
def test_options_in_the_text_exist(page):
    known = OTHERS.union(*map(options, (*PROGRAMS, *MODULES)))
    told = {word for span in spans(page.read_text()) if span.startswith("-") for word in span.split()}
    assert {word for word in told if re.match(r"--?[a-zA-Z]", word)} - known == set()


@each_page
def test_the_records_that_a_command_names_are_there(page):
    for word in {word for line in command_lines(page.read_text()) for word in line}:
        if word.startswith("docs/runs/") and not re.search(r"NAME|\$", word):
            found = subprocess.run(["bash", "-O", "failglob", "-c", f"echo {word}"], cwd=ROOT, capture_output=True)
            assert found.returncode == 0, word
