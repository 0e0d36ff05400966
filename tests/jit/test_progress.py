"""The lines that report a build."""

from __future__ import annotations

import pytest

from ops.jit import load_inline
from tests.jit.support import ANSWER

pytestmark = pytest.mark.cpp


def build(cache, settings, progress):
    settings(CACHE_DIR=str(cache), PROGRESS=progress)
    load_inline("answer", ANSWER, is_python_module=False, no_implicit_headers=True)


def test_stderr_gets_a_line_when_a_build_starts_and_one_when_it_ends(cache, settings, capsys):
    build(cache, settings, "1")
    first, second = capsys.readouterr().err.splitlines()
    assert first == "jitops: compiling answer (1 file)"
    assert second.startswith("jitops: compiled answer (1 file) in ")


def test_the_line_is_there_while_the_compilers_run(cache, settings, capsys, monkeypatch):
    monkeypatch.setattr("ops.jit._compile._runner.run", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build(cache, settings, "1")
    assert capsys.readouterr().err == "jitops: compiling answer (1 file)\n"


def test_nothing_is_said_without_progress(cache, settings, capsys):
    build(cache, settings, "0")
    assert capsys.readouterr().err == ""
