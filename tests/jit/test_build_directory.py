"""What stands in build_directory: nothing of the user's is written over, followed or waited for."""

from __future__ import annotations

import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.utils.cpp_extension as torchs

import ops
from ops.jit import _build_directory, load, load_inline
from tests.harness.forks import run
from tests.jit.support import ANSWER, entries
from tests.jit.test_drop_in import OPERATORS, STABLE

pytestmark = pytest.mark.cpp

PLAIN = {"is_python_module": False, "no_implicit_headers": True}


COMMANDS = [  # of other tools, for the same folder and with the same macro
    '[{"file": "a.cpp", "command": "c++ a.cpp"}]',
    '[{"directory": "{0}", "file": "{0}/main.cpp", "command": "c++ -DTORCH_EXTENSION_NAME=a"}]',
    "",
]


@pytest.mark.parametrize("others", COMMANDS)
def test_commands_of_another_build_stay(cache, tmp_path, others):
    others = others.replace("{0}", str(tmp_path))
    commands = tmp_path / "compile_commands.json"
    commands.write_text(others)
    for _ in range(2):
        load_inline("answer", ANSWER, build_directory=tmp_path, **PLAIN)
        assert commands.read_text() == others


def test_commands_that_the_loader_wrote_are_replaced_until_somebody_edits_them(cache, tmp_path):
    commands = tmp_path / "compile_commands.json"
    for flag in ("-DFIRST", "-DSECOND"):
        load_inline("answer", ANSWER, extra_cflags=[flag], build_directory=tmp_path, **PLAIN)
        assert flag in commands.read_text()
    edited = commands.read_text().replace("-DSECOND", "-DEDITED")
    commands.write_text(edited)
    load_inline("answer", ANSWER, extra_cflags=["-DFIRST"], build_directory=tmp_path, **PLAIN)
    assert commands.read_text() == edited


def test_commands_are_written_through_no_link(cache, tmp_path):
    """Though the text it leads to is ours."""
    first, second = tmp_path / "first", tmp_path / "second"
    load_inline("answer", ANSWER, build_directory=first, **PLAIN)
    second.mkdir()
    before = (first / "compile_commands.json").read_text()
    for target in (first / "compile_commands.json", tmp_path / "nowhere"):
        link = second / "compile_commands.json"
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        load_inline("answer", ANSWER, build_directory=second, **PLAIN)
        assert link.readlink() == target
    assert (first / "compile_commands.json").read_text() == before
    assert not (tmp_path / "nowhere").exists()


MINE = "// mine"
DIGEST = 64 * "0"


@pytest.mark.parametrize("content", ["mine\n", f"{DIGEST}  main.cpp\n", f"{DIGEST} x\nmine"])
def test_a_record_of_the_users_stays(cache, tmp_path, content):
    """Of the same name, or nearly what ours holds: of sha256sum, say."""
    (tmp_path / ".jitops").write_text(content)
    with pytest.raises(ops.ArgumentError, match=r"no \.jitops but one that the loader wrote, got"):
        load_inline("answer", ANSWER, build_directory=tmp_path, **PLAIN)
    assert (tmp_path / ".jitops").read_text() == content
    assert entries(cache) == []


@pytest.mark.parametrize("content", ["", MINE, ANSWER, "#include <torch/extension.h>\n" + MINE])
def test_a_file_of_the_users_in_build_directory_stays(cache, tmp_path, content):
    """Also where it is the text itself, read from there; nothing is built for it."""
    mine = tmp_path / "main.cpp"
    mine.write_text(content)
    with pytest.raises(ops.ArgumentError, match=f"no main.cpp but .* got {mine}: move or delete"):
        load_inline("answer", ANSWER, build_directory=tmp_path, **PLAIN)
    assert mine.read_text() == content
    assert entries(cache) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["main.cpp"]


def test_cuda_text_spares_a_file_of_the_users(cache, tmp_path):
    mine = tmp_path / "cuda.cu"
    mine.write_text(MINE)
    with pytest.raises(ops.ArgumentError, match=f"no cuda.cu but .* got {mine}: move or delete"):
        load_inline("answer", ANSWER, "// text", build_directory=tmp_path, **PLAIN)
    assert mine.read_text() == MINE


def test_a_program_spares_a_file_of_the_users(cache, tmp_path):
    (tmp_path / "program").write_text("#!/bin/sh\n")
    source = tmp_path / "main.cpp"
    source.write_text("int main() {}\n")
    program = {"is_python_module": False, "is_standalone": True, "build_directory": tmp_path}
    with pytest.raises(ops.ArgumentError, match="no program but one that the loader wrote"):
        load("program", source, **program)
    (tmp_path / "program").unlink()
    for text in ("int main() {}\n", "int main() { return 0; }\n"):  # its own, it writes over
        source.write_text(text)
        load("program", source, **program)
        assert source.read_text() == text


