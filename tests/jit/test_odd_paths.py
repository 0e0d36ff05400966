"""Caches, folders and sources whose paths have what ninja, compilers or the shell make much of."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

import ops
from ops import _config
from ops.jit import Extension, Spec, load_inline
from ops.jit._cache import _location
from tests.jit.support import ANSWER, answer, entries, extension, leftovers

pytestmark = pytest.mark.cpp

PLAIN = {"is_python_module": False, "no_implicit_headers": True}
ODD = {
    "space": "a b",
    "dollar": "a$b",
    "dollars": "$HOME",
    "quote": "a'b",
    "quotes": 'a"b',
    "newline": "a\nb",
    "colon": "a:b",
    "backslash": "a\\b",
    "shell": "a&b;c`d|e",
    "glob": "*",
    "accent": "\u00fc",
    "comma": "a,~b",
}


PLAIN_ENOUGH = ("space", "accent", "comma")  # for ninja and compilers


@pytest.fixture(params=ODD)
def odd(request, cache, tmp_path, monkeypatch):
    """A cache at such a place, and whether anything can be built there."""
    folder = tmp_path / ODD[request.param]
    monkeypatch.setenv("JITOPS_CACHE_DIR", str(folder))
    monkeypatch.setattr(_location, "private_root", lambda: tmp_path / "private")
    _config.settings.cache_clear()
    return folder, request.param in PLAIN_ENOUGH


def test_a_cache_anywhere(odd, source, tmp_path):
    """Text and files are built in the private folder, if need be; an entry is found anywhere."""
    folder, works = odd
    root = folder if works else tmp_path / "private"
    with contextlib.nullcontext() if works else pytest.warns(ops.CacheWarning, match="has charac"):
        for made in (ops.jit.text("text", ANSWER, **PLAIN), extension(source)):
            library = made.load()
            assert library.is_relative_to(root)
            assert answer(library) == 42
            assert made.find() == library
    assert leftovers(root) == []
    root.rename(tmp_path / "moved")
    if folder.exists():
        folder.rmdir()
    (tmp_path / "moved").rename(folder)
    assert extension(source).find().is_relative_to(folder)
    (source.parent / "include" / "answer.h").write_text("#define ANSWER 7\n")
    assert extension(source).find() is None


@pytest.mark.parametrize("name", PLAIN_ENOUGH)
def test_errors_in_a_cache_anywhere(cache, tmp_path, monkeypatch, name):
    monkeypatch.setenv("JITOPS_CACHE_DIR", str(tmp_path / ODD[name]))
    _config.settings.cache_clear()
    with pytest.raises(ops.BuildError) as raised:
        load_inline("broken", "int x = oops;\n", **PLAIN)
    assert "broken[0].cpp:1: " in str(raised.value)
    assert "cause: the source has an error" in str(raised.value)
    assert "oops" in Path(raised.value.log).read_text()


def test_a_build_directory_anywhere(cache, tmp_path):
    for name in ODD.values():
        folder = tmp_path / "built" / name
        assert answer(load_inline("answer", ANSWER, build_directory=folder, **PLAIN)) == 42
    assert len(entries(cache)) == 1


def test_nowhere_to_go(cache, tmp_path, monkeypatch):
    """Where temporary files are at such a place too."""
    folder = tmp_path / "a$b"
    folder.mkdir()
    monkeypatch.setenv("JITOPS_CACHE_DIR", str(folder / "cache"))
    monkeypatch.setenv("TMPDIR", str(folder))
    _config.settings.cache_clear()
    with pytest.raises(ops.CacheError, match=r"has characters .* Set JITOPS_CACHE_DIR"):
        load_inline("answer", ANSWER, **PLAIN)
    assert not (folder / "cache").exists()


def test_folders_of_headers_with_spaces(cache, source, tmp_path):
    include = (source.parent / "include").rename(tmp_path / "in clude")
    spec = extension(source).spec
    assert answer(Extension(Spec(**{**vars(spec), "extra_include_paths": (include,)})).load()) == 42
    with pytest.raises(ops.ArgumentError, match=r"extra_include_paths must be paths without '\$'"):
        Spec(**{**vars(spec), "extra_include_paths": (Path("/a$b"),)})
