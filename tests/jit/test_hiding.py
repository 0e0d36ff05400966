"""Headers that come where the compiler would find them first; names that are hard to follow."""

from __future__ import annotations

import dataclasses
import os
import subprocess

import pytest

import ops
from ops.jit import Extension, files, text
from tests.jit.support import COMPILER, answer, entries, extension

pytestmark = pytest.mark.cpp

PLAIN = {"is_python_module": False, "no_implicit_headers": True}
VALUE = 'extern "C" int answer() { return VALUE; }\n'


def inline(before, **changes):
    """Text that answers what VALUE is."""
    return text("answer", before + VALUE, **{**PLAIN, **changes})


def changes(built, before, after, change):
    """What it answers before and after a change; each is found again."""
    assert answer(built.load()) == before
    assert built.find()
    change()
    assert built.find() is None
    assert answer(built.load()) == after
    assert built.find()


def put(path, value):
    """A header that says what VALUE is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#define VALUE {value}\n")


# ---- asked for -----------------------------------------------------------------------------------

ASKS = {
    "text": '#if __has_include("late.h")',
    "an angle": "#if __has_include( <late.h> )",
    "the next": "#if defined X || __has_include_next(/* so */ <late.h>)",
    "a macro": '#define LATE "late.h"\n#if __has_include(LATE)',
    "a line that goes on": "#if __has_\\\ninclude(<late.h>)",
    "a comment": "#if __has_include /* so */ (<late.h>)",
    "an alias": "#define HAS __has_include\n#if HAS(<late.h>)",
    "a function": '#define OTHER "x"\n#define HAS(x) __has_include(x)\n#if 1 < 2 && HAS(<late.h>)',
}


@pytest.mark.parametrize("asked", ASKS.values(), ids=ASKS)
@pytest.mark.filterwarnings("ignore")
def test_what_text_asks_for(cache, tmp_path, asked):
    built = inline(
        f"{asked}\n#define VALUE 2\n#else\n#define VALUE 1\n#endif\n",
        extra_include_paths=[tmp_path / "a"],
    )
    changes(built, 1, 2, lambda: put(tmp_path / "a" / "late.h", 0))


def test_what_flags_ask_for(cache, tmp_path):
    """A macro among the flags names the header, which a file that they include asks for."""
    given = tmp_path / "given.h"
    given.write_text("#if __has_include(LATE)\n#define VALUE 2\n#else\n#define VALUE 1\n#endif\n")
    flags = ["-D", "'LATE=<late.h>'", "-include", str(given)]
    built = inline("", extra_cflags=flags, extra_include_paths=[tmp_path / "a"])
    changes(built, 1, 2, lambda: put(tmp_path / "a" / "late.h", 0))


@pytest.mark.skipif("clang" in str(COMPILER), reason="g++ looks for them by itself")
@pytest.mark.parametrize("how", ["first", "-include"])
def test_headers_that_the_user_has_precompiled(cache, tmp_path, how):
    """g++ takes one in the place of its header, and reports neither."""
    header, other = tmp_path / "a" / "v.h", tmp_path / "other.h"
    put(header, 1)
    forced = ["-include", str(header)] if how == "-include" else []
    built = inline(
        "" if forced else "#include <v.h>\n",
        extra_include_paths=[header.parent],
        extra_cflags=forced,
    )

    def precompile(value):
        put(other, value)
        script = built.build().with_name("build.ninja").read_text()
        words = script.partition("\ncflags = ")[2].partition("\n")[0].split()
        flags = [w for w in words if w.startswith(("-D", "-f", "-std")) and "depend" not in w]
        made = [*flags, "-x", "c++-header", str(other), "-o", f"{header}.gch"]
        subprocess.run([COMPILER, *made], check=True)

    changes(built, 1, 2, lambda: precompile(2))
    changes(built, 2, 3, lambda: precompile(3))


# ---- hidden --------------------------------------------------------------------------------------


@pytest.mark.parametrize("deep", [False, True])
def test_a_new_header_that_hides_one_of_the_system(cache, tmp_path, deep):
    """In a new folder, and in one that was there."""
    if deep:
        put(tmp_path / "a" / "linux" / "other.h", 3)
    built = inline(
        "#include <linux/version.h>\n#ifndef VALUE\n#define VALUE 1\n#endif\n",
        extra_include_paths=[tmp_path / "a"],
    )
    changes(built, 1, 2, lambda: put(tmp_path / "a" / "linux" / "version.h", 2))


def test_a_new_header_that_hides_one_of_torch(cache, tmp_path):
    built = inline(
        "#include <torch/headeronly/macros/Macros.h>\n#ifndef VALUE\n#define VALUE 1\n#endif\n",
        extra_include_paths=[tmp_path / "a"],
    )
    name = "torch/headeronly/macros/Macros.h"
    changes(built, 1, 2, lambda: put(tmp_path / "a" / name, 2))


def test_a_header_that_nothing_asks_for_hides_none(cache, tmp_path):
    built = inline("#include <linux/version.h>\n#define VALUE 1\n", extra_include_paths=[tmp_path])
    library = built.load()
    put(tmp_path / "other.h", 2)
    (tmp_path / "folder").mkdir()
    assert built.find() == library


@pytest.mark.parametrize("name", ["./v.h", "././/v.h", "s/./v.h", "s//v.h"])
def test_names_with_parts_that_lead_nowhere(cache, tmp_path, name):
    put(tmp_path / "b" / name, 1)
    built = inline(f"#include <{name}>\n", extra_include_paths=[tmp_path / "a", tmp_path / "b"])
    changes(built, 1, 2, lambda: put(tmp_path / "a" / name, 2))


def test_a_blank_part_below_a_folder_of_the_extension(cache, tmp_path):
    put(tmp_path / "s" / "v.h", 1)
    built = inline("#include <s//v.h>\n", extra_include_paths=[tmp_path / "s", tmp_path])
    changes(built, 1, 2, lambda: put(tmp_path / "s" / "v.h", 2))


def test_a_header_that_hides_a_source_that_another_includes(cache, tmp_path):
    put(tmp_path / "b" / "v.cpp", 1)
    (tmp_path / "b" / "answer.cpp").write_text(f"#include <v.cpp>\n{VALUE}")
    sources = [tmp_path / "b" / "answer.cpp", tmp_path / "b" / "v.cpp"]
    folders = [tmp_path / "a", tmp_path / "b"]
    built = files("answer", sources, None, None, None, folders, is_python_module=False)
    changes(built, 1, 2, lambda: put(tmp_path / "a" / "v.cpp", 2))


def test_a_header_in_the_place_of_a_folder(cache, tmp_path):
    """Where compilers pass the folder over."""
    put(tmp_path / "b" / "v.h", 1)
    place = tmp_path / "a" / "v.h"
    place.mkdir(parents=True)
    built = inline("#include <v.h>\n", extra_include_paths=[place.parent, tmp_path / "b"])
    changes(built, 1, 2, lambda: (place.rmdir(), put(place, 2)))


def test_a_link_to_a_folder_searched_before_that_leads_elsewhere_now(cache, tmp_path):
    """The compiler ignores it, until then."""
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a")
    put(tmp_path / "b" / "v.h", 1)
    put(tmp_path / "c" / "v.h", 2)
    flags = [f"-I{tmp_path / name}" for name in ("a", "link", "b")]

    def change():
        (tmp_path / "link").unlink()
        (tmp_path / "link").symlink_to("c")

    changes(inline("#include <v.h>\n", extra_cflags=flags), 1, 2, change)


FOLDERS = {
    "a variable": ({"CPLUS_INCLUDE_PATH": "{0}:{1}"}, []),
    "variables": ({"CPATH": "{0}", "CPLUS_INCLUDE_PATH": "{1}"}, []),
    "the compiler's words": ({"CXX": f"{COMPILER} -I{{0}} -I{{1}}"}, []),
    "after": ({}, ["--include-directory-after={0}", "--include-directory-after", "{1}"]),
    "with a prefix": ({}, ["-iprefix", "{2}/", "-iwithprefix", "a", "-iwithprefix", "b"]),
    "before": ({}, ["-iprefix {2}/ -iwithprefixbefore a -iwithprefixbefore b"]),
    "long": ({}, ["--include-prefix={2}/", "--include-with-prefix=a",
                  "--include-with-prefix-before", "a", "--include-with-prefix-after=b"]),
}  # fmt: skip


@pytest.mark.parametrize(("variables", "flags"), FOLDERS.values(), ids=FOLDERS)
def test_folders_of_headers_however_they_come(cache, tmp_path, monkeypatch, variables, flags):
    early, late = tmp_path / "a", tmp_path / "b"
    early.mkdir()
    put(late / "v.h", 1)
    places = early, late, tmp_path
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(*places))
    built = inline('#include "v.h"\n', extra_cflags=[flag.format(*places) for flag in flags])
    changes(built, 1, 2, lambda: put(early / "v.h", 2))
    changes(built, 2, 3, lambda: put(early / "v.h", 3))


def test_folders_that_contain_themselves_by_links(cache, tmp_path):
    """Of two such links, there would be 2 ** 40 paths."""
    for name in ("detail", "impl"):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / name).symlink_to(".")
    put(tmp_path / "a" / "v.h", 1)
    (tmp_path / "a" / "w.h").write_text("")
    built = inline("#include <detail/v.h>\n#include <impl/w.h>\n",
                   extra_include_paths=[tmp_path / "b", tmp_path / "a"])  # fmt: skip
    changes(built, 1, 2, lambda: put(tmp_path / "b" / "detail" / "v.h", 2))


@pytest.mark.parametrize("absolute", [True, False])
def test_beside_a_header_that_was_read(cache, source, tmp_path, absolute):
    """Its folder, which nothing names, is where headers in quotes are looked for first."""
    root, other = source.parent / "include", source.parent / "other"
    other.mkdir()
    (other / "c.h").write_text('#include "d.h"\n')
    put(root / "d.h", 1)
    if absolute:
        built = inline(f'#include "{other}/c.h"\n', extra_include_paths=[root])
    else:
        (root / "answer.cpp").write_text(f'#include "../other/c.h"\n{VALUE}')
        spec = extension(root / "answer.cpp").spec
        built = Extension(dataclasses.replace(spec, extra_include_paths=(root,)))
    changes(built, 1, 2, lambda: put(other / "d.h", 2))


# ---- links, and names that are hard to follow ----------------------------------------------------


def linked(tmp_path):
    """A folder, and a link to it that lies elsewhere."""
    real = tmp_path / "deep" / "real" / "in"
    real.mkdir(parents=True)
    (tmp_path / "link").symlink_to(real)
    return real, tmp_path / "link"


@pytest.mark.parametrize("decoy", [False, True])
@pytest.mark.parametrize("kind", ["source", "include"])
def test_up_from_a_link(cache, tmp_path, kind, decoy):
    """Where ``link/..`` is not what it looks like, and another file may be there."""
    real, link = linked(tmp_path)
    if decoy:
        put(tmp_path / "x.h", 99)
    if kind == "source":
        (real / "answer.cpp").write_text(f'#include "../x.h"\n{VALUE}')
        spec = extension(link / "answer.cpp").spec
        built = Extension(dataclasses.replace(spec, extra_include_paths=()))
    else:
        (real / "a.h").write_text('#include "../x.h"\n')
        built = inline('#include "a.h"\n', extra_include_paths=[link])
    put(real.parent / "x.h", 1)
    changes(built, 1, 2, lambda: put(real.parent / "x.h", 2))


@pytest.mark.parametrize("flag", ["-I", "-isystem"])
def test_a_link_that_leads_elsewhere_now(cache, tmp_path, flag):
    link = tmp_path / "a-link-with-a-name-longer-than-what-it-leads-to"
    for number in (1, 2):
        put(tmp_path / str(number) / "v.h", number)
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / str(number))
        built = inline('#include "v.h"\n', extra_cflags=[f"{flag}{link}"])
        assert built.find() is None
        assert answer(built.load()) == number


def test_a_header_that_is_a_link_to_a_source(cache, tmp_path):
    source = tmp_path / "answer.cpp"
    source.write_text(f'#ifndef VALUE\n#define VALUE 1\n#include "v.h"\n{VALUE}#endif\n')
    (tmp_path / "v.h").symlink_to(source)

    def change():
        (tmp_path / "v.h").unlink()
        (tmp_path / "v.h").write_text("#undef VALUE\n#define VALUE 2\n")

    changes(files("answer", source, is_python_module=False), 1, 2, change)


@pytest.mark.parametrize("name", ["v;b.h", "v'b.h", "v b.h", "v$b.h", "v#b.h", "v\tb.h", "v\\b.h",
                                  "v:b.h", "v&b.h", "v\u00a0b.h", "v\u2028b.h"])  # fmt: skip
def test_names_of_headers(cache, tmp_path, name):
    """Beside a file of what ninja takes for the name."""
    put(tmp_path / "v", 99)
    put(tmp_path / name, 1)
    built = inline(f'#include "{name}"\n', extra_include_paths=[tmp_path])
    changes(built, 1, 2, lambda: put(tmp_path / name, 2))


def test_a_name_that_no_list_can_hold(cache, tmp_path, monkeypatch):
    put(tmp_path / "a\nb" / "v.h", 1)
    monkeypatch.setenv("CPLUS_INCLUDE_PATH", str(tmp_path / "a\nb"))
    with pytest.raises(ops.BuildError, match="cannot be tracked, because the compiler"):
        inline('#include "v.h"\n').load()
    assert entries(cache) == []


def test_a_list_that_is_written_elsewhere(cache, tmp_path):
    put(tmp_path / "v.h", 1)
    flags = ["-MF", str(tmp_path / "list")]
    built = inline('#include "v.h"\n', extra_cflags=flags, extra_include_paths=[tmp_path])
    with pytest.raises(ops.BuildError, match=r"did not say in main\.o\.d which files it read"):
        built.load()
    assert entries(cache) == []


# ---- while it was being compiled -----------------------------------------------------------------


def meanwhile(tmp_path, monkeypatch, command):
    """A compiler after which a command of the shell is run."""
    script = tmp_path / "my-g++"
    script.write_text(
        f'#!/bin/sh\n{COMPILER} "$@" || exit\ncase "$*" in *" -c "*main.cpp*) {command};; esac\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))


def moved(tmp_path):
    put(tmp_path / "new.h", 2)
    os.utime(tmp_path / "new.h", (10**9, 10**9))
    return f"[ ! -f {tmp_path}/new.h ] || mv {tmp_path}/new.h"


@pytest.mark.parametrize("where", ["b", "a"])
def test_an_old_file_that_is_moved_here_during_the_build(cache, tmp_path, monkeypatch, where):
    """In the header's place, and where it hides it: it is built once more, silently."""
    (tmp_path / "a").mkdir()
    put(tmp_path / "b" / "v.h", 1)
    meanwhile(tmp_path, monkeypatch, f"{moved(tmp_path)} {tmp_path}/{where}/v.h")
    built = inline('#include "v.h"\n', extra_include_paths=[tmp_path / "a", tmp_path / "b"])
    assert answer(built.load()) == 2
    assert built.find()


