"""Files that flags name: an edit of one is a miss, however it is named."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path

import pytest

import ops
from ops.jit import Extension, _flags, _key
from ops.jit._compile import _build
from tests.jit.support import answer, extension

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
        ["@{1}"],
    ],
    ids=" ".join,
)
def test_folders_of_headers_however_they_are_named(cache, source, tmp_path, flags):
    include = source.parent / "include"
    response = tmp_path / "flags.txt"
    response.write_text(f"-O1\n-isystem '{include}'\n")
    built = plain(source, extra_cflags=tuple(flag.format(include, response) for flag in flags))
    assert built.in_force.header_roots[0] == include
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
        ["@{1}"],
        ["@{2}"],
    ],
    ids=" ".join,
)
def test_files_that_compilers_are_told_to_read(cache, source, tmp_path, flags):
    """Also a response file that names another."""
    header, response, outer = (tmp_path / name for name in ("given.h", "flags.txt", "outer.txt"))
    source.write_text('extern "C" int answer() { return GIVEN; }\n')
    outer.write_text(f"@{response}")
    flags = tuple(flag.format(header, response, outer) for flag in flags)
    for number in (1, 2):
        header.write_text(f"#define GIVEN {number}\n")
        response.write_text(f"-DGIVEN={number}")
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
        ["-L{2}", "-Wl,--version-script=exported.map"],
        ["-Wl,-L,{2}", "-Wl,--version-script,exported.map"],
        ["-Wl,@{1}"],
        ["@{1}"],
    ],
    ids=" ".join,
)
def test_files_that_linkers_are_told_to_read(cache, source, tmp_path, flags):
    script, response = tmp_path / "exported.map", tmp_path / "flags.txt"
    source.write_text('extern "C" { int answer() { return 1; } int other() { return 2; } }\n')
    flags = tuple(flag.format(script, response, tmp_path) for flag in flags)
    passed_on = "" if flags[0].startswith("-Wl,@") else "-Wl,"
    response.write_text(f"{passed_on}--version-script={script}")
    for hidden, shown in (("other", "answer"), ("answer", "other")):
        script.write_text(f"{{ local: {hidden}; }};\n")
        built = plain(source, extra_ldflags=flags)
        assert built.find() is None
        command = ["nm", "-D", "--defined-only", str(built.load())]
        exported = subprocess.check_output(command, text=True).split()
        assert (hidden in exported, shown in exported) == (False, True)
        assert built.find()


@pytest.mark.parametrize("flags", [["-Wl,-T", "-Wl,{0}"], ["-T{0}"], ["-L{1}", "-T", "extra.ld"]])
def test_linker_scripts(source, tmp_path, flags):
    script = tmp_path / "extra.ld"
    digests = set()
    for number in (1, 2):
        script.write_text(f"given = {number};\n")
        ldflags = tuple(flag.format(script, tmp_path) for flag in flags)
        digests.add(_key.digest(_key.request(plain(source, extra_ldflags=ldflags).spec)))
    assert len(digests) == 2


def test_what_flags_name_and_what_they_do_not(tmp_path):
    for name in ("a.map", "libx.a", "libx.so", "out.map", "x.h"):
        (tmp_path / name).touch()
    flags = [
        f"-Wl,-Map={tmp_path}/out.map,-soname={tmp_path}/a.map",
        f"-DNAME={tmp_path}/x.h",
        f"-L{tmp_path} -lx {tmp_path}/libx.so",
        "-includex.h",
        "an 'unbalanced",
        "@nowhere",
    ]
    assert _flags.files(flags) == [tmp_path / "libx.a"]
    assert _flags.folders([f"-I{tmp_path}", "-Irelative", "-isystem", "relative"]) == [tmp_path]


def test_response_files_in_a_circle(tmp_path):
    response = tmp_path / "flags.txt"
    response.write_text(f"-DX @{response}")
    assert _flags.files([f"@{response}"]) == [response]
    assert "-DX" in _flags.words([f"@{response}"])


def test_a_response_file_edited_during_the_build(cache, source, tmp_path, monkeypatch):
    response = tmp_path / "flags.txt"
    response.write_text("-DX=1")
    building = _build._call

    def edited(*arguments):
        response.write_text("-DX=2")
        building(*arguments)

    monkeypatch.setattr(_build, "_call", edited)
    with pytest.raises(ops.BuildError, match="changed while it was being compiled"):
        extension(source, extra_cflags=(f"@{response}",)).load()


def test_folders_are_no_files_and_need_not_be_there(tmp_path):
    assert _flags.files([f"-include{tmp_path}", f"@{tmp_path}"]) == []
    assert _flags.folders(["-I/no/such"]) == [Path("/no/such")]
