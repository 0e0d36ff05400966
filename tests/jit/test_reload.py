"""A newer version that does not load: the older one goes on, and the error is raised."""

from __future__ import annotations

import ctypes
import os

import pytest
import torch

import ops
from ops.jit import _trial, load_inline
from tests.helpers import run
from tests.jit.support import ANSWER
from tests.jit.test_drop_in import OPERATORS, PYTHON_MODULE, STABLE, operators

pytestmark = pytest.mark.cpp

UNDEFINED = '\nint nowhere();\nextern "C" int f() { return nowhere(); }\n'
LAZY = {**STABLE, "extra_ldflags": ["-Wl,--unresolved-symbols=ignore-all"]}
THROWS = """
#include <stdexcept>
static int thrown = [] { throw std::runtime_error("on purpose"); return 0; }();
"""


def newer(namespace, more, schema="int x"):
    """A version that gets through compiler and linker."""
    text = OPERATORS.format(namespace=namespace, number=7, schema=schema) + more
    return load_inline(namespace, text, **LAZY)


@pytest.mark.parametrize("tried", [True, False])
def test_operators_whose_newer_version_has_an_undefined_symbol(cache, monkeypatch, tried):
    if not tried:  # no memory for a fork, say: withdrawn, and put back
        monkeypatch.setattr(_trial, "problem", lambda load, deadly_only: None)
    namespace = f"reload_undefined_{tried}".lower()
    operators(namespace, 1)
    held = getattr(torch.ops, namespace).add.default
    for _ in range(2):
        with pytest.raises(ops.BuildError, match=r"does not load:\n.*undefined symbol: nowhere"):
            newer(namespace, UNDEFINED)
        assert getattr(torch.ops, namespace).add(10) == held(10) == 11
    for number in (2, 1):  # and it can still be replaced
        operators(namespace, number)
        assert getattr(torch.ops, namespace).add(10) == held(10) == 10 + number


@pytest.mark.parametrize(
    ("change", "said"),
    [(f"text + {THROWS!r}", "on purpose"), ("text.replace('(int x)', '(int x')", "schema")],
    ids=["throws", "schema"],
)
def test_operators_whose_newer_version_would_end_the_process(cache, change, said):
    code = f"""
        import ops, torch
        from ops.jit import load_inline
        text = {OPERATORS.format(namespace="reload_dies", number=1, schema="int x")!r}
        load_inline("reload_dies", text, **{STABLE!r})
        try:
            load_inline("reload_dies", {change}, **{STABLE!r})
        except ops.BuildError as error:
            print(error)
        print(torch.ops.reload_dies.add(10))
        load_inline("reload_dies", text.replace("x + 1", "x + 2"), **{STABLE!r})
        print(torch.ops.reload_dies.add(10))
    """
    out, _ = run(code, JITOPS_CACHE_DIR=cache)
    assert "does not load:\n  loading it would end the process (signal 6): " in out
    assert said in out
    assert out.split()[-2:] == ["11", "12"]


def test_a_module_whose_newer_version_does_not_load(cache):
    """Neither an undefined symbol, nor an exception, nor the end of the process is the older's."""
    bound = """
        #include <pybind11/pybind11.h>
        #include <stdexcept>
        int answer() { return 1; }
        PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def("answer", &answer); }
    """
    newer = [
        bound + UNDEFINED,
        bound + THROWS,
        bound.replace('m.def("', 'throw std::runtime_error("on purpose"); m.def("'),
    ]
    code = f"""
        import sys, ops
        from ops.jit import load_inline
        kept = {{"extra_ldflags": {LAZY["extra_ldflags"]!r}, "no_implicit_headers": True}}
        module = sys.modules["reload_bound"] = load_inline("reload_bound", {bound!r}, **kept)
        for text in {newer!r}:
            try:
                load_inline("reload_bound", text, **kept)
            except ops.BuildError as error:
                print("nowhere" in str(error), "on purpose" in str(error), end=" ")
            print(module.answer(), sys.modules["reload_bound"] is module)
        newest = load_inline("reload_bound", {bound.replace("return 1", "return 2")!r}, **kept)
        print(newest.answer(), module.answer())
    """
    out, _ = run(code, JITOPS_CACHE_DIR=cache)
    assert out.splitlines() == [
        "True False 1 True",
        "False True 1 True",
        "False True 1 True",
        "2 1",
    ]


def test_a_module_in_the_place_of_operators_that_does_not_load(cache):
    """It would register its operators before it fails, in the way of the older ones."""
    operators("reload_kind", 1)
    registers = OPERATORS.format(namespace="reload_kind", number=2, schema="int x")
    fails = (PYTHON_MODULE % 2).replace("return m;", "Py_DECREF(m); return nullptr;")
    flags = {"extra_cflags": STABLE["extra_cflags"], "no_implicit_headers": True}
    with pytest.raises(ops.BuildError, match="does not load"):
        load_inline("reload_kind", registers + fails, **flags)
    assert torch.ops.reload_kind.add(10) == 11


def test_an_op_goes_on_with_what_was_loaded(cache, source):
    extension = ops.jit.files("answer", source, None, None, None, [source.parent / "include"],
                              is_python_module=False)  # fmt: skip
    op = ops.Op("reload_op", cpp=extension)
    with ops.use_backend("cpp"):
        assert op.backend_for(torch.ones(1)) == "cpp"
        before = op.load("cpp")
        source.write_text("nonsense")
        for _ in range(2):
            with pytest.raises(ops.BuildError):
                op.reload()
        assert op.backend_for(torch.ones(1)) == "cpp"
        assert op.load("cpp") == before
        source.write_text(ANSWER.replace("42", "43"))
        op.reload()
        assert ctypes.CDLL(str(op.load("cpp"))).answer() == 43


def test_a_trial_has_an_end(monkeypatch):
    """A child that waits for a lock nobody will give back is ended, and says nothing."""
    monkeypatch.setattr(_trial, "_LONGEST", 0.2)
    read, write = os.pipe()
    assert _trial.problem(lambda: os.read(read, 1), deadly_only=False) is None
    os.close(read)
    os.close(write)


def test_no_trial_where_cuda_is_initialised(monkeypatch):
    """It does not work in a fork, and would be taken for the library's fault."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert _trial.problem(lambda: os._exit(4), deadly_only=True) is None


def test_a_trial_tells_what_ends_the_process():
    assert _trial.problem(lambda: None, deadly_only=False) is None
    assert _trial.problem(lambda: 1 / 0, deadly_only=False) == "division by zero"
    assert _trial.problem(lambda: 1 / 0, deadly_only=True) is None
    told = _trial.problem(lambda: os.kill(os.getpid(), 9), deadly_only=True)
    assert told == "loading it would end the process (signal 9): nothing said"
    told = _trial.problem(lambda: os._exit(4), deadly_only=True)
    assert told == "loading it would end the process (status 4): nothing said"
