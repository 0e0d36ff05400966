"""A newer version that does not load: the older one goes on, and the error is raised."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import sys

import pytest
import torch

import ops
from ops.jit import _reload, load_inline
from ops.jit._cache import _eviction
from tests.harness import forks
from tests.harness.forks import start
from tests.jit.support import ANSWER
from tests.jit.test_drop_in import OPERATORS, PYTHON_MODULE, STABLE, operators

pytestmark = [pytest.mark.cpp, pytest.mark.usefixtures("trials_in_forks")]

run = functools.partial(forks.run, whole_end=True)  # only then does torch free its registrations

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


def test_operators_whose_newer_version_has_an_undefined_symbol(cache, trials_in_a_new_python):
    namespace = "reload_undefined"
    operators(namespace, 1)
    held = getattr(torch.ops, namespace).add.default
    for _ in range(2):
        with pytest.raises(
            OSError, match=r"does not load:\n.*undefined symbol: \w*nowhere"
        ) as raised:
            newer(namespace, UNDEFINED)
        assert isinstance(raised.value, ops.BuildError)
        assert getattr(torch.ops, namespace).add(10) == held(10) == 11
    for number in (2, 1):  # and it can still be replaced
        operators(namespace, number)
        assert getattr(torch.ops, namespace).add(10) == held(10) == 10 + number


def test_what_is_withdrawn_and_cannot_be_replaced_is_said(cache, monkeypatch):
    """Where the newer version could not be tried: in an application that has Python built in."""
    monkeypatch.setattr(sys, "executable", "/opt/application")
    operators("reload_untried", 1)
    with pytest.raises(ops.BuildError, match="older version is withdrawn: start a new process"):
        newer("reload_untried", UNDEFINED)


DIES = [  # the text of a version, the expected message, and whether an exception causes it
    (THROWS, r"signal 6 \(SIGABRT\) in its initialisers: .*on purpose", True),
    # torch 2.11 logs the error, goes on, and has no such operator.
    *(
        [("schema", r"signal 6 \(SIGABRT\) in its initialisers: .*schema", True)]
        if torch.__version__ >= "2.12"
        else []
    ),
    ("abort()", r"signal 6 \(SIGABRT\) in its initialisers: nothing said", False),
    ("exit(0)", r"exit 0 in its initialisers: nothing said", False),
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
        else (more if more == THROWS else INITIALISER % more)
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
        assert ("terminate called" in text) is thrown
        assert text.endswith("\n11")
    assert last == "12\n"


def test_a_newer_version_whose_initialisers_do_not_end(cache):
    text = OPERATORS.format(namespace="reload_hangs", number=1, schema="int x")
    newer = INITIALISER % "for (;;) pause()"
    code = f"""
        import ops, torch
        from ops.jit import _reload, load_inline
        _reload._LONGEST = 2
        load_inline("reload_hangs", {text!r}, **{STABLE!r})
        try:
            load_inline("reload_hangs", {newer!r}, **{STABLE!r})
        except ops.BuildError as error:
            print(error)
        print(torch.ops.reload_hangs.add(10))
    """
    process = start(code, whole_end=True, JITOPS_CACHE_DIR=cache)
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "loading it would not end within 2 s of its initialisers" in out
    assert out.endswith("\n11\n")


def test_a_module_whose_newer_version_does_not_load(cache):
    """Neither an undefined symbol nor an exception is the older's."""
    older = PYTHON_MODULE % 1
    fails = 'Py_DECREF(m); PyErr_SetString(PyExc_ImportError, "on purpose"); return nullptr;'
    newer = [older + UNDEFINED, older.replace("return m;", fails)]
    code = f"""
        import sys, ops
        from ops.jit import load_inline
        kept = {{"extra_ldflags": {LAZY["extra_ldflags"]!r}, "no_implicit_headers": True}}
        module = sys.modules["reload_module"] = load_inline("reload_module", {older!r}, **kept)
        for text in {newer!r}:
            try:
                load_inline("reload_module", text, **kept)
            except ImportError as error:
                print("nowhere" in str(error), "on purpose" in str(error), end=" ")
            print(module.answer, sys.modules["reload_module"] is module)
        newest = load_inline("reload_module", {PYTHON_MODULE % 2!r}, **kept)
        print(newest.answer, module.answer)
    """
    out, _ = run(code, JITOPS_CACHE_DIR=cache)
    assert out.splitlines() == [
        "True False 1 True",
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


@pytest.mark.parametrize("schema", ["Tensor x", "Tensor x, int more=1"])
def test_a_dispatch_mode_sees_the_newer_operator(cache, schema):
    """torch keeps a pointer to each object that went through a mode, and does not own it."""
    text = """
    #include <torch/csrc/stable/library.h>
    #include <torch/csrc/stable/ops.h>
    #include <torch/csrc/stable/tensor.h>
    void same(StableIValue* stack, uint64_t, uint64_t) {
      auto x = torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
      stack[0] = torch::stable::detail::from(torch::stable::clone(x));
    }
    STABLE_TORCH_LIBRARY(reload_modes, m) { m.def("same(Tensor x) -> Tensor"); }
    STABLE_TORCH_LIBRARY_IMPL(reload_modes, KEY, m) { m.impl("same", &same); }
    """
    out, _ = run(
        f"""
        import gc, torch
        from ops.jit import load_inline
        from torch.utils._python_dispatch import TorchDispatchMode
        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if func.namespace == "reload_modes":
                    print(func._schema)
                return func(*args, **(kwargs or {{}}))
        def call(*args):
            with Mode(), torch._dispatch.python.enable_python_dispatcher():
                torch.ops.reload_modes.same(torch.ones(2), *args)
        text = {text!r}
        load_inline("reload_modes", text.replace("KEY", "CompositeExplicitAutograd"), **{STABLE!r})
        call()
        newer = text.replace("KEY", "CPU").replace("Tensor x)", {schema!r} + ")")
        load_inline("reload_modes", newer, **{STABLE!r})
        gc.collect()
        ballast = [bytes(400) for _ in range(20000)]
        call(*[2] * {schema.count("int")})
        """,
        JITOPS_CACHE_DIR=cache,
    )
    before, after = out.splitlines()
    assert "same(Tensor x) -> Tensor" in before
    assert f"same({schema}) -> Tensor" in after


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


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def test_descriptors_do_not_grow_with_reloads(cache, monkeypatch):
    """Neither of operators, nor of modules, nor of programs."""
    monkeypatch.setattr(_reload, "_try", lambda *_: None)  # takes two seconds each
    for number in (1, 2, 1):
        operators("reload_counts", number)
    before = descriptors()
    for number in (2, 1) * 20:
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


def test_what_is_effective_spec_is_in_use(cache):
    """And what it took the place of is not, until it is asked for again."""
    for numbers in ((1,), (1, 2), (1, 2, 1)):
        for number in numbers[-1:]:
            module = load_inline("reload_used", PYTHON_MODULE % number, no_implicit_headers=True)
        _eviction.evict(cache, 0)
        (item,) = _eviction.items(cache)
        assert module.__file__ == str(item.entry.library)
        if number == 2:
            ops.jit.text("reload_used", PYTHON_MODULE % 1, no_implicit_headers=True).build()


@pytest.mark.parametrize("level", ["-O0", "-O2"])
def test_two_extensions_that_register_the_same(cache, level):
    """torch would end the process without a word; who defines something else is not refused.

    The loader finds the namespaces of a library in its symbols. Optimisation removes some of them.
    """
    given = {**STABLE, "extra_cflags": [*STABLE["extra_cflags"], level]}
    texts = [OPERATORS.format(namespace="reload_clash", number=n, schema="int x") for n in (1, 2)]
    fragment = OPERATORS.format(namespace="reload_clash", number=3, schema="int x")
    fragment = fragment.replace("LIBRARY(", "LIBRARY_FRAGMENT(")
    code = f"""
        import ops, torch
        from ops.jit import load_inline
        load_inline("first", {texts[0]!r}, **{given!r})
        for name, text in (("second", {texts[1]!r}), ("third", {fragment!r})):
            try:
                load_inline(name, text, **{given!r})
            except ops.BuildError as error:
                print(error)
        load_inline("fourth", {fragment.replace('"add', '"sub')!r}, **{given!r})
        print(torch.ops.reload_clash.add(10), torch.ops.reload_clash.sub(10))
        load_inline("first", {texts[0].replace("x + 1", "x + 5")!r}, **{given!r})
        print(torch.ops.reload_clash.add(10))
    """
    out, _ = run(code, JITOPS_CACHE_DIR=cache)
    assert "second was built but does not load:" in out
    assert "second time, of these: namespace reload_clash, reload_clash::add(int x) -> int" in out
    assert "third was built but does not load:" in out
    assert "it registers a second time, of these: reload_clash::add(int x) -> int\n" in out
    assert out.endswith("\n11 13\n15\n")


def test_two_extensions_that_share_a_namespace(cache):
    """One defines an operator, the other implements it and defines one of its own."""
    text = OPERATORS.format(namespace="reload_shared", number=1, schema="int x")
    defines, implements = text.split("STABLE_TORCH_LIBRARY_IMPL")
    one = defines.replace("LIBRARY(", "LIBRARY_FRAGMENT(")
    other = one.replace('"add(', '"sub(') + "STABLE_TORCH_LIBRARY_IMPL" + implements
    out, _ = run(
        f"""
        import torch
        from ops.jit import load_inline
        load_inline("one", {one!r}, **{STABLE!r})
        load_inline("other", {other!r}, **{STABLE!r})
        print(torch.ops.reload_shared.add(1))
        """,
        JITOPS_CACHE_DIR=cache,
    )
    assert out == "2\n"


@pytest.mark.parametrize("how", ["schema", "function"])
def test_an_extension_that_registers_an_operator_of_torch(cache, how):
    """At its first load, when nothing of its name is there to be replaced.

    torch's own macros make the schema of a function: then the library holds the name alone.
    """
    schema = {
        "schema": '"relu(Tensor self) -> Tensor"',
        "function": '(std::string("relu") + "(Tensor self) -> Tensor").c_str()',
    }[how]
    text = f"""
    #include <string>
    #include <torch/csrc/stable/library.h>
    STABLE_TORCH_LIBRARY_FRAGMENT(aten, m) {{ m.def({schema}); }}
    """
    out, _ = run(
        f"""
        import ops, torch
        from ops.jit import load_inline
        for _ in range(2):
            try:
                load_inline("of_torch", {text!r}, **{STABLE!r})
            except ops.BuildError as error:
                print(error)
        print(torch.relu(torch.tensor([-1.0])).item())
        """,
        JITOPS_CACHE_DIR=cache,
    )
    assert out.count("of_torch was built but does not load:\n") == 2
    assert re.search(r"registers a second time, of these: .*aten::relu\(Tensor self\) -> T", out)
    assert out.endswith("\n0.0\n")


def test_an_extension_that_registers_an_operator_that_python_has_defined(cache):
    text = OPERATORS.format(namespace="reload_python", number=1, schema="int x")
    text = text.replace("LIBRARY(", "LIBRARY_FRAGMENT(")
    out, _ = run(
        f"""
        import ops, torch
        from ops.jit import load_inline
        library = torch.library.Library("reload_python", "DEF")
        library.define("sub(int x) -> int")
        load_inline("of_python", {text.replace("add", "more")!r}, **{STABLE!r})
        library.define("add(int x) -> int")
        try:
            load_inline("again", {text!r}, **{STABLE!r})
        except ops.BuildError as error:
            print(error)
        print(torch.ops.reload_python.more(1))
        """,
        JITOPS_CACHE_DIR=cache,
    )
    assert "it registers a second time, of these: reload_python::add(int x) -> int\n" in out
    assert out.endswith("\n2\n")


def test_an_extension_of_a_namespace_that_python_has_a_part_of(cache):
    """To define the whole after a part is allowed."""
    text = OPERATORS.format(namespace="reload_part", number=1, schema="int x")
    out, _ = run(
        f"""
        import torch
        from ops.jit import load_inline
        library = torch.library.Library("reload_part", "FRAGMENT")
        library.define("sub(int x) -> int")
        load_inline("of_part", {text!r}, **{STABLE!r})
        print(torch.ops.reload_part.add(1))
        """,
        JITOPS_CACHE_DIR=cache,
    )
    assert out == "2\n"


@pytest.mark.thorough
def test_a_namespace_without_operators_is_not_defined_twice(cache):
    text = "#include <torch/library.h>\nTORCH_LIBRARY(reload_empty, m) {}\n"
    out, _ = run(
        f"""
        import ops, torch
        from ops.jit import load_inline
        library = torch.library.Library("reload_empty", "DEF")
        try:
            load_inline("two", {text!r}, is_python_module=False, no_implicit_headers=True)
        except ops.BuildError as error:
            print(error)
        """,
        JITOPS_CACHE_DIR=cache,
    )
    assert "it registers a second time, of these: namespace reload_empty\n" in out


def test_classes_that_are_registered_stay(cache):
    """torch takes none back, and ends the process if one is registered twice."""
    texts = [
        OPERATORS.format(namespace="reload_class", number=number, schema="int x")
        + 'extern "C" const char* marks() { return "registerCustomClass"; }\n'
        for number in (1, 2)
    ]
    load_inline("reload_class", texts[0], **STABLE)
    with pytest.raises(ops.BuildError, match="its older version cannot be withdrawn: start a new"):
        load_inline("reload_class", texts[1], **STABLE)
    assert torch.ops.reload_class.add(1) == 2
