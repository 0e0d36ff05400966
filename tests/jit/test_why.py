"""Why something is not in the cache: named as what differs from the nearest entry."""

from __future__ import annotations

import json
import os

import pytest

from ops.jit import _admin, files
from tests.jit.support import COMPILER, extension

pytestmark = pytest.mark.cpp


@pytest.fixture
def built(cache, source):
    extension(source).load()
    return source


def reasons(source, **changes):
    return _admin.reasons(extension(source, **changes).spec)


def test_a_hit_has_no_reason(built):
    assert reasons(built) == []


def test_nothing_of_that_name(cache, source):
    assert reasons(source) is None
    assert _admin.sentence(extension(source).spec) == "there is nothing of that name in the cache"


def edit_source(source, monkeypatch):
    source.write_text(source.read_text() + "// edited\n")


def edit_header(source, monkeypatch):
    (source.parent / "include" / "answer.h").write_text("#define ANSWER 43\n")


def hide_header(source, monkeypatch):
    (source.parent / "answer.h").write_text("#define ANSWER 44\n")


def upgrade_torch(source, monkeypatch):
    monkeypatch.setattr("torch.__version__", "9.9.9")


def upgrade_compiler(source, monkeypatch):
    fake = source.parent / "g++"
    fake.write_text(
        f'#!/bin/sh\n[ "$1" = -v ] && echo "gcc version 13.1.0" >&2 || exec {COMPILER} "$@"\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))


def set_a_path(source, monkeypatch):
    monkeypatch.setenv("CPATH", "/somewhere")


def corrupt(source, monkeypatch):
    library = extension(source).find()
    content = library.read_bytes()
    library.unlink()  # written over, it would be pulled from under this process
    library.write_bytes(content[:-1])


def another_format(source, monkeypatch):
    monkeypatch.setattr("ops.jit._key.FORMAT", 99)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (edit_source, "sources: answer.cpp has changed"),
        (edit_header, "answer.h has changed"),
        (hide_header, "a file has come or gone that may hide another"),
        (upgrade_torch, "torch: "),
        (upgrade_compiler, "cxx: gcc version "),
        (set_a_path, "environment CPATH: None → /somewhere"),
        (corrupt, "its library is damaged"),
        (another_format, "it was built by another version of jitops"),
    ],
)
def test_one_change_is_the_reason(built, monkeypatch, change, expected):
    change(built, monkeypatch)
    (reason,) = reasons(built)
    assert expected in reason


def test_both_compilers_are_named(built, monkeypatch):
    upgrade_compiler(built, monkeypatch)
    (reason,) = reasons(built)
    assert reason.endswith("→ gcc version 13.1.0")


def test_flags_are_told_one_by_one(built):
    assert reasons(built, extra_cflags=("-O2", "-g")) == ["extra_cflags: none → -O2 -g"]


def test_the_nearest_counts(built):
    extension(built, extra_cflags=("-O2", "-DA", "-DB")).load()
    assert reasons(built, extra_cflags=("-O2", "-DA")) == ["extra_cflags: -DB → none"]


@pytest.mark.parametrize(
    "garbage",
    [{}, {"name": "answer", "request": 5}, {"name": "answer", "request": {"format": 2}}, [], 7],
)
def test_garbage_is_no_reason_to_fail(built, cache, garbage):
    folder = cache / "answer-0123456789abcdef" / "0"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(garbage))
    assert reasons(built) == []
    assert os.path.isfile(folder / "manifest.json")


def test_the_order_of_sources(cache, source):
    other = source.with_name("other.cpp")
    other.write_text("int other;\n")
    ordered = [files("answer", its, is_python_module=False) for its in
               ([source, other], [other, source])]  # fmt: skip
    source.write_text(source.read_text().replace('#include "answer.h"', "#define ANSWER 1"))
    ordered[0].build()
    assert _admin.reasons(ordered[1].spec)[0].startswith("sources: their order has changed")
