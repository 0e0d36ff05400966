"""Errors as users see them: few frames of jitops, and a guess at the word they meant."""

from __future__ import annotations

import re
import sys
import traceback
from types import SimpleNamespace

import pytest
import torch

import ops
from ops import _config
from ops._cli import main as cli
from ops._errors import did_you_mean
from tests.harness.helpers import LOSS, path_without, run

BROKEN = """
    from ops.jit import load_inline
    text = "int f(int x) {\\n  return x + nowhere;\\n}\\n"
    load_inline("broken", text, is_python_module=False, no_implicit_headers=True)
"""


def frames(text):
    return re.findall(r'^ +File "(.+)", line', text, re.MULTILINE)


# ---- a script ------------------------------------------------------------------------------------


@pytest.mark.cpp
def test_a_failed_build_in_a_script(tmp_path):
    _, err = run(BROKEN, ok=False, JITOPS_CACHE_DIR=tmp_path / "cache")
    assert len(frames(err)) == 2
    assert "/jit/" not in err.partition("BuildError")[0]
    first, *lines = err[err.index("broken does not build") :].splitlines()
    assert first == "broken does not build:"
    assert re.match(r"  broken\[0\]\.cpp:2: .*nowhere.* was not declared in this scope", lines[0])
    assert lines[1].strip() == "return x + nowhere;"
    assert [line.split()[0] for line in lines[2:]] == ["cause:", "fix:", "log:"]


def test_a_back_end_that_does_not_exist(tmp_path):
    _, err = run(LOSS, ok=False, JITOPS_BACKEND="gpu")
    assert len(frames(err)) == 2
    assert err.endswith(
        "JITOPS_BACKEND must be one of auto, torch, cpp, cuda, compiled, got 'gpu'; "
        "did you mean 'cuda'?\n"
    )


@pytest.mark.parametrize("how", ["variable", "use_backend"])
def test_a_back_end_that_cannot_run(tmp_path, how):
    """The first error says all that its cause does, so the cause is not shown."""
    compilers = ("c++", "g++", "clang++", "cc", "gcc", "clang")
    variables = {
        "PATH": path_without(*compilers, folder=tmp_path / "bin"),
        "CXX": None,
        "JITOPS_CACHE_DIR": tmp_path / "cache",
    }
    if how == "variable":
        _, err = run(LOSS, ok=False, JITOPS_BACKEND="cpp", **variables)
        assert len(frames(err)) == 2
    else:
        asked = "import ops; asked = ops.use_backend('cpp'); asked.__enter__()"
        _, err = run(f"    {asked}{LOSS}", ok=False, **variables)
    assert err.count("Traceback") == 1
    assert "back end 'cpp' was asked for and cannot run: no C++ compiler" in err


# ---- a notebook ----------------------------------------------------------------------------------


@pytest.fixture
def ipython(monkeypatch):
    def structured_traceback(kind, error, frames, tb_offset):
        assert tb_offset == 1  # the first frame is IPython's
        return traceback.format_exception(kind, error, frames)

    shell = SimpleNamespace(
        InteractiveTB=SimpleNamespace(structured_traceback=structured_traceback)
    )
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))


class Mine(torch.nn.Module):
    def forward(self, x):
        return ops.improved_triplet_loss(x, x, x, "a", 0.0, 1.0)


@pytest.mark.parametrize(
    ("call", "its"),
    [
        (lambda: ops.normalize_with_norm(3), 2),
        (lambda: ops.use_backend("gpu").__enter__(), 2),
        (lambda: ops.ImprovedTripletLoss(-1.0, 0.0, 1.0)(1, 2, 3), 2),
        (lambda: ops.jit.load_inline("a b", ""), 2),
        (lambda: Mine()(torch.ones(2, 2)), 5),  # its forward, which torch calls
    ],
)
def test_a_notebook_shows_the_frames_of_the_user(ipython, call, its):
    with pytest.raises(ops.JitopsError) as raised:
        call()
    shown = "".join(raised.value._render_traceback_())
    assert frames(shown)[-1] == __file__
    assert len(frames(shown)) == its
    assert str(raised.value) in shown
    assert traceback.extract_tb(raised.value.__traceback__)[-1].filename != __file__  # for %debug


# ---- did you mean --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "meant"),
    [("gpu", "cuda"), ("GPU", "cuda"), ("cpu", "cpp"), ("c++", "cpp"), ("pytorch", "torch")],
)
def test_the_back_end_that_was_meant(settings, given, meant):
    with pytest.raises(ops.ConfigError, match=f"got '{re.escape(given)}'; did you mean '{meant}'"):
        ops.use_backend(given).__enter__()
    settings(BACKEND=given)
    with pytest.raises(ops.ConfigError, match=f"did you mean '{meant}'"):
        _config.settings()


def test_nothing_is_meant_by_a_word_that_is_like_none():
    assert did_you_mean("xyz", _config.BACKENDS) == ""
    assert did_you_mean("gpu", ("none", "mean")) == ""


def test_other_words_that_are_nearly_right(settings, monkeypatch, capsys):
    with pytest.raises(ops.ArgumentError, match="got 'avg'; did you mean 'mean'"):
        ops.ImprovedTripletLoss(-1.0, 0.0, 1.0, reduction="avg")
    with pytest.raises(ops.ArgumentError, match="got 'ltlm'; did you mean 'lltm'"):
        ops.explain("ltlm")
    with pytest.raises(ops.ConfigError, match="got 'gpu'; did you mean 'cuda'"):
        ops.check_gradients(torch.sin, torch.ones(2), backends=["gpu"])
    for command in ("build", "check"):
        assert cli.main([command, "ltlm"]) == 1
        assert "got 'ltlm'; did you mean 'lltm'?" in capsys.readouterr().err
    settings(BUILD="newer")
    with pytest.raises(ops.ConfigError, match="got 'newer'; did you mean 'never'"):
        _config.settings()
    monkeypatch.delenv("JITOPS_BUILD")
    settings(BACKENDS="cpp")
    with pytest.warns(ops.ConfigWarning, match="did you mean 'JITOPS_BACKEND'"):
        _config.settings()
