"""Many at once: ranks, workers, threads, hosts that share a cache but no locks."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest

import ops
from ops.jit import text
from tests.harness import forks
from tests.harness.forks import run, start
from tests.harness.helpers import environment
from tests.jit.support import ANSWER, COMPILER, answer, entries, leftovers

pytestmark = pytest.mark.cpp

PLAIN = {"is_python_module": False, "no_implicit_headers": True}


@pytest.fixture
def compiler(tmp_path):
    """Slow enough that all of a crowd come while it runs; notes each of its runs."""
    path, runs = tmp_path / "slow-g++", tmp_path / "runs"
    path.write_text(
        f'#!/bin/sh\ncase "$*" in *" -c "*main.cpp*) echo run >> {runs}; sleep 1;; esac\n'
        f'exec {COMPILER} "$@"\n'
    )
    path.chmod(0o755)
    runs.touch()
    return path, lambda: len(runs.read_text().splitlines())


RANK = f"""
    import os, sys, ops.jit
    text = {ANSWER!r} if sys.argv[1] == "good" else "int x = NOWHERE;"
    try:
        said = ops.jit.load_inline("ranks", text, **{PLAIN})
    except ops.BuildError as error:
        said = str(error).splitlines()[1].strip()
    with open(f"{{sys.argv[2]}}/rank{{os.environ['RANK']}}", "w") as file:
        file.write(said)
"""


@pytest.mark.parametrize("kind", ["good", "broken"])
def test_torchrun(cache, tmp_path, compiler, kind):
    """Four ranks on an empty cache: one build, and every rank the same result, or error."""
    rank = [forks.python(), "-c", textwrap.dedent(RANK), kind, str(tmp_path)]
    forks.run(
        f"""
        import runpy, sys
        sys.argv = ["torchrun", "--no-python", "--nproc_per_node=4", *{rank!r}]
        runpy.run_module("torch.distributed.run", run_name="__main__")
        """,
        JITOPS_CACHE_DIR=cache,
        CXX=compiler[0],
        OMP_NUM_THREADS="1",
    )
    said = [(tmp_path / f"rank{rank}").read_text() for rank in range(4)]
    assert len(set(said)) == 1
    assert compiler[1]() == 1
    if kind == "good":
        assert answer(said[0]) == 42
    else:
        assert "NOWHERE" in said[0]


LOADER = f"""
    import ctypes, torch, ops.jit
    from torch.utils.data import DataLoader, Dataset
    class Answers(Dataset):
        def __len__(self):
            return 8
        def __getitem__(self, index):
            path = ops.jit.load_inline("workers", {ANSWER!r}, **{PLAIN})
            return ctypes.CDLL(path).answer() + index
    if __name__ == "__main__":
        loader = DataLoader(Answers(), num_workers={{workers}}, multiprocessing_context="{{start}}")
        print(sorted(int(x) for x in loader))
        print(ctypes.CDLL(ops.jit.load_inline("workers", {ANSWER!r}, **{PLAIN})).answer())
"""


@pytest.mark.parametrize(("how", "workers"), [("fork", "4"), ("spawn", "2")])
def test_data_loader_workers(cache, tmp_path, compiler, how, workers):
    """Those that are spawned read a script anew, and import torch, which takes two seconds each."""
    code = LOADER.replace("{start}", how).replace("{workers}", workers)
    variables = {"JITOPS_CACHE_DIR": cache, "CXX": compiler[0]}
    if how == "fork":
        out, _ = run(code, **variables)
    else:
        script = tmp_path / "loader.py"
        script.write_text(textwrap.dedent(code))
        out = subprocess.check_output(
            [sys.executable, script], env=environment(**variables), text=True, timeout=300
        )
    assert out.splitlines() == [str([42 + n for n in range(8)]), "42"]
    assert compiler[1]() == 1


HOST = f"""
    import errno, fcntl, sys
    import ops.jit
    from ops.jit._cache import _location
    _location.is_shared = lambda path: SHARED
    def refuse(*_, **__):
        raise OSError(errno.ENOLCK, "No locks available")
    if LOCKS == "none":
        fcntl.flock = refuse
    for number in range(3):
        text = {ANSWER!r} + f"// {{number}}\\n"
        print(ops.jit.load_inline("hosts", text, **{PLAIN}))
"""


def test_two_hosts_without_a_common_lock(cache):
    """As on NFS without locks: builds may be done twice, and everybody gets a whole library."""
    crowd = [
        start(
            HOST.replace("LOCKS", repr(locks)).replace("SHARED", repr(shared)),
            JITOPS_CACHE_DIR=cache,
        )
        for locks, shared in (("own", True), ("own", False), ("none", True), ("none", False))
    ]
    results = [process.communicate(timeout=300) for process in crowd]
    assert [process.returncode for process in crowd] == [0] * 4, results
    assert len({out for out, _ in results}) == 1
    for path in results[0][0].splitlines():
        assert answer(path) == 42
    assert len(entries(cache)) == 3
    assert leftovers(cache) == []


def test_threads_build_different_things_at_once(cache, compiler, monkeypatch):
    monkeypatch.setenv("CXX", str(compiler[0]))
    made = [text(f"thread{n}", ANSWER + f"// {n}\n", **PLAIN) for n in range(4)]
    before = dict(os.environ)
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda one: one.load(), made))
    assert [answer(path) for path in paths] == [42] * 4
    assert dict(os.environ) == before


def test_threads_build_the_same_thing_once(cache, compiler, monkeypatch):
    monkeypatch.setenv("CXX", str(compiler[0]))
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: text("same", ANSWER, **PLAIN).load(), range(4)))
    assert len(set(paths)) == 1
    assert compiler[1]() == 1


def test_eight_processes_hit_at_once(cache):
    """No lock is waited for, and each is counted."""
    text("answer", ANSWER, **PLAIN).build()
    code = f"import ops.jit; print(ops.jit.load_inline('answer', {ANSWER!r}, **{PLAIN}))"
    crowd = [start(code, JITOPS_CACHE_DIR=cache) for _ in range(8)]
    results = [process.communicate(timeout=300) for process in crowd]
    assert [process.returncode for process in crowd] == [0] * 8
    assert len({out for out, _ in results}) == 1
    (used,) = cache.glob("*/*/used")
    assert used.stat().st_size == 8


def test_import_is_light():
    out, _ = run(
        """
        import sys, torch
        before = set(sys.modules)
        import ops, ops.jit
        heavy = ("torch.utils.cpp_extension", "setuptools", "filelock", "rich", "ninja")
        print([name for name in heavy if name in set(sys.modules) - before])
        print(torch.cuda.is_initialized())
        """
    )
    assert out.split() == ["[]", "False"]


def test_a_failed_load_of_one_does_not_hold_up_another(cache):
    with pytest.raises(ops.BuildError):
        text("broken", "int x = NOWHERE;", **PLAIN).load()
    assert answer(text("answer", ANSWER, **PLAIN).load()) == 42
