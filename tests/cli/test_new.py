"""``python -m ops new``: it writes an op that passes all tests, or nothing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ops
from ops._cli import _new, main as cli
from tests.cuda import emulator as cuda_emulator
from tests.harness.helpers import ROOT, environment

KINDS = {"compiled": [], "torch_only": ["--torch-only"]}
IGNORED = (".git", ".venv", ".*_cache", "__pycache__", "build", "*.egg-info")


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A copy of the repository, which the command takes for its own."""
    folder = shutil.copytree(ROOT, tmp_path / "jitops", ignore=shutil.ignore_patterns(*IGNORED))
    monkeypatch.setattr(ops, "__file__", str(folder / "ops" / "__init__.py"))
    return folder


def tree(folder):
    files = (path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    return {path: path.read_bytes() for path in files if path.is_file()}


def in_copy(folder, *arguments):
    """A module of Python, run in the copy."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        env=environment(PYTHONPATH=folder, PYTHONDONTWRITEBYTECODE=1, PYTEST_ADDOPTS=None),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_it_writes_the_files_and_the_lines_of_an_op(checkout, kind, capsys):
    before = tree(checkout)
    assert cli.main(["new", "my_new_loss", *KINDS[kind]]) == 0
    said = capsys.readouterr().out
    now = tree(checkout)
    new = {str(path.relative_to(checkout)) for path in now.keys() - before}
    compiled = {f"cuda_src/my_new_loss.{suffix}" for suffix in ("h", "cpp", "cu")}
    compiled.add("benchmarks/losses/bench_my_new_loss.py")
    assert new == {
        "ops/losses/my_new_loss.py",
        "tests/losses/test_my_new_loss.py",
        "docs/ops/my_new_loss.md",
        *(compiled if kind == "compiled" else ()),
    }
    changed = {str(path.relative_to(checkout)) for path in before if now[path] != before[path]}
    assert changed == {"ops/__init__.pyi", "README.md", "CHANGELOG.md", "docs/checks.md"}
    for path in new | changed:
        assert path in said
        text = (checkout / path).read_text()
        assert "smooth_distance" not in text
        assert "SmoothDistance" not in text
        assert "my_new_loss" in text


@pytest.mark.thorough
def test_a_line_has_its_place(checkout):
    """Imports are sorted; the new row and the new point are the last ones."""
    for name in ("zz_last", "aa_first"):
        assert cli.main(["new", name, "--torch-only"]) == 0
    stub = (checkout / _new._STUB).read_text()
    lines = [line for line in stub.splitlines() if line.startswith("from .losses.")]
    assert lines == sorted(lines)
    assert lines[0].split()[1] == ".losses.aa_first"
    assert lines[-1].split()[1] == ".losses.zz_last"
    for document, after in (("README.md", "## Layers"), ("CHANGELOG.md", None)):
        text = (checkout / document).read_text()
        *_, before, one, other = text[: text.index(after) if after else None].strip().splitlines()
        assert before[:2] in ("| ", "- ", "  ")  # of the same table or list
        assert "ops.zz_last" in one
        assert "ops.aa_first" in other


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("MyLoss", "NAME must be in snake_case, as in focal_loss, got 'MyLoss'"),
        ("my-loss", "NAME must be in snake_case"),
        ("../my_loss", "NAME must be in snake_case"),
        ("_my_loss", "NAME must be in snake_case"),
        ("2_loss", "NAME must be in snake_case"),
        ("my_löss", "NAME must be in snake_case"),
        ("", "NAME must be in snake_case"),
        ("lambda", "NAME must not be a word of Python or C++, got 'lambda'"),
        ("thread_local", "NAME must not be a word of Python or C++"),
        ("improved_triplet_loss", "NAME must be new, got 'improved_triplet_loss'"),
        ("lltm_sequence", "NAME must be new"),
        ("set_matching", "NAME must be new"),  # of the class SetMatching
        ("losses", "NAME must be new"),
        ("dtype_number", "NAME must not be a word of the code around an op, got 'dtype_number'"),
        ("reference", "NAME must not be a word of the code around an op"),
    ],
)
def test_names_that_cannot_be(checkout, name, message, capsys):
    before = tree(checkout)
    assert cli.main(["new", name]) == 1
    assert message in capsys.readouterr().err
    assert tree(checkout) == before


def test_a_file_of_that_name_is_kept(checkout, capsys):
    (checkout / "docs" / "ops" / "my_loss.md").write_text("mine")
    before = tree(checkout)
    assert cli.main(["new", "my_loss"]) == 1
    assert "docs/ops/my_loss.md exists" in capsys.readouterr().err
    assert tree(checkout) == before


@pytest.mark.parametrize("document", ["README.md", "CHANGELOG.md", _new._STUB])
def test_a_list_without_the_place_is_told_before_anything_is_written(checkout, document, capsys):
    (checkout / document).write_text("Another text.\n")
    before = tree(checkout)
    assert cli.main(["new", "my_loss"]) == 1
    assert f"{document} has no place for the op" in capsys.readouterr().err
    assert tree(checkout) == before


def test_a_full_disk_leaves_nothing(checkout, monkeypatch):
    before, write, written = tree(checkout), Path.write_text, []

    def full(path, *arguments, **keywords):
        written.append(path)
        if len(written) == 9:  # a list
            write(path, "half")
            raise OSError(28, "No space left on device")
        return write(path, *arguments, **keywords)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left on device"):
        _new.main(cli._parser().parse_args(["new", "my_loss"]))
    assert tree(checkout) == before


def test_an_installed_package_has_no_templates(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ops, "__file__", str(tmp_path / "ops" / "__init__.py"))
    assert cli.main(["new", "my_loss"]) == 1
    assert "`new` needs a checkout of jitops, and ops was imported from" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.thorough
@pytest.mark.parametrize("kind", KINDS)
def test_the_new_op_passes_its_tests(checkout, kind, request):
    """The battery on each back end under test, planted bugs, nvcc, structure and documents."""
    told = request.config.backends
    name = "my_new_loss"
    assert cli.main(["new", name, *KINDS[kind]]) == 0
    tests = [f"tests/losses/test_{name}.py", "tests/test_structure.py", "tests/test_prose.py"]
    tests += ["tests/test_site.py", "tests/test_docs.py::test_the_tables_of_checks_are_current"]
    tests += ["tests/test_package.py::test_a_module_exports_what_the_package_does"]
    if kind == "compiled":
        emulated = cuda_emulator.NAME in told
        tests += ["tests/cuda/test_cuda_emulator.py"] if emulated else []
        tests += ["tests/cuda/test_cuda_compiles.py"] if request.config.nvcc else []
    options = [f"--backends={','.join(told)}", "-p", "no:cacheprovider", "-q", "-n0"]
    mine = f"{name} or not (test_cuda_emulator or test_cuda_compiles or test_site)"
    said = in_copy(checkout, "pytest", *options, "-k", mine, *tests)
    assert " passed" in said
    assert " skipped" not in said
    its = [
        one for one in told if one in ("torch", "cpp") and (kind == "compiled" or one == "torch")
    ]
    assert "ok" in in_copy(checkout, "ops", "check", name, f"--backends={','.join(its)}")


@pytest.mark.thorough
@pytest.mark.lint
def test_new_ops_pass_lint(checkout):
    """Lines that hold the name fit whatever its length."""
    if (ROOT / ".mypy_cache").is_dir():  # mypy looks anew at files that are not as they were
        shutil.copytree(ROOT / ".mypy_cache", checkout / ".mypy_cache")
    for start in ("q", "a_loss_with_a_name_that_is_rather_long_"):
        for kind, options in KINDS.items():
            assert cli.main(["new", start + kind[0], *options]) == 0
    in_copy(checkout, "ruff", "check", ".")
    in_copy(checkout, "ruff", "format", "--check", ".")
    in_copy(checkout, "mypy")
