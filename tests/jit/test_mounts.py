"""Full, read-only, noexec: file systems as users have them. Needs to mount, so root."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.harness.forks import run
from tests.jit.support import ANSWER, entries, leftovers

pytestmark = [pytest.mark.cpp, pytest.mark.mounts]

PLAIN = {"is_python_module": False, "no_implicit_headers": True}
NO_HOME = Path("/nonexistent/.cache/jitops")
BUILD = f"""
    import ctypes, sys, ops, ops.jit
    try:
        path = ops.jit.load_inline("answer", {ANSWER!r}, **{PLAIN})
        print(path, ctypes.CDLL(path).answer())
    except ops.JitopsError as error:
        print(type(error).__name__, error)
"""


def private(temporary, uid, configured):
    """The folder that serves where a configured one cannot."""
    of = hashlib.sha256(os.fsencode(configured)).hexdigest()[:8]
    return temporary / f"jitops-{uid}-{of}"


@contextlib.contextmanager
def mounted(folder, options):
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder):
    """Until nothing more fits."""
    with contextlib.suppress(OSError), open(folder / "ballast", "wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)


@pytest.mark.parametrize("size", ["64k", "128k", "192k", "256k", "512k"])
def test_a_disk_that_becomes_full(tmp_path, size):
    """At whatever point of the build: it is said, nothing half is left, and room mends it."""
    with mounted(tmp_path / "disk", f"size={size},mode=755") as disk:
        cache = disk / "cache"
        fill(disk)
        with open(disk / "ballast", "r+b") as file:  # room for a beginning
            file.truncate(
                max(0, file.seek(0, os.SEEK_END) - {"64k": 0, "128k": 20480}.get(size, 40960))
            )
        out, _ = run(BUILD, JITOPS_CACHE_DIR=cache, TMPDIR=disk / "none")
        assert "No space left" in out or "disk is full" in out or " 42" in out
        assert "Traceback" not in out
        if (cache / "staging").is_dir():
            assert leftovers(cache) == []
        (disk / "ballast").unlink()
        subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
        out, _ = run(BUILD, JITOPS_CACHE_DIR=cache)
        assert out.endswith(" 42\n")
        assert len(entries(cache)) == 1


def test_a_full_disk_is_in_the_report(tmp_path):
    with mounted(tmp_path / "disk", "size=1m,mode=755") as disk:
        (disk / "cache").mkdir()
        fill(disk)
        out, _ = run(
            "from ops._cli.main import main; main(['doctor'])",
            JITOPS_CACHE_DIR=disk / "cache",
            TMPDIR=disk / "none",
        )
        assert "nearly full: 0 of 1 MiB free" in out or "cannot be written" in out
        assert "JITOPS_CACHE_DIR" in out


def test_a_read_only_cache_hits(tmp_path):
    with mounted(tmp_path / "disk", "size=16m,mode=755") as disk:
        run(BUILD, JITOPS_CACHE_DIR=disk / "cache")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        out, _ = run(BUILD, JITOPS_CACHE_DIR=disk / "cache", PATH="/nowhere")
        assert out == f"{entries(disk / 'cache')[0] / 'answer.so'} 42\n"


def test_a_read_only_cache_misses(tmp_path):
    """Built in the private folder instead, with a warning; where that cannot be, it is said."""
    with mounted(tmp_path / "disk", "ro,size=1m,mode=755") as disk:
        out, err = run(BUILD, JITOPS_CACHE_DIR=disk / "cache", TMPDIR=tmp_path)
        folder = private(tmp_path, 0, disk / "cache")
        assert out.startswith(f"{folder}/answer-")
        assert f"using {folder} as the cache, since {disk}/cache cannot be written" in err
        out, _ = run(BUILD, JITOPS_CACHE_DIR=disk / "cache", TMPDIR=disk)
        assert out.startswith("CacheError no folder can be used as the cache: ")
        assert "Set JITOPS_CACHE_DIR" in out


def test_a_noexec_cache(tmp_path):
    with mounted(tmp_path / "disk", "noexec,size=16m,mode=755") as disk:
        out, err = run(BUILD, JITOPS_CACHE_DIR=disk / "cache", TMPDIR=tmp_path)
        assert out.startswith(f"{private(tmp_path, 0, disk / 'cache')}/answer-")
        assert out.endswith(" 42\n")
        assert "mounted noexec, from which no library can be loaded" in err


def test_a_cache_that_becomes_noexec_is_built_elsewhere(tmp_path):
    with mounted(tmp_path / "disk", "size=16m,mode=755") as disk:
        run(BUILD, JITOPS_CACHE_DIR=disk / "cache")
        subprocess.run(["mount", "-o", "remount,noexec", str(disk)], check=True)
        out, _ = run(BUILD, JITOPS_CACHE_DIR=disk / "cache", TMPDIR=tmp_path)
        assert out.endswith(" 42\n")


# ---- other users ---------------------------------------------------------------------------------

AS_NOBODY = """
    import logging, os, sys
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # a CUDA without a GPU
    import ops.jit, ops.jit._build_once, ops.jit._admin, ops.jit._compile._diagnostics
    import torch.utils.cpp_extension, tempfile, warnings  # read before they may not be
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
"""


def as_nobody(code, **changes):
    return run(AS_NOBODY + code, cwd="/", **changes)


@pytest.fixture
def public():
    """A folder that every user can reach. (pytest closes its own whenever it starts anew.)"""
    with tempfile.TemporaryDirectory(prefix="jitops-public-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_what_root_built_another_user_loads(public):
    cache = public / "cache"
    run(BUILD, JITOPS_CACHE_DIR=cache)
    out, err = as_nobody(BUILD, JITOPS_CACHE_DIR=cache, JITOPS_BUILD="never")
    assert out == f"{entries(cache)[0] / 'answer.so'} 42\n"
    assert err == ""


def test_what_another_user_built_root_does_not_load(public):
    """Nothing is loaded that someone else could have put there."""
    cache = public / "cache"
    run(BUILD, JITOPS_CACHE_DIR=cache)
    for path in [cache, *cache.rglob("*")]:
        os.chown(path, 65534, 65534)
    out, err = run(BUILD, JITOPS_CACHE_DIR=cache, TMPDIR=public)
    assert out.startswith(f"{private(public, 0, cache)}/")
    assert "belongs to user 65534, not to you or root" in err


def test_no_home(public):
    """As in a container whose user is nobody: a private folder, and a word about it."""
    (public / "tmp").mkdir()
    (public / "tmp").chmod(0o1777)
    code = "    from ops.jit._cache import _location\n    print(_location.writable_root())\n"
    out, _ = as_nobody(code, HOME="/nonexistent", TMPDIR=public / "tmp", JITOPS_CACHE_DIR=None)
    assert out == f"{private(public / 'tmp', 65534, NO_HOME)}\n"
    out, _ = as_nobody(code, HOME=None, TMPDIR=public / "tmp", JITOPS_CACHE_DIR=None)
    assert out == f"{private(public / 'tmp', 65534, NO_HOME)}\n"


def test_a_private_folder_that_another_user_made_is_refused(public):
    (public / "tmp").mkdir()
    (public / "tmp").chmod(0o1777)
    folder = private(public / "tmp", 65534, NO_HOME)
    folder.mkdir(mode=0o777)
    code = """
    import ops
    from ops.jit._cache import _location
    try:
        print(_location.writable_root())
    except ops.CacheError as error:
        print(error)
    """
    folder.chmod(0o777)
    os.chown(folder, 12345, 12345)
    out, _ = as_nobody(code, HOME="/nonexistent", TMPDIR=public / "tmp", JITOPS_CACHE_DIR=None)
    assert "belongs to user 12345, not to you or root" in out
