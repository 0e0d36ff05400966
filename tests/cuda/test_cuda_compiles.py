"""The CUDA back end compiles and links; no GPU is needed.

nvcc compiles every ``.cu`` for the architectures of users, and warnings are errors. The host
compiler compiles the ``.cpp`` with its CUDA branch. The ``.cu`` defines every function that the
``.cpp`` calls.
"""

from __future__ import annotations

import ast
import functools
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from ops._core import extensions
from ops.jit._compile import _compilers
from tests.cuda import emulator as cuda_emulator

pytestmark = pytest.mark.nvcc

FOLDER = extensions.source_folder()
TORCH = Path(torch.__file__).parent / "include"


def run(*command):
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def nvcc():
    return _compilers.nvcc().command


# The architectures of users.
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)


def architectures():
    """The flags for all architectures, and their numbers.

    Neighbours share one pass of the compiler's first half, which takes most of the time, because
    no kernel's text depends on the architecture. The newest pass also gives the PTX that serves
    later architectures.
    """
    known = {int(name.partition("_")[2]) for name in run(*nvcc(), "--list-gpu-arch").split()}
    assert {80, 86, 89, 90} <= known, "an nvcc that is too old to tell anything"
    ours = [number for number in ARCHITECTURES if number in known]
    flags = []
    for first, end in ((75, 80), (80, 100), (100, 1000)):
        its = [f"sm_{number}" for number in ours if first <= number < end]
        if its:
            newest = [f"compute_{first}"] * (ours[-1] < end)
            flags.append(f"-gencode=arch=compute_{first},code=[{','.join([*its, *newest])}]")
    return flags, ours


@dataclass
class Compiled:
    """Both objects of an op, and the output of ptxas for its kernels."""

    folder: Path
    report: str


@pytest.fixture(scope="module")
def compiled_op(tmp_path_factory):
    """Compiles both files of an op, once, with the flags of users' builds."""
    folder = tmp_path_factory.mktemp("objects")
    flags, _ = architectures()

    @functools.cache
    def compiled(op):
        report = run(
            *nvcc(),
            *extensions.cuda_cflags(),
            *flags,
            "-std=c++20",
            "-Werror=all-warnings",
            "-Xptxas=-v",
            "-Xcompiler=-fPIC,-Wall,-Wextra,-Werror",
            f"-I{FOLDER}",
            "-MMD",
            "-MF",
            folder / f"{op}.d",
            "-c",
            FOLDER / f"{op}.cu",
            "-o",
            folder / f"{op}.cu.o",
        )
        run(
            *_compilers.cxx().command,
            *extensions.cflags(),
            "-DUSE_CUDA",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-fPIC",
            f"-I{FOLDER}",
            f"-isystem{TORCH}",
            f"-isystem{TORCH / 'torch/csrc/api/include'}",
            f"-isystem{_compilers.cuda_home() / 'include'}",
            "-c",
            FOLDER / f"{op}.cpp",
            "-o",
            folder / f"{op}.o",
        )
        return Compiled(folder, report)

    return compiled


# ---- registers and shared memory of kernels ------------------------------------------------------

USE = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)' for 'sm_(?P<arch>\d+)'\n.*\n"
    r"\s+\d+ bytes stack frame, (?P<stored>\d+) bytes spill stores, .*\n"
    r".*Used (?P<registers>\d+) registers(?:.*?(?P<shared>\d+) bytes smem)?"
)
BUDGET = re.compile(
    r"Budget: (?P<registers>\d+) registers, (?P<shared>\d+) bytes shared"
    r"(?:, (?P<spilt>\d+) bytes spilt(?: \((?P<dtype>\w+)\))?)?\."
    r"\n(?:template <.*>\n)?__global__ void \w+\(.*\) (?P<kernel>\w+)\("
)
MANGLED = {"float64": "Id", "float32": "If", "bfloat16": "I13__nv_bfloat16", "float16": "I6__half"}


def over_budget(report, text):
    """A line for each kernel that needs more than the budget in its comment."""
    budgets = {found["kernel"]: found for found in BUDGET.finditer(text)}
    over, seen = [], set()
    for use in USE.finditer(report):
        kernel = next(name for name in budgets if name in use["symbol"])
        seen.add((kernel, int(use["arch"])))
        budget = budgets[kernel]
        of_all = budget["dtype"] is None
        mine = of_all or kernel + MANGLED[budget["dtype"]] in use["symbol"]
        allowed = int(budget["spilt"] or 0) if mine else 0
        for what, used, most in (
            ("registers", int(use["registers"]), int(budget["registers"])),
            ("bytes shared", int(use["shared"] or 0), int(budget["shared"])),
            ("bytes spilt", int(use["stored"]), allowed),
        ):
            if used > most:
                over.append(f"{use['symbol']} for sm_{use['arch']}: {used} {what}, not {most}")
    return over, seen


