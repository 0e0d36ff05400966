"""Killed at any moment of a build: the next call works, and nothing is left locked or growing."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from ops.jit import load_inline
from tests.harness.forks import run, start
from tests.jit.support import ANSWER, COMPILER, answer, entries, forked, leftovers

pytestmark = pytest.mark.cpp

BUILD = f"""
    import ops.jit
    print(ops.jit.load_inline("answer", {ANSWER!r}, is_python_module=False,
                              no_implicit_headers=True))
"""
# What changes a file system, a lock or a process, as Python's audit hooks report it.
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "os.link"}
CHANGES |= {
    "os.posix_spawn",
    "subprocess.Popen",
    "fcntl.flock",
    "shutil.rmtree",
    "tempfile.mkdtemp",
}


def changes(event, arguments):
    if event == "open":
        _, mode, flags = arguments
        return bool(set(mode or "") & set("wax+")) or bool(flags & (os.O_WRONLY | os.O_RDWR))
    return event in CHANGES


def build():
    load_inline("answer", ANSWER, is_python_module=False, no_implicit_headers=True)


def build_until(last):
    """Build, and be killed before the change of that number."""
    seen = []

    def count(event, arguments):
        if changes(event, arguments):
            seen.append(event)
            if len(seen) == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    build()


def test_killed_before_any_change(cache):
    """At each in turn; and the next call builds."""
    for number in range(1, 200):
        for path in (*entries(cache), *leftovers(cache)):
            shutil.rmtree(path, ignore_errors=True)  # its compilers are just ending
        status = forked(lambda number=number: build_until(number))
        if status == 0:
            break  # it has no more changes
        assert status == -signal.SIGKILL
        assert len(leftovers(cache)) <= 1
        if number % 6 == 0:
            started = time.time()
            for path in leftovers(cache):
                os.utime(path, (started - 100, started - 100))  # its builder would have locked it
            assert forked(build) == 0
            assert time.time() - started < 60
            assert len(entries(cache)) == 1
            assert leftovers(cache) == []
    assert status == 0
    assert number > 20


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
