"""A build that fails: told to those that waited for it, and tried again by all others."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

import ops
from ops.jit import load_inline
from ops.jit._cache import _eviction
from tests.harness.forks import start
from tests.jit.support import ANSWER, COMPILER, answer, extension

pytestmark = pytest.mark.cpp

BROKEN = 'extern "C" int answer() { return NOWHERE; }\n'
TRY = f"""
    import time, ops, ops.jit
    started = time.perf_counter()
    try:
        ops.jit.load_inline("broken", {BROKEN!r}, is_python_module=False, no_implicit_headers=True)
    except ops.BuildError as error:
        print(time.perf_counter() - started)
        print(error)
"""


@pytest.fixture
def counting(tmp_path, monkeypatch):
    """A compiler that notes each of its runs on a source."""
    path, notes = tmp_path / "counting-g++", tmp_path / "runs"
    path.write_text(
        f'#!/bin/sh\ncase "$*" in *" -c "*r.cpp*|*" -c "*main.cpp*) echo run >> {notes};; esac\n'
        f'exec {COMPILER} "$@"\n'
    )
    path.chmod(0o755)
    notes.touch()
    monkeypatch.setenv("CXX", str(path))
    return lambda: len(notes.read_text().splitlines())


def attempt(source):
    with pytest.raises(ops.BuildError) as raised:
        extension(source).load()
    return str(raised.value)


def test_a_new_process_tries_again(cache, source, counting, settings):
    """Nothing is remembered: whatever may have been mended, JITOPS_RETRY or not."""
    good = source.read_text()
    source.write_text(BROKEN)
    for number, retry in enumerate(("0", "1"), start=1):
        settings(RETRY=retry, CACHE_DIR=str(cache))
        attempt(source)
        assert counting() == number
    with pytest.raises(ops.BuildError, match="NOWHERE"):
        extension(source).build(retry=True)
    assert counting() == 3
    source.write_text(good)
    assert answer(extension(source).load()) == 42


def test_every_waiter_gets_the_same_error(cache, counting, tmp_path):
    slow = tmp_path / "slow-g++"  # so that all have come before it fails
    slow.write_text(
        f'#!/bin/sh\ncase "$*" in *" -c "*) sleep 2;; esac\nexec {os.environ["CXX"]} "$@"'
    )
    slow.chmod(0o755)
    variables = {"JITOPS_CACHE_DIR": cache, "CXX": slow}
    crowd = [start(TRY, **variables) for _ in range(3)]
    said = [process.communicate(timeout=300)[0] for process in crowd]
    first = {"\n".join(text.splitlines()[1:5]) for text in said}
    assert len(first) == 1
    assert "NOWHERE" in first.pop()
    assert counting() == 1


def test_out_of_memory_is_named(cache, tmp_path, monkeypatch):
    path = tmp_path / "killed-g++"
    path.write_text(
        f'#!/bin/sh\n[ "$1" = -v ] && exec {COMPILER} -v\n'
        "echo 'c++: fatal error: Killed signal terminated program cc1plus' >&2\nexit 1\n"
    )
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    with pytest.raises(ops.BuildError, match="ran out of memory"):
        load_inline("answer", BROKEN, is_python_module=False, no_implicit_headers=True)


def test_logs_are_of_one_text_each_and_last_a_week(cache):
    logs = []
    for text in (BROKEN, BROKEN.replace("NOWHERE", "NOTHING")):
        with pytest.raises(ops.BuildError) as raised:
            load_inline("broken", text, is_python_module=False, no_implicit_headers=True)
        logs.append(Path(raised.value.log))
    load_inline("broken", ANSWER, is_python_module=False, no_implicit_headers=True)
    assert ["NOWHERE" in log.read_text() for log in logs] == [True, False]
    week = 7 * 24 * 3600
    os.utime(logs[0], (time.time() - week - 60,) * 2)
    os.utime(logs[1], (time.time() - week + 60,) * 2)
    load_inline("another", ANSWER, is_python_module=False, no_implicit_headers=True)
    assert [log.exists() for log in logs] == [False, True]


def test_a_log_that_cannot_be_deleted_hinders_nothing(cache, source, monkeypatch):
    evicted, real = [], Path.unlink

    def unlink(path, missing_ok=False):
        if path.suffix == ".log":
            raise PermissionError(1, "Operation not permitted")
        real(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    monkeypatch.setattr(_eviction, "evict", lambda *_, **__: evicted.append(1))
    assert answer(extension(source).load()) == 42
    assert evicted == [1]