def kernels_text(op):
    return "".join((FOLDER / name).read_text() for name in sorted(FOLDER.glob(f"{op}.cu*")))


@pytest.mark.parametrize("op", extensions.stems())
def test_budgets(compiled_op, op):
    text = kernels_text(op)
    over, seen = over_budget(compiled_op(op).report, text)
    assert not over
    _, ours = architectures()
    kernels = re.findall(r"__global__ void \w+\(.*\) (\w+)\(", text)
    assert seen == {(kernel, arch) for kernel in kernels for arch in ours}


def test_budgets_that_are_exceeded_are_told(compiled_op):
    text = kernels_text("lltm")
    report = compiled_op("lltm").report
    over, _ = over_budget(report, text.replace("Budget: 104 registers", "Budget: 16 registers"))
    assert len([line for line in over if "registers, not 16" in line]) == len(over) > 20
    assert all("backward_kernel" in line for line in over)
    over, _ = over_budget(report, text.replace(", 48 bytes spilt (float64)", ""))
    assert all("bytes spilt, not 0" in line and "backward_kernelId" in line for line in over)
    assert over


# ---- both objects of an op -----------------------------------------------------------------------


def symbols(path, *kinds):
    lines = (line.split() for line in run("nm", path).splitlines())
    return {words[-1] for words in lines if len(words) >= 2 and words[-2] in kinds}


@pytest.mark.parametrize("op", extensions.stems())
def test_every_launcher_called_is_defined(compiled_op, op):
    objects = compiled_op(op).folder
    called = {name for name in symbols(objects / f"{op}.o", "U") if "launch_" in name}
    defined = {name for name in symbols(objects / f"{op}.cu.o", "T") if "launch_" in name}
    assert called
    assert called == defined


@pytest.mark.parametrize("op", extensions.stems())
def test_kernels_read_no_header_of_torch(compiled_op, op):
    read = (compiled_op(op).folder / f"{op}.d").read_text()
    assert f"{op}.h" in read
    assert str(TORCH) not in read


@pytest.mark.parametrize("op", extensions.stems())
def test_two_files_make_a_library(compiled_op, op):
    """Only symbols of torch and CUDA may be undefined."""
    objects = compiled_op(op).folder
    library = objects / f"{op}.so"
    home = _compilers.cuda_home()
    run(
        *_compilers.cxx().command,
        "-shared",
        objects / f"{op}.o",
        objects / f"{op}.cu.o",
        f"-L{home / 'lib64'}",
        f"-L{home / 'lib'}",
        "-lcudart",
        "-o",
        library,
    )
    missing = symbols(library, "U")
    assert not [name for name in missing if "jitops" in name]


def test_what_the_emulator_is_tested_with_is_cuda(tmp_path):
    source = cuda_emulator.FOLDER / "planted.cu"
    run(*nvcc(), "-std=c++20", "-arch=sm_80", f"-I{FOLDER}", "-c", source, "-o", tmp_path / "x.o")


def test_the_example_compiles(root, tmp_path):
    """The text in the strings of examples/swiglu.py compiles, because users copy it."""
    texts = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse((root / "examples/swiglu.py").read_text()).body
        if isinstance(node, ast.Assign) and node.targets[0].id in ("CPP", "CUDA")
    }
    (tmp_path / "swiglu.cu").write_text(texts["CUDA"])
    (tmp_path / "swiglu.cpp").write_text(texts["CPP"])
    flags, _ = architectures()
    run(
        *nvcc(),
        *flags,
        "-std=c++20",
        "-Werror=all-warnings",
        "-c",
        tmp_path / "swiglu.cu",
        "-o",
        tmp_path / "swiglu.cu.o",
    )
    includes = [f"-isystem{TORCH}", f"-isystem{_compilers.cuda_home() / 'include'}"]
    run(
        *_compilers.cxx().command,
        "-DUSE_CUDA",
        "-std=c++20",
        "-Wall",
        "-Werror",
        *includes,
        "-c",
        tmp_path / "swiglu.cpp",
        "-o",
        tmp_path / "swiglu.o",
    )
    assert {name for name in symbols(tmp_path / "swiglu.o", "U") if "launch" in name} <= symbols(
        tmp_path / "swiglu.cu.o", "T"
    )
