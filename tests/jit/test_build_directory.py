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
from ops.jit import load, load_inline
from tests.harness.forks import run
from tests.jit.support import ANSWER, entries
from tests.jit.test_drop_in import OPERATORS, STABLE

pytestmark = pytest.mark.cpp

PLAIN = {"is_python_module": False, "no_implicit_headers": True}


MINE = "// mine"


def test_a_file_of_the_users_in_place_of_the_record_stays(cache, tmp_path):
    (tmp_path / ".jitops").write_text(MINE)
    with pytest.raises(ops.ArgumentError, match=r"can have a folder \.jitops, got"):
        load_inline("answer", ANSWER, build_directory=tmp_path, **PLAIN)
    assert (tmp_path / ".jitops").read_text() == MINE
    assert entries(cache) == []


@pytest.mark.parametrize("content", ["", MINE])
def test_a_file_of_the_users_in_build_directory_stays(cache, tmp_path, content):
    """Nothing is built for it. Sources that are there are none of the loader's business."""
    (tmp_path / "main.cpp").write_text(MINE)
    mine = tmp_path / "answer.so"
    mine.write_text(content)
    with pytest.raises(ops.ArgumentError, match=f"no answer.so but .* got {mine}: move or delete"):
        load_inline("answer", ANSWER, build_directory=tmp_path, **PLAIN)
    assert mine.read_text() == content
    assert entries(cache) == []
    mine.unlink()
    load_inline("answer", ANSWER, build_directory=tmp_path, **PLAIN)
    assert (tmp_path / "main.cpp").read_text() == MINE


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
    written = tmp_path / "answer.so"
    for number in (1, 2):
        text = f'extern "C" int answer() {{ return {number}; }}\n'
        library = load_inline("answer", text, build_directory=tmp_path, **PLAIN)
        assert written.read_bytes() == Path(library).read_bytes()
    edited = written.read_bytes() + b"more"
    written.unlink()  # it is the cache's own file
    written.write_bytes(edited)
    with pytest.raises(ops.ArgumentError, match=r"no answer\.so but one that the loader wrote"):
        load_inline("answer", ANSWER, build_directory=tmp_path, **PLAIN)
    assert written.read_bytes() == edited


def test_the_library_that_torchs_own_loader_built_there_is_replaced(cache, tmp_path):
    """And one that somebody else has put there stays."""
    torchs.load_inline("answer", ANSWER, build_directory=str(tmp_path), **PLAIN)
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


def test_a_special_file_is_an_error_and_not_waited_for(cache, tmp_path):
    os.mkfifo(tmp_path / "answer.so")
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
    assert "build_directory must have no answer.so but one that the loader wrote, got" in said[0]
    assert f"{tmp_path / 'answer.so'}, which is no plain file: move or delete it" in said[0]
    assert entries(cache) == []


@pytest.mark.parametrize("target", ["elsewhere", "nowhere", "folder"])
def test_a_link_is_somebody_elses(cache, tmp_path, target):
    (tmp_path / "elsewhere").write_text(MINE)
    (tmp_path / "folder").mkdir()
    (tmp_path / "answer.so").symlink_to(tmp_path / target)
    with pytest.raises(ops.ArgumentError, match=r"answer.so, which is no plain file: move"):
        load_inline("answer", ANSWER, build_directory=tmp_path, **PLAIN)
    assert (tmp_path / "answer.so").is_symlink()
    assert (tmp_path / "elsewhere").read_text() == MINE


def test_files_that_are_right_are_left_alone(cache, tmp_path):
    def files():
        return {path.name: path.stat().st_ino for path in (tmp_path / "build").iterdir()}

    load_inline("answer", ANSWER, build_directory=tmp_path / "build", **PLAIN)
    before = files()
    load_inline("answer", ANSWER, build_directory=tmp_path / "build", **PLAIN)
    assert files() == before
    assert set(before) == {".jitops", "answer.so"}


def test_nobody_can_foresee_a_draft(cache, tmp_path):
    """A link in its place would be followed."""
    mine = tmp_path / "mine"
    mine.write_text(MINE)
    draft = tmp_path / f".answer.so.{os.getpid()}"
    draft.symlink_to(mine)
    load_inline("answer", ANSWER, build_directory=tmp_path, **PLAIN)
    assert mine.read_text() == MINE
    assert set(tmp_path.iterdir()) == {
        tmp_path / name for name in ("mine", "cache", ".jitops", "answer.so", draft.name)
    }


def test_threads_that_write_one_file(cache, tmp_path):
    """Each leaves all of its own, and no draft."""
    texts = [f'extern "C" int answer() {{ return {number}; }}\n' for number in range(4)]

    def write(text):
        for _ in range(5):
            load_inline("answer", text, build_directory=tmp_path / "build", **PLAIN)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, texts))
    libraries = [path.read_bytes() for path in cache.glob("*/*/answer.so")]
    assert (tmp_path / "build" / "answer.so").read_bytes() in libraries
    assert sorted(os.listdir(tmp_path / "build")) == [".jitops", "answer.so"]


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


def test_a_copy_by_another_name_is_the_users(cache, tmp_path):
    load_inline("answer", ANSWER, build_directory=tmp_path, **PLAIN)
    shutil.copy(tmp_path / "answer.so", tmp_path / "kept.so")
    with pytest.raises(ops.ArgumentError, match="no kept.so but one that the loader wrote"):
        load_inline("kept", ANSWER, build_directory=tmp_path, **PLAIN)


def test_the_record_follows_no_link(cache, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / ".jitops").symlink_to(tmp_path / "mine")
    with pytest.raises(ops.ArgumentError, match="build_directory must be a folder .* is a link"):
        load_inline("answer", ANSWER, build_directory=tmp_path, **PLAIN)
    assert list((tmp_path / "mine").iterdir()) == []
