"""load and load_inline in the place of torch's: the same arguments, the same results."""

from __future__ import annotations

import colorsys
import functools
import inspect
import os
import subprocess
import sys
import threading

import pytest
import torch
import torch.utils.cpp_extension as torchs

import ops
from ops.jit import _admin, _load, load, load_inline
from ops.jit._cache import _eviction
from tests.harness import forks
from tests.jit.support import ANSWER, answer, entries

pytestmark = [pytest.mark.cpp, pytest.mark.usefixtures("trials_in_forks")]

run = functools.partial(forks.run, whole_end=True)  # only then does torch free its registrations

PLAIN = {"is_python_module": False, "no_implicit_headers": True}
PYTHON_MODULE = """
#include <Python.h>
#define GLUE_(a, b) a##b
#define GLUE(a, b) GLUE_(a, b)
#define TEXT_(a) #a
#define TEXT(a) TEXT_(a)
static PyModuleDef module = {PyModuleDef_HEAD_INIT, TEXT(TORCH_EXTENSION_NAME)};
PyMODINIT_FUNC GLUE(PyInit_, TORCH_EXTENSION_NAME)() {
  PyObject* m = PyModule_Create(&module);
  PyModule_AddIntConstant(m, "answer", %d);
  return m;
}
"""


@pytest.mark.parametrize("name", ["load", "load_inline"])
def test_the_signature_is_torchs(name):
    def shape(function):
        return [
            (parameter.name, parameter.kind, parameter.default)
            for parameter in inspect.signature(function).parameters.values()
        ]

    assert shape(getattr(ops.jit, name)) == shape(getattr(torchs, name))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"with_sycl": True}, ops.ArgumentError, "with_sycl must be empty: jitops does not build"),
        ({"extra_sycl_cflags": ["-O2"]}, ops.ArgumentError, "extra_sycl_cflags must be empty"),
        ({"sycl_sources": "x"}, ops.ArgumentError, "sycl_sources must be empty"),
        ({"with_cuda": "yes"}, ops.ArgumentTypeError, "with_cuda must be True or False, got 'yes'"),
        ({"is_python_module": "no"}, ops.ArgumentTypeError, "is_python_module must be True or"),
        (
            {"functions": 5},
            ops.ArgumentError,
            "functions must be a name, a list of",
        ),
        ({"functions": [("f",)]}, ops.ArgumentTypeError, "functions must hold strings only, got"),
        ({"functions": {3: 4}}, ops.ArgumentTypeError, "functions must hold strings only, got 3"),
        ({"name": "my-ops"}, ops.ArgumentError, "name must be C identifiers with"),
        ({"name": "é"}, ops.ArgumentError, "name must be C identifiers with"),
        ({"name": "-x", **PLAIN}, ops.ArgumentError, "name must be at most 200 bytes of"),
        ({"name": ".x", **PLAIN}, ops.ArgumentError, "name must be at most 200 bytes of"),
        ({"name": "a/b", **PLAIN}, ops.ArgumentError, "name must be at most 200 bytes of"),
        ({"name": "a b", **PLAIN}, ops.ArgumentError, "name must be at most 200 bytes of"),
        ({"name": 101 * "é", **PLAIN}, ops.ArgumentError, "name must be at most 200 bytes of"),
        ({"functions": ["a b"]}, ops.ArgumentError, "functions must be names of C.. functions"),
        ({"functions": ['f", evil, "']}, ops.ArgumentError, "functions must be names of C"),
        ({"cpp_sources": "a\0b"}, ops.ArgumentError, "cpp_sources must hold text without NUL"),
        (
            {"cpp_sources": "\ud800"},
            ops.ArgumentError,
            "cpp_sources must hold text without NUL that UTF-8",
        ),
        ({"extra_cflags": ["-D\0"]}, ops.ArgumentError, "extra_cflags must hold text without NUL"),
        ({"build_directory": 5}, ops.ArgumentTypeError, "build_directory must be a path, got int"),
        ({"build_directory": "/dev/null/x"}, ops.ArgumentError, "must be a folder that is there"),
        ({"build_directory": ["."]}, ops.ArgumentTypeError, "build_directory must be a path, got"),
    ],
)
def test_what_cannot_be_honoured_raises(cache, arguments, error, text):
    with pytest.raises(error, match=text):
        load_inline(**{"name": "a", "cpp_sources": ANSWER, **arguments})


def test_standalone_needs_what_torch_needs(cache, source):
    with pytest.raises(ops.ArgumentError, match="is_standalone must come with is_python_module=F"):
        load("answer", [source], is_standalone=True)


