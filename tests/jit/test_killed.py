"""Killed at any stage of a build: the next call works, and nothing is left locked or growing."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.harness.helpers import run, start
from tests.jit.support import ANSWER, COMPILER, answer, entries, leftovers

pytestmark = pytest.mark.cpp

BUILD = f"""
    import ops.jit
    print(ops.jit.load_inline("answer", {ANSWER!r}, is_python_module=False,
                              no_implicit_headers=True))
"""
# Each stage of a build, in order: what is about to be done when the process is killed.
STAGES = {
    "the folders are made": "ops.jit._cache._roots.tempfile.TemporaryFile",
    "the lock is taken": "filelock.FileLock.acquire",
    "the lock is signed": "ops.jit._cache._lock.json.dumps",
    "the private folder is made": "ops.jit._cache._staging.Path.mkdir",
    "the private folder is locked": "ops.jit._cache._staging.fcntl.flock",
    "the private folder is named": "ops.jit._cache._staging.Path.rename",
    "torch writes its files": "ops.jit._compile._build._call",
    "ninja is run": "ops.jit._compile._ninja.run",
    "the lists of headers are read": "ops.jit._compile._headers.read_by",
    "the headers are hashed": "ops.jit._facts.of",
    "the editors' file is written": "ops.jit._compile_commands.write",
    "the entry is prepared": "ops.jit._cache._store.publish",
    "the manifest is flushed": "ops.jit._cache._store.os.fsync",
    "the entry is renamed into place": "ops.jit._cache._store.os.rename",
    "the compilers are remembered": "ops.jit._facts.remember_compilers",
    "the old ones are evicted": "ops.jit._cache._inventory.evict",
    "it is counted": "ops.jit._cache._usage.hold",
    "it is loaded": "ops.jit._library._operators",
}
KILL = """
    import importlib, os, signal
    import filelock, ops.jit, ops.jit._miss
    module, name = {target!r}.rsplit(".", 1)
    try:
        owner = importlib.import_module(module)
    except ImportError:
        outer, inner = module.rsplit(".", 1)
        owner = importlib.import_module(outer) if "Path" not in outer else None
        owner = getattr(owner, inner)
    def die(*arguments, **keywords):
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(owner, name, die)
"""


@pytest.mark.parametrize("stage", STAGES)
def test_killed_before(cache, stage):
    code = KILL.format(target=STAGES[stage]) + BUILD
    for number in range(2):  # nothing grows from one to the next
        process = start(code, JITOPS_CACHE_DIR=cache)
        process.communicate(timeout=120)
        if number == 0 or not entries(cache):  # what is published needs no second build
            assert process.returncode == -signal.SIGKILL
    assert len(leftovers(cache) if (cache / "staging").is_dir() else []) <= 2
    started = time.time()
    out, err = run(BUILD, JITOPS_CACHE_DIR=cache, JITOPS_PROGRESS="1")
    assert time.time() - started < 60
    assert "waiting" not in err
    assert answer(Path(out.strip())) == 42
    assert len(entries(cache)) == 1
    hidden = [path for path in leftovers(cache) if not path.name.startswith(".")]
    assert hidden == []


def test_interrupted_by_the_keyboard(cache, tmp_path):
    """Ctrl-C: an end at once, the compilers' too, and the next call builds."""
    slow = tmp_path / "slow-g++"
    slow.write_text(
        f'#!/bin/sh\ncase "$*" in *" -c "*) echo $$ > {tmp_path}/pid; sleep 60;; esac\n'
        f'exec {COMPILER} "$@"\n'
    )
    slow.chmod(0o755)
    # What runs in a shell's background starts with Ctrl-C ignored.
    heeding = "    import signal\n    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    process = start(heeding + BUILD, JITOPS_CACHE_DIR=cache, CXX=slow)
    deadline = time.time() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
        assert time.time() < deadline
        time.sleep(0.02)
    compiler = int((tmp_path / "pid").read_text())
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert "KeyboardInterrupt" in err
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.kill(compiler, 0)
            time.sleep(0.02)
    assert leftovers(cache) == []
    out, _ = run(BUILD, JITOPS_CACHE_DIR=cache)
    assert answer(Path(out.strip())) == 42
