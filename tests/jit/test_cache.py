"""When a build is spared and when it is not; what a hit needs; what damage does."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from ops import _config
from ops.jit import _load
from tests.harness.forks import run
from tests.harness.helpers import path_without
from tests.jit.support import ANSWER, COMPILER, answer, entries, extension, leftovers

pytestmark = pytest.mark.cpp


def test_builds_once(cache, source):
    first = extension(source).load()
    assert answer(first) == 42
    assert extension(source).find() == first
    assert extension(source).load() == first
    assert len(entries(cache)) == 1
    assert leftovers(cache) == []


HIT = """
    import fcntl, sys
    events, active = [], [False]
    def watch(event, args):
        if not active[0]:
            return
        if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork",
                     "os.mkdir", "os.rename", "os.remove", "os.chmod", "fcntl.flock"):
            if args[1:] != (fcntl.LOCK_SH | fcntl.LOCK_NB,):  # it never waits
                events.append((event, args))
        if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
            if not str(args[0]).endswith("/used"):  # the counter
                events.append((event, args))
    sys.addaudithook(watch)
    import torch, ops.jit
    active[0] = {watched}
    ops.jit.load("answer", {source!r}, extra_include_paths=[{include!r}], is_python_module=False)
    bad = [m for m in ("torch.utils.cpp_extension", "filelock", "ninja", "subprocess")
           if m in set(sys.modules) - {{"subprocess"}}]
    print(events, bad, torch.cuda.is_initialized())
