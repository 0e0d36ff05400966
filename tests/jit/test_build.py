"""load and load_inline: what they build, and what they say when it does not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import ops
from ops.jit import _load, load, load_inline
from tests.harness import helpers
from tests.harness.forks import run
from tests.harness.helpers import environment, path_without
from tests.jit.support import ANSWER, COMPILER, answer, entries, extension, leftovers

pytestmark = pytest.mark.cpp


def test_a_compile_error_is_readable(cache, source):
    source.write_text('#include "answer.h"\n\nextern "C" int answer() { return NOWHERE; }\n')
    with pytest.raises(ops.BuildError) as raised:
        extension(source).load()
    text = str(raised.value)
    assert "answer does not build:" in text
    assert f"{source}:3: " in text
    assert "NOWHERE" in text.splitlines()[1]
    assert text.splitlines()[2].strip() == 'extern "C" int answer() { return NOWHERE; }'
    assert raised.value.log in text
    assert "c++" in Path(raised.value.log).read_text()
    assert entries(cache) == []
    assert leftovers(cache) == []


def test_a_notebook_asks_ninja_for_colours(cache, monkeypatch):
    """They are not part of the error."""
    monkeypatch.setenv("CLICOLOR_FORCE", "1")
    with pytest.raises(ops.BuildError, match=r"1: expected .*\n.*\n  cause: the source has"):
        load_inline("broken", "int f(", is_python_module=False, no_implicit_headers=True)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ('#include "no_such_header.h"\n', "a header is missing"),
        (
            'int f();\nextern "C" int answer() { return f(); }\n',
            "something declared is defined nowhere",
        ),
    ],
)
def test_known_causes(cache, text, cause):
    with pytest.raises(ops.BuildError, match=cause):
        load_inline("broken", text, is_python_module=False, no_implicit_headers=True)


@pytest.mark.parametrize(
    ("flags", "cause"),
    [
        ({"extra_ldflags": ["-lno_such_library"]}, "a library to link against is missing"),
        ({"extra_cflags": ["--no-such-flag"]}, "the compiler does not know one of the flags"),
    ],
)
def test_known_causes_in_flags(cache, flags, cause):
    with pytest.raises(ops.BuildError, match=cause):
        load_inline("broken", ANSWER, is_python_module=False, no_implicit_headers=True, **flags)


def test_inline_errors_count_the_users_own_lines(cache):
    with pytest.raises(ops.BuildError) as raised:
        load_inline("broken", ["int fine;\n", "\n\nint x = oops;\n"], no_implicit_headers=True)
    assert "broken[1].cpp:3: " in str(raised.value)
    assert "      int x = oops;\n" in str(raised.value)


# In the place of pybind11, which takes three seconds to compile.
FUNCTIONS = """
struct Module { template <class... T> void def(T...); };
#define PYBIND11_MODULE(name, m) void bind(Module& m)
int right() { return 1; }
"""
BOUND = {"no_implicit_headers": True, "with_pytorch_error_handling": False}


@pytest.mark.parametrize("name", ["wrong", "no::wrong"])
def test_a_function_that_is_not_declared_is_named(cache, name):
    with pytest.raises(ops.BuildError) as raised:
        load_inline("broken", FUNCTIONS, functions=["right", name], **BOUND)
    first, second = str(raised.value).splitlines()[1:3]
    assert first.startswith("  broken.functions:3: ")
    assert f"‘{name.partition('::')[0]}’" in first
    assert second == "  cause: functions names something that is not declared in cpp_sources"


def test_a_failed_build_can_be_mended(cache, source):
    good = source.read_text()
    source.write_text("nonsense")
    with pytest.raises(ops.BuildError):
        extension(source).load()
    source.write_text(good)
    assert answer(extension(source).load()) == 42


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


def test_python_modules(cache, monkeypatch):
    """Built, from the cache, and a second source of the same name in the same process."""
    for value in (1, 2, 1):
        monkeypatch.setattr(_load, "_loaded", {} if value == 1 else _load._loaded)
        module = load_inline("module_of_mine", PYTHON_MODULE % value, no_implicit_headers=True)
        assert module.answer == value
    assert len(entries(cache)) == 2


def test_a_locale_that_cannot_write_the_text(cache):
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code = f"""
        import ops.jit
        ops.jit.load_inline("answer", "// \\u00fc\\n" + {ANSWER!r}, no_implicit_headers=True,
                            is_python_module=False)
    """
    out, _ = helpers.run(code, JITOPS_CACHE_DIR=cache, **ascii_only)
    assert out == ""
    assert len(entries(cache)) == 1


def test_the_environment_is_left_alone(cache, source, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", path_without("ninja", folder=tmp_path / "bin"))
    monkeypatch.delenv("MAX_JOBS", raising=False)
    before = dict(os.environ)
    extension(source).load()
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"name": "a b", "sources": "x.cpp"}, ops.ArgumentError, "name must be C identifiers with"),
        ({"name": "a", "sources": "/no/x.cpp"}, ops.ArgumentError, "sources must be files, got"),
        ({"name": "a", "sources": []}, ops.ArgumentError, "must have either source files or text"),
        ({"name": "a", "sources": [1]}, ops.ArgumentTypeError, "sources must be paths, got int"),
        (
            {"name": "a", "sources": [], "extra_cflags": "-O2"},
            ops.ArgumentTypeError,
            "extra_cflags must be a list of strings, got '-O2'",
        ),
        ({"name": 5, "sources": "x.cpp"}, ops.ArgumentTypeError, "name must be a string, got int"),
        ({"name": "a", "sources": 5}, ops.ArgumentTypeError, "sources must be a list, got int"),
        (
            {"name": "a", "sources": [], "extra_cflags": 0},
            ops.ArgumentTypeError,
            "extra_cflags must be a list, got int",
        ),
        (
            {"name": "a", "sources": [], "extra_ldflags": [3]},
            ops.ArgumentTypeError,
            "extra_ldflags must hold strings only, got",
        ),
    ],
)
def test_bad_arguments(arguments, error, text):
    with pytest.raises(error, match=text):
        load(**arguments)


@pytest.mark.thorough
def test_import_leaves_cuda_alone_and_forks(cache, source):
    """A process that has used an op can fork workers which use it too."""
    out, _ = run(
        """
        import os, torch, ops
        with ops.use_backend("cpp"):
            x = [torch.ones(2, 3) for _ in range(3)]
            ops.improved_triplet_loss(*x, -1.0, 0.0, 1.0)
            pid = os.fork()
            if pid == 0:
                ops.improved_triplet_loss(*x, -1.0, 0.0, 1.0)
                os._exit(7)
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), torch.cuda.is_initialized())
        """,
        JITOPS_CACHE_DIR=environment()["JITOPS_CACHE_DIR"],
    )
    assert out.split() == ["7", "False"]


# ---- whatever stderr and $CXX are


@pytest.mark.parametrize(
    "stderr", ["None", "open('/dev/full', 'w')", "object()", "closed", "broken pipe"]
)
def test_a_build_needs_no_stderr(cache, stderr):
    out, _ = run(
        f"""
        import os, sys
        import ops.jit
        if {stderr!r} == "closed":
            sys.stderr.close()
        elif {stderr!r} == "broken pipe":
            reading, writing = os.pipe()
            os.close(reading)
            sys.stderr = os.fdopen(writing, "w")
        else:
            sys.stderr = {stderr if " p" not in stderr and stderr != "closed" else None}
        ops.jit.load_inline("a", {ANSWER!r}, is_python_module=False, no_implicit_headers=True)
        print("built", flush=True)
        os._exit(0)
        """,
        JITOPS_CACHE_DIR=cache,
        JITOPS_PROGRESS="1",
    )
    assert out == "built\n"


def test_compilers_with_arguments(cache, source, monkeypatch):
    monkeypatch.setenv("CXX", f"env LANG=C '{COMPILER}' -DANSWER_FROM_CXX=1")
    source.write_text('extern "C" int answer() { return ANSWER_FROM_CXX; }\n')
    assert answer(extension(source).load()) == 1
    monkeypatch.setenv("CXX", "g++ 'a")
    with pytest.raises(ops.ToolchainError, match=r"is no command: No closing quotation"):
        extension(source).load()


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["a.cpp", "a.cc"], "sources must have distinct names, got 'a' twice"),
        (["x.txt"], r"sources must end in \.cpp"),
        (["jitops_retire.cpp"], "sources must not be called jitops_retire, got"),
        (["b$.cpp"], r"sources must be paths without '\$', which ninja cannot pass on, got '.*b\$"),
        (["b|.cpp"], r"sources must be paths without '\|', which ninja cannot pass on, got '.*b\|"),
        (
            ["a b.cpp"],
            "sources must have names without blanks, .* got 'a b.cpp': rename it",
        ),
        (
            ["-a.cpp"],
            "sources must have names .* and without '-' in front, .* '-a.cpp'",
        ),
        (["b:.cpp"], "sources must be paths without ':', which ninja"),
        (["b\n.cpp"], r"sources must be paths without '\\n', which ninja .* name a link"),
    ],
)
def test_unusable_sources(tmp_path, names, text):
    paths = [tmp_path / name for name in names]
    for path in paths:
        path.write_text(ANSWER)
    with pytest.raises(ops.ArgumentError, match=text):
        load("answer", paths)


def test_a_link_to_a_file_of_an_odd_name(cache, source):
    odd = source.rename(source.with_name("-an swer.cpp"))
    source.symlink_to(odd)
    assert answer(extension(source).load()) == 42


@pytest.mark.parametrize(
    ("argument", "value"),
    [("sources", ["x.cpp"]), ("extra_include_paths", "x"), ("build_directory", "x")],
)
def test_a_current_folder_that_is_gone(cache, source, tmp_path, monkeypatch, argument, value):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    arguments = {"sources": [source], argument: value}
    with pytest.raises(ops.ArgumentError, match=f"{argument} must be absolute, since the current"):
        load("answer", is_python_module=False, **arguments)
