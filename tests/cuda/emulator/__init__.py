"""The back end ``cuda-emulated``: the shipped CUDA text, run on the CPU.

The ``.cpp`` of an op is compiled as for CUDA. Its ``.cu`` is compiled as C++, with the headers of
this folder instead of CUDA's. Both are linked with the emulator; ``emulator.h`` lists its checks.
The library registers with the dispatch key of the CPU, like the CPU kernels of the op. Only one of
the two can be loaded, so :func:`select` exchanges them.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

from torch.utils import cpp_extension

import ops.jit
from ops._core import extensions
from ops._core.dispatch import Op, built_in
from ops.jit import Extension
from ops.jit._compile import _compilers

NAME = "cuda-emulated"
FOLDER = Path(__file__).parent
PARTS = ("threads", "memory", "tensors")


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="jitops-emulator-")  # removed when the process exits


def compile_all(*jobs: tuple[str, list[str]]) -> list[Path]:
    """Compile object files in parallel, from their names and the arguments of the compiler."""
    cxx = list(_compilers.cxx().command)
    # Objects are never overwritten, because an extension may be loaded later.
    folder = tempfile.mkdtemp(dir=_scratch().name)
    objects = [Path(folder) / f"{name}.o" for name, _ in jobs]
    running = [
        subprocess.Popen(
            [*cxx, "-std=c++20", "-fPIC", "-g1", *arguments, "-c", "-o", str(path)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for path, (_, arguments) in zip(objects, jobs, strict=True)
    ]
    for process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    return objects


@functools.cache
def emulator() -> list[Path]:
    """The objects of the emulator."""
    # Some systems let g++ check longjmp by default. It then refuses to change to another stack.
    flags = ["-O2", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden"]
    return compile_all(*((part, [*flags, str(FOLDER / f"{part}.cpp")]) for part in PARTS))


def kernels(name: str, source: Path, include: Path) -> Path:
    """The object of a ``.cu``, which reports each memory access to the emulator.

    Vectorisation is off, so that accesses are those of the text. With ``-O1`` the local
    variables of a thread are in registers, so they are not reported. Unset ones have huge values,
    because registers of a GPU hold anything.
    """
    undefined = "bounds,object-size,alignment,signed-integer-overflow,integer-divide-by-zero,shift"
    watched = [
        f"-fsanitize=thread,{undefined}",
        "-ftrivial-auto-var-init=pattern",
        "-fno-tree-vectorize",
        "-O1",
    ]
    narrow = ["-Wconversion", "-Werror=conversion"]  # a 64-bit size used as a 32-bit index
    headers = ["-isystem", str(FOLDER), f"-I{include}"]
    quiet = ["-Wno-unknown-pragmas", "-fvisibility=hidden"]
    arguments = [*watched, *narrow, *headers, *quiet]
    (path,) = compile_all((name, [*arguments, "-x", "c++", str(source)]))
    renamed = (f"--redefine-sym={name}=jitops_{name}" for name in ("memcpy", "memmove", "memset"))
    subprocess.run(["objcopy", *renamed, str(path)], check=True)
    return path


_hosts: dict[tuple[str, ...], Path] = {}  # objects, by all text that they are made of


def host_side(name: str, host: Path, include: Path) -> Path:
    """The object of a ``.cpp``. It is compiled once for all copies of the same text."""
    text = tuple(path.read_text() for path in (host, *sorted(include.rglob("*.h"))))
    if text not in _hosts:
        flags = [*extensions.cflags(), "-DUSE_CUDA", "-DJITOPS_DISPATCH_KEY=CPU", f"-I{include}"]
        flags += [f"-isystem{path}" for path in cpp_extension.include_paths()]
        (_hosts[text],) = compile_all((f"{name}_host", [*flags, str(host)]))
    return _hosts[text]


def library(name: str, host: Path, source: Path, include: Path) -> Extension:
    """The extension of a host source and its kernels, for tensors on the CPU.

    ``include`` is the folder of the headers ``common/...``.
    """
    objects = (host_side(name, host, include), kernels(name, source, include), *emulator())
    return ops.jit.files(
        name,
        [FOLDER / "library.cpp"],
        extra_ldflags=[str(path) for path in objects],
        is_python_module=False,
    )


def only_last_block(stem: str, only: bool) -> None:
    """Whether launches of the op run only the last block of their grid."""
    ctypes.CDLL(str(built_in(stem).load("cpp"))).jitops_only_last_block(only)


# ---- instead of the CPU kernels of an op ---------------------------------------------------------

_own: dict[str, object] = {}  # the CPU extensions of the ops that are emulated now


@functools.cache
def _emulated(stem: str) -> Extension:
    folder = extensions.source_folder()
    # With the same name, the loader withdraws the one before it loads the other.
    sources = (folder / f"{stem}.cpp", folder / f"{stem}.cu")
    return library(f"jitops_{stem}_cpp", *sources, include=folder)


def select(emulated: bool) -> None:
    """Make the back end ``cpp`` of every op its emulated CUDA, or its CPU kernels again."""
    if emulated == bool(_own):
        return
    for stem in extensions.stems():
        op = built_in(stem)
        if emulated:
            _own[stem] = op._sources["cpp"]
            exchange(op, functools.partial(_emulated, stem))
        else:
            exchange(op, _own.pop(stem))


def exchange(op: Op, source: object) -> None:
    """Build the back end ``cpp`` of the op from ``source`` from now on."""
    op._sources["cpp"] = source
    op._chosen.clear()
    op._loaded.pop("cpp", None)
