"""Several processes, dying ones, locks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

import ops
from ops import _config
from ops.jit import _key
from ops.jit._cache import _entries, _location, _publish
from tests.harness.forks import run, start
from tests.jit.support import ANSWER, COMPILER, answer, entries, extension, leftovers

pytestmark = pytest.mark.cpp


SLOW = f"""
    import ops.jit
    print(ops.jit.load_inline("slow", {ANSWER!r}, is_python_module=False, no_implicit_headers=True))
"""


@pytest.fixture
def slow_compiler(tmp_path):
    """A compiler that takes its time, so that a build can be caught in the act."""
    path = tmp_path / "slow-g++"
    path.write_text(f'#!/bin/sh\n[ "$1" = -v ] || sleep 1\nexec {COMPILER} "$@"\n')
    path.chmod(0o755)
    return path


def wait_for(condition, seconds=60):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.02)


def works_below(folder):
    """Tell whether a process has its current folder below this one."""

    def does(process):
        with contextlib.suppress(OSError):  # it has ended, or is of another user
            return (process / "cwd").readlink().is_relative_to(folder)

    return does


def test_kill_9_in_the_middle_of_a_build(cache, slow_compiler):
    variables = {"JITOPS_CACHE_DIR": cache, "CXX": slow_compiler}
    for _ in range(2):
        victim = start(SLOW, **variables)
        wait_for(lambda: list(cache.glob("staging/*/main.cpp")))
        time.sleep(0.3)
        victim.send_signal(signal.SIGKILL)
        victim.communicate()
        assert entries(cache) == []
    wait_for(lambda: not any(map(works_below(cache), Path("/proc").glob("[0-9]*"))))
    for path in leftovers(cache):
        os.utime(path, (1, 1))  # one that was just made might not be locked yet
    out, err = run(SLOW, **variables, JITOPS_PROGRESS="1")
    assert "jitops: compiled slow" in err
    assert "waiting" not in err
    assert Path(out.strip()).is_file()
    assert leftovers(cache) == []


def test_eight_processes_one_build(cache, slow_compiler):
    """At once, on an empty cache: one build, eight successes, the same library."""
    variables = {"JITOPS_CACHE_DIR": cache, "CXX": slow_compiler, "JITOPS_PROGRESS": "1"}
    crowd = [start(SLOW, **variables) for _ in range(8)]
    results = [process.communicate(timeout=300) for process in crowd]
    assert [process.returncode for process in crowd] == [0] * 8
    assert sum("jitops: compiled slow" in err for _, err in results) == 1
    assert len({out for out, _ in results}) == 1
    assert leftovers(cache) == []


def test_stale_locks_do_not_hang(cache, source, monkeypatch, tmp_path):
    """Torch's own stale lock file, and one of ours whose holder is gone."""
    torchs = tmp_path / "torch_extensions"
    (torchs / "answer").mkdir(parents=True)
    (torchs / "answer" / "lock").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(torchs))
    digest = _key.digest(_key.request(extension(source).spec))
    (cache / "locks").mkdir(parents=True)
    lock = _publish.lock_path(cache, "answer", digest)
    lock.write_text("held by a process long gone")
    started = time.time()
    assert answer(extension(source).load()) == 42
    assert time.time() - started < 30


def test_a_failure_is_told_to_those_that_wait_for_the_same(cache, source):
    """And not to who waits for something else, which may have the same lock."""
    digest = _key.digest(_key.request(extension(source).spec))
    (cache / "locks").mkdir(parents=True)
    lock = _publish.lock_path(cache, "answer", digest)
    told = {"failed": "on purpose", "log": None, "since": time.time() + 60}
    same = [digest, str(source.parent / "include"), str(source.parent)]
    lock.write_text(json.dumps({**told, "of": same}))
    with pytest.raises(ops.BuildError, match="on purpose"):
        extension(source).load()
    # Headers are not in the digest, and may differ in another checkout.
    for other in (["another", *same[1:]], [digest, "/elsewhere/include", "/elsewhere"]):
        lock.write_text(json.dumps({**told, "of": other}))
        assert answer(extension(source).load()) == 42
        shutil.rmtree(extension(source).find().parent)


HOLD = """
    import sys, time
    from pathlib import Path
    from ops.jit._cache import _publish
    with _publish.exclusive(Path({path!r}), "answer", 1, print):
        print("held", flush=True)
        time.sleep(60)
"""


