"""A newer version that does not load: the older one goes on, and the error is raised."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
import time

import pytest
import torch

import ops
from ops.jit import _trial, load_inline
from ops.jit._cache import _inventory
from tests.harness.helpers import run, start
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
        monkeypatch.setattr(_trial, "problem", lambda load, anew, deadly_only: None)
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
    # torch 2.11 logs the error, goes on, and has no such operator.
    *(
        [("schema", r"signal 6 \(SIGABRT\) in its initialisers: .*schema", True)]
        if torch.__version__ >= "2.12"
        else []
    ),
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
        _trial._ASLEEP, _trial._LONGEST = 0.5, 8
        load_inline("reload_hangs", {text!r}, **{STABLE!r})
        try:
            load_inline("reload_hangs", {newer!r}, **{STABLE!r})
        except ops.BuildError as error:
            print(error)
        print(torch.ops.reload_hangs.add(10) if {registers} else 11)
    """
    process = start(code, JITOPS_CACHE_DIR=cache)
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "loading it would not end: its initialisers had not ended after 8 s" in out
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


def problem(load, anew="", **given):
    return _trial.problem(load, anew, **given)


@pytest.mark.parametrize(
    "hangs", ["at('this'); time.sleep(60)", "at('this'); [0 for _ in iter(int, 1)]"]
)
def test_a_trial_has_an_end(monkeypatch, hangs):
    """Whether it waits or works. The verdict is that of a new process, which has all threads."""
    monkeypatch.setattr(_trial, "_ASLEEP", 0.2)
    monkeypatch.setattr(_trial, "_FORKED", 1.0)
    monkeypatch.setattr(_trial, "_LONGEST", 2.0)
    tried = []
    for anew, expected in [
        (f"import time; {hangs}", "loading it would not end: this had not ended after 2 s"),
        (
            "at('this'); import os; os.abort()",
            "loading it would end the process: signal 6 (SIGABRT) in this: nothing said",
        ),
        ("at('this'); 1 / 0", None),  # it may lack what this process has
        ("import no_such_module", None),
        ("at('this')", None),
    ]:
        told = problem(lambda at: exec(hangs, {"at": at, "time": time}), anew, deadly_only=False)
        tried.append(told == expected)
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
    assert all(tried)


def test_no_new_process_where_none_can_be_started(monkeypatch):
    monkeypatch.setattr(_trial, "_ASLEEP", 0.2)
    for python in ("/no/such/python", None):
        monkeypatch.setattr(sys, "executable", python)
        told = problem(lambda at: (at("this"), time.sleep(60)), "1", deadly_only=False)
        assert told is None


POOLS = """
#include <omp.h>
static int threads = [] {
  int seen = 0;
#pragma omp parallel num_threads(2) reduction(+ : seen)
  ++seen;
  return seen;
}();
extern "C" int answer() { return threads + %d; }
"""
WAITS = """
#include <condition_variable>
#include <mutex>
#include <thread>
static struct Worker {
  std::mutex mutex;
  std::condition_variable changed;
  bool over = false, through = false;
  std::thread thread{[this] {
    std::unique_lock lock(mutex);
    changed.wait(lock, [this] { return over; });
    through = true;
    changed.notify_all();
  }};
  ~Worker() {
    std::unique_lock lock(mutex);
    over = true;
    changed.notify_all();
    changed.wait(lock, [this] { return through; });
    lock.unlock();
    thread.join();
  }
} worker;
"""


def test_threads_that_a_fork_does_not_have(cache):
    """An initialiser that uses OpenMP's pool; a destructor that waits for a thread."""
    text = OPERATORS.format(namespace="reload_waits", number=1, schema="int x") + WAITS
    code = f"""
        import ctypes, torch
        from ops.jit import _trial, load_inline
        _trial._ASLEEP = 0.5
        for number in (1, 2):
            path = load_inline("reload_pools", {POOLS!r} % number, is_python_module=False,
                               no_implicit_headers=True, extra_cflags=["-fopenmp"],
                               extra_ldflags=["-fopenmp"])
            print(ctypes.CDLL(path).answer())
        for number in (1, 2, 1):
            load_inline("reload_waits", {text!r}.replace("x + 1", f"x + {{number}}"), **{STABLE!r})
            print(torch.ops.reload_waits.add(10))
    """
    out, err = run(code, JITOPS_CACHE_DIR=cache, JITOPS_PROGRESS="1", OMP_NUM_THREADS=2)
    assert out.split() == ["3", "4", "11", "12", "11"]
    assert err.count("a trial in a fork of this process does not end in its initialisers") == 1
    assert err.count("does not end in the older version's destructors: trying it in a new one") == 2


