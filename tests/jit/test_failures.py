"""What fails is remembered, until something changes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time

import pytest

import ops
from ops.jit import Extension, Spec, load_inline
from tests.harness.helpers import run, start
from tests.jit.support import COMPILER, answer, extension

pytestmark = pytest.mark.cpp

BROKEN = 'extern "C" int answer() { return NOWHERE; }\n'
TRY = f"""
    import time, ops, ops.jit
    started = time.perf_counter()
    try:
        ops.jit.load_inline("broken", {BROKEN!r}, is_python_module=False, no_implicit_headers=True)
    except ops.BuildError as error:
        print(time.perf_counter() - started)
        print(error)
"""


@pytest.fixture
def counting(tmp_path, monkeypatch):
    """A compiler that notes each of its runs on a source."""
    path, notes = tmp_path / "counting-g++", tmp_path / "runs"
    path.write_text(
        f'#!/bin/sh\ncase "$*" in *" -c "*r.cpp*|*" -c "*main.cpp*) echo run >> {notes};; esac\n'
        f'exec {COMPILER} "$@"\n'
    )
    path.chmod(0o755)
    notes.touch()
    monkeypatch.setenv("CXX", str(path))
    return lambda: len(notes.read_text().splitlines())


def attempt(source):
    with pytest.raises(ops.BuildError) as raised:
        extension(source).load()
    return str(raised.value)


def test_the_second_process_learns_at_once(cache, counting):
    variables = {"JITOPS_CACHE_DIR": cache, "CXX": os.environ["CXX"]}
    first, _ = run(TRY, **variables)
    runs = counting()
    second, _ = run(TRY, **variables)
    assert counting() == runs
    seconds, _, message = second.partition("\n")
    assert float(seconds) < 0.5
    assert message.startswith(first.partition("\n")[2].rstrip())
    assert "nothing has changed: not tried again. JITOPS_RETRY=1 tries again" in message


def test_every_waiter_gets_the_same_error(cache, counting):
    variables = {"JITOPS_CACHE_DIR": cache, "CXX": os.environ["CXX"]}
    crowd = [start(TRY, **variables) for _ in range(4)]
    said = [process.communicate(timeout=300)[0] for process in crowd]
    first = {"\n".join(text.splitlines()[1:5]) for text in said}
    assert len(first) == 1
    assert "NOWHERE" in first.pop()
    assert counting() == 1


def test_changed_inputs_try_again(cache, source, counting, monkeypatch, tmp_path):
    good = source.read_text()
    source.write_text(BROKEN)
    attempt(source)
    attempt(source)
    assert counting() == 1
    source.write_text(BROKEN + "// edited\n")
    attempt(source)
    assert counting() == 2
    (source.parent / "include" / "new.h").touch()  # may be the one that was missing
    attempt(source)
    assert counting() == 3
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:{tmp_path}")
    attempt(source)
    assert counting() == 4
    source.write_text(good)
    assert answer(extension(source).load()) == 42


@pytest.mark.parametrize("named", [["{0}/libfoo.so"], ["-L{0}", "-lfoo"], ["-L{0} -l:libfoo.so"]])
def test_a_library_that_is_mended_in_place(cache, source, tmp_path, named):
    """Written over with one of the same size and time: the folder is as it was."""
    program, libraries = source.parent / "main.cpp", tmp_path / "libraries"
    program.write_text('extern "C" int foo();\nint main() { return foo(); }\n')
    libraries.mkdir()

    def library(name, path):
        (tmp_path / "part.cpp").write_text(f'extern "C" int {name}() {{ return 1; }}\n')
        command = [COMPILER, "-shared", "-fPIC", tmp_path / "part.cpp", "-o", path]
        subprocess.run(command, check=True)

    library("bar", libraries / "libfoo.so")
    library("foo", tmp_path / "good.so")
    status = (libraries / "libfoo.so").stat()
    spec = Spec(
        name="linked",
        sources=(program,),
        extra_ldflags=tuple(flag.format(libraries) for flag in named),
        is_python_module=False,
        is_standalone=True,
    )
    for again in (False, True):
        with pytest.raises(ops.BuildError, match="foo") as raised:
            Extension(spec).build()
        assert ("not tried again" in str(raised.value)) is again
    shutil.copyfile(tmp_path / "good.so", libraries / "libfoo.so")
    os.utime(libraries / "libfoo.so", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert Extension(spec).build()


def test_a_header_that_comes_where_a_variable_leads(cache, source, tmp_path, monkeypatch):
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.setenv("CPLUS_INCLUDE_PATH", f":{place}")
    source.write_text('#include "late.h"\nextern "C" int answer() { return LATE; }\n')
    attempt(source)
    assert "not tried again" in attempt(source)
    (place / "late.h").write_text("#define LATE 3\n")
    assert answer(extension(source).load()) == 3


def test_retry(cache, source, counting, settings):
    source.write_text(BROKEN)
    attempt(source)
    with pytest.raises(ops.BuildError):
        extension(source).build(retry=True)
    assert counting() == 2
    settings(RETRY="1", CACHE_DIR=str(cache))
    attempt(source)
    assert counting() == 3


def test_it_is_forgotten_after_an_hour_and_when_mended(cache, source, counting):
    source.write_text(BROKEN)
    attempt(source)
    (note,) = (cache / "failures").iterdir()
    told = json.loads(note.read_text())
    note.write_text(json.dumps({**told, "when": time.time() - 3601}))
    attempt(source)
    assert counting() == 2
    (note,) = (cache / "failures").iterdir()
    note.write_text("garbage")
    attempt(source)
    assert counting() == 3


def test_what_passes_by_itself_is_not_remembered(cache, tmp_path, monkeypatch):
    """A disk that was full is no reason never to try again."""
    path = tmp_path / "full"
    path.write_text(
        f'#!/bin/sh\n[ "$1" = -v ] && exec {COMPILER} -v\n[ -e {tmp_path}/mended ] && '
        f'exec {COMPILER} "$@"\necho "main.s: No space left on device" >&2\nexit 1\n'
    )
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    arguments = {"is_python_module": False, "no_implicit_headers": True}
    text = 'extern "C" int answer() { return 42; }\n'
    with pytest.raises(ops.BuildError, match="disk is full"):
        load_inline("answer", text, **arguments)
    (tmp_path / "mended").touch()
    assert answer(load_inline("answer", text, **arguments)) == 42


def test_out_of_memory_is_tried_once_more_alone(cache, tmp_path, monkeypatch, capfd, settings):
    """A compiler that is killed whenever another one runs."""
    path, lock = tmp_path / "hungry-g++", tmp_path / "busy"
    path.write_text(
        f'#!/bin/sh\ncase "$*" in *" -c "*)\n'
        f"  mkdir {lock} 2>/dev/null || {{ sleep 0.5; echo 'c++: fatal error: Killed signal "
        f"terminated program cc1plus' >&2; exit 1; }}\n"
        f'  sleep 0.3; {COMPILER} "$@"; status=$?; rmdir {lock}; exit $status;;\n'
        f'esac\nexec {COMPILER} "$@"\n'
    )
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    monkeypatch.setenv("MAX_JOBS", "2")
    settings(PROGRESS="1", CACHE_DIR=str(cache))
    sources = []
    for name in ("one", "two"):
        sources.append(tmp_path / f"{name}.cpp")
        sources[-1].write_text(f'extern "C" int {name}() {{ return 42; }}\n')
    spec = {"is_python_module": False}
    assert ops.jit.load("both", sources, **spec)
    assert "out of memory; trying once more with one compiler at a time" in capfd.readouterr().err


def test_out_of_memory_even_alone_is_named(cache, tmp_path, monkeypatch):
    path = tmp_path / "killed-g++"
    path.write_text(
        f'#!/bin/sh\n[ "$1" = -v ] && exec {COMPILER} -v\n'
        "echo 'c++: fatal error: Killed signal terminated program cc1plus' >&2\nexit 1\n"
    )
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    with pytest.raises(ops.BuildError, match="ran out of memory"):
        load_inline("answer", BROKEN, is_python_module=False, no_implicit_headers=True)
