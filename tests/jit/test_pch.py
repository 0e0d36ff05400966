"""torch's default header, precompiled in this cache: slow to test, because it is what is slow."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
import torch

from ops.jit import Extension, _key, _pch, load_inline, text
from ops.jit._cache import _eviction, _location, _publish
from tests.harness import forks
from tests.harness.helpers import PACKAGE, run
from tests.jit.support import COMPILER, leftovers
from tests.jit.torchs_tests import NAMES, TORCHS_TESTS, check

pytestmark = pytest.mark.cpp


@pytest.fixture(autouse=True)
def wanted(settings):
    settings(PCH="1")


def headers(cache):
    return [item for item in _eviction.items(cache) if item.name == _pch.NAME]


# Of a docstring, which is text in C++.
ODD = 'times "3" \\ 3\nand ??= no trigraph'
# As text for torch's load_inline often is; and what comes too late for a header with instances.
SPECIALISES = """
    #include <torch/extension.h>
    template <> void std::_Destroy(at::Tensor* first, at::Tensor* last) {
      for (; first != last; ++first) first->~Tensor();
    }
"""
# Without torch/all.h, which takes a third of the time: who needs it includes it.
SHORT = ["-DTORCH_INDUCTOR_CPP_WRAPPER"]
TIMES = "torch::Tensor times(torch::Tensor x) { return x * 3; }"


def make(**flags):
    """Build the header, as the process in the background does."""
    return Extension(_pch.header_for(text("x", "int x;", **flags).spec)).build_entry()


def is_of_precompiled(library):
    """Whether a precompiled header took part in the build."""
    return "/precompiled " in Path(library).with_name("build.ninja").read_text()


def test_builds_take_the_header_that_is_precompiled(cache, settings):
    """Of text with default headers, which torch's load_inline is used for most.

    Functions have docstrings, as torch binds them; and torch's own folders stay as they are.
    """
    settings(PCH="1", CACHE_DIR=str(cache))
    include = Path(torch.__file__).parent / "include" / "torch"
    before = sorted(path.name for path in include.iterdir())
    make(extra_cflags=SHORT)
    sources = [TORCHS_TESTS, "// another"]
    docstrings = {**{name: f"{name}." for name in NAMES}, "device": ODD}
    module = load_inline("with_headers", sources, functions=docstrings, extra_cflags=SHORT)
    assert sources == [TORCHS_TESTS, "// another"]  # torch's inserts a line into the caller's list
    assert module.tanh_add.__doc__.endswith("tanh_add.\n")
    assert module.device.__doc__.endswith(f"{ODD}\n")
    check(module)
    assert is_of_precompiled(module.__file__)
    out, _ = forks.run(
        f"""
        import torch, ops.jit
        text, docstrings = {SPECIALISES + TIMES!r}, {{"times": {ODD!r}}}
        module = ops.jit.load_inline("times", text, functions=docstrings, extra_cflags={SHORT})
        assert module.times(torch.ones(2)).tolist() == [3.0] * 2
        assert module.times.__doc__.endswith({ODD!r} + "\\n")
        print(module.__file__)
        """,
        whole_end=True,
        JITOPS_CACHE_DIR=cache,
        JITOPS_PCH="1",
    )
    assert is_of_precompiled(out.strip())
    (item,) = headers(cache)
    assert item.hits == 2
    assert sorted(path.name for path in include.iterdir()) == before
    assert leftovers(cache) == []


@pytest.mark.parametrize(
    "arguments",
    [
        {"no_implicit_headers": True},
        {"extra_include_paths": ["/somewhere"]},  # another header may lie there, of any name
        *(
            {"extra_cflags": flags}
            for flags in (
                *(["-include", "cmath"], ["-imacros", "x.h"], ["-x", "c"]),
                *(["-isystem", "/x"], ["-idirafter/x"], ["-iquote", "/x"], ["-I/x"]),
                *(["-specs=/x"], ["-Wp,-I/x"], ["-fplugin=/x.so"], ["-DX=/x", "-B/x"]),
                *(["-fprofile-use=/x"], ["--include-directory=/x"]),
            )
        ),
    ],
    ids=str,
)
def test_where_it_cannot_serve_it_is_not_made(cache, arguments):
    assert _pch.header_for(text("x", "int x;", **arguments).spec) is None


@pytest.mark.parametrize("name", ["CPATH", "CPLUS_INCLUDE_PATH"])
def test_folders_of_headers_in_the_environment(cache, monkeypatch, name):
    assert _pch.header_for(text("x", "int x;").spec)
    monkeypatch.setenv(name, "/somewhere")
    assert _pch.header_for(text("x", "int x;").spec) is None


@pytest.mark.parametrize(
    "flags",
    [
        *(["-O3"], ["-O2 -march=native -fopenmp"], ["-std=c++20"], ["-g", "-ggdb3"], ["-w"]),
        *(["-DNAME=1", "-DTEXT='a b'", "-UX"], ["-Wall", "-Wno-sign-compare", "-Werror=all"]),
        *(["-fno-exceptions", "-fvisibility=hidden", "-fsanitize=address,undefined"], ["-m64"]),
    ],
    ids=str,
)
def test_flags_that_it_serves(cache, flags):
    assert _pch.header_for(text("x", "int x;", extra_cflags=flags).spec)


# ---- the same with a header of a line ------------------------------------------------------------


@pytest.fixture
def small(cache, tmp_path, monkeypatch, settings):
    """A compiler that finds a small header in the place of torch's."""
    settings(PCH="1", CACHE_DIR=str(cache))
    include = tmp_path / "include" / "torch"
    include.mkdir(parents=True)
    (include / "extension.h").write_text('#include "inner.h"\n')
    (include / "inner.h").write_text("inline int answer() { return 1; }\n")
    script = tmp_path / "g++"
    script.write_text(f'#!/bin/sh\nexec {COMPILER} "$@" -I{tmp_path}/include\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return include


def used(tmp_path):
    """How many folders a build is told to search first."""
    folder = tmp_path / f"staging{time.monotonic_ns()}"
    folder.mkdir()
    with _pch.include_dir(text("x", "int x;").spec, folder) as first:
        return len(first)


def test_it_is_used_while_it_is_whole_and_wanted(small, tmp_path, settings, cache):
    assert used(tmp_path) == 0
    entry = make()
    assert entry.manifest["replaceable"]  # for the cache: tests/jit/test_inventory.py
    assert leftovers(cache) == []
    assert used(tmp_path) == 1
    settings(PCH="0", CACHE_DIR=str(cache))
    assert used(tmp_path) == 0
    settings(PCH="1", CACHE_DIR=str(cache))
    content = entry.library.read_bytes()
    entry.library.unlink()
    entry.library.write_bytes(content[:-1] + b"x")
    assert used(tmp_path) == 0


def test_a_header_in_it_that_has_changed(small, tmp_path):
    """Also one of the system's: g++ does not look at them again."""
    make()
    (small / "inner.h").write_text("inline int answer() { return 2; }\n")
    assert used(tmp_path) == 0
    make()
    assert used(tmp_path) == 1


def test_the_compiler_takes_it(small):
    """Whatever the extension is called, which a macro says."""
    flags = ["-Winvalid-pch", "-Werror"]
    make(extra_cflags=flags)
    other = text("other", "int x = answer();", extra_cflags=flags, is_python_module=False)
    assert "/precompiled " in other.build().with_name("build.ninja").read_text()


ORDER = """
    import os, sys
    sys.path.insert(0, {package!r})
    import ops.jit._pch as p
    from ops.jit import text
    os.chdir({cwd!r})
    p._NEEDS = 0
    p._cpu.cores = lambda: 2
    text("x", "int x;", extra_cflags=["-DA=1"] * 4000).build()
"""


@pytest.mark.parametrize("how", ["current folder", "PYTHONPATH"])
def test_the_process_is_of_this_package_and_is_told_all(small, cache, tmp_path, how):
    """Which a build starts: where another package has the name of this one; and by many flags."""
    foreign = tmp_path / "foreign"
    (foreign / "ops").mkdir(parents=True)
    here = how == "current folder"
    for name in ("ops/__init__.py", *(["json.py", "importlib.py", "torch.py"] if here else [])):
        (foreign / name).write_text(f"open({str(tmp_path / 'foreign has run')!r}, 'w')\n")
    code = ORDER.format(package=str(PACKAGE), cwd=str(foreign if here else tmp_path))
    path = None if here else foreign
    run(code, JITOPS_CACHE_DIR=cache, PYTHONPATH=path, JITOPS_PCH="1", JITOPS_DEBUG="1")
    deadline = time.time() + 60
    while not headers(cache):
        assert time.time() < deadline
        time.sleep(0.1)
    (item,) = headers(cache)
    flags = item.entry.manifest["request"]["extra_cflags"]
    assert (flags.count("-DA=1"), flags.count("-DJITOPS_DEBUG")) == (4000, 1)
    assert not (tmp_path / "foreign has run").exists()


@pytest.mark.parametrize("executable", [None, "", "/opt/application", sys.executable])
def test_nothing_in_the_background_costs_the_build(cache, monkeypatch, capfd, settings, executable):
    """An application that has Python built in is not started again, and no error comes through."""
    settings(PROGRESS="1", CACHE_DIR=str(cache), PCH="1")
    started = []

    def fails(python, header):
        started.append(python)
        raise TypeError("no such program")

    monkeypatch.setattr(_pch, "_NEEDS", 0)
    monkeypatch.setattr(_pch._cpu, "cores", lambda: 2)
    monkeypatch.setattr(_pch, "_spawn", fails)
    monkeypatch.setattr(sys, "executable", executable)
    _pch.schedule(text("x", "int x;").spec, _location.writable_root())
    if executable and os.path.basename(executable).startswith("python"):
        assert "is not precompiled: no such program" in capfd.readouterr().err
    else:
        assert started == []


def test_it_is_scheduled_once(cache, monkeypatch, settings, capfd):
    """By whoever builds while it is being made, it is neither ordered again nor announced."""
    settings(PROGRESS="1", CACHE_DIR=str(cache), PCH="1")
    started = []
    monkeypatch.setattr(_pch, "_NEEDS", 0)
    monkeypatch.setattr(_pch._cpu, "cores", lambda: 2)
    monkeypatch.setattr(_pch, "_spawn", lambda python, header: started.append(header))
    root, spec = _location.writable_root(), text("x", "int x;").spec
    lock = _publish.lock_path(root, _pch.NAME, _key.digest(_key.request(_pch.header_for(spec))))
    with _publish.exclusive(lock, "it", 1.0, lambda _: None):
        _pch.schedule(spec, root)
        assert started == []
        assert capfd.readouterr().err == ""
    _pch.schedule(spec, root)
    assert started == [_pch.header_for(spec)]