"""


def test_a_hit_needs_nothing(cache, source, tmp_path):
    """No ninja, compiler, subprocess, waiting or cpp_extension, and nothing on PATH.

    What it changes is that it is counted.
    """
    values = {"source": str(source), "include": str(source.parent / "include")}
    everything = path_without(folder=tmp_path / "bin")  # and no link to ccache, which is asked
    run(HIT.format(watched=False, **values), JITOPS_CACHE_DIR=cache, PATH=everything)

    def files():
        return sorted((p, p.stat().st_mtime_ns) for p in cache.rglob("*") if p.name != "used")

    (used,) = cache.glob("*/*/used")
    before = files()
    for path in (everything, str(tmp_path)):
        out, _ = run(HIT.format(watched=True, **values), JITOPS_CACHE_DIR=cache, PATH=path)
        assert out.strip() == "[] [] False"
    assert files() == before
    assert used.read_bytes() == b"..."


def test_times_and_places_do_not_matter(cache, source, tmp_path, monkeypatch):
    """Touched, checked out elsewhere, cache moved: all hits."""
    extension(source).load()
    for path in source.parent.rglob("*"):
        os.utime(path, (1, 1))
    assert extension(source).find()
    elsewhere = tmp_path / "a checkout elsewhere"
    shutil.copytree(source.parent, elsewhere)
    assert extension(elsewhere / "answer.cpp").find()
    cache.rename(tmp_path / "moved")
    assert extension(source).find() is None
    monkeypatch.setenv("JITOPS_CACHE_DIR", str(tmp_path / "moved"))
    _config.settings.cache_clear()
    assert extension(source).find()


def test_an_edited_header_is_a_miss(cache, source):
    first = extension(source).load()
    (source.parent / "include" / "answer.h").write_text("#define ANSWER 43\n")
    assert extension(source).find() is None
    second = extension(source).load()
    assert (answer(first), answer(second)) == (42, 43)
    (source.parent / "include" / "answer.h").write_text("#define ANSWER 42\n")
    assert extension(source).find() == first
    assert len(entries(cache)) == 2


def test_a_deleted_header_is_a_miss(cache, source):
    extension(source).load()
    (source.parent / "include" / "answer.h").unlink()
    assert extension(source).find() is None


def test_an_edited_source_is_another_extension_in_the_same_process(cache, source):
    first = extension(source).load()
    source.write_text(ANSWER.replace("42", "44"))
    second = extension(source).load()
    assert (answer(first), answer(second)) == (42, 44)


def fake_compiler(folder, version):
    """The compiler under another name, which says it is of another version."""
    path = folder / "my-g++"
    path.write_text(
        f'#!/bin/sh\n[ "$1" = -v ] && {{ echo "gcc version {version}" >&2; exit 0; }}\n'
        f'exec {COMPILER} "$@"\n'
    )
    path.chmod(0o755)
    return path


def test_another_compiler_is_a_miss_and_a_moved_one_a_hit(cache, source, tmp_path, monkeypatch):
    compiler = fake_compiler(tmp_path, "12.1")
    monkeypatch.setenv("CXX", str(compiler))
    first = extension(source).load()
    compiler.rename(tmp_path / "moved-g++")
    monkeypatch.setenv("CXX", str(tmp_path / "moved-g++"))
    assert extension(source).load() == first  # asked who it is, and remembered
    assert extension(source).find() == first
    fake_compiler(tmp_path, "12.2").rename(tmp_path / "moved-g++")
    assert extension(source).find() is None
    assert extension(source).load() != first
    monkeypatch.setenv("CXX", "/no/compiler/at/all")
    assert extension(source).find()  # one that is not there cannot disagree


def script(path, *lines):
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


def versions(path, version, answer):
    """A compiler of that version, whose code gives that answer."""
    script(
        path,
        f'case "$*" in *-v) echo "gcc version {version}" >&2; exit 0;; esac',
        f'exec {COMPILER} -DGIVEN={answer} "$@"',
    )


def ccache(folder):
    """What ccache does of it all: run the next program, or the next one of its own name."""
    return script(
        folder / "ccache",
        'name=$(basename "$0")',
        '[ "$name" = ccache ] && { name=$1; shift; }',
        "for folder in $(echo $PATH | tr : ' '); do",
        '  case $(readlink -f "$folder/$name") in */ccache) continue;; esac',
        '  [ -x "$folder/$name" ] && exec "$folder/$name" "$@"',
        "done",
    )


@pytest.mark.parametrize(
    "how", ["word", "masquerade", "masquerade by path", "both", "script", "folder"]
)
def test_a_compiler_behind_another_program_that_is_upgraded(
    cache, source, tmp_path, monkeypatch, how
):
    real, links = tmp_path / "real", tmp_path / "links"
    launcher = ccache(tmp_path / "bin")
    links.mkdir()
    (links / "c++").symlink_to(launcher)
    first = [links] if how in ("masquerade", "both") else []
    if how not in ("script", "folder"):
        first.append(real)
    monkeypatch.setenv("PATH", ":".join(map(str, [*first, os.environ["PATH"]])))
    named = {"word": f"{launcher} c++", "masquerade by path": links / "c++"}
    named |= {"both": f"{launcher} c++", "masquerade": "c++"}
    named["script"] = script(tmp_path / "wrapper", f"PATH={real}:$PATH", 'exec c++ -O1 "$@"')
    named["folder"] = script(tmp_path / "nvcc" / "c++", f'exec {real}/$(basename $0) "$@"')
    monkeypatch.setenv("CXX", str(named[how]))
    source.write_text('extern "C" int answer() { return GIVEN; }\n')
    for number in (1, 2):
        versions(real / "c++", f"12.{number}", number)
        built = extension(source)
        assert built.find() is None
        assert answer(built.load()) == number
        assert built.find()


@pytest.mark.parametrize("wrapper", ["ccache", "sccache"])
def test_a_compiler_cache_on_path_is_not_used_unasked(
    cache, source, tmp_path, monkeypatch, wrapper
):
    """torch 2.13 puts it before the compiler; it may return an object made of other headers."""
    script(tmp_path / wrapper, "exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert answer(extension(source).load()) == 42


def test_ccache_by_request_reads_the_headers_anew(cache, source, tmp_path, monkeypatch):
    """Its direct mode does not notice a new header that hides another one."""
    launcher = script(
        tmp_path / "ccache",
        'case "$*" in *" -v" | *-###*) ;; *) [ "$CCACHE_NODIRECT" ] || exit 1 ;; esac',
        'exec "$@"',
    )
    monkeypatch.setenv("CXX", f"{launcher} {COMPILER}")
    assert answer(extension(source).load()) == 42


def test_two_compilers_by_turns_behind_one_program(cache, source, tmp_path, monkeypatch):
    """Each is remembered: neither is asked again, and nothing is compiled again."""
    launcher = ccache(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'real'}:{os.environ['PATH']}")
    source.write_text('extern "C" int answer() { return GIVEN; }\n')
    for number in (1, 2):
        versions(tmp_path / "real" / f"g++-{number}", f"1{number}.0", number)
    for turn, number in enumerate((1, 2, 1, 2)):
        monkeypatch.setenv("CXX", f"{launcher} g++-{number}")
        assert bool(extension(source).find()) is (turn > 1)
        assert answer(extension(source).load()) == number
    assert len(entries(cache)) == 2


# ---- damage --------------------------------------------------------------------------------------


def replace(library, content):
    """A new file of that name; one written over would pull the old one from under its users."""
    library.unlink()
    library.write_bytes(content)


def corrupt(library, manifest):
    content = bytearray(library.read_bytes())
    content[len(content) // 2] ^= 1
    replace(library, content)


def truncate(library, manifest):
    replace(library, library.read_bytes()[:100])


def empty(library, manifest):
    replace(library, b"")


def swap(library, manifest):
    """Another library that would load: only its hash tells."""
    replace(library, Path(torch._C.__file__).read_bytes())


def remove(library, manifest):
    library.unlink()


def garble(library, manifest):
    manifest.chmod(0o700)
    manifest.write_text("{not json")


def strip(library, manifest):
    manifest.chmod(0o700)
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({"digest": content["digest"]}))


def retype(library, manifest):
    manifest.chmod(0o700)
    manifest.write_text("[1, 2, 3]")


@pytest.mark.parametrize("damage", [corrupt, truncate, empty, swap, remove, garble, strip, retype])
def test_damage_is_rebuilt_never_loaded(cache, source, monkeypatch, damage):
    library = extension(source).load()
    damage(library, library.parent / "manifest.json")
    monkeypatch.setattr(_load, "_loaded", {})
    assert extension(source).find() is None
    again = extension(source).load()
    assert answer(again) == 42
    assert extension(source).find() == again
    assert leftovers(cache) == []


def test_interrupted_publish_leaves_nothing(cache, source, monkeypatch):
    """An exception at every step of publishing: no entry, no staging folder, and then it works."""
    for step in ("os.rename", "_entries.digest_of"):
        with monkeypatch.context() as m:
            m.setattr(f"ops.jit._cache._publish.{step}", lambda *a: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                extension(source).load()
        assert entries(cache) == []
        assert leftovers(cache) == []
    assert answer(extension(source).load()) == 42
