"""What ninja and the shell make of flags: known without them, or refused."""

from __future__ import annotations

import subprocess

import pytest

import ops
from ops import jit
from tests.jit.support import extension


@pytest.mark.parametrize("flag", ["$$X", '"$$X"', "$${X}", "$$1", "$$$$", "$$(x)", "`x`",
                                  '"`x`"', "a;b", "a|b", "a & b", "> b", "$(x)"])  # fmt: skip
def test_what_runs_a_program_or_reads_a_variable_is_refused(flag):
    for argument in ("extra_cflags", "extra_cuda_cflags", "extra_ldflags"):
        with pytest.raises(ops.ArgumentError, match=f"{argument} must hold no '"):
            jit.text("x", "int x;", **{argument: ["-O1", f"-DX={flag}"]})


def test_a_quote_over_several_flags_quotes():
    assert jit.text("x", "int x;", extra_cflags=["'-DX=a", "$$Y;'"])
    with pytest.raises(ops.ArgumentError, match=r"must hold no '\$Y'"):
        jit.text("x", "int x;", extra_cflags=["an 'unbalanced", "$$Y"])


@pytest.mark.parametrize("flag", ["/objects/*.o", "~/part.o", "'/objects'/p[a-z]rt.o", "/a/?.o"])
def test_files_that_only_the_shell_finds_are_refused(flag):
    with pytest.raises(ops.ArgumentError, match=r"extra_ldflags must hold no '(~|/)"):
        jit.text("x", "int x;", extra_ldflags=["-lm", flag])


@pytest.mark.parametrize("flag", ["@/x/flags.txt", "-Wl,@/x", "-Xlinker @/x", "--options-file=/x"])
def test_files_of_flags_are_refused(monkeypatch, flag):
    """No tool reports them, and they may name others. Paths of macOS that begin alike are none."""
    with pytest.raises(ops.ArgumentError, match=r"extra_cflags must hold no '(@|--options)"):
        jit.text("x", "int x;", extra_cflags=["-O1", flag])
    assert jit.text("x", "int x;", extra_ldflags=["-Wl,-rpath,@loader_path"])
    monkeypatch.setenv("CXX", "g++ @/x/flags.txt")
    with pytest.raises(ops.ToolchainError, match=r"\$CXX must name no file of flags, .*'@/x"):
        jit.text("x", "int x;").find()


def test_patterns_that_name_no_files():
    flags = ["-gencode=arch=compute_80,code=[sm_80,compute_80]"]
    assert jit.text("x", "int x;", extra_cuda_cflags=flags)


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