def test_waiting_has_an_end(cache, source, monkeypatch):
    digest = _key.digest(_key.request(extension(source).spec))
    (cache / "locks").mkdir(parents=True)
    path = str(_publish.lock_path(cache, "answer", digest))
    holder = start(HOLD.format(path=path))
    try:
        assert holder.stdout.readline() == "held\n"
        monkeypatch.setenv("JITOPS_BUILD_TIMEOUT", "0.5")
        _config.settings.cache_clear()
        with pytest.raises(ops.BuildTimeoutError) as raised:
            extension(source).load()
        assert f"process {holder.pid} on" in str(raised.value)
        assert "more than 0.5 s" in str(raised.value)
        assert "JITOPS_BUILD_TIMEOUT" in str(raised.value)
    finally:
        holder.kill()
        holder.communicate()
    assert answer(extension(source).load()) == 42


def test_no_locks_on_this_file_system(cache, source, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert answer(extension(source).load()) == 42


def test_the_loser_of_a_race_uses_the_winners_entry(cache, source, tmp_path):
    library = extension(source).load()
    manifest = json.loads((library.parent / "manifest.json").read_text())
    with _publish.staging(cache, _entries.entry_name("answer", manifest["digest"])) as folder:
        mine = folder / library.name
        mine.write_bytes(library.read_bytes() + b"x")
        entry = _publish.publish(cache, folder, mine, {**manifest, "seconds": 0.0})
    assert entry.library == library
    assert leftovers(cache) == []


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.05, 0.1, 0.5])
def test_a_fork_while_another_thread_builds(cache, slow_compiler, delay):
    """The child has no such thread, and does not wait for it."""
    out, _ = run(
        f"""
        import os, threading, time
        import ops.jit
        def load(name):
            return ops.jit.load_inline(name, {ANSWER!r}, is_python_module=False,
                                       no_implicit_headers=True)
        builder = threading.Thread(target=load, args=("one",))
        builder.start()
        time.sleep({delay})
        pid = os.fork()
        if pid == 0:
            load("two")
            os._exit(7)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        builder.join()
        """,
        JITOPS_CACHE_DIR=cache,
        CXX=slow_compiler,
    )
    assert out.split() == ["7"]


def test_a_child_that_is_forked_during_a_build_keeps_no_lock(cache, source):
    """Such as a worker of a DataLoader, beside a thread whose build fails."""
    asked = _key.digest(_key.request(extension(source).spec))
    extension(source).load()
    path = _publish.lock_path(cache, "answer", asked)
    with _publish.exclusive(path, "answer", 0, print):
        child = os.fork()
        if child == 0:
            signal.pause()
    try:
        with _publish.exclusive(path, "answer", 0, print) as lock:
            assert lock.is_exclusive
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_fork_while_another_thread_imports(cache):
    """The child has no such thread, whose import it would wait for."""
    out, _ = run(
        f"""
        import os, signal, sys, threading, time
        import ops.jit
        begun = threading.Event()
        class Slow:
            def find_spec(self, name, path=None, target=None):
                if name == "ops.jit._build_once":
                    begun.set()
                    time.sleep(0.5)
        sys.meta_path.insert(0, Slow())
        def load(name):
            return ops.jit.load_inline(name, {ANSWER!r}, is_python_module=False,
                                       no_implicit_headers=True)
        builder = threading.Thread(target=load, args=("one",))
        builder.start()
        begun.wait()
        pid = os.fork()
        if pid == 0:
            signal.alarm(30)
            load("two")
            os._exit(7)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        builder.join()
        """,
        JITOPS_CACHE_DIR=cache,
    )
    assert out.split() == ["7"]


def test_staging_of_any_dead_builder_is_swept(cache, source, monkeypatch):
    """A dead builder no longer holds its lock; where locks tell nothing, it is a day old."""
    extension(source).load()
    now, staging = time.time(), cache / "staging"

    def left_by_next_build():
        for name, age in {"dead": 100, "alive": 100, "old": 90_000, "just made": 1}.items():
            (staging / name).mkdir(exist_ok=True)
            os.utime(staging / name, (now - age, now - age))
        source.write_text(source.read_text() + "\n")
        extension(source).load()
        return sorted(path.name for path in leftovers(cache))

    (staging / "alive").mkdir()
    descriptor = os.open(staging / "alive", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    assert left_by_next_build() == ["alive", "just made"]
    os.close(descriptor)
    monkeypatch.setattr(_location, "is_shared", lambda path: True)  # with hosts unseen from here
    assert left_by_next_build() == ["alive", "dead", "just made"]


def test_a_sweep_never_locks_the_folder_that_a_builder_is_just_making(cache, monkeypatch):
    """The builder would wait for the lock, which a child that is forked then would keep."""
    (cache / "staging" / "young").mkdir(parents=True)
    monkeypatch.setattr(_publish, "try_lock", lambda descriptor: pytest.fail("locked"))
    _publish.sweep(cache)
    assert len(leftovers(cache)) == 1
