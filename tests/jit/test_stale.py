"""Changes that a look-up must notice, because a stale library is the worst that it could load."""

from __future__ import annotations

import ctypes
import shutil
import textwrap
from pathlib import Path

import pytest
import torch

import ops
from ops.jit import text
from tests.harness.forks import run
from tests.jit.support import ANSWER, COMPILER, answer, entries, extension

pytestmark = pytest.mark.cpp

PLAIN = {"is_python_module": False, "no_implicit_headers": True}
GIVEN = 'extern "C" int answer() { return GIVEN; }\n'


# ---- of the system -------------------------------------------------------------------------------

# Mounts that nobody else sees, and that go with the process.
ALONE = """
import ctypes, os, subprocess, sys
assert ctypes.CDLL(None, use_errno=True).unshare(0x20000) == 0, ctypes.get_errno()
def mount(*words):
    subprocess.run(["mount", *words], check=True)
mount("--make-rprivate", "/")
"""


def alone(code, cache):
    out, _ = run(ALONE + textwrap.dedent(code), JITOPS_CACHE_DIR=cache)
    return out.split()


@pytest.mark.mounts
def test_a_header_of_another_package_of_the_system(cache):
    code = f"""
    from pathlib import Path
    from ops.jit import text
    mount("-t", "tmpfs", "tmpfs", "/usr/include/protocols")
    built = text("answer", '#include <protocols/v.h>\\n' + {GIVEN!r}, **{PLAIN})
    for number in (1, 2):
        Path("/usr/include/protocols/v.h").write_text(f"#define GIVEN {{number}}\\n")
        print(built.find() is not None, ctypes.CDLL(str(built.load())).answer())
    """
    assert alone(code, cache) == ["False", "1", "False", "2"]


@pytest.mark.mounts
def test_a_package_of_the_system_that_text_asks_for(cache):
    """Installed since, to a folder of headers that has too many to look at them all."""
    code = f"""
    from pathlib import Path
    from ops.jit import text
    mount("-t", "tmpfs", "tmpfs", "/usr/include/protocols")
    asks = "#if __has_include(<protocols/v.h>)\\n#define GIVEN 2\\n#else\\n#define GIVEN 1\\n"
    asks += "#endif\\n"
    built = text("answer", asks + {GIVEN!r}, **{PLAIN})
    print(ctypes.CDLL(str(built.load())).answer(), built.find() is not None)
    Path("/usr/include/protocols/v.h").touch()
    print(built.find() is not None, ctypes.CDLL(str(built.load())).answer())
    """
    assert alone(code, cache) == ["1", "True", "False", "2"]


@pytest.mark.mounts
def test_an_archive_of_the_system_that_a_name_finds(cache, tmp_path):
    code = f"""
    from pathlib import Path
    from ops.jit import text
    mount("-t", "tmpfs", "tmpfs", "/usr/local/lib")
    given = 'extern "C" int given();\\nextern "C" int answer() {{{{ return given(); }}}}\\n'
    built = text("answer", given, extra_ldflags=["-lsomepkg"], **{PLAIN})
    for number in (1, 2):
        part = Path({str(tmp_path)!r}, "part.cpp")
        part.write_text('extern "C" int given() {{{{ return %d; }}}}' % number)
        object = part.with_suffix(".o")
        subprocess.run([{COMPILER!r}, "-fPIC", "-c", part, "-o", object], check=True)
        Path("/usr/local/lib/libsomepkg.a").unlink(missing_ok=True)
        subprocess.run(["ar", "rc", "/usr/local/lib/libsomepkg.a", object], check=True)
        print(built.find() is not None, ctypes.CDLL(str(built.load())).answer())
    """.replace("{{", "{").replace("}}", "}")
    assert alone(code, cache) == ["False", "1", "False", "2"]


@pytest.mark.mounts
def test_torch_replaced_while_a_process_runs(cache, tmp_path):
    """As pip does to a notebook: nothing is built of headers that are not torch's in memory."""
    version = Path(torch.__file__).parent / "version.py"
    other = version.read_text().replace(torch.__version__, "9.9.9")
    (tmp_path / "version.py").write_text(other)
    code = f"""
    import torch, ops
    from ops.jit import load_inline
    load_inline("before", {ANSWER!r}, **{PLAIN})
    mount("--bind", {str(tmp_path / "version.py")!r}, {str(version)!r})
    load_inline("before", {ANSWER!r}, **{PLAIN})
    try:
        load_inline("after", {ANSWER!r}, **{PLAIN})
    except ops.ToolchainError as error:
        print(str(error).replace(" ", "_"))
    """
    (said,) = alone(code, cache)
    assert "holds_9.9.9,_and_this_process_has_imported_" in said
    assert "Start_a_new_process" in said
    assert len(entries(cache)) == 1


# ---- of the compiler -----------------------------------------------------------------------------


def wrapper(path, *lines):
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("variable", ["OMPI_CXX", "SPACK_CXX", "MY_OWN"])
def test_a_wrapper_that_finds_the_compiler_by_a_variable(cache, tmp_path, monkeypatch, variable):
    monkeypatch.setenv("CXX", str(wrapper(tmp_path / "wrapper", f'exec ${variable} "$@"')))
    built = text("answer", GIVEN, **PLAIN)
    for number in (1, 2):
        real = wrapper(tmp_path / f"g++-{number}", f'exec {COMPILER} -DGIVEN={number} "$@"')
        monkeypatch.setenv(variable, str(real))
        assert built.find() is None
        assert answer(built.load()) == number
        assert built.find()


