"""The built-in ops as extensions: which files, which flags, for which back end."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from pathlib import Path

from ops._errors import JitopsError
from ops.jit import Extension, Spec
from ops.jit._compile import _cpu

# The oldest torch whose stable ABI the sources use, as torch/headeronly/version.h encodes it.
_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"


def source_folder() -> Path:
    """``cuda_src``: inside the package where it is installed, beside it in a checkout.

    Raises:
        JitopsError: neither is there.
    """
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "cuda_src", package.parent / "cuda_src"):
        if (folder / "common").is_dir():
            return folder
    raise JitopsError(
        f"the sources (cuda_src) are neither in {package} nor beside it: reinstall jitops"
    )


def stems() -> list[str]:
    """The ops that have compiled back ends."""
    return sorted(path.stem for path in source_folder().glob("*.cpp"))


LEVELS = ("baseline", "x86-64-v3", "x86-64-v4")
_OF_V3 = {"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "abm"}
_OF_V4 = {*_OF_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}


@functools.cache
def cpu_level() -> str:
    """Return this CPU's x86-64 level, for ``-march``: portable, unlike ``native``."""
    features = _cpu.features() if platform.machine() in ("x86_64", "AMD64") else frozenset()
    return LEVELS[(features >= _OF_V3) + (features >= _OF_V4)]


def cflags(level: str | None = None) -> tuple[str, ...]:
    """Flags of the host side and the CPU kernels (which ask for more than ``-O1`` themselves).

    C++17 is enough for these files and for torch's stable headers. In C++20 the standard headers
    are larger, and g++ takes 0.3 s longer. ``-fopenmp-simd`` turns on ``#pragma omp simd`` and
    needs no OpenMP runtime. Without ``-U__F16C__`` torch's Half.h includes immintrin.h: 0.3 s and
    80 MB for nothing we use. The architecture is one of the portable x86-64 levels, so that
    machines of one level share a cache.
    """
    level = level or cpu_level()
    return (
        "-std=c++17",
        "-O1",
        "-pipe",
        *((f"-march={level}",) if level != "baseline" else ()),
        "-U__F16C__",
        "-fopenmp-simd",
        "-fvisibility=hidden",
        _TARGET,
    )


def cuda_cflags() -> tuple[str, ...]:
    """Flags of the kernels."""
    return ("-O3", "--threads=0")


@functools.cache
def extension(stem: str, backend: str, level: str | None = None) -> Extension:
    """The extension of an op for ``cpp`` or ``cuda``.

    Args:
        level: the instruction set, one of ``LEVELS``. By default this CPU's; where nothing can be
            built, what is there of lower ones serves.
    """
    if level is not None:
        return Extension(_spec(stem, backend, level))
    best, *lower = LEVELS[LEVELS.index(cpu_level()) :: -1]
    return Extension(
        _spec(stem, backend, best), fallbacks=tuple(_spec(stem, backend, one) for one in lower)
    )


def _spec(stem: str, backend: str, level: str) -> Spec:
    folder = source_folder()
    cuda = backend == "cuda"
    return Spec(
        name=f"jitops_{stem}_{backend}",
        sources=tuple(folder / f"{stem}{suffix}" for suffix in ((".cpp", ".cu")[: 1 + cuda])),
        extra_cflags=(*cflags(level), "-DUSE_CUDA") if cuda else cflags(level),
        extra_cuda_cflags=cuda_cflags() if cuda else (),
        extra_include_paths=(folder,),
        is_python_module=False,
    )


def makers(stem: str) -> tuple[Callable[[], Extension], Callable[[], Extension]]:
    """What makes the extensions of an op, ``cpp`` and ``cuda``, once they are needed."""
    return functools.partial(extension, stem, "cpp"), functools.partial(extension, stem, "cuda")
