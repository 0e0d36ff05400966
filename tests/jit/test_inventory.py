"""What is in a cache, and what may go: the least used first, never what is in use."""

from __future__ import annotations

import json
import os
import time

import pytest

from ops import _config
from ops.jit import _load, load_inline, text
from ops.jit._cache import _entries, _eviction
from tests.harness.forks import start
from tests.jit.support import ANSWER, entries

pytestmark = pytest.mark.cpp

PLAIN = {"is_python_module": False, "no_implicit_headers": True}
MINUTE = 60.0


def fill(cache, *names):
    """Extensions that nobody has loaded, the first of them the oldest."""
    for number, name in enumerate(names):
        folder = build(name).parent
        when = time.time() - (len(names) - number) * MINUTE
        for file in ("used", "manifest.json"):
            os.utime(folder / file, (when, when))


def build(name):
    return text(name, ANSWER, **PLAIN).build()


def names(cache):
    return [item.name for item in _eviction.items(cache)]


def test_items_tell_size_and_use(cache):
    load_inline("answer", ANSWER, **PLAIN)
    (item,) = _eviction.items(cache)
    assert item.name == "answer"
    assert item.hits == 1
    assert item.size >= item.entry.library.stat().st_size
    assert time.time() - 60 < item.built <= item.used <= time.time() + 1


def test_the_longest_unused_go_first(cache):
    fill(cache, "a", "b", "c")
    size = sum(item.size for item in _eviction.items(cache))
    assert names(cache) == ["c", "b", "a"]
    gone = _eviction.evict(cache, size - 1)
    assert [item.name for item in gone] == ["a"]
    assert not gone[0].entry.folder.parent.exists()
    assert names(cache) == ["c", "b"]
    assert [item.name for item in _eviction.evict(cache, 0)] == ["b", "c"]
    assert entries(cache) == []


def test_what_a_live_process_has_loaded_stays(cache):
    code = f"""
        import sys, time, ops.jit
        ops.jit.load_inline("held", {ANSWER!r}, **{PLAIN})
        print("loaded", flush=True)
        sys.stdin.readline()
    """
    process = start(code, JITOPS_CACHE_DIR=cache)
    try:
        assert process.stdout.readline() == "loaded\n"
        fill(cache, "idle")
        _eviction.evict(cache, 0)
        assert names(cache) == ["held"]
    finally:
        process.kill()
        process.communicate()
    _eviction.evict(cache, 0)
    assert names(cache) == []


def test_a_build_makes_room(cache, monkeypatch):
    fill(cache, "a", "b")
    monkeypatch.setenv("JITOPS_CACHE_MAX_SIZE", "1")
    _config.settings.cache_clear()
    build("c")
    assert names(cache) == ["c"]  # too large as well, and just built


def test_what_is_replaceable_goes_first_and_pushes_nothing_out(cache):
    fill(cache, "a", "header", "b", "another")
    for item in _eviction.items(cache):
        if item.name in ("header", "another"):
            manifest = {**item.entry.manifest, "replaceable": True}
            path = item.entry.folder / "manifest.json"
            path.chmod(0o644)
            path.write_text(json.dumps(manifest))
            os.utime(path, (item.used, item.used))
    sizes = {item.name: item.size for item in _eviction.items(cache)}
    (newest,) = (item for item in _eviction.items(cache) if item.name == "another")
    of_both = sizes["a"] + sizes["b"]

    gone = _eviction.evict(cache, of_both + sizes["another"], newest=newest.entry.folder)
    assert [item.name for item in gone] == ["header"]  # though "a" was not used for longer
    gone = _eviction.evict(cache, of_both, newest=newest.entry.folder)
    assert [item.name for item in gone] == ["another"]  # rather than what is built
    assert names(cache) == ["b", "a"]


def test_an_entry_that_goes_while_it_is_looked_up_is_built_again(cache, monkeypatch):
    """Found, verified, and evicted by another process just before it is loaded."""
    fill(cache, "answer")
    real, times = _load.load, []

    def load(spec, entry):
        if not times:
            times.append(_eviction.evict(cache, 0))
            return None
        return real(spec, entry)

    monkeypatch.setattr(_load, "load", load)
    assert load_inline("answer", ANSWER, **PLAIN)
    assert len(times[0]) == 1


def test_a_thousand_others_do_not_matter(cache, monkeypatch):
    """The look-up goes by the name of the folder: it reads no other."""
    load_inline("answer", ANSWER, **PLAIN)
    for number in range(1000):
        folder = cache / f"other{number}-0123456789abcdef" / "0"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
    read = []
    real = _entries.open_entry

    def spy(folder):
        read.append(folder)
        return real(folder)

    monkeypatch.setattr(_entries, "open_entry", spy)
    assert text("answer", ANSWER, **PLAIN).find()
    assert len(read) == 1


def test_what_is_loaded_from_a_folder_of_somebody_else_stays(cache, monkeypatch):
    """Who may read but not write has the lock too."""
    fill(cache, "answer")
    (item,) = _eviction.items(cache)
    real = os.open

    def opened(path, flags, *more, **options):
        if flags & (os.O_RDWR | os.O_WRONLY):
            raise PermissionError(13, "Permission denied")
        return real(path, flags, *more, **options)

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr("builtins.open", refused)
    assert _entries.mark_in_use(item.entry.folder)
    monkeypatch.undo()
    try:
        assert not _eviction.remove(cache, item)
    finally:
        _entries.release(item.entry.folder)
    assert _eviction.remove(cache, item)


@pytest.mark.parametrize("manifest", ["{}", "[]", '{"library": []}', "[" * 10_000])
def test_a_folder_without_a_library_is_no_entry(cache, manifest):
    fill(cache, "answer")
    (folder,) = entries(cache)
    (folder / "manifest.json").chmod(0o644)
    (folder / "manifest.json").write_text(manifest)
    assert _eviction.items(cache) == []
    assert build("answer").is_file()
