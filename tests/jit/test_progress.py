"""The lines that report a build: on a terminal, in a file and in a notebook."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace

import pytest

from ops.jit import load_inline
from tests.jit.support import ANSWER

PLAIN = {"is_python_module": False, "no_implicit_headers": True}


class Notebook:
    """The part of IPython that shows outputs in a notebook, and the outputs of a cell."""

    def __init__(self, shell):
        self.outputs = []
        self.get_ipython = lambda: shell
        self.display = SimpleNamespace(display=self._display)

    def _display(self, content, *, raw, display_id):
        assert raw
        assert display_id
        self.outputs.append(content["text/plain"])
        return SimpleNamespace(update=self._update)

    def _update(self, content, *, raw):
        assert raw
        self.outputs[-1] = content["text/plain"]


@pytest.fixture
def ipython(monkeypatch):
    def start(**shell):
        notebook = Notebook(SimpleNamespace(**shell))
        monkeypatch.setitem(sys.modules, "IPython", notebook)
        monkeypatch.setitem(sys.modules, "IPython.display", notebook.display)
        return notebook

    return start


def build(cache, settings, progress="1"):
    settings(CACHE_DIR=str(cache), PROGRESS=progress)
    load_inline("answer", ANSWER, **PLAIN)


@pytest.mark.cpp
def test_a_notebook_shows_one_line_that_is_updated(cache, settings, ipython, capsys):
    notebook = ipython(kernel=object())
    build(cache, settings)
    (line,) = notebook.outputs
    assert re.fullmatch(r"jitops: compiled answer \(1 file\) in \d+\.\d s", line)
    assert capsys.readouterr().err == ""


@pytest.mark.cpp
def test_a_notebook_shows_when_a_build_starts(cache, settings, ipython, monkeypatch):
    notebook = ipython(kernel=object())
    monkeypatch.setattr("ops.jit._compile._build._run", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build(cache, settings)
    assert notebook.outputs == ["jitops: compiling answer (1 file)"]


@pytest.mark.cpp
@pytest.mark.parametrize("shell", [None, {}])
def test_elsewhere_stderr_gets_a_line_when_it_starts_and_one_when_it_ends(
    cache, settings, ipython, capsys, shell
):
    """Also in IPython on a terminal, which has a shell without a kernel."""
    outputs = [] if shell is None else ipython(**shell).outputs
    build(cache, settings)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "jitops: compiling answer (1 file)"
    assert second.startswith("jitops: compiled answer (1 file) in ")
    assert outputs == []


@pytest.mark.cpp
def test_nothing_is_said_without_progress(cache, settings, ipython, capsys):
    notebook = ipython(kernel=object())
    build(cache, settings, progress="0")
    assert notebook.outputs == []
    assert capsys.readouterr().err == ""
