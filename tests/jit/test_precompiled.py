"""torch's default header, precompiled in our own cache: slow to test, since it is what is slow."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from pathlib import Path

import pytest
import torch

from ops._errors import BuildError
from ops.jit import _key, _precompiled, _precompiler, load_inline, text
from ops.jit._cache import _inventory, _lock, _roots, _staging, _store
from ops.jit._compile import _build, _headers, _instantiate, _toolchain
from tests.harness.helpers import PACKAGE, run
from tests.jit.support import leftovers

pytestmark = pytest.mark.cpp

BUILD = """
    import torch, ops.jit, ops.jit._precompiled
    if {alone}:  # makes none for builds to come
        ops.jit._precompiled._NEEDS_MEMORY = 1 << 60
    module = ops.jit.load_inline(
        {name!r},
        {before!r} "torch::Tensor times(torch::Tensor x) {{ return x * {number}; }}",
        functions={{"times": 'times "{number}" \\\\ {number}\\nand ??= no trigraph'}},
        build_directory={folder!r},
    )
    assert module.times(torch.ones(2)).tolist() == [{number}.0] * 2
    assert module.times.__doc__.endswith('times "{number}" \\\\ {number}\\nand ??= no trigraph\\n')
    try:
        module.times(5)
    except TypeError:
        print("ran")
"""


def build(cache, tmp_path, number, before="", alone=False, **variables):
    """Whether a precompiled header took part in the build."""
    folder = tmp_path / f"build{number}"
    out, _ = run(
        BUILD.format(
            name=f"times{number}", number=number, folder=str(folder), before=before, alone=alone
        ),
        JITOPS_CACHE_DIR=cache,
        **variables,
    )
    assert out == "ran\n"
    (command,) = [
        line
        for line in (folder / "compile_commands.json").read_text().splitlines()
        if '"command"' in line
    ]
    return "/precompiled " in command


def headers(cache):
    return [item for item in _inventory.items(cache) if item.name == _precompiled.NAME]


# As text for torch's load_inline often is; and what no precompiled header with instances can serve:
# functions of torch's header destroy vectors of tensors.
INCLUDES = "#include <torch/extension.h>\n#include <torch/torch.h>\n#include <vector>\n"
SPECIALISES = """
    template <> void std::_Destroy(at::Tensor* first, at::Tensor* last) {
      for (; first != last; ++first) first->~Tensor();
    }
"""


def test_the_second_build_takes_what_the_first_had_made(cache, tmp_path):
    """Functions with docstrings, as torch binds them; and torch's own folders stay as they are."""
    include = Path(torch.__file__).parent / "include" / "torch"
    before = sorted(path.name for path in include.iterdir())
    assert not build(cache, tmp_path, 2)
    deadline = time.time() + 300
    while not headers(cache):
        assert time.time() < deadline
        time.sleep(0.5)
    assert build(cache, tmp_path, 3)
    (item,) = headers(cache)
    assert item.hits == 1
    assert item.entry.manifest["instantiated"]
    assert build(cache, tmp_path, 4, before=INCLUDES)
    assert not build(cache, tmp_path, 5, before=SPECIALISES)
    # One that is damaged is not believed, and goes.
    item.entry.library.chmod(0o644)
    with open(item.entry.library, "r+b") as file:
        file.seek(item.entry.library.stat().st_size // 2)
        file.write(bytes(1 << 20))
    assert not build(cache, tmp_path, 6, alone=True)
    assert headers(cache) == []
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
                *(["-include", "cmath"], ["-imacros", "x.h"], ["@/flags"], ["-x", "c"]),
                *(["-isystem", "/x"], ["-idirafter/x"], ["-iquote", "/x"], ["-I/x"]),
                *(["-specs=/x"], ["-Wp,-I/x"], ["-fplugin=/x.so"], ["-DX=/x", "-B/x"]),
                *(["-fprofile-use=/x"], ["--include-directory=/x"], ["-nostdinc++"]),
            )
        ),
    ],
    ids=str,
)
def test_where_it_cannot_serve_it_is_not_made(cache, arguments):
    assert _precompiled.request(text("x", "int x;", **arguments).spec) is None


@pytest.mark.parametrize("name", ["CPATH", "CPLUS_INCLUDE_PATH"])
def test_folders_of_headers_in_the_environment(cache, monkeypatch, name):
    assert _precompiled.request(text("x", "int x;").spec)
    monkeypatch.setenv(name, "/somewhere")
    assert _precompiled.request(text("x", "int x;").spec) is None


def test_what_only_linkers_read_makes_no_other_header(cache, monkeypatch):
    asked = _precompiled.request(text("x", "int x;").spec)
    for name in ("LD_RUN_PATH", "LIBRARY_PATH", "SOURCE_DATE_EPOCH"):
        monkeypatch.setenv(name, "1")
    assert _precompiled.request(text("x", "int x;").spec) == asked


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
    assert _precompiled.request(text("x", "int x;", extra_cflags=flags).spec)


