"""A newer version that does not load: the older one goes on, and the error is raised."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import time

import pytest
import torch

import ops
from ops.jit import _trial, load_inline
from tests.helpers import run, start
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


DIES = [  # what is added to a version, what must be said, and whether it is an exception's doing
    (THROWS, r"signal 6 \(SIGABRT\) in its initialisers: .*on purpose", True),
    ("schema", r"signal 6 \(SIGABRT\) in its initialisers: .*schema", True),
    ("abort()", r"signal 6 \(SIGABRT\) in its initialisers: nothing said", False),
    ("raise(SIGSEGV)", r"signal 11 \(SIGSEGV\) in its initialisers: nothing said", False),
    ("_exit(0)", r"exit status 0 in its initialisers: nothing said", False),
    ("_exit(3)", r"exit status 3 in its initialisers: nothing said", False),
    ("exit(0)", r"exit status 0 in its initialisers: nothing said", False),
]
INITIALISER = "\n#include <csignal>\n#include <cstdlib>\n#include <unistd.h>\n" + (
    "static int initialised = [] { %s; return 0; }();\n"
)


def test_operators_whose_newer_version_would_end_the_process(cache):
    """Whatever ends it is told, and nothing is said of its cause that is not known."""
    text = OPERATORS.format(namespace="reload_dies", number=1, schema="int x")
    newer = [
        text.replace("(int x)", "(int x")
        if more == "schema"
        else text + (more if more == THROWS else INITIALISER % more)
        for more, _, _ in DIES
    ]
    code = f"""
        import ops, torch
        from ops.jit import load_inline
        load_inline("reload_dies", {text!r}, **{STABLE!r})
        for newer in {newer!r}:
            try:
                load_inline("reload_dies", newer, **{STABLE!r})
            except ops.BuildError as error:
                print(error)
            print(torch.ops.reload_dies.add(10), end="\\0")
        load_inline("reload_dies", {text.replace("x + 1", "x + 2")!r}, **{STABLE!r})
        print(torch.ops.reload_dies.add(10))
    """
    out, _ = run(code, JITOPS_CACHE_DIR=cache)
    *told, last = out.split("\0")
    assert len(told) == len(DIES)
    for (_, said, thrown), text in zip(DIES, told, strict=True):
        assert re.search(f"does not load:\n  loading it would end the process: {said}", text)
        assert ("an exception" in text) is thrown
        assert text.endswith("\n11")
    assert last == "12\n"


def test_an_older_version_whose_destructors_end_the_process(cache):
    """It can be replaced in a new process only, and the newer one is not blamed."""
    text = OPERATORS.format(namespace="reload_stays", number=1, schema="int x")
    dies = """
        #include <stdexcept>
        static struct Dies {
          ~Dies() noexcept(false) { throw std::runtime_error("too old"); }
        } dies;
    """
    code = f"""
        import os, sys, ops, torch
        from ops.jit import load_inline
        load_inline("reload_stays", {(text + dies)!r}, **{STABLE!r})
        try:
            load_inline("reload_stays", {text!r}, **{STABLE!r})
        except ops.BuildError as error:
            print(error)
        print(torch.ops.reload_stays.add(10))
        sys.stdout.flush()
        os._exit(0)
    """
    out, _ = run(code, JITOPS_CACHE_DIR=cache)
    assert "end the process: signal 6 (SIGABRT) in the older version's destructors: " in out
    assert "too old" in out
    assert "its initialisers" not in out
    assert "start a new process" in out
    assert out.endswith("\n11\n")


@pytest.mark.parametrize("registers", [True, False])
def test_a_newer_version_whose_initialisers_do_not_end(cache, registers):
    """Also of one that replaces no operators: any load of it would hang."""
    text = OPERATORS.format(namespace="reload_hangs", number=1, schema="int x")
    if not registers:
        text = ANSWER
    newer = text + INITIALISER % "for (;;) pause()"
    code = f"""
        import ops, torch
        from ops.jit import _trial, load_inline
        _trial._LONGEST = 1.5
        load_inline("reload_hangs", {text!r}, **{STABLE!r})
        try:
            load_inline("reload_hangs", {newer!r}, **{STABLE!r})
        except ops.BuildError as error:
            print(error)
        print(torch.ops.reload_hangs.add(10) if {registers} else 11)
    """
    process = start(code, JITOPS_CACHE_DIR=cache)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "loading it would not end: its initialisers had not ended after 1.5 s" in out
    assert out.endswith("\n11\n")


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
    """A child that waits for a lock nobody will give back is ended."""
    monkeypatch.setattr(_trial, "_LONGEST", 0.2)
    read, write = os.pipe()
    told = _trial.problem(lambda at: (at("this"), os.read(read, 1)), deadly_only=True)
    assert told == "loading it would not end: this had not ended after 0.2 s"
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    os.close(read)
    os.close(write)


def test_no_trial_where_cuda_is_initialised(monkeypatch):
    """It does not work in a fork, and would be taken for the library's fault."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert _trial.problem(lambda at: os._exit(4), deadly_only=True) is None


def test_a_trial_tells_what_ends_the_process():
    assert _trial.problem(lambda at: None, deadly_only=False) is None
    assert _trial.problem(lambda at: 1 / 0, deadly_only=False) == "division by zero"
    assert _trial.problem(lambda at: 1 / 0, deadly_only=True) is None
    told = _trial.problem(lambda at: (at("this"), os.kill(os.getpid(), 9)), deadly_only=True)
    assert told == "loading it would end the process: signal 9 (SIGKILL) in this: nothing said"
    for status in (0, 3, 4):

        def load(at, status=status):
            at("this")
            os._exit(status)

        told = _trial.problem(load, deadly_only=True)
        how = f"exit status {status} in this"
        assert told == f"loading it would end the process: {how}: nothing said"


def test_a_trial_where_somebody_else_takes_the_children_in(monkeypatch):
    """How it ended is not known then, only that it did."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert _trial.problem(lambda at: None, deadly_only=False) is None
        told = _trial.problem(lambda at: os._exit(0), deadly_only=False)
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert told == "loading it would end the process: in a way not known: nothing said"


def test_of_what_a_trial_prints_the_end_is_passed_on():
    """It may print for ever, and no disk has to take it."""

    def load(at):
        for _ in range(100_000):
            os.write(2, b"all is well so far\n")
        os.write(2, b"the reason")
        os.abort()

    told = _trial.problem(load, deadly_only=True)
    assert told.endswith("all is well so far the reason")
    assert len(told) < 2200

    def throw(at):
        os.write(2, b"x" * 3000 + b"\nterminate called after throwing: reason" + b" frame" * 1000)
        os.abort()

    told = _trial.problem(throw, deadly_only=True)
    assert ": terminate called after throwing: reason frame" in told
    assert len(told) < 2200

    def refuse(at):
        os.write(2, b"x" * 3000)
        raise OSError("y" * 3000 + "undefined symbol: nowhere")

    told = _trial.problem(refuse, deadly_only=False)
    assert told.endswith("undefined symbol: nowhere")
    assert len(told) < 2200


def test_what_outlives_a_trial_is_not_waited_for():
    def load(at):
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)

    started = time.monotonic()
    assert _trial.problem(load, deadly_only=False) is None
    assert time.monotonic() - started < 30