def test_what_the_loader_wrote_it_writes_over_until_somebody_edits_it(cache, tmp_path):
    written = tmp_path / "main.cpp"
    for number in (1, 2):
        text = f'extern "C" int answer() {{ return {number}; }}\n'
        load_inline("answer", text, build_directory=tmp_path, **PLAIN)
        assert text in written.read_text()
    written.write_text(written.read_text().replace("return 2", "return 3"))
    with pytest.raises(ops.ArgumentError, match="no main.cpp but one that the loader wrote"):
        load_inline("answer", ANSWER, build_directory=tmp_path, **PLAIN)
    assert "return 3" in written.read_text()


@pytest.mark.parametrize("more", ["", "// mine"])
@pytest.mark.parametrize("handling", [True, False])
@pytest.mark.parametrize("functions", [["answer"], {"answer": "What it is."}])
def test_a_folder_of_torchs_own_loader(cache, tmp_path, monkeypatch, functions, handling, more):
    """It can be taken over, unless somebody has written to its files since."""
    monkeypatch.setattr(torchs, "_run_ninja_build", lambda *arguments, **named: None)
    monkeypatch.setattr(torchs, "_import_module_from_library", lambda *arguments: None)
    monkeypatch.setattr(torchs, "_join_cuda_home", lambda *names: "nvcc")
    monkeypatch.setattr(torchs, "_get_cuda_arch_flags", lambda flags=None: [])
    monkeypatch.setattr(ops.jit._torch_api.Extension, "load_entry", lambda self, verbose: 1 / 0)
    given = {"functions": functions, "build_directory": str(tmp_path)}
    given |= {"with_pytorch_error_handling": handling}
    torchs.load_inline("answer", [ANSWER, "int x;"], ["int y;", "int z;"], **given)
    (tmp_path / ".ninja_log").write_text("# ninja log v5\n")
    later = (tmp_path / ".ninja_log").stat().st_mtime + 10
    for name in ("main.cpp", "cuda.cu"):
        written = (tmp_path / name).read_text() + more
        if more:
            (tmp_path / name).write_text(written)
            os.utime(tmp_path / name, (later, later))
        expected = pytest.raises(ops.ArgumentError, match=f"no {name} but one that the loader")
        with expected if more else pytest.raises(ZeroDivisionError):
            load_inline("answer", [ANSWER, "int x;"], ["int y;", "int z;"], **given)
        assert (tmp_path / name).read_text() == written
        (tmp_path / name).unlink()


def test_the_library_that_torchs_own_loader_built_there_is_replaced(cache, tmp_path):
    """And one that somebody else has put there stays."""
    torchs.load_inline("answer", ANSWER, build_directory=str(tmp_path), **PLAIN)
    (tmp_path / "main.cpp").unlink()  # of text without bindings: it could be the user's
    load_inline("answer", ANSWER, build_directory=tmp_path, **PLAIN)
    (tmp_path / "answer.so").unlink()
    (tmp_path / "answer.so").write_text(MINE)
    (tmp_path / ".ninja_log").unlink()
    with pytest.raises(ops.ArgumentError, match="no answer.so but one that the loader wrote"):
        load_inline("answer", ANSWER, build_directory=tmp_path, **PLAIN)
    assert (tmp_path / "answer.so").read_text() == MINE


def test_a_program_that_somebody_edited_or_exchanged_stays(cache, tmp_path):
    source, program = tmp_path / "main.cpp", tmp_path / "program"
    source.write_text("int main() {}\n")
    given = {"is_python_module": False, "is_standalone": True, "build_directory": tmp_path}
    load("program", source, **given)
    built = program.read_bytes()
    assert os.access(program, os.X_OK)
    source.write_text("int main() { return 1; }\n")
    for other in (built + b"more", Path(shutil.which("true")).read_bytes()):
        program.write_bytes(other)
        with pytest.raises(ops.ArgumentError, match="no program but one that the loader wrote"):
            load("program", source, **given)
        assert program.read_bytes() == other
    program.write_bytes(built)
    load("program", source, **given)
    assert program.read_bytes() != built


@pytest.mark.parametrize("name", ["main.cpp", "answer.so"])
def test_a_special_file_is_an_error_and_not_waited_for(cache, tmp_path, name):
    os.mkfifo(tmp_path / name)
    said = []

    def loading():
        try:
            load_inline("answer", ANSWER, build_directory=tmp_path, **PLAIN)
        except ops.ArgumentError as error:
            said.append(str(error))

    thread = threading.Thread(target=loading, daemon=True)
    thread.start()
    thread.join(30)
    assert len(said) == 1
    assert f"build_directory must have no {name} but one that the loader wrote, got" in said[0]
    assert f"{tmp_path / name}, which is no plain file: move or delete it" in said[0]
    assert entries(cache) == []


