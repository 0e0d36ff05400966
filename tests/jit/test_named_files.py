"""Files that flags name: an edit of one is a miss, however it is named."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess

import pytest

import ops
from ops.jit import Extension
from tests.jit.support import COMPILER, answer, entries, extension

pytestmark = pytest.mark.cpp


def plain(source, **changes):
    """The extension without extra_include_paths."""
    return Extension(dataclasses.replace(extension(source, **changes).spec, extra_include_paths=()))


@pytest.mark.parametrize(
    "flags",
    [
        ["-isystem", "{0}"],
        ["-isystem{0}"],
        ["-isystem {0}"],
        ["-iquote", "{0}"],
        ["-idirafter", "{0}"],
        ["--include-directory={0}"],
        ["-Xpreprocessor", "-isystem", "-Xpreprocessor", "{0}"],
    ],
    ids=" ".join,
)
def test_folders_of_headers_however_they_are_named(cache, source, flags):
    include = source.parent / "include"
    built = plain(source, extra_cflags=tuple(flag.format(include) for flag in flags))
    assert answer(built.load()) == 42
    assert built.find()
    (include / "answer.h").write_text("#define ANSWER 7\n")
    assert built.find() is None
    assert answer(built.load()) == 7
    assert built.find()


def test_a_new_header_in_a_system_folder_that_hides_another(cache, source, tmp_path):
    early = tmp_path / "early"
    early.mkdir()
    flags = (f"-isystem{early}", f"-isystem{source.parent / 'include'}")
    built = plain(source, extra_cflags=flags)
    assert answer(built.load()) == 42
    (early / "answer.h").write_text("#define ANSWER 7\n")
    assert built.find() is None
    assert answer(built.load()) == 7


def test_a_header_that_a_variable_leads_to(cache, source, monkeypatch):
    include = source.parent / "include"
    monkeypatch.setenv("CPLUS_INCLUDE_PATH", str(include))
    built = plain(source)
    assert answer(built.load()) == 42
    assert built.find()
    (include / "answer.h").write_text("#define ANSWER 7\n")
    assert built.find() is None
    assert answer(built.load()) == 7


@pytest.mark.parametrize(
    "flags",
    [
        ["-include", "{0}"],
        ["-include{0}"],
        ["--include={0}"],
        ["-imacros", "{0}"],
        ["-Wp,-include,{0}"],
    ],
    ids=" ".join,
)
def test_files_that_compilers_are_told_to_read(cache, source, tmp_path, flags):
    header = tmp_path / "given.h"
    source.write_text('extern "C" int answer() { return GIVEN; }\n')
    flags = tuple(flag.format(header) for flag in flags)
    for number in (1, 2):
        header.write_text(f"#define GIVEN {number}\n")
        built = plain(source, extra_cflags=flags)
        assert built.find() is None
        assert answer(built.load()) == number
        assert built.find()


@pytest.mark.parametrize(
    "flags",
    [
        ["-Wl,--version-script={0}"],
        ["-Wl,--version-script,{0}"],
        ["-Xlinker", "--version-script={0}"],
    ],
    ids=" ".join,
)
def test_files_that_linkers_are_told_to_read(cache, source, tmp_path, flags):
    script = tmp_path / "exported.map"
    source.write_text('extern "C" { int answer() { return 1; } int other() { return 2; } }\n')
    flags = tuple(flag.format(script) for flag in flags)
    for hidden, shown in (("other", "answer"), ("answer", "other")):
        script.write_text(f"{{ local: {hidden}; }};\n")
        built = plain(source, extra_ldflags=flags)
        assert built.find() is None
        command = ["nm", "-D", "--defined-only", str(built.load())]
        exported = subprocess.check_output(command, text=True).split()
        assert (hidden in exported, shown in exported) == (False, True)
        assert built.find()


@pytest.mark.parametrize(
    ("argument", "flag"),
    [
        ("extra_ldflags", "-Wl,-Map={0}"),
        ("extra_ldflags", "-Wl,-Map,{0}"),
        ("extra_cflags", "-O2 -fopt-info-all={0}"),
        ("extra_cflags", "-fdump-tree-optimized={0}"),
        ("extra_cflags", "-D LOG={0}"),
    ],
)
def test_a_file_that_flags_name_but_nobody_reads(cache, source, tmp_path, argument, flag):
    """Nor does it count who writes it."""
    source.write_text('extern "C" int answer() { return 42; }\n')
    file = tmp_path / "written"
    built = plain(source, **{argument: (flag.format(file),)})
    library = built.load()
    assert file.exists() != ("LOG" in flag)
    file.write_text("more")
    assert built.find() == library


LINKED = {
    "folder and library": ["-Wl,--library-path={0}", "-Wl,--library=vv"],
    "in two words each": ["-Wl,--library-path,{0}", "-Wl,--library,vv"],
    "the compiler's word": ["--library-directory={0}", "-lvv"],
    "a script": ["{0}/absolute.ld"],
    "a script that looks": ["-L{0}", "{0}/looking.ld"],
    "a script beside": ["{0}/beside.ld"],
    "a script for a shared library": ["-L{0}", "-lqq"],
    "by its file": ["-L{0}", "-l:libqq.so"],
    "its path": ["-L{0}", "{0}/libqq.so"],
    "an odd suffix": ["{0}/odd.o.txt"],
    "no suffix": ["{0}/odd"],
}


@pytest.mark.parametrize("flags", LINKED.values(), ids=LINKED)
def test_what_is_linked_however_it_is_named(cache, source, tmp_path, flags):
    """Built, edited, built again: by the linker itself."""
    scripts = {
        "absolute.ld": f"/* not INPUT(this) */ INPUT({tmp_path}/libvv.a)",
        "looking.ld": 'SEARCH_DIR("/nowhere")\nGROUP ( AS_NEEDED ( -lvv ), libvv.a )',
        "beside.ld": f"SEARCH_DIR({tmp_path}) INPUT(libvv.a)",
        "libqq.so": f"OUTPUT_FORMAT(elf64-x86-64)\nGROUP({tmp_path}/libvv.a)",
    }
    for name, text in scripts.items():
        (tmp_path / name).write_text(text)
    source.write_text('extern "C" int given();\nextern "C" int answer() { return given(); }\n')
    flags = tuple(flag.format(tmp_path) for flag in flags)
    for number in (1, 2):
        part = tmp_path / "part.cpp"
        part.write_text(f'extern "C" int given() {{ return {number}; }}\n')
        subprocess.run([COMPILER, "-fPIC", "-c", part, "-o", tmp_path / "odd"], check=True)
        shutil.copy(tmp_path / "odd", tmp_path / "odd.o.txt")
        (tmp_path / "libvv.a").unlink(missing_ok=True)
        subprocess.run(["ar", "rc", tmp_path / "libvv.a", tmp_path / "odd"], check=True)
        built = plain(source, extra_ldflags=flags)
        assert built.find() is None
        assert answer(built.load()) == number
        assert built.find()


@pytest.mark.parametrize("flags", [["{0}/libthin.a"], ["-L{0}", "-lthin"]], ids=" ".join)
def test_a_thin_archive_is_refused(cache, source, tmp_path, flags):
    """It has the names of its objects alone."""
    (tmp_path / "part.cpp").write_text('extern "C" int given() { return 1; }\n')
    subprocess.run([COMPILER, "-fPIC", "-c", "part.cpp"], cwd=tmp_path, check=True)
    subprocess.run(["ar", "rcT", "libthin.a", "part.o"], cwd=tmp_path, check=True)
    source.write_text('extern "C" int given();\nextern "C" int answer() { return given(); }\n')
    built = plain(source, extra_ldflags=tuple(flag.format(tmp_path) for flag in flags))
    with pytest.raises(ops.BuildError, match=r"libthin\.a is a thin archive, which names objects"):
        built.load()
    assert entries(cache) == []


def test_link_time_optimisation(cache, source):
    """The linker reports temporary objects too, which nobody keeps."""
    built = extension(source, extra_cflags=("-flto",), extra_ldflags=("-flto",))
    assert answer(built.load()) == 42


@pytest.mark.parametrize("flags", [["-specs={0}"], ["-specs", "{0}"], ["--specs={0}"],
                                   ["--specs", "{0}"], ["-specs {0}"]])  # fmt: skip
@pytest.mark.parametrize("argument", ["extra_cflags", "extra_ldflags"])
def test_specs(cache, source, tmp_path, flags, argument):
    specs = tmp_path / "given.specs"
    flags = tuple(flag.format(specs) for flag in flags)
    source.write_text('extern "C" int answer() { return GIVEN + 0; }\n')
    more = {"extra_cflags": ("-DGIVEN=1",)} if argument == "extra_ldflags" else {}
    for number in (1, 2):
        specs.write_text(f"*cpp_unique_options:\n+ -DGIVEN={number}\n\n")
        built = plain(source, **{**more, argument: flags})
        assert built.find() is None
        loaded = answer(built.load())
        assert loaded == (1 if more else number)
        assert built.find()


def test_a_library_that_the_compiler_loads(cache, source, tmp_path, monkeypatch):
    """A plugin, which no tool reports. Here the compiler is a script that reads it."""
    plugin, script = tmp_path / "plugin.so", tmp_path / "cxx"
    script.write_text(
        '#!/bin/sh\nfor word; do shift; case "$word" in *plugin.so) file=${word#*=}\n'
        '  set -- "$@" -DANSWER=$(tail -c 1 "$file") ;; *) set -- "$@" "$word" ;;\n'
        f'esac; done\nexec {COMPILER} "$@"\n'
    )
    source.write_text('extern "C" int answer() { return ANSWER; }\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    built = plain(source, extra_cflags=(f"-fplugin={plugin}",))
    for number in (1, 2):
        plugin.write_bytes(b"\x7fELF%d" % number)
        os.utime(plugin, (number, number))
        assert built.find() is None
        assert answer(built.load()) == number
        assert built.find()


def test_a_file_that_flags_name_edited_during_the_build(cache, source, tmp_path, monkeypatch):
    specs, script = tmp_path / "given.specs", tmp_path / "cxx"
    specs.write_text("*cpp_unique_options:\n+ -DX=1\n\n")
    script.write_text(f'#!/bin/sh\necho "# more" >> {specs}\nexec {COMPILER} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(ops.BuildError, match="changed while it was being compiled"):
        extension(source, extra_cflags=(f"-specs={specs}",)).load()


@pytest.mark.parametrize("flags", [["-L{0}", "-Wl,--version-script=some.map"], ["-L{0}", "{0}/x"]])
def test_a_script_that_the_linker_finds_by_itself_is_refused(cache, source, tmp_path, flags):
    """The linker reports it by a name that leads nowhere."""
    (tmp_path / "some.map").write_text("{ global: answer; };\n")
    (tmp_path / "x").write_text("INCLUDE inner.ld")
    (tmp_path / "inner.ld").write_text("given = 1;")
    built = plain(source, extra_ldflags=tuple(flag.format(tmp_path) for flag in flags))
    source.write_text('extern "C" int answer() { return 42; }\n')
    with pytest.raises(ops.BuildError, match="cannot be tracked, .* name it by an absolute path"):
        built.load()
    assert built.find() is None


@pytest.mark.parametrize("flags", ["-L'{0}' -L{1} -lvv", "-Wl,--library-path={0},-L,{1},-l,vv"])
def test_a_library_that_comes_before_the_one_that_was_linked(cache, source, tmp_path, flags):
    """To an earlier folder of -L, whose name may have a blank."""
    source.write_text('extern "C" int given();\nextern "C" int answer() { return given(); }\n')

    def archive(folder, number):
        part = tmp_path / "part.cpp"
        part.write_text(f'extern "C" int given() {{ return {number}; }}\n')
        folder.mkdir(exist_ok=True)
        subprocess.run([COMPILER, "-fPIC", "-c", part, "-o", tmp_path / "part.o"], check=True)
        subprocess.run(["ar", "rc", folder / "libvv.a", tmp_path / "part.o"], check=True)
        return folder

    early = tmp_path / ("ear ly" if "'" in flags else "early")
    early.mkdir()
    archive(tmp_path / "late", 1)
    built = plain(source, extra_ldflags=(flags.format(early, tmp_path / "late"),))
    assert answer(built.load()) == 1
    assert built.find()
    archive(early, 2)
    assert built.find() is None
    assert answer(built.load()) == 2