REOPENED = """
    namespace c10 {
    inline std::ostream& operator<<(std::ostream& out, IntArrayRef) { return out << "mine"; }
    }
"""


@pytest.mark.parametrize(
    "source",
    [REOPENED, "namespace pybind11 { namespace detail {}}", "namespace at::native\n{}", "int x;"],
)
def test_overloads_for_torchs_types_are_found_as_without_it(cache, source):
    """By templates that the header holds they would not be."""
    serves = _precompiled.request(text("x", source).spec) is not None
    assert serves is (source == "int x;")
    for harmless in ("using namespace at;", "namespace mine { }", "namespace nn = torch::nn;"):
        assert _precompiled.request(text("x", harmless).spec)


# ---- the same with a header of four lines --------------------------------------------------------

HEADER = """
template <class T> int inner(T) { return 1; }
template <class T> int outer(T x) { return inner(x); }
inline int answer() { return outer(0); }
"""
USE = "#include <torch/extension.h>\n%s\nint main() { return answer(); }\n"
TRIAL = _precompiler._stands_trial
LATE = "template <> int inner(int) { return 2; }"  # too late for what is instantiated


@pytest.fixture
def made(cache, tmp_path, monkeypatch):
    """Makes the entry of a small header, as the process in the background does, but for its trial.

    No header of torch stands that; and what it compiles takes a quarter of a minute.
    """
    monkeypatch.setattr(_precompiler, "_stands_trial", lambda asked, folder: True)
    (tmp_path / "include" / "torch").mkdir(parents=True)
    (tmp_path / "include" / "torch" / "extension.h").write_text(HEADER)

    def make():
        asked = _precompiled.request(text("x", "int x;").spec)
        command = [*_toolchain.cxx().command, "-x", "c++-header", "-I", str(tmp_path / "include")]
        _precompiler.make(asked, command, _roots.writable_root())
        assert leftovers(cache) == []
        return _precompiled.find(asked)

    return make


def program(entry, tmp_path, more=""):
    """What a program answers that takes a precompiled header, or the compiler's errors."""
    folder = tmp_path / "program"
    folder.mkdir(exist_ok=True)
    (folder / "torch").mkdir(exist_ok=True)
    gch = folder / "torch" / _precompiled.FILE
    gch.unlink(missing_ok=True)
    gch.symlink_to(entry.library)
    (folder / "main.cpp").write_text(USE % more)
    flags = ["-Winvalid-pch", "-Werror", "-I", str(folder), str(folder / "main.cpp")]
    command = [*_toolchain.cxx().command, *flags, "-o", str(folder / "program")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stderr or subprocess.run([folder / "program"], check=False).returncode


def test_templates_are_instantiated_before_the_header_is_written(made, tmp_path):
    entry = made()
    assert entry.manifest["instantiated"]
    assert program(entry, tmp_path) == 1
    assert "after instantiation" in program(entry, tmp_path, LATE)


def test_what_fails_its_trial_is_made_plain(made, tmp_path, monkeypatch):
    """It is no header of torch: nothing that is tried with it compiles."""
    monkeypatch.setattr(_precompiler, "_stands_trial", TRIAL)
    entry = made()
    assert not entry.manifest["instantiated"]
    assert (program(entry, tmp_path), program(entry, tmp_path, LATE)) == (1, 2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("_SOURCE", "#error does not compile"),
        ("_SOURCE", _instantiate._SOURCE.replace("get_named_event_id", "is_nowhere")),
        ("_SOURCE", _instantiate._SOURCE.replace("plugin_is_GPL_compatible", "refused")),
        ("_SOURCE", _instantiate._SOURCE.replace("done = true;", "__builtin_trap();")),
        ("END", ""),
    ],
)
def test_without_the_plugin_it_is_made_plain(made, tmp_path, monkeypatch, name, value):
    monkeypatch.setattr(_instantiate, name, value)
    entry = made()
    assert not entry.manifest["instantiated"]
    assert (program(entry, tmp_path), program(entry, tmp_path, LATE)) == (1, 2)


@pytest.mark.parametrize(
    ("said", "calls"),
    [
        ("x.cpp:1: error: expected ';' before '}'", 1),
        ("error: specialization of 'T f(T) [with T = int]' after instantiation", 2),
        ("internal compiler error: Segmentation fault", 2),
        ("ld: x.o: undefined reference to `f()'", 2),
    ],
)
def test_a_build_that_the_header_may_have_failed_is_tried_without(made, tmp_path, said, calls):
    made()
    root, log = _roots.writable_root(), tmp_path / "log"
    log.write_text(said)
    seen = []

    def build(first):
        seen.append((len(first), sorted(path.name for path in staging.iterdir())))
        (staging / "main.o").touch()
        raise BuildError("fails", log=str(log))

    spec = text("x", "int x;").spec
    with _staging.staging(root, "x") as staging, pytest.raises(BuildError):
        _precompiled.serve(spec, staging, root, build)
    alive = _staging.ALIVE
    assert seen == [(1, [alive, "precompiled"]), (0, [alive])][:calls]


