"""Edits at bad moments, headers in bad places, manifests that are none."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading

import pytest

import ops
from ops.jit import Extension, _load
from tests.jit.support import COMPILER, answer, entries, extension, leftovers

pytestmark = pytest.mark.cpp


def test_an_edit_during_the_build_is_not_cached(cache, source, tmp_path, monkeypatch):
    """Nobody knows which version the compiler read."""
    header = source.parent / "include" / "answer.h"
    for edited in (header, source):
        script = tmp_path / f"editing-{edited.stem}"
        text = edited.read_text()
        script.write_text(
            f'#!/bin/sh\n[ "$1" = -v ] || echo "// edited" >> {edited}\nexec {COMPILER} "$@"\n'
        )
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        with pytest.raises(ops.BuildError, match="changed while it was being compiled"):
            extension(source).load()
        assert entries(cache) == []
        assert leftovers(cache) == []
        edited.write_text(text)
    monkeypatch.delenv("CXX")
    assert answer(extension(source).load()) == 42


def test_a_new_header_that_hides_the_old_one_is_a_miss(cache, source, tmp_path):
    early = tmp_path / "early"
    early.mkdir()
    spec = dataclasses.replace(
        extension(source).spec, extra_include_paths=(early, source.parent / "include")
    )
    assert answer(Extension(spec).load()) == 42
    (early / "answer.h").write_text("#define ANSWER 7\n")
    assert Extension(spec).find() is None
    assert answer(Extension(spec).load()) == 7
    assert Extension(spec).find()


def test_folders_of_headers_in_flags(cache, source, tmp_path):
    """-I among the flags is as good as extra_include_paths."""
    early, late = tmp_path / "early", source.parent / "include"
    early.mkdir()
    for flags in ((f"-I{early}", f"-I{late}"), (f"-I {early} -I {late}",)):
        spec = extension(source, extra_cflags=flags).spec
        built = Extension(dataclasses.replace(spec, extra_include_paths=()))
        assert answer(built.load()) == 42
        (early / "answer.h").write_text("#define ANSWER 7\n")
        assert built.find() is None
        assert answer(built.load()) == 7
        (early / "answer.h").unlink()


GARBAGE = {
    "not a list": {"inputs": 3},
    "an index too large": {"inputs": [[10**30, "answer.h", ""]]},
    "a path for a number": {"inputs": [["x", "answer.h", ""]]},
    "a name with NUL": {"library": {"file": "a\0b", "size": 1, "sha256": ""}},
    "a name elsewhere": {"library": {"file": "../../../x.so", "size": 1, "sha256": ""}},
    "compilers in a list": {"compilers": [1]},
}


@pytest.mark.parametrize("change", GARBAGE.values(), ids=GARBAGE)
def test_garbage_in_a_manifest_is_a_miss(cache, source, monkeypatch, change):
    manifest = extension(source).load().parent / "manifest.json"
    manifest.chmod(0o600)
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **change}))
    assert extension(source).find() is None
    monkeypatch.setattr(_load, "_loaded", {})
    assert answer(extension(source).load()) == 42


def test_a_library_elsewhere_is_not_loaded(cache, source, tmp_path):
    library = extension(source).load()
    other = tmp_path / "other.so"
    shutil.copy(library, other)
    manifest = library.parent / "manifest.json"
    manifest.chmod(0o600)
    content = json.loads(manifest.read_text())
    content["library"]["file"] = str(other)
    manifest.write_text(json.dumps(content))
    assert extension(source).find() is None


@pytest.mark.parametrize("name", ["manifest.json", "answer.so"])
def test_a_special_file_in_an_entry_is_a_miss_and_not_waited_for(cache, source, name):
    path = extension(source).load().with_name(name)
    path.unlink()
    os.mkfifo(path)
    found = []
    thread = threading.Thread(target=lambda: found.append(extension(source).find()), daemon=True)
    thread.start()
    thread.join(20)
    assert found == [None]
    assert answer(extension(source).build()) == 42
