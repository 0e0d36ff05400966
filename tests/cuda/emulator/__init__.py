"""The back end ``cuda-emulated``: the CUDA text as it ships, run on the CPU.

An op's ``.cpp`` is compiled as for CUDA, its ``.cu`` as C++ with the headers of this folder in the
place of CUDA's, and both are linked with the emulator (``emulator.h`` tells what that checks). The
library registers with the CPU's dispatch key, in place of the op's own CPU kernels: only one of the
two can be loaded, so :func:`select` exchanges them.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

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
    return tempfile.TemporaryDirectory(prefix="jitops-emulator-")  # gone with the process


def compile_all(*jobs: tuple[str, list[str]]) -> list[Path]:
    """Object files, compiled side by side: of each a name, and the compiler's arguments."""
    cxx = list(_compilers.cxx().command)
    # Never written over: an extension is what its object holds whenever it is loaded.
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
    """The emulator's own objects."""
    # Some systems let g++ check longjmp by default. It then refuses to change to another stack.
    flags = ["-O2", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden"]
    return compile_all(*((part, [*flags, str(FOLDER / f"{part}.cpp")]) for part in PARTS))


def kernels(name: str, source: Path, include: Path) -> Path:
    """The object of a ``.cu``, with each access to memory announced to the emulator.

    Without vectorisation, so that an access is what the text says; ``-O1``, since a thread's
    own variables are then in registers, and not announced. Those that are not set have huge
    values: registers of a GPU hold anything.
    """
    undefined = "bounds,object-size,alignment,signed-integer-overflow,integer-divide-by-zero,shift"
    watched = [
        f"-fsanitize=thread,{undefined}",
        "-ftrivial-auto-var-init=pattern",
        "-fno-tree-vectorize",
        "-O1",
    ]
    narrow = ["-Wconversion", "-Werror=conversion"]  # a 64-bit size that becomes a 32-bit index
    headers = ["-isystem", str(FOLDER), f"-I{include}"]
    quiet = ["-Wno-unknown-pragmas", "-fvisibility=hidden"]
    arguments = [*watched, *narrow, *headers, *quiet]
    (path,) = compile_all((name, [*arguments, "-x", "c++", str(source)]))
    renamed = (f"--redefine-sym={name}=jitops_{name}" for name in ("memcpy", "memmove", "memset"))
    subprocess.run(["objcopy", *renamed, str(path)], check=True)
    return path


def library(name: str, host: Path, source: Path, include: Path) -> Extension:
    """The extension of a host side and its kernels, for tensors on the CPU.

    ``include`` is the folder of the headers ``common/...``.
    """
    return ops.jit.files(
        name,
        [host],
        extra_cflags=[*extensions.cflags(), "-DUSE_CUDA", "-DJITOPS_DISPATCH_KEY=CPU"],
        extra_include_paths=[include],
        extra_ldflags=[str(path) for path in (kernels(name, source, include), *emulator())],
        is_python_module=False,
    )


def only_last_block(stem: str, only: bool) -> None:
    """Whether launches of the op run the last block of their grid and no other."""
    ctypes.CDLL(str(built_in(stem).load("cpp"))).jitops_only_last_block(only)


# ---- in the place of the op's own CPU kernels ----------------------------------------------------

_own: dict[str, object] = {}  # of the ops whose kernels are emulated now


@functools.cache
def _emulated(stem: str) -> Extension:
    folder = extensions.source_folder()
    # The same name: the loader then withdraws the one before it loads the other.
    sources = (folder / f"{stem}.cpp", folder / f"{stem}.cu")
    return library(f"jitops_{stem}_cpp", *sources, include=folder)


def select(emulated: bool) -> None:
    """From now on, back end ``cpp`` of every op is its emulated CUDA, or its own again."""
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
    """From now on, back end ``cpp`` of the op is built from ``source``."""
    op._sources["cpp"] = source
    op._chosen.clear()
    op._loaded.pop("cpp", None)
