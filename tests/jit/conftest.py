"""An empty cache, and a small extension to fill it with."""

from __future__ import annotations

import sys

import pytest

from ops import _config
from ops.jit import _load
from ops.jit._cache import _location
from tests.harness import forks

PYTHON = sys.executable


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a process that remembers nothing."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("JITOPS_CACHE_DIR", str(folder))
    monkeypatch.setattr(_load, "_loaded", {})
    _config.settings.cache_clear()
    _location._refused.cache_clear()
    yield folder
    # Variables of the test too, because undoing them later would restore this folder.
    monkeypatch.undo()
    _config.settings.cache_clear()
    _location._refused.cache_clear()


@pytest.fixture
def source(tmp_path):
    """A source with a header of its own."""
    folder = tmp_path / "source"
    (folder / "include").mkdir(parents=True)
    (folder / "include" / "answer.h").write_text("#define ANSWER 42\n")
    (folder / "answer.cpp").write_text(
        '#include "answer.h"\nextern "C" int answer() { return ANSWER; }\n'
    )
    return folder / "answer.cpp"


@pytest.fixture
def trials_in_forks(monkeypatch):
    """A newer version is tried in a fork, also by forks: a new Python would take two seconds."""
    monkeypatch.setattr(sys, "executable", forks.python())


@pytest.fixture
def trials_in_a_new_python(trials_in_forks, monkeypatch):
    """As users have them, for a test whose module asks for the other."""
    monkeypatch.setattr(sys, "executable", PYTHON)
