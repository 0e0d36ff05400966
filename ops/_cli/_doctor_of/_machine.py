"""The machine, and the settings in force."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

import ops
from ops import _config, _namesake
from ops._cli._doctor_of._finding import GOOD, NOTE, Finding
from ops._core import extensions, selection
from ops.jit import _admin


def machine() -> Iterator[Finding]:
    """The versions of jitops, Python and torch, and the resources of the machine."""
    yield Finding("jitops", f"{ops.__version__} in {Path(ops.__file__).parent}")
    for other in _namesake.others():
        yield Finding("namesake", f"{other} has a package ops too", NOTE, _namesake.FIX)
    yield Finding("python", f"{platform.python_version()}, {platform.platform(terse=True)}")
    cuda = torch.version.cuda
    yield Finding("torch", f"{torch.__version__}, {f'CUDA {cuda}' if cuda else 'without CUDA'}")
    count = torch.cuda.device_count() if selection.has_gpu() else 0
    yield Finding("GPUs", ", ".join(map(_gpu, range(count))) or "none that torch sees")
    memory, cores = _admin.cpu.memory_limit(), len(os.sched_getaffinity(0))
    yield Finding(
        "resources",
        f"{cores} cores, {memory / 2**30:.1f} GiB of memory, {_admin.cpu.jobs()} compilers at once",
        NOTE if memory < 2 << 30 else GOOD,
        "torch/extension.h takes 1.9 GiB to compile; the built-in ops 0.2"
        if memory < 2 << 30
        else None,
    )
    yield Finding("instruction set", f"{platform.machine()}, {extensions.cpu_level()}")


def _gpu(number: int) -> str:
    found = _admin.gpu_archs.of_this_machine()[number : number + 1]
    return f"{number}: {', '.join(found) or 'unknown'}"


def variables() -> Iterator[Finding]:
    """The settings in force."""
    settings = _config.settings()
    for variable in _config.VARIABLES:
        if os.environ.get(variable.name, "").strip():
            yield Finding(variable.name, str(getattr(settings, variable.field)))
    for name in ("CXX", "CC", "CUDA_HOME", "PYTORCH_NVCC", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS"):
        if name in os.environ:
            yield Finding(name, os.environ[name])