def test_a_program(cache, tmp_path):
    source = tmp_path / "program.cpp"
    source.write_text('#include <cstdio>\nint main() { std::puts("hello"); }\n')
    for _ in range(2):
        program = load("program", str(source), is_python_module=False, is_standalone=True)
        assert subprocess.check_output([program], text=True) == "hello\n"
    assert len(entries(cache)) == 1
    assert _eviction.evict(cache, 0) == []  # it may be run at any time


@pytest.mark.parametrize("name", ["my-ops", "my.ops", "3d", "é", "c++", "a-0123456789abcdef"])
def test_names_that_are_no_identifiers(cache, tmp_path, name):
    """Nothing but files is called by it where there is no module."""
    paths = {load_inline(name, ANSWER, build_directory=tmp_path, **PLAIN) for _ in range(2)}
    (item,) = _eviction.items(cache)
    assert paths == {str(item.entry.library)}
    assert item.name == name
    assert answer(tmp_path / f"{name}.so") == 42
    assert _admin.reasons(ops.jit.text(name, ANSWER, **PLAIN).spec) == []


def test_a_program_is_not_called_as_a_file_of_the_build(cache, source):
    for name in ("used", "manifest.json", "build.ninja"):
        with pytest.raises(ops.ArgumentError, match="name must not be as of a file of the build"):
            load(name, source, is_python_module=False, is_standalone=True)


def test_nothing_of_the_callers_changes(cache, monkeypatch):
    """Neither the lists nor the environment, not even while the compiler runs."""
    monkeypatch.setenv("CXX", "env LANG=C c++")
    monkeypatch.delenv("MAX_JOBS", raising=False)
    before, seen, done = dict(os.environ), [], threading.Event()

    def watch():
        while not done.is_set():
            seen.append(dict(os.environ) == before and torchs.os.environ is os.environ)

    watcher = threading.Thread(target=watch)
    watcher.start()
    lists = {"cpp_sources": [ANSWER], "extra_cflags": ["-O1"], "extra_ldflags": ["-lm"]}
    load_inline("answer", **lists, **PLAIN)
    done.set()
    watcher.join()
    assert len(seen) > 10
    assert all(seen)
    assert lists == {"cpp_sources": [ANSWER], "extra_cflags": ["-O1"], "extra_ldflags": ["-lm"]}


def test_torchs_own_build_goes_on_working_beside_ours(cache, tmp_path):
    """Its module sees the real environment again, in this thread and in others."""
    load_inline("answer", ANSWER, **PLAIN)
    path = torchs.load_inline("torchs", ANSWER, build_directory=str(tmp_path), **PLAIN)
    assert answer(path) == 42


def test_several_sources_of_one_name_in_one_process(cache):
    one = load_inline("mine", PYTHON_MODULE % 1, no_implicit_headers=True)
    two = load_inline("mine", PYTHON_MODULE % 2, no_implicit_headers=True)
    again = load_inline("mine", PYTHON_MODULE % 1, no_implicit_headers=True)
    assert (one.answer, two.answer, again.answer) == (1, 2, 1)
    assert again is one
    assert one.__name__ == two.__name__ == "mine"


def test_modules_of_that_name_stay_imported(cache):
    """CPython would put the extension in the place of the standard library's."""
    module = load_inline("colorsys", PYTHON_MODULE % 1, no_implicit_headers=True)
    assert module.answer == 1
    assert sys.modules["colorsys"] is colorsys


# ---- the calls that torch's own tests of its loader make -----------------------------------------

BOUND = """
#include <pybind11/pybind11.h>
int {name}() {{ return {value}; }}
"""
BARE = {"no_implicit_headers": True, "with_pytorch_error_handling": False}


@pytest.mark.thorough
def test_functions_with_docstrings_of_templates_and_in_several_texts(cache):
    template = "template <class T, int N> T plus(T x) { return x + N; }\n"
    texts = [BOUND.format(name="f", value=1), BOUND.format(name="g", value=2), template]
    functions = {"f": "Of f.", "g": "Of g.", "plus<int, 2>": "Of plus."}
    module = load_inline("forms", texts, functions=functions, **BARE)
    assert (module.f(), module.g()) == (1, 2)
    assert module.g.__doc__.endswith("Of g.\n")
    assert getattr(module, "plus<int, 2>")(1) == 3
    # Hot reload of modules of pybind11, which has a table of all of a process.
    edited = [BOUND.format(name="f", value=3), *texts[1:]]
    assert load_inline("forms", edited, functions="f", **BARE).f() == 3
    assert load_inline("forms", texts, functions=functions, **BARE) is module


