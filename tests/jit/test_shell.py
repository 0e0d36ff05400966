"""What ninja and the shell make of flags: known without them, or refused."""

from __future__ import annotations

import subprocess

import pytest

import ops
from ops import jit
from ops.jit import _key
from tests.jit.support import COMPILER, answer, extension


@pytest.mark.parametrize("flag", ["$$X", '"$$X"', "$${X}", "$$1", "$$$$", "$$(x)", "`x`",
                                  '"`x`"', "a;b", "a|b", "a & b", "> b", "$(x)"])  # fmt: skip
def test_what_runs_a_program_or_reads_a_variable_is_refused(flag):
    for argument in ("extra_cflags", "extra_cuda_cflags", "extra_ldflags"):
        with pytest.raises(ops.ArgumentError, match=f"{argument} must hold no '.* for the shell"):
            jit.text("x", "int x;", **{argument: ["-O1", f"-DX={flag}"]})


def test_a_quote_over_several_flags_quotes():
    assert jit.text("x", "int x;", extra_cflags=["'-DX=a", "$$Y;'"])
    with pytest.raises(ops.ArgumentError, match=r"must hold no '\$Y'"):
        jit.text("x", "int x;", extra_cflags=["an 'unbalanced", "$$Y"])


@pytest.mark.cpp
@pytest.mark.parametrize("flag", ["{0}/*.o", "~/part.o", "'{0}'/p[a-z]rt.o"])
def test_objects_that_the_shell_finds(cache, source, tmp_path, monkeypatch, flag):
    """Edited, and joined by another."""
    monkeypatch.setenv("HOME", str(tmp_path))
    source.write_text(
        'extern "C" int given();\nextern "C" __attribute__((weak)) int more();\n'
        'extern "C" int answer() { return given() + (more ? more() : 0); }\n'
    )

    def compiled(name, text):
        (tmp_path / f"{name}.cpp").write_text(f'extern "C" int {text}; }}\n')
        command = [COMPILER, "-fPIC", "-c", tmp_path / f"{name}.cpp", "-o", tmp_path / f"{name}.o"]
        subprocess.run(command, check=True)

    for number in (1, 2):
        compiled("part", f"given() {{ return {number}")
        built = extension(source, extra_ldflags=(flag.format(tmp_path),))
        assert built.find() is None
        assert answer(built.load()) == number
        assert built.find()
    if "*" in flag:
        compiled("other", "more() { return 10")
        assert built.find() is None
        assert answer(built.load()) == 12


@pytest.mark.cpp
@pytest.mark.parametrize("flag", ["'-Wl,-rpath,$$ORIGIN/x'", "-Wl,-rpath,\\$$ORIGIN/x"])
def test_origin_in_quotes_is_the_dynamic_linkers(cache, source, flag):
    library = extension(source, extra_ldflags=(flag,)).load()
    said = subprocess.check_output(["readelf", "-d", library], text=True)
    assert "[$ORIGIN/x]" in said


@pytest.mark.cpp
def test_origin_alone_is_a_variable_of_ninjas(cache, source):
    """As for torch, which passes it on: it builds, and comes to nothing."""
    library = extension(source, extra_ldflags=("-Wl,-rpath,/a$ORIGIN/x",)).load()
    assert "[/a/x]" in subprocess.check_output(["readelf", "-d", library], text=True)


def test_where_the_home_folder_is_counts(monkeypatch, tmp_path):
    spec = jit.text("x", "int x;", extra_ldflags=["-Xlinker", "-rpath", "-Xlinker", "~/lib"]).spec
    monkeypatch.setenv("HOME", str(tmp_path / "one"))
    before = _key.digest(_key.request(spec))
    monkeypatch.setenv("HOME", str(tmp_path / "two"))
    assert _key.digest(_key.request(spec)) != before
