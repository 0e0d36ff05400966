"""Where the cache is, and whether it can be trusted and written."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from pathlib import Path

import pytest

import ops
from ops import _config
from ops.jit._cache import _location
from tests.jit.support import answer, entries, extension

pytestmark = pytest.mark.cpp


def test_a_cache_that_others_can_write_is_refused(cache, source, monkeypatch, tmp_path):
    library = extension(source).load()
    monkeypatch.setattr(_location, "private_root", lambda: tmp_path / "private")
    cache.chmod(0o777)
    _location._refused.cache_clear()
    with pytest.warns(ops.CacheWarning, match=r"ignoring the cache: .* can be written by others"):
        assert extension(source).find() is None
    with pytest.warns(ops.CacheWarning, match=f"using {tmp_path / 'private'} as the cache, since"):
        assert extension(source).load().is_relative_to(tmp_path / "private")
    cache.chmod(0o755)
    _location._refused.cache_clear()
    library.parent.chmod(0o777)
    assert not extension(source).find().is_relative_to(cache)


def test_a_cache_of_someone_else_is_refused(cache, source, monkeypatch, tmp_path):
    extension(source).load()
    monkeypatch.setattr(_location, "private_root", lambda: tmp_path / "private")
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    os.chown(cache, 4321, -1) if os.geteuid() == 0 else None
    _location._refused.cache_clear()
    if os.geteuid() != 0:
        monkeypatch.setattr(os, "getuid", lambda: os.geteuid() + 1)
    with pytest.warns(ops.CacheWarning, match=r"belongs to user \d+, not to you or root"):
        assert extension(source).find() is None


def test_unwritable_cache(source, monkeypatch, tmp_path):
    monkeypatch.setenv("JITOPS_CACHE_DIR", "/proc/nowhere")
    _config.settings.cache_clear()
    monkeypatch.setattr(_location, "private_root", lambda: tmp_path / "private")
    with pytest.warns(ops.CacheWarning, match=r"since /proc/nowhere cannot be written"):
        assert extension(source).load().is_relative_to(tmp_path / "private")
    monkeypatch.setattr(_location, "private_root", lambda: Path("/proc/either"))
    with pytest.raises(
        ops.CacheError, match=r"/proc/nowhere .*; /proc/either .* Set JITOPS_CACHE_DIR"
    ):
        extension(source).load()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"JITOPS_CACHE_DIR": "/a/b", "TORCH_EXTENSIONS_DIR": "/t"}, "/a/b"),
        ({"TORCH_EXTENSIONS_DIR": "/t"}, "/t/jitops"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/jitops"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/jitops"),
        ({}, "/home/me/.cache/jitops"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="XDG folders are Linux's")
def test_where_the_cache_is(monkeypatch, variables, expected):
    for name in ("JITOPS_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    _config.settings.cache_clear()
    assert _location.configured_root() == Path(expected)


def test_a_full_disk_is_said(cache, source, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr("ops.jit._cache._publish.os.rename", full)
        with pytest.raises(ops.CacheError, match="cannot be (kept in|written).*No space"):
            extension(source).load()
    assert answer(extension(source).load()) == 42


def test_a_name_in_the_way_is_said(cache, source):
    extension(source).load()
    (folder,) = (path.parent for path in entries(cache))
    shutil.rmtree(folder)
    folder.touch()
    with pytest.raises(ops.CacheError, match=f"answer cannot be kept in {cache}"):
        extension(source).load()


def test_a_cache_below_a_closed_folder_is_as_if_it_were_not(cache, source, monkeypatch):
    def closed(self):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "is_dir", closed)
    assert list(_location.readable_roots()) == []


def test_umask_opens_nothing(tmp_path, monkeypatch):
    before = os.umask(0)
    try:
        monkeypatch.setenv("JITOPS_CACHE_DIR", str(tmp_path / "a" / "b"))
        _config.settings.cache_clear()
        root = _location.writable_root()
    finally:
        os.umask(before)
        _config.settings.cache_clear()
    for folder in (root, root.parent, root / "staging"):
        assert folder.stat().st_mode & 0o022 == 0