def test_one_function_is_a_list_of_one():
    both = "answer", ["answer"]
    one, listed = (ops.jit.text("f", ANSWER, functions=given).spec for given in both)
    assert one == listed


@pytest.mark.thorough
def test_files_with_folders_of_headers_and_lenient_flags(cache, tmp_path, capfd):
    """Several sources; flags and folders with blanks and line breaks around them."""
    (tmp_path / "given.h").write_text("int given();\n")
    (tmp_path / "given.cpp").write_text('#include "given.h"\nint given() { return GIVEN; }\n')
    (tmp_path / "bound.cpp").write_text(
        "#include <given.h>\n" + PYTHON_MODULE.replace("%d", "given()")
    )
    module = load(
        "lenient",
        [str(tmp_path / "bound.cpp"), str(tmp_path / "given.cpp")],
        extra_cflags=["-g\n\n", "-O0 -Wall -DGIVEN=5"],
        extra_cuda_cflags=["-lineinfo"],  # of no effect without CUDA
        extra_include_paths=[f"       {tmp_path}\n"],
        with_cuda=False,
        keep_intermediates=False,
        verbose=True,
    )
    assert module.answer == 5
    assert "bound.cpp" in capfd.readouterr().out


def test_one_name_loaded_again_with_other_flags(cache):
    text = (PYTHON_MODULE % 1).replace('"answer", 1', '"answer", VALUE')
    for value in (456, 7, 456):
        flags = [f"-DVALUE={value}"]
        module = load_inline("flags", text, extra_cflags=flags, no_implicit_headers=True)
        assert module.answer == value


def test_an_error_of_the_compiler_is_a_runtime_error(cache):
    with pytest.raises(RuntimeError, match=r"(?s)broken does not build.*oops"):
        load_inline("broken", "int x = oops;", **PLAIN)
    assert load_inline("broken", ANSWER, **PLAIN)  # of the same name, once it is mended


def test_build_directory(cache, tmp_path):
    """The library is there, whether it was just built or not."""
    for number in range(2):
        folder = tmp_path / f"build{number}" / "deep"
        path = load_inline("answer", ANSWER, build_directory=folder, **PLAIN)
        (library,) = cache.glob("*/*/answer.so")
        assert path == str(library)
        assert answer(path) == answer(folder / "answer.so") == 42
    assert len(entries(cache)) == 1


@pytest.mark.thorough
def test_what_is_returned_can_be_loaded_again(cache, tmp_path):
    """As torch's examples do; a copy would register its operators beside those of the cache's."""
    code = f"""
        import torch
        from ops.jit import load_inline
        for number in (1, 2, 1):
            text = {OPERATORS.format(namespace="hot_again", number=1, schema="int x")!r}
            path = load_inline("hot_again", text.replace("x + 1", f"x + {{number}}"),
                               build_directory={str(tmp_path / "build")!r}, **{STABLE!r})
            torch.ops.load_library(path)
            torch.classes.load_library(path)
            print(torch.ops.hot_again.add(10))
    """
    out, _ = run(code, JITOPS_CACHE_DIR=cache)
    assert out.split() == ["11", "12", "11"]


def test_a_build_directory_that_cannot_take_it(cache, tmp_path):
    (tmp_path / "answer.so").mkdir()
    with pytest.raises(ops.ArgumentError, match="answer.so, which is no plain file"):
        load_inline("answer", ANSWER, build_directory=tmp_path, **PLAIN)


def test_verbose_passes_on_what_the_compilers_say(cache, capfd):
    text = f"#warning look here\n{ANSWER}"
    load_inline("answer", text, verbose=True, **PLAIN)
    out = capfd.readouterr().out
    assert "look here" in out
    assert "[1/4] " in out


def test_a_hit_says_so_when_asked(cache):
    load_inline("answer", ANSWER, **PLAIN)
    _, err = run(
        f"import ops.jit; ops.jit.load_inline('answer', {ANSWER!r}, verbose=True, **{PLAIN})",
        JITOPS_CACHE_DIR=cache,
        JITOPS_PROGRESS="1",
    )
    assert "answer is in the cache: " in err


OPERATORS = """
#include <torch/csrc/stable/library.h>
int64_t add(int64_t x) {{ return x + {number}; }}
void boxed(StableIValue* stack, uint64_t, uint64_t) {{
  auto x = torch::stable::detail::to<int64_t>(stack[0]);
  stack[0] = torch::stable::detail::from(add(x));
}}
STABLE_TORCH_LIBRARY({namespace}, m) {{ m.def("add({schema}) -> int"); }}
STABLE_TORCH_LIBRARY_IMPL({namespace}, CompositeExplicitAutograd, m) {{ m.impl("add", &boxed); }}
"""
STABLE = {**PLAIN, "extra_cflags": ["-DTORCH_TARGET_VERSION=0x020a000000000000"]}