@pytest.mark.parametrize("target", ["elsewhere", "nowhere", "folder"])
def test_a_link_is_somebody_elses(cache, tmp_path, target):
    (tmp_path / "elsewhere").write_text(MINE)
    (tmp_path / "folder").mkdir()
    (tmp_path / "main.cpp").symlink_to(tmp_path / target)
    with pytest.raises(ops.ArgumentError, match=r"main.cpp, which is no plain file: move"):
        load_inline("answer", ANSWER, build_directory=tmp_path, **PLAIN)
    assert (tmp_path / "main.cpp").is_symlink()
    assert (tmp_path / "elsewhere").read_text() == MINE


def test_files_that_are_right_are_left_alone(cache, tmp_path):
    def files():
        return {path.name: path.stat().st_ino for path in (tmp_path / "build").iterdir()}

    load_inline("answer", ANSWER, build_directory=tmp_path / "build", **PLAIN)
    before = files()
    load_inline("answer", ANSWER, build_directory=tmp_path / "build", **PLAIN)
    assert files() == before
    assert set(before) == {".jitops", "answer.so", "compile_commands.json", "main.cpp"}


def test_nobody_can_foresee_a_draft(cache, tmp_path):
    """A link in its place would be followed."""
    mine = tmp_path / "mine"
    mine.write_text(MINE)
    names = ("main.cpp", "answer.so", "compile_commands.json")
    for name in names:
        (tmp_path / f".{name}.{os.getpid()}").symlink_to(mine)
    load_inline("answer", ANSWER, build_directory=tmp_path, **PLAIN)
    assert mine.read_text() == MINE
    drafts = {f".{name}.{os.getpid()}" for name in names}
    assert {path.name for path in tmp_path.iterdir()} - drafts == {
        "mine",
        "cache",
        ".jitops",
        *names,
    }


def test_the_record_is_written_through_no_link(cache, tmp_path):
    (tmp_path / "mine").write_text(MINE)
    (tmp_path / ".jitops").symlink_to(tmp_path / "mine")
    with pytest.raises(ops.ArgumentError, match=r"no \.jitops .*, which is no plain file"):
        load_inline("answer", ANSWER, build_directory=tmp_path, **PLAIN)
    assert (tmp_path / "mine").read_text() == MINE


def test_threads_that_write_one_file(cache, tmp_path):
    """Each leaves all of its own, and no draft."""
    texts = [f'extern "C" int answer() {{ return {number}; }}\n' for number in range(4)]

    def write(text):
        for _ in range(5):
            load_inline("answer", text, build_directory=tmp_path / "build", **PLAIN)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, texts))
    written = (tmp_path / "build" / "main.cpp").read_text()
    assert sum(text in written for text in texts) == 1
    assert sorted(os.listdir(tmp_path / "build")) == [
        ".jitops", "answer.so", "compile_commands.json", "main.cpp"
    ]  # fmt: skip


def test_the_copy_is_the_same_file_so_that_to_load_it_does_nothing(cache, tmp_path):
    """torch would end the process if its operators were registered twice."""
    code = f"""
        import torch
        from ops.jit import load_inline
        text = {OPERATORS.format(namespace="copied", number=1, schema="int x")!r}
        load_inline("copied", text, build_directory={str(tmp_path / "build")!r}, **{STABLE!r})
        torch.ops.load_library({str(tmp_path / "build" / "copied.so")!r})
        print(torch.ops.copied.add(10))
    """
    out, _ = run(code, JITOPS_CACHE_DIR=cache)
    assert out == "11\n"


BOUND = """
#include <pybind11/pybind11.h>
int answer() {{ return {number}; }}
"""


def test_a_folder_that_torchs_own_loader_built_in(cache, tmp_path):
    """Of another text: torch would write over it as well. Not one that was edited since."""
    given = {"functions": ["answer"], "build_directory": str(tmp_path)}
    (tmp_path / "main.cpp").write_text(
        "#include <torch/extension.h>\n" + BOUND.format(number=1) + "\n"
        "PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {\n"
        'm.def("answer", torch::wrap_pybind_function(answer), "answer");\n}'
    )
    source = tmp_path / "main.cpp"
    (tmp_path / "build.ninja").write_text(f"build main.o: compile {source}\n")
    (tmp_path / ".ninja_log").write_text("# ninja log v5\n")
    spec = ops.jit.text("answer", BOUND.format(number=2), functions=["answer"]).spec
    assert _build_directory.prepare(tmp_path, spec) == tmp_path
    later = (tmp_path / ".ninja_log").stat().st_mtime + 10
    os.utime(source, (later, later))
    with pytest.raises(ops.ArgumentError, match="no main.cpp but one that the loader wrote"):
        load_inline("answer", BOUND.format(number=2), **given)