def test_no_trial_where_cuda_is_initialised(monkeypatch):
    """It does not work in a fork, and would be taken for the library's fault."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert problem(lambda at: os._exit(4), deadly_only=True) is None


def test_a_trial_tells_what_ends_the_process():
    assert problem(lambda at: None, deadly_only=False) is None
    assert problem(lambda at: 1 / 0, deadly_only=False) == "division by zero"
    assert problem(lambda at: 1 / 0, deadly_only=True) is None
    told = problem(lambda at: (at("this"), os.kill(os.getpid(), 9)), deadly_only=True)
    assert told == "loading it would end the process: signal 9 (SIGKILL) in this: nothing said"
    for status in (0, 3, 4):

        def load(at, status=status):
            at("this")
            os._exit(status)

        told = problem(load, deadly_only=True)
        how = f"exit status {status} in this"
        assert told == f"loading it would end the process: {how}: nothing said"


def test_a_trial_where_somebody_else_takes_the_children_in(monkeypatch):
    """How it ended is not known then, only that it did."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert problem(lambda at: None, deadly_only=False) is None
        told = problem(lambda at: os._exit(0), deadly_only=False)
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

    told = problem(load, deadly_only=True)
    assert told.endswith("all is well so far the reason")
    assert len(told) < 2200

    def throw(at):
        os.write(2, b"x" * 3000 + b"\nterminate called after throwing: reason" + b" frame" * 1000)
        os.abort()

    told = problem(throw, deadly_only=True)
    assert ": terminate called after throwing: reason frame" in told
    assert len(told) < 2200

    def refuse(at):
        os.write(2, b"x" * 3000)
        raise OSError("y" * 3000 + "undefined symbol: nowhere")

    told = problem(refuse, deadly_only=False)
    assert told.endswith("undefined symbol: nowhere")
    assert len(told) < 2200


def test_what_outlives_a_trial_is_not_waited_for():
    def load(at):
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)

    started = time.monotonic()
    assert problem(load, deadly_only=False) is None
    assert time.monotonic() - started < 30


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def test_descriptors_do_not_grow_with_reloads(cache):
    """Neither of operators, nor of modules, nor of programs."""
    for number in (1, 2, 1):
        operators("reload_counts", number)
    before = descriptors()
    for number in (2, 1) * 50:
        operators("reload_counts", number)
    assert torch.ops.reload_counts.add(10) == 11
    assert descriptors() == before
    seen = []
    for number in range(5):
        load_inline("reload_many", PYTHON_MODULE % number, no_implicit_headers=True)
        seen.append(descriptors())
    assert seen[1:] == seen[:1] * 4
    assert load_inline("reload_many", PYTHON_MODULE % 1, no_implicit_headers=True).answer == 1
    assert descriptors() == seen[0]


def test_what_is_in_force_is_in_use(cache):
    """And what it took the place of is not, until it is asked for again."""
    for numbers in ((1,), (1, 2), (1, 2, 1)):
        for number in numbers[-1:]:
            module = load_inline("reload_used", PYTHON_MODULE % number, no_implicit_headers=True)
        _inventory.evict(cache, 0)
        (item,) = _inventory.items(cache)
        assert module.__file__ == str(item.entry.library)
        if number == 2:
            ops.jit.text("reload_used", PYTHON_MODULE % 1, no_implicit_headers=True).build()


def test_more_than_a_thousand_open_files(cache):
    """select() takes no descriptor above 1023."""
    code = f"""
        import os, resource, ops
        from ops.jit import load_inline
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 4096), most))
        text = {PYTHON_MODULE!r}
        for number in (1, 2):
            print(load_inline("reload_open", text % number, no_implicit_headers=True).answer)
            opened = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (opened[0], most))
        try:
            load_inline("reload_open", text % 3, no_implicit_headers=True)
        except ops.JitopsError as error:
            print("Too many open files" in str(error))
    """
    out, _ = run(code, JITOPS_CACHE_DIR=cache)
    assert out.split() == ["1", "2", "True"]