def test_overloads_in_a_header_of_the_users(made, tmp_path):
    """Which headers are read is known after the build: it is done again."""
    made()
    root, spec, seen = _roots.writable_root(), text("x", "int x;").spec, []
    mine = tmp_path / "mine.h"
    for content, calls in (("int y;", 1), (REOPENED, 2)):
        mine.write_text(content)
        seen.clear()
        with _staging.staging(root, "x") as staging:

            def build(first):
                seen.append(len(first))
                return _build.Built(tmp_path / "x.so", _headers.Read([mine], []), 0.0, [])

            _precompiled.serve(spec, staging, root, build)
        assert seen == [1, 0][:calls]


ORDER = """
    import os, sys
    sys.path.insert(0, {package!r})
    import ops.jit._precompiled as p
    from pathlib import Path
    from ops.jit import text
    from ops.jit._cache import _roots
    os.chdir({cwd!r})
    p._NEEDS_MEMORY = p._NEEDS_DISK = 0
    os.sched_getaffinity = lambda _: (0, 1)
    flags = ["-DA=1"] * 40_000
    Path({folder!r}, "build.ninja").write_text(
        "cxx = {folder}/compiler\\ncflags = " + " ".join(flags) + "\\n"
    )
    p.begin(text("x", "int x;", extra_cflags=flags).spec, Path({folder!r}), _roots.writable_root())
"""


@pytest.mark.parametrize("how", ["current folder", "PYTHONPATH"])
def test_the_process_is_of_this_package_and_is_told_all(cache, tmp_path, how):
    """Where another has its name; and by however many flags."""
    compiler = tmp_path / "compiler"
    said = f'echo "$*" > {tmp_path}/said; mv {tmp_path}/said {tmp_path}/ran'
    compiler.write_text(f"#!/bin/sh\n{said}\n")
    compiler.chmod(0o755)
    foreign = tmp_path / "foreign"
    (foreign / "ops").mkdir(parents=True)
    here = how == "current folder"
    for name in ("ops/__init__.py", *(["json.py", "importlib.py", "torch.py"] if here else [])):
        (foreign / name).write_text(f"open({str(tmp_path / 'foreign has run')!r}, 'w')\n")
    code = ORDER.format(
        package=str(PACKAGE), folder=str(tmp_path), cwd=str(foreign if here else tmp_path)
    )
    run(code, JITOPS_CACHE_DIR=cache, PYTHONPATH=None if here else foreign)
    deadline = time.time() + 60
    while not (tmp_path / "ran").exists():
        assert time.time() < deadline
        time.sleep(0.1)
    assert (tmp_path / "ran").read_text().count("-DA=1") == 40_000
    assert not (tmp_path / "foreign has run").exists()


def test_what_cannot_be_ordered_costs_no_build(cache, monkeypatch, capfd, settings):
    settings(PROGRESS="1", CACHE_DIR=str(cache))
    monkeypatch.setattr(_precompiled, "_NEEDS_MEMORY", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: (0, 1))

    def fails(job):
        raise OSError(errno.E2BIG, os.strerror(errno.E2BIG))

    monkeypatch.setattr(_precompiled, "_order", fails)
    module = load_inline("answer", "int answer() { return 42; }", functions="answer")
    assert module.answer() == 42
    assert "is not precompiled: [Errno 7] Argument list too long" in capfd.readouterr().err


def test_a_truncated_one_is_no_entry(made):
    entry = made()
    entry.library.chmod(0o644)
    os.truncate(entry.library, 1000)
    assert _precompiled.find(entry.manifest["request"]) is None
    assert not _store.verify(entry)


def test_without_precompiled_headers_none_is_used(made, settings):
    entry, seen = made(), []
    assert entry.manifest["replaceable"]  # for the cache: tests/jit/test_inventory.py
    root, spec = _roots.writable_root(), text("x", "int x;").spec
    for pch, taken in (("0", 0), ("1", 1)):
        settings(PCH=pch)
        with _staging.staging(root, "x") as staging:

            def build(first):
                seen.append(first)
                return _build.Built(staging / "x.so", _headers.Read([], []), 0.0, [])

            _precompiled.serve(spec, staging, root, build)
        assert len(seen.pop()) == taken


def test_it_is_ordered_once(cache):
    """By whoever builds while it is being made, it is neither ordered again nor announced."""
    asked = _precompiled.request(text("x", "int x;").spec)
    assert not _precompiled._is_being_made(asked, cache)
    stem = _store.stem(_precompiled.NAME, _key.digest(asked))
    with _lock.exclusive(_store.lock_path(cache, stem), "it", 1.0, lambda _: None):
        assert _precompiled._is_being_made(asked, cache)
    assert not _precompiled._is_being_made(asked, cache)
