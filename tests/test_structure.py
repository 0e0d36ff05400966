"""The shape of the project: who imports whom, and that every op has all of its files."""

from __future__ import annotations

import ast
import re

import pytest

from ops import _extensions
from tests.helpers import ROOT

PACKAGE = ROOT / "ops"
SOURCES = ROOT / "cuda_src"
OPS = sorted(path.stem for path in SOURCES.glob("*.cpp"))  # those with an extension
PUBLIC = sorted(path.stem for path in PACKAGE.glob("[a-z]*.py") if path.stem != "cli")

# A module imports from the layers above its own only; two of one layer never see each other.
LAYERS = (
    {"ops._errors"},
    {"ops._config"},
    {"ops.jit._flags"},
    {"ops.jit._spec"},
    {"ops.jit._cache", "ops.jit._cache._location"},
    {"ops.jit._cache._entries", "ops.jit._cache._lock"},
    {"ops.jit._cache._publish"},
    {"ops.jit._cache._bundle", "ops.jit._cache._eviction"},
    {f"ops.jit._compile{name}" for name in ("", "._causes", "._compilers", "._cpu", "._log")},
    {f"ops.jit._compile.{name}" for name in ("_diagnostics", "_gpu_archs")},
    {f"ops.jit._compile.{name}" for name in ("_progress", "_runner", "_torch_build")},
    {"ops.jit._compile._build"},
    {"ops.jit._compile._reports"},
    {"ops.jit._debug", "ops.jit._inputs", "ops.jit._key", "ops.jit._reload"},
    {"ops.jit._explain_miss", "ops.jit._load", "ops.jit._record"},
    {"ops.jit._pch"},
    {"ops.jit._build_once"},
    {"ops.jit._extension"},
    {"ops.jit._build_directory"},
    {"ops.jit._admin", "ops.jit._torch_api"},
    {"ops.jit"},
    {"ops._autograd", "ops._checks", "ops._extensions"},
    {"ops._arrays"},
    {"ops._backend", "ops.from_numpy"},
    {"ops._op"},
    {"ops._lltm"},
    {"ops._gradcheck"},
    {f"ops._gradcheck.{name}" for name in ("_differ", "_differences", "_subject")},
    {"ops._gradcheck._probe", "ops._gradcheck._report"},
    {"ops._gradcheck._consistency", "ops._gradcheck._derivatives"},
    {"ops._explain", *(f"ops.{op}" for op in PUBLIC if op != "from_numpy")},
    {"ops"},
    {"ops._commands", "ops._commands._build", "ops._commands._check"},
    {"ops._commands._names"},
    {f"ops._commands.{name}" for name in ("_bundle", "_cache", "_demo", "_doctor_of")},
    {"ops._commands._doctor_of._finding"},
    {f"ops._commands._doctor_of.{name}" for name in ("_cache", "_machine", "_tools")},
    {"ops._commands._doctor"},
    {"ops.cli"},
    {"ops.__main__"},
)


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


MODULES = dict(modules())


def imports_of(name):
    """The ops modules that this one imports, anywhere in it but for type checkers."""
    tree = ast.parse(MODULES[name].read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module


def layer(name):
    found = [number for number, names in enumerate(LAYERS) if name in names]
    assert found, f"{name} is in no layer: give it one"
    return found[0]


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_one_way(name):
    for imported in imports_of(name):
        if imported in MODULES and imported != name:
            assert layer(imported) < layer(name), f"{name} imports {imported}"


@pytest.mark.parametrize("name", MODULES)
def test_only_the_build_imports_cpp_extension(name):
    if name not in ("ops.jit._compile._torch_build", "ops.jit._torch_api"):
        assert not any("cpp_extension" in imported for imported in imports_of(name))


def test_the_cache_knows_no_compiler_and_the_compilers_no_cache():
    for name in MODULES:
        room, _, _ = name.removeprefix("ops.jit._").partition(".")
        for imported in imports_of(name):
            assert not (
                room == "cache" and imported.startswith(("ops.jit._compile", "ops.jit._spec"))
            )
            assert not (room == "compile" and imported.startswith("ops.jit._cache"))


def test_the_loader_knows_no_op():
    for path in (PACKAGE / "jit").rglob("*.py"):
        for op in OPS:
            assert op not in path.read_text(), path


@pytest.mark.parametrize("op", PUBLIC)
def test_an_op_has_a_test_and_is_in_the_readme(op):
    assert (ROOT / "tests" / f"test_{op}.py").is_file()
    assert f"`ops.{op}`" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("op", OPS)
def test_an_op_is_one_stem_everywhere(op):
    assert op in PUBLIC
    assert op in _extensions.stems()
    for path in (
        SOURCES / f"{op}.h",
        SOURCES / f"{op}.cpp",
        SOURCES / f"{op}.cu",
        ROOT / "benchmarks" / f"bench_{op}.py",
    ):
        assert path.is_file(), path


def test_every_source_belongs_to_an_op():
    assert {path.stem for path in SOURCES.iterdir() if path.is_file()} == set(OPS)


@pytest.mark.parametrize("name", MODULES)
def test_no_bare_assert(name):
    """``python -O`` removes them."""
    tree = ast.parse(MODULES[name].read_text())
    assert not any(isinstance(node, ast.Assert) for node in ast.walk(tree))


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_short(name):
    assert len(MODULES[name].read_text().splitlines()) <= 340


@pytest.mark.parametrize("path", sorted(SOURCES.rglob("*.cu*")), ids=lambda path: path.name)
def test_kernels_know_nothing_of_torch_and_are_launched_in_one_place(path):
    text = path.read_text()
    assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", text)
    if path.name == "launch.cuh":
        assert text.count("<<<") == 1
        assert "shared_bytes, static_cast<cudaStream_t>(stream)>>>" in text
    else:
        assert "<<<" not in text


@pytest.mark.parametrize("op", OPS)
def test_kernels_state_their_limits(op):
    """The threads that every launch has at most, a budget, and in the head comment the floor."""
    text = (SOURCES / f"{op}.cu").read_text()
    kernels = text.count("__global__")
    assert kernels
    assert text.count("__global__ void __launch_bounds__(cuda::kMaxThreads) ") == kernels
    assert text.count("Budget: ") == kernels
    assert "The floor" in text[: text.index("#include")]


@pytest.mark.parametrize("path", sorted(SOURCES.rglob("*.h")), ids=lambda path: path.name)
def test_headers_of_torch_are_those_that_compile_fast(path):
    for header in re.findall(r"#include\s*<((?:torch|ATen|c10)/[^>]+)>", path.read_text()):
        assert header.startswith(("torch/csrc/stable/", "torch/headeronly/")), header
