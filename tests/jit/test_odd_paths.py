"""Caches, folders and sources whose paths have what ninja, compilers or the shell make much of."""

from __future__ import annotations

import json
import shlex
import subprocess
import tempfile
from pathlib import Path

import pytest

import ops
from ops import _config
from ops.jit import Extension, Spec, load_inline
from ops.jit._cache import _location
from ops.jit._compile import _build
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
}


@pytest.fixture(params=ODD.values(), ids=ODD)
def odd(request, cache, tmp_path, monkeypatch):
    """A cache at such a place."""
    folder = tmp_path / request.param
    monkeypatch.setenv("JITOPS_CACHE_DIR", str(folder))
    _config.settings.cache_clear()
    return folder


def test_a_cache_anywhere(odd, source):
    """Text and files, built and found; compile_commands.json tells where they are."""
    for made in (ops.jit.text("text", ANSWER, **PLAIN), extension(source)):
        library = made.load()
        assert library.is_relative_to(odd)
        assert answer(library) == 42
        assert made.find() == library
    assert leftovers(odd) == []
    (source.parent / "include" / "answer.h").write_text("#define ANSWER 7\n")
    assert extension(source).find() is None


def test_errors_in_a_cache_anywhere(odd):
    with pytest.raises(ops.BuildError) as raised:
        load_inline("broken", "int x = oops;\n", **PLAIN)
    assert "broken[0].cpp:1: " in str(raised.value)
    assert "cause: the source has an error" in str(raised.value)
    again = str(raised.value).partition("  again: ")[2]
    done = subprocess.run(shlex.split(again), capture_output=True, text=True, check=False)
    assert "oops" in done.stderr


def test_a_build_directory_anywhere(cache, tmp_path):
    for name in ODD.values():
        folder = tmp_path / "built" / name
        assert answer(load_inline("answer", ANSWER, build_directory=folder, **PLAIN)) == 42
        (command,) = json.loads((folder / "compile_commands.json").read_text())
        assert command["file"] == str(folder / "main.cpp")
        assert str(folder / "main.cpp") in shlex.split(command["command"])
    assert len(entries(cache)) == 1


@pytest.mark.parametrize(("name", "works"), [("a$b", False), ("a b", True)])
def test_nowhere_to_go(cache, tmp_path, monkeypatch, name, works):
    """Where temporary files are at such a place too."""
    folder = tmp_path / name
    folder.mkdir()
    monkeypatch.setenv("JITOPS_CACHE_DIR", str(folder / "cache"))
    _config.settings.cache_clear()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(_build, "_TEMPORARY", folder)
    if works:
        assert answer(load_inline("answer", ANSWER, **PLAIN)) == 42
        return
    with pytest.raises(ops.BuildError, match=r"ninja cannot pass on, .* set JITOPS_CACHE_DIR or T"):
        load_inline("answer", ANSWER, **PLAIN)
    assert entries(folder / "cache") == []


def test_folders_of_headers_with_spaces(cache, source, tmp_path):
    include = (source.parent / "include").rename(tmp_path / "in clude")
    spec = extension(source).spec
    assert answer(Extension(Spec(**{**vars(spec), "extra_include_paths": (include,)})).load()) == 42
    with pytest.raises(ops.ArgumentError, match=r"extra_include_paths must be paths without '\$'"):
        Spec(**{**vars(spec), "extra_include_paths": (Path("/a$b"),)})


def test_the_private_cache_anywhere(cache, tmp_path, monkeypatch):
    """TMPDIR is where it is made, and may be such a place."""
    (tmp_path / "a'b").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "a'b"))
    monkeypatch.setenv("JITOPS_CACHE_DIR", str(tmp_path / "file"))
    _config.settings.cache_clear()
    _location._refused.cache_clear()
    with pytest.warns(ops.CacheWarning, match="as the cache, since"):
        assert answer(load_inline("answer", ANSWER, **PLAIN)) == 42
