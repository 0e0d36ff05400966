"""The back end ``cuda-emulated``: the shipped CUDA text, run on the CPU.

The ``.cpp`` of an op is compiled as for CUDA. Its ``.cu`` is compiled as C++, with the headers of
this folder instead of CUDA's. Both are linked with the emulator; ``emulator.h`` lists its checks.
The library registers with the dispatch key of the CPU, like the CPU kernels of the op. Only one of
the two can be loaded, so :func:`select` exchanges them.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from unittest import mock

from torch.utils import cpp_extension

import ops.jit
from ops._core import extensions
from ops._core.dispatch import Op, built_in
from ops.jit import Extension, _reload
from tests.cuda.emulator.objects import Job, compile_all

NAME = "cuda-emulated"
FOLDER = Path(__file__).parent
PARTS = ("threads", "memory", "tensors")


def emulator() -> list[Job]:
    """The objects of the emulator."""
    # Some systems let g++ check longjmp by default. It then refuses to change to another stack.
    flags = ("-O2", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden")
    return [Job(part, FOLDER / f"{part}.cpp", flags, headers=(FOLDER,)) for part in PARTS]


def kernels(name: str, source: Path, include: Path) -> Job:
    """The object of a ``.cu``, which reports each memory access to the emulator.

    Vectorisation is off, so that accesses are those of the text. With ``-O1`` the local
    variables of a thread are in registers, so they are not reported. Unset ones have huge values,
    because registers of a GPU hold anything.
    """
    undefined = "bounds,object-size,alignment,signed-integer-overflow,integer-divide-by-zero,shift"
    flags = (
        f"-fsanitize=thread,{undefined}",
        "-ftrivial-auto-var-init=pattern",
        "-fno-tree-vectorize",
        "-O1",
        *("-Wconversion", "-Werror=conversion"),  # a 64-bit size used as a 32-bit index
        *("-Wno-unknown-pragmas", "-fvisibility=hidden"),
        *("-x", "c++"),
    )
    renamed = {one: f"jitops_{one}" for one in ("memcpy", "memmove", "memset")}
    return Job(name, source, flags, headers=(include,), system=(FOLDER,), renamed=renamed)


def host_side(name: str, host: Path, include: Path) -> Job:
    """The object of a ``.cpp``."""
    system = (f"-isystem{path}" for path in cpp_extension.include_paths())
    flags = (*extensions.cflags(), "-DUSE_CUDA", "-DJITOPS_DISPATCH_KEY=CPU", *system)
    return Job(f"{name}_host", host, flags, headers=(include,), suffixes=(".h",))


class Library(Extension):
    """Loaded without a trial in a new Python, which takes more than a second for each."""

    def load(self, **options):
        with mock.patch.object(_reload, "_try"):
            return super().load(**options)


def library(name: str, host: Path, source: Path, include: Path) -> Library:
    """The extension of a host source and its kernels, for tensors on the CPU.

    ``include`` is the folder of the headers ``common/...``.
    """
    jobs = (host_side(name, host, include), kernels(name, source, include), *emulator())
    linked = ops.jit.files(
        name,
        [FOLDER / "library.cpp"],
        extra_ldflags=[str(path) for path in compile_all(*jobs)],
        is_python_module=False,
    )
    return Library(linked.spec)


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
