"""The docs: their code is that of the examples, and their commands print the shown output."""

from __future__ import annotations

import doctest
import inspect
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ops
from ops._cli import main as cli
from tests.harness import matrix
from tests.harness.helpers import ROOT, environment, run

ENGLISH, CHINESE = (ROOT / "docs" / f"write-your-own{suffix}.md" for suffix in ("", ".zh-CN"))
LOADER = ROOT / "docs" / "loader.md"
EXAMPLES = ROOT / "examples"


def blocks(document, language=r"\w+"):
    return re.findall(rf"```({language})\n(.*?)```", document.read_text(), re.DOTALL)


def test_both_languages_show_the_same():
    assert blocks(ENGLISH) == blocks(CHINESE)
    assert len(re.findall("^## ", ENGLISH.read_text(), re.MULTILINE)) == 5


@pytest.mark.parametrize(
    "document",
    [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"],
    ids=lambda path: path.name,
)
def test_links_lead_somewhere(document):
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)", document.read_text())
    if document in (ENGLISH, CHINESE, LOADER):
        assert len(targets) >= len(list(EXAMPLES.glob("*.py")))
    for target in targets:
        assert (document.parent / target).exists(), target


def test_the_code_is_that_of_the_examples():
    texts = [path.read_text() for path in EXAMPLES.glob("*.py")]
    for _, code in blocks(ENGLISH, "python"):
        assert any(code in text for text in texts), code


def test_the_small_op_is_that_of_the_template():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    ((path, code),) = re.findall(
        r"<!-- (templates/\S+) -->\n\n```python\n(.*?)```", text, re.DOTALL
    )
    assert code == (ROOT / path).read_text()


@pytest.mark.cpp
def test_the_code_about_the_loader(tmp_path):
    (code,) = (code for _, code in blocks(LOADER, "python") if "TEXT" in code)
    out, _ = run(code, JITOPS_CACHE_DIR=tmp_path)
    assert out == re.search(r"  # (tensor\(.*\)\n)", code)[1]


def masked(text):
    """Mask times, because they differ from run to run."""
    # pytest adds hours and minutes to what takes longer than one.
    return re.sub(r"\d+\.\d+s( \(\d+:\d+:\d+\))?", "0s", text).strip()


def pairs():
    """Each command with the output that follows it."""
    found = blocks(ENGLISH, "sh|text")
    for (kind, command), (after, output) in zip(found, [*found[1:], ("", "")], strict=True):
        if kind == "sh" and after == "text":
            yield command.strip(), output


@pytest.mark.thorough
@pytest.mark.cpp
def test_the_compiled_example_in_graphs_and_reloaded(tmp_path):
    """It works in a notebook: under torch.compile, and after an edit."""
    shutil.copy(EXAMPLES / "swiglu.py", tmp_path)
    code = """
    import importlib, pathlib, torch, ops, swiglu
    x, y = torch.randn(2, 3, 4).requires_grad_()
    with ops.use_backend("cpp"):
        for edited in (False, True):
            if edited:
                file = pathlib.Path(swiglu.__file__)
                text = file.read_text()
                file.write_text(text.replace("gate[i] * s * value", "2 * gate[i] * s * value"))
                importlib.reload(swiglu)
            function = torch.compile(swiglu.swiglu, fullgraph=True, backend="aot_eager")
            expected = swiglu.torch_path(x, y)
            torch.testing.assert_close(function(x, y), expected * (2 if edited else 1))
            mine, theirs = (torch.autograd.grad(z.sum(), x) for z in (function(x, y), expected))
            torch.testing.assert_close(mine, theirs)
    """
    run(code, cwd=tmp_path, JITOPS_CACHE_DIR=tmp_path / "cache")


@pytest.mark.thorough
@pytest.mark.cpp
def test_the_commands_print_what_is_shown(tmp_path):
    """They run in a folder that holds only the examples, with an empty cache."""
    folder = tmp_path / "mine"
    shutil.copytree(EXAMPLES, folder, ignore=shutil.ignore_patterns("__pycache__"))
    commands = list(pairs())
    assert len(commands) == 7
    for command, output in commands:
        run = subprocess.run(
            ["bash", "-c", command],
            cwd=folder,
            env=environment(
                PATH=f"{Path(sys.executable).parent}:{environment()['PATH']}",
                JITOPS_CACHE_DIR=tmp_path / "cache",
                PYTEST_ADDOPTS="-p no:cacheprovider",
            ),
            capture_output=True,
            text=True,
            check=False,
        )
        assert masked(run.stdout) == masked(output), run.stderr
        assert run.returncode == ("failed" in output.splitlines()[-1]), run.stderr


def test_every_claim_of_the_comparison_has_its_test():
    """Each "yes" of the loader names a test that exists in the linked file."""
    rows = [
        [cell.strip() for cell in line.strip("|\n").split("|")]
        for line in LOADER.read_text().splitlines()
        if line.startswith("| ")
    ]
    claims = [ours for what, _, ours in rows if not what.startswith("**") and what]
    assert len(claims) > 40
    for claim in claims:
        if claim.startswith("no"):
            continue
        name, place = re.fullmatch(r"yes: \[(\w+)\]\(([^)]+)\)", claim).groups()
        assert f"\ndef test_{name}(" in (LOADER.parent / place).read_text(), claim


def test_the_commands_of_the_loader_are_understood():
    """The command line parses every command of the page."""
    lines = "\n".join(text for _, text in blocks(LOADER, "sh")).splitlines()
    commands = [line.partition("#")[0] for line in lines if line]
    commands += re.findall(r"`(?:RUN )?(jitops [^`\n]+)`", LOADER.read_text())
    assert len(commands) > 8
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "jitops"
        cli._parser().parse_args(arguments)


def test_the_tables_of_checks_are_current():
    assert matrix.PAGE.read_text().partition(matrix.START)[2] == matrix.tables()


def examples_of_help():
    """The public names whose docstrings have an example, each with it."""
    for name in ops.__all__:
        public = getattr(ops, name)
        text = inspect.getdoc(public) or ""
        if ">>>" in text:
            names = {**vars(sys.modules[public.__module__]), "torch": torch}
            yield doctest.DocTestParser().get_doctest(text, names, name, None, None)


def test_the_examples_of_help_print_what_is_shown():
    tests = {test.name: test for test in examples_of_help()}
    assert {"ImprovedTripletLoss", "from_numpy"} <= tests.keys()
    for test in tests.values():
        assert doctest.DocTestRunner().run(test).failed == 0


def test_help_suggests_values_for_parameters_without_a_default():
    text = inspect.getdoc(ops.improved_triplet_loss)
    for value in ("t1: .* The paper takes −1", "t2: .* takes 0.01", "beta: .* takes 0.002"):
        assert re.search(value, text)
