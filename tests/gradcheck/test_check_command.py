"""``jitops check``: ops, functions of users, inputs of every kind."""

from __future__ import annotations

import json
import sys

import pytest

from ops._cli import main as cli

MINE = """
import torch

def right(x, y):
    return (x * y).sin()

class Wrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g

wrong = Wrong.apply

def rows(x, index, mask):
    assert index.dtype is torch.int64 and index.max() < 3 and mask.dtype is torch.bool
    return x[index].sin() * mask[:, None]

def to_target(x, target):
    assert 0 <= target.min() and target.max() <= 1
    return (x - target.detach()).square()

def hidden(x):
    return 1e13 + 1e-4 * x.sin()
"""


@pytest.mark.thorough
def test_command_on_all_ops(capsys):
    assert cli.main(["check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[1].rstrip(":,") for line in lines[:-1]} == set(_samples())
    assert lines[-1] == f"{len(lines) - 1} of {len(lines) - 1} ok"


def test_command_without_scipy(capsys, monkeypatch):
    """It names the ops that need SciPy, and checks all others."""
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    assert cli.main(["check", "set_matching_loss", "linear"]) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "not checked: set_matching_loss needs scipy" in line]
    assert last == "2 of 5 ok, 3 not checked"


def _samples():
    from ops._cli import _check

    return _check.modules()


def test_every_op_has_samples(root):
    modules = {
        path.stem
        for room in ("losses", "layers", "arrays")
        for path in (root / "ops" / room).glob("[a-z]*.py")
    }
    assert set(_samples()) == modules - {"from_numpy", "conversions"}  # neither is an op


def test_command_on_functions_of_ones_own(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)  # of other tests
    assert cli.main(["check", "mine:right", "--input", "3,4", "--input", "4"]) == 0
    assert capsys.readouterr().out.startswith("mine:right(x [3, 4], y [4])")
    files = ["--json", "report.json", "--plot", "report.png"]
    assert cli.main(["check", "mine.py:wrong", "--input", "3", *files]) == 1
    assert "a factor is missing: analytic = 0.5 numeric" in capsys.readouterr().out
    assert json.loads((tmp_path / "report.json").read_text())[0]["ok"] is False
    assert (tmp_path / "report.png").exists()


def test_command_with_inputs_of_every_kind(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    rows = ["--input", "3,4", "--input", "5:long:3", "--input", "5:bool"]
    assert cli.main(["check", "mine.py:rows", *rows, "--order", "3"]) == 0, capsys.readouterr().out
    assert "third order" in capsys.readouterr().out
    assert cli.main(["check", "mine.py:to_target", "--input", "4", "--input", "4:float:0:1"]) == 1
    assert "target: the gradient is zero or missing" in capsys.readouterr().out
    assert cli.main(["check", "mine.py:to_target", "--input", "4", "--input", "4:fixed:0:1"]) == 0


def test_command_on_what_nobody_can_tell(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["check", "mine.py:hidden", "--input", "3"]) in (0, 1)
    out, err = capsys.readouterr()
    assert "reverse mode           cannot tell" in out
    assert not err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3,x", "must be sizes separated by commas"),
        ("3:short", "must name one of float, fixed, long, bool after the shape, got '3:short'"),
        ("3:long:5:5", "must have a range of numbers, as in 4:long:0:10"),
        ("3:long:1.5", "must have a range of numbers"),
        ("3:float:0:inf", "must have a range of numbers"),
        ("3:float:1:2:3", "must have a range of numbers"),
        ("3:bool:2", "must have a range of numbers"),
    ],
)
def test_command_with_bad_inputs(text, message, capsys):
    with pytest.raises(SystemExit):
        cli.main(["check", "math:sin", "--input", text])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "last"),
    [
        ("def f(x):\n    raise ValueError('of mine')\n", "ValueError: of mine"),
        ("def f(x):\n    return x[1.5]\n", "IndexError: only integers"),
        ("def f(x:\n", "SyntaxError: '(' was never closed"),
        ("import no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module'"),
    ],
)
@pytest.mark.parametrize("target", ["broken.py:f", "broken:f"])
def test_command_on_code_that_raises(text, last, target, capsys, tmp_path, monkeypatch):
    """The user's own frames are shown, and none of those that call them."""
    (tmp_path / "broken.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    assert cli.main(["check", target, "--input", "3"]) == 1
    first, place, *_, end = capsys.readouterr().err.splitlines()
    assert first == f"jitops: {target} raises an error:"
    assert place.startswith(f'  File "{tmp_path}/broken.py", line ')
    assert end.startswith(last)


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_command_with_nowhere_to_write_to(option, capsys, tmp_path):
    file = tmp_path / "nowhere" / "x.png"
    assert cli.main(["check", "math:sin", "--input", "3", option, str(file)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"jitops: {option} must be a file in a folder that exists, got {file}\n"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["math:sin", "--input", "3", "--plot", "k.xyz"], "--plot must end in ."),
        (
            ["nothing"],
            "TARGET must be MODULE:NAME, FILE.py:NAME or one of batch_",
        ),
        (["math:sin"], "--input must give the shape of each argument of math:sin"),
        (["nowhere:f", "--input", "3"], "TARGET must name a module, got 'nowhere'"),
        (["nowhere.py:f", "--input", "3"], "TARGET must name a file that exists"),
        (["mine.py:Module", "--input", "3"], "got 'Module', a class"),
        (["mine.py:right", "--input", "3"], "--input must be given once for each argument of"),
        (["math:nothing", "--input", "3"], "TARGET must name an object in math, got 'nothing'"),
    ],
)
def test_command_with_bad_arguments(arguments, text, capsys, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(f"{MINE}\nfrom torch.nn import Module\n")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["check", *arguments]) == 1
    assert text in capsys.readouterr().err
