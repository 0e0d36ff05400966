"""Changes that a look-up must notice, because a stale library is the worst that it could load."""

from __future__ import annotations

import ctypes
import os
import shutil
import sysconfig
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ops
from ops.jit import files, text
from ops.jit._compile import _compilers
from tests.harness.forks import run
from tests.jit.support import ANSWER, COMPILER, answer, entries, extension

pytestmark = pytest.mark.cpp

PLAIN = {"is_python_module": False, "no_implicit_headers": True}
GIVEN = 'extern "C" int answer() { return GIVEN; }\n'
OR_1 = "#ifndef GIVEN\n#define GIVEN 1\n#endif\n"


def put(path, content):
    """A file, in a folder that is made for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


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
    from ops.jit import files, text
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
    from ops.jit import files, text
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
def test_a_header_of_the_administrator_that_hides_one_of_the_system(cache):
    code = f"""
    from pathlib import Path
    from ops.jit import text
    mount("-t", "tmpfs", "tmpfs", "/usr/local/include")
    before = "#include <protocols/routed.h>\\n#ifndef GIVEN\\n#define GIVEN 1\\n#endif\\n"
    built = text("answer", before + {GIVEN!r}, **{PLAIN})
    print(ctypes.CDLL(str(built.load())).answer(), built.find() is not None)
    Path("/usr/local/include/protocols").mkdir()
    Path("/usr/local/include/protocols/routed.h").write_text("#define GIVEN 2\\n")
    print(built.find() is not None, ctypes.CDLL(str(built.load())).answer())
    """
    assert alone(code, cache) == ["1", "True", "False", "2"]


@pytest.mark.mounts
def test_an_archive_of_the_system_that_a_name_finds(cache, tmp_path):
    code = f"""
    from pathlib import Path
    from ops.jit import files, text
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
    assert f"is_not_that_of_torch_{torch.__version__},_which_this_process_has_imported" in said
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


@pytest.mark.parametrize("named", [True, False])
def test_the_compiler_that_nvcc_runs(tmp_path, monkeypatch, named):
    """$CC or the first gcc on PATH, whichever compiler $CXX is."""
    monkeypatch.setenv("CXX", COMPILER)
    monkeypatch.setenv("CC", str(tmp_path / "gcc") if named else "")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    identities = set()
    for number in (1, 2):
        wrapper(tmp_path / "gcc", f'exec {COMPILER} -DGIVEN={number} "$@"')
        identities.add(_compilers.identity(_compilers.tools(with_cuda=True)["nvcc_host"]))
    assert len(identities) == 2
    assert "nvcc_host" not in _compilers.tools(with_cuda=False)


def test_a_compiler_that_is_not_there_is_said(cache, source, monkeypatch):
    """What another one has built is used all the same."""
    library = extension(source).load()
    monkeypatch.setenv("CXX", "/nope/c++")
    with pytest.warns(ops.CacheWarning, match=r"\$CXX is '/nope/c\+\+', which is not found"):
        assert extension(source).load() == library


def test_a_header_that_another_package_puts_among_pythons(cache, tmp_path, monkeypatch):
    """Python's version tells when its own change, not those of the packages beside them."""
    include = tmp_path / "python"
    shutil.copytree(sysconfig.get_path("include"), include)
    real = sysconfig.get_path
    monkeypatch.setattr(
        sysconfig,
        "get_path",
        lambda n, *a, **k: str(include) if n == "include" else real(n, *a, **k),
    )
    built = text("answer", f"#include <Python.h>\n#include <package/x.h>\n{GIVEN}", **PLAIN)
    for number in (1, 2):
        put(include / "package" / "x.h", f"#define GIVEN {number}\n")
        assert built.find() is None
        assert answer(built.load()) == number
        assert built.find()


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


