"""The structure of the project: modules import one way, and every op has all of its files."""

from __future__ import annotations

import ast
import graphlib
import importlib
import re

import pytest

from benchmarks import common
from tests.harness.helpers import ROOT

PACKAGE = ROOT / "ops"
SOURCES = ROOT / "cuda_src"
OPS = sorted(path.stem for path in SOURCES.glob("*.cpp"))  # the ops with an extension
ROOMS = ("losses", "layers", "arrays")
PUBLIC = {
    path.stem: room
    for room in ROOMS
    for path in sorted((PACKAGE / room).glob("[a-z]*.py"))
    if path.stem != "conversions"
}

# A module imports from lower levels, and from its own room.
LEVELS = (
    {"ops._errors", "ops._operators"},
    {"ops._namesake"},
    {"ops._config"},
    {"ops.jit"},
    {"ops._core"},
    {"ops.arrays"},
    {"ops.losses", "ops.layers", "ops.gradcheck"},
    {"ops"},
    {"ops._cli"},
    {"ops.__main__"},
)


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


MODULES = dict(modules())


def imports_of(name):
    """The modules of ops that a module imports anywhere, except for type checkers only."""
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


def room_of(name):
    return ".".join(name.split(".")[:2])


def level(name):
    found = [number for number, rooms in enumerate(LEVELS) if room_of(name) in rooms]
    assert found, f"{name} is in a room without a level"
    return found[0]


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_one_way(name):
    for imported in imports_of(name):
        if imported in MODULES and room_of(imported) != room_of(name):
            assert level(imported) < level(name), f"{name} imports {imported}"


def test_no_imports_go_round_in_a_circle():
    graph = {name: {one for one in imports_of(name) if one in MODULES} for name in MODULES}
    graph = {name: {one for one in its if one != name} for name, its in graph.items()}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize("name", MODULES)
def test_only_the_build_imports_cpp_extension(name):
    if name not in ("ops.jit._compile._build", "ops.jit._torch_api"):
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


@pytest.mark.parametrize(("op", "room"), PUBLIC.items())
def test_an_op_has_a_test_and_is_in_the_readme(op, room):
    assert (ROOT / "tests" / room / f"test_{op}.py").is_file()
    assert f"`ops.{op}`" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("op", OPS)
def test_an_op_is_one_stem_everywhere(op):
    for path in (
        SOURCES / f"{op}.h",
        SOURCES / f"{op}.cpp",
        SOURCES / f"{op}.cu",
        ROOT / "benchmarks" / PUBLIC[op] / f"bench_{op}.py",
    ):
        assert path.is_file(), path


@pytest.mark.parametrize("module", common.benches().values())
def test_a_bench_can_be_run(module):
    """It imports nothing that is gone. CI does not run them: they need an idle machine."""
    assert callable(importlib.import_module(module).run)


def test_every_source_belongs_to_an_op():
    assert {path.stem for path in SOURCES.iterdir() if path.is_file()} == set(OPS)


@pytest.mark.parametrize("path", sorted(SOURCES.rglob("*.cu*")), ids=lambda path: path.name)
def test_kernels_know_nothing_of_torch_and_are_launched_in_one_place(path):
    text = path.read_text()
    assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", text)
    assert "<<<" not in text
    assert text.count("cudaLaunchKernel(") == (path.name == "launch.cuh")


@pytest.mark.parametrize("op", OPS)
def test_kernels_state_their_limits(op):
    """Each kernel states its largest block and its budget, each file the floor of its time."""
    text = (SOURCES / f"{op}.cu").read_text()
    assert "The floor" in text[: text.index("#include")]
    text += "".join(path.read_text() for path in SOURCES.glob(f"{op}.cuh"))
    kernels = text.count("__global__")
    assert kernels
    bounds = re.findall(r"__global__ void __launch_bounds__\((cuda::kMaxThreads|3 \* kS)\) ", text)
    assert len(bounds) == kernels
    assert text.count("Budget: ") == kernels


@pytest.mark.parametrize("path", sorted(SOURCES.rglob("*.h")), ids=lambda path: path.name)
def test_headers_of_torch_are_those_that_compile_fast(path):
    for header in re.findall(r"#include\s*<((?:torch|ATen|c10)/[^>]+)>", path.read_text()):
        assert header.startswith(("torch/csrc/stable/", "torch/headeronly/")), header