# ---- assembly ------------------------------------------------------------------------------------

READS = {
    "absolute": ("", r'".incbin \"{0}/blob\""', []),
    "raw": ("", 'R"(.incbin "{0}/blob")"', []),
    "of a part": ("", r'".incbin \"{0}/blob\", 0, 1"', []),
    "capitals": ("", r'".INCBIN \"{0}/blob\""', []),
    "in a header": ('#include "{0}/reads.h"\n', "READS", []),
}


@pytest.mark.parametrize(("before", "reads", "flags"), READS.values(), ids=READS)
def test_files_that_assembly_reads(cache, tmp_path, before, reads, flags):
    def write(number):
        (tmp_path / "blob").write_bytes(bytes([number]))

    before, reads, inner, *flags = (
        one.replace("{0}", str(tmp_path)) for one in (before, reads, READS["raw"][1], *flags)
    )
    (tmp_path / "reads.h").write_text(f"#define READS {inner}\n")
    before += (
        rf'asm(".section .rodata\nblob:\n" {reads} "\n.previous\n");'
        '\nextern "C" const char blob[] __attribute__((visibility("hidden")));\n'
        "#define VALUE blob[0]\n"
    )
    write(1)
    changes(inline(before, extra_cflags=flags), 1, 2, lambda: write(2))