@pytest.mark.parametrize("flag", ["-DGIVEN={0}", "-isystem {1}"])
def test_a_wrapper_that_adds_the_flags_in_a_variable(cache, tmp_path, monkeypatch, flag):
    """As those of Nix do."""
    script = wrapper(tmp_path / "c++", f'exec {COMPILER} "$@" $NIX_CFLAGS_COMPILE')
    monkeypatch.setenv("CXX", str(script))
    includes = "#if __has_include(<given.h>)\n#include <given.h>\n#endif\n"
    built = text("answer", includes + GIVEN, **PLAIN)
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "given.h").write_text(f"#define GIVEN {number}\n")
        monkeypatch.setenv("NIX_CFLAGS_COMPILE", flag.format(number, folder))
        assert built.find() is None
        assert answer(built.load()) == number
        assert built.find()


def test_a_compiler_that_is_not_there_is_said(cache, source, monkeypatch):
    """What another one has built is used all the same."""
    library = extension(source).load()
    monkeypatch.setenv("CXX", "/nope/c++")
    with pytest.warns(ops.CacheWarning, match=r"\$CXX is '/nope/c\+\+', which is not found"):
        assert extension(source).load() == library


# ---- of the sources ------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["__FILE__", "PLACE", "source_location::current().file_name()"])
def test_sources_that_know_their_own_place(cache, tmp_path, how):
    """Moved, they are built anew: they may read what lies beside them."""
    here = tmp_path / "here"
    here.mkdir()
    (here / "place.h").write_text(
        "#include <source_location>\nusing std::source_location;\n#define PLACE __FILE__\n"
    )
    (here / "place.cpp").write_text(
        f'#include "place.h"\nextern "C" const char* place() {{ return {how}; }}\n'
    )

    def place(folder):
        flags = ["-std=c++20"]  # torch 2.11 asks for an older standard
        path = ops.jit.load("place", folder / "place.cpp", flags, is_python_module=False)
        function = ctypes.CDLL(path).place
        function.restype = ctypes.c_char_p
        return Path(function().decode()).parent

    assert place(here) == here
    shutil.move(here, tmp_path / "there")
    assert place(tmp_path / "there") == tmp_path / "there"
    assert len(entries(cache)) == 2


# ---- of the cache --------------------------------------------------------------------------------


def test_an_entry_that_others_can_write_is_replaced(cache, source):
    """Built once more, not by every process, and never loaded."""
    library = extension(source).load()
    inode = library.stat().st_ino
    library.parent.chmod(0o777)
    assert extension(source).find() is None
    again = extension(source).build()
    assert again.stat().st_ino != inode
    assert again.parent.stat().st_mode & 0o022 == 0
    assert extension(source).find() == again


def test_a_cache_that_a_trusted_group_can_write(cache, source):
    """As volumes are by policy: only if somebody says so, and never for all others."""
    library = extension(source).load()
    for folder in (cache, library.parent.parent, library.parent):
        folder.chmod(0o2775)
    trusted = f"""
        import ops, ops.jit
        try:
            print(ops.jit.load("answer", {str(source)!r}, is_python_module=False,
                               extra_include_paths=[{str(source.parent / "include")!r}]))
        except ops.NotBuiltError as error:
            print(error)
    """
    out, err = run(trusted, JITOPS_CACHE_DIR=cache, JITOPS_BUILD="never")
    assert "JITOPS_TRUST_GROUP=1 trusts its group" in err
    assert f"{cache} can be written by others" in out
    more = {"JITOPS_CACHE_DIR": cache, "JITOPS_TRUST_GROUP": "1"}
    out, err = run(trusted, **more)
    assert (Path(out.strip()).is_relative_to(cache), err) == (True, "")
    assert Path(out.strip()).parents[1].stat().st_mode & 0o2070 == 0o2070
    cache.chmod(0o777)
    out, err = run(trusted, **more)
    assert not Path(out.strip()).is_relative_to(cache)
    assert "can be written by others" in err


def test_what_imports_torchs_module_again_changes_nothing(cache):
    """One assignment switches packages that call torch's loader themselves; and back."""
    code = f"""
        import ctypes
        from ops import jit
        from torch.utils import cpp_extension
        theirs = cpp_extension.load_inline
        cpp_extension.load_inline = jit.load_inline
        print(ctypes.CDLL(cpp_extension.load_inline("one", {ANSWER!r}, **{PLAIN})).answer())
        cpp_extension.load_inline = theirs
        jit.install()
        print(ctypes.CDLL(cpp_extension.load_inline("two", {ANSWER!r}, **{PLAIN})).answer())
        jit.uninstall()
        print(cpp_extension.load_inline is theirs, cpp_extension.JIT_EXTENSION_VERSIONER.entries)
        path = cpp_extension.load_inline("two", {ANSWER!r}, build_directory={{folder!r}}, **{PLAIN})
        print(ctypes.CDLL(path).answer())
    """
    folder = str(cache.parent)
    out, _ = run(code.replace("{folder!r}", repr(folder)), JITOPS_CACHE_DIR=cache)
    assert out.split() == ["42", "42", "True", "{}", "42"]
    assert len(entries(cache)) == 2