def layouts(tmp_path):
    """Pairs of requests for the same text, whose headers the compilers find elsewhere."""
    for number in (1, 2):
        for name in ("x.h", "errno.h"):
            put(tmp_path / f"v{number}" / name, f"#define GIVEN {number}\n")
        put(tmp_path / f"v{number}" / "quoted.cpp", f'#include "x.h"\n{GIVEN}')
        put(tmp_path / f"v{number}" / "part.cpp", "")
        put(tmp_path / f"v{number}" / "angle.cpp", f"#include <errno.h>\n{OR_1}{GIVEN}")
    put(tmp_path / "outer" / "inner" / "x.h", "#define GIVEN 1\n")
    put(tmp_path / "empty" / "y.h", "")
    one, two, outer, empty = (tmp_path / name for name in ("v1", "v2", "outer", "empty"))
    other = one / "part.cpp", two / "other.cpp"
    put(other[1], "")
    hides = {"cpp_sources": f"#include <errno.h>\n{OR_1}{GIVEN}"}
    asks = {"cpp_sources": f'#if __has_include("x.h")\n#include "x.h"\n#endif\n{OR_1}{GIVEN}'}
    includes = {"cpp_sources": f"#include <x.h>\n{GIVEN}"}
    return {
        "one more, which hides": [
            {**hides, "extra_include_paths": p} for p in ([empty], [empty, two])
        ],
        "one more, asked for": [
            {**asks, "extra_include_paths": p} for p in ([empty], [empty, two])
        ],
        "one within another": [
            {**includes, "extra_include_paths": [outer, inner]} for inner in (outer / "inner", two)
        ],
        "a source's folder": [{"sources": [*other, v / "quoted.cpp"]} for v in (one, two)],
        "searched, or not": [
            {"sources": [two / "angle.cpp"], "extra_include_paths": p} for p in ([], [two])
        ],
    }


@pytest.mark.parametrize(
    "which",
    ["one more, which hides", "one more, asked for", "one within another", "a source's folder",
     "searched, or not"],
)  # fmt: skip
def test_folders_that_lie_otherwise(cache, tmp_path, which):
    """The same names and contents, and another meaning."""
    for number, request in enumerate(layouts(tmp_path)[which], 1):
        make = text if "cpp_sources" in request else files
        plain = {"no_implicit_headers": True} if make is text else {}
        built = make("answer", **request, **plain, is_python_module=False)
        assert answer(built.load()) == number


@pytest.mark.parametrize("how", ["a flag", "a directive", "a variable"])
def test_a_copied_tree_that_names_a_folder_of_the_first(cache, tmp_path, monkeypatch, how):
    """The copy has a header of its own, which is not the one that is read."""
    first, copied = tmp_path / "first", tmp_path / "copied"
    named = first / "include" / "x.h"
    put(named, "#define GIVEN 1\n")
    directive = f'"{named}"' if how == "a directive" else "<x.h>"
    put(first / "x.cpp", f"#include {directive}\n{GIVEN}")
    shutil.copytree(first, copied)
    flags = [f"-I{named.parent}"] if how == "a flag" else []
    if how == "a variable":
        monkeypatch.setenv("CPATH", str(named.parent))
    for number, folder in enumerate((first, copied), 1):
        put(named, f"#define GIVEN {number}\n")
        built = files("answer", folder / "x.cpp", flags, is_python_module=False)
        assert answer(built.load()) == number


@pytest.mark.parametrize(
    ("of_source", "of_headers"), [("x/../src/x.cpp", "src"), ("src/x.cpp", "src/../inc")]
)
def test_a_copied_tree_whose_folders_are_named_by_way_of_others(
    cache, tmp_path, of_source, of_headers
):
    """As in ``Path(__file__).parent / ".." / "inc"``, of which compilers never see the dots."""
    for number, tree in enumerate((tmp_path / "first", tmp_path / "copied"), 1):
        (tree / "x").mkdir(parents=True)
        put(tree / "src" / "x.cpp", f'#include "x.h"\n{GIVEN}')
        put((tree / of_headers).resolve() / "x.h", f"#define GIVEN {number}\n")
        folders = [tree / of_headers] if "inc" in of_headers else None
        built = files("answer", tree / of_source, None, None, None, folders, is_python_module=False)
        assert answer(built.load()) == number


def test_folders_exchanged_whose_files_have_the_same_size_and_times(cache, tmp_path, monkeypatch):
    """Archives may leave such files. The times of many file systems are a few milliseconds long."""
    for number in (1, 2):
        put(tmp_path / f"v{number}" / "x.h", f"#define GIVEN {number}\n")
    stat = os.stat

    def at_one_moment(path, **keywords):
        status = stat(path, **keywords)
        if not str(path).endswith("x.h"):
            return status
        found = {name: getattr(status, name) for name in dir(status) if name.startswith("st_")}
        return SimpleNamespace(**{**found, "st_mtime_ns": 10**18, "st_ctime_ns": 10**18})

    monkeypatch.setattr(os, "stat", at_one_moment)
    link = tmp_path / "current"
    built = text("answer", f"#include <x.h>\n{GIVEN}", extra_cflags=[f"-isystem{link}"], **PLAIN)
    for number in (1, 2):
        link.unlink(missing_ok=True)
        link.symlink_to(f"v{number}")
        assert answer(built.load()) == number


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