def test_a_file_that_a_source_of_assembly_reads(cache, tmp_path):
    blob, source = tmp_path / "blob", tmp_path / "answer.s"
    source.write_text(f'.data\n.global answers\nanswers: .incbin "{blob}"\n')
    blob.write_bytes(b"1")
    built = files("answer", source, is_python_module=False)
    assert built.build() == built.find()
    blob.write_bytes(b"2")
    assert built.find() is None


def test_a_file_that_a_source_in_the_place_of_assembly_reads(cache, tmp_path):
    blob, source = tmp_path / "blob", tmp_path / "answer.cpp"
    source.write_text(f'.data\n.global answers\nanswers: .incbin "{blob}"\n')
    blob.write_bytes(b"1")
    flags = ["-x", "assembler-with-cpp"]
    built = files("answer", source, is_python_module=False, extra_cflags=flags)
    assert built.build() == built.find()
    blob.write_bytes(b"2")
    assert built.find() is None


def test_a_method_is_no_assembly(cache):
    text = "struct S { int include(int x) { return x; } };\n#define VALUE S().include (3)\n"
    assert answer(inline("#include <cstdio>  // which has some\n" + text).load()) == 3


@pytest.mark.parametrize(
    "read",
    [r'".incbin \"" BLOB "\""', r'".incbin \"blob\""', r'".include \"{0}/blob\""'],
    ids=["computed", "relative", "assembly"],
)
def test_a_file_that_assembly_reads_in_another_way_is_refused(cache, tmp_path, read):
    (tmp_path / "blob").write_text(".byte 1\n")
    read = read.replace("{0}", str(tmp_path))
    text = f'#define BLOB "{tmp_path}/blob"\nasm({read});\n#define VALUE 1\n'
    with pytest.raises(ops.BuildError, match=r"no file by \.include, and one by \.incbin by"):
        inline(text, extra_cflags=[f"-I{tmp_path}"]).load()
    assert entries(cache) == []


def test_a_comment_asks_for_no_header(cache):
    assert answer(inline("// Of __has_include(...).\n#define VALUE 1\n").load()) == 1


@pytest.mark.parametrize("asked", ["STRING(late.h)", "LESS late.h MORE"])
def test_a_header_asked_for_by_a_computed_name_is_refused(cache, asked):
    text = '#define OTHER "x"\n#define STRING(x) #x\n#define LESS <\n#define MORE >\n'
    text += f"#if __has_include({asked})\n#endif\n#define VALUE 1\n"
    with pytest.raises(ops.BuildError, match="__has_include must name a header, or a macro"):
        inline(text).load()