def operators(namespace, number, schema="int x"):
    text = OPERATORS.format(namespace=namespace, number=number, schema=schema)
    return load_inline(namespace, text, **STABLE)


@pytest.mark.thorough
def test_hot_reload_of_operators(cache):
    """Edited, reverted, edited again; whoever holds the operator gets the newest."""
    operators("hot_one", 1)
    held = torch.ops.hot_one.add.default
    for number in (2, 1, 3, 2):
        operators("hot_one", number)
        assert torch.ops.hot_one.add(10) == held(10) == 10 + number


@pytest.mark.thorough
@pytest.mark.parametrize("gone", [False, True])
def test_hot_reload_whatever_there_was_before(cache, gone):
    """Nothing but a namespace; a cache that was deleted meanwhile."""
    code = f"""
        import shutil, torch
        from ops.jit import load_inline
        text = {OPERATORS.format(namespace="hot_five", number=1, schema="int x")!r}
        if not {gone}:
            load_inline("hot_five", text.replace('m.def("add(int x) -> int");', "")
                        .replace('m.impl("add", &boxed);', ""), **{STABLE!r})
        load_inline("hot_five", text, **{STABLE!r})
        if {gone}:
            shutil.rmtree({str(cache)!r})
        load_inline("hot_five", text.replace("x + 1", "x + 2"), **{STABLE!r})
        print(torch.ops.hot_five.add(10))
    """
    out, _ = run(code, JITOPS_CACHE_DIR=cache)
    assert out == "12\n"


TORCHS_OWN = """
#include <torch/library.h>
static const std::string named = "something to destroy at the end, for which g++ declares a symbol";
static int64_t add(int64_t x) {{ return x + {number}; }}
TORCH_LIBRARY(hot_torch, m) {{ m.def("add(int x) -> int"); }}
TORCH_LIBRARY_IMPL(hot_torch, CompositeImplicitAutograd, m) {{ m.impl("add", &add); }}
"""


@pytest.mark.thorough
def test_hot_reload_of_operators_registered_by_torchs_macros(cache, trials_in_a_new_python):
    """In a process of its own, which must end well too."""
    code = f"""
        import torch
        from ops.jit import load_inline
        for number in (1, 2, 1):
            load_inline("hot_torch", {TORCHS_OWN!r}.format(number=number),
                        no_implicit_headers=True, is_python_module=False)
            print(torch.ops.hot_torch.add(10))
    """
    out, _ = run(code, JITOPS_CACHE_DIR=cache)
    assert out.split() == ["11", "12", "11"]


@pytest.mark.thorough
def test_hot_reload_with_another_schema(cache):
    operators("hot_two", 1)
    held = torch.ops.hot_two.add
    operators("hot_two", 2, "int x, int y=0")
    assert torch.ops.hot_two.add(x=1) == 3
    assert held(1) == 3


def test_hot_reload_of_a_file(cache, source):
    for value in (1, 2, 1):
        source.write_text(f'extern "C" int answer() {{ return {value}; }}\n')
        assert answer(load("answer", source, is_python_module=False)) == value


@pytest.mark.thorough
def test_hot_reload_spares_other_extensions(cache):
    operators("hot_three", 1)
    operators("hot_four", 1)
    operators("hot_four", 2)
    assert torch.ops.hot_three.add(1) == 2
    assert not any(one.retired for folder, one in _load._loaded.items() if "three" in str(folder))


def test_uninstall_leaves_what_somebody_else_has_put_there(monkeypatch):
    theirs = torchs.load_inline
    monkeypatch.setattr(torchs, "load", torchs.load)
    ops.jit.install()
    torchs.load = other = object()
    ops.jit.uninstall()
    assert (torchs.load, torchs.load_inline) == (other, theirs)


@pytest.mark.parametrize("argument", ["extra_cflags", "extra_cuda_cflags", "extra_ldflags"])
def test_no_flags_as_an_empty_text(cache, argument):
    """Packages pass variables of the environment, which may be empty."""
    path = load_inline("answer", ANSWER, no_implicit_headers=True, is_python_module=False,
                       **{argument: ""})  # fmt: skip
    assert answer(path) == 42


def test_no_cuda_sources_as_an_empty_text(cache):
    path = load_inline("answer", ANSWER, "", no_implicit_headers=True, is_python_module=False)
    assert answer(path) == 42
