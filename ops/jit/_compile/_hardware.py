"""What this machine can run: CPU instruction sets, memory, cores, GPU architectures.

Nothing here runs a program or initialises CUDA.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import re
from collections.abc import Iterable
from pathlib import Path

import torch

from ops._errors import ToolchainError

# ---- the CPU -------------------------------------------------------------------------------------

_X86_LEVELS = (
    ("x86-64-v4", {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
    ("x86-64-v3", {"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "abm"}),
)


@functools.lru_cache(maxsize=1)
def cpu_features() -> frozenset[str]:
    """The instruction-set extensions of this CPU, as Linux names them; empty elsewhere."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as lines:
            for line in lines:  # the first core's: reading all of them takes long on large machines
                if line.startswith(("flags", "Features")):
                    return frozenset(line.partition(":")[2].split())
    except FileNotFoundError:
        pass
    return frozenset()


@functools.lru_cache(maxsize=1)
def cpu_level() -> str | None:
    """The x86-64 micro-architecture level, for ``-march``: portable, where ``native`` is not."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return None
    level_v3 = _X86_LEVELS[1][1]
    for level, needs in _X86_LEVELS:
        if cpu_features() >= needs | level_v3:
            return level
    return None


def memory_limit() -> int:
    """Bytes of memory this process may use: the machine's, or less where a cgroup says so."""
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in (
        "/sys/fs/cgroup/memory.max",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
    ):
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            limit = min(limit, int(text))
    return limit


def jobs() -> int:
    """How many compilers to run at once: one a core, each with 3 GB of memory to itself."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(1, min(cores, memory_limit() // (3 << 30)))


# ---- the GPU -------------------------------------------------------------------------------------


def torchs_cuda() -> str:
    """The CUDA version torch is built for.

    Raises:
        ToolchainError: torch is built without CUDA.
    """
    if torch.version.cuda is None:
        raise ToolchainError(f"this torch ({torch.__version__}) is built without CUDA")
    return torch.version.cuda


def has_gpu() -> bool:
    """Whether torch could use a CUDA device. Asks NVML, which leaves CUDA uninitialised."""
    return torch.version.cuda is not None and torch.cuda.device_count() > 0


def cuda_architectures() -> tuple[str, ...]:
    """The architectures to compile for, as in ``("8.0", "9.0+PTX")``, in numeric order.

    ``TORCH_CUDA_ARCH_LIST`` decides; without it, the GPUs of this machine do.

    Raises:
        ToolchainError: neither names one, or torch itself has no CUDA.
    """
    torchs_cuda()
    named = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if named and named != ["native"]:
        for item in named:
            if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", item):
                raise ToolchainError(
                    "TORCH_CUDA_ARCH_LIST must hold numbers like 8.0, 9.0a or 9.0+PTX, "
                    f"got {item!r}"
                )
        return tuple(sorted(set(named), key=_arch_order))
    found = set(nvml_capabilities())
    if not found:
        raise ToolchainError(
            "no CUDA architecture to compile for: no GPU is visible here, "
            "and TORCH_CUDA_ARCH_LIST (like '8.0 9.0+PTX') is not set"
        )
    return tuple(sorted(found, key=_arch_order))


def _arch_order(architecture: str) -> tuple[int, int, str]:
    number, _, _ = architecture.partition("+")
    major, _, minor = number.rstrip("af").partition(".")
    return int(major), int(minor), architecture


def serves(built_for: Iterable[str], needed: str) -> bool:
    """Whether code for these architectures runs on ``needed``: its own, or PTX it can compile.

    Code runs on a later minor version of its major one, PTX on anything later; what is specific to
    an architecture (``9.0a``) runs on that one alone.
    """
    major, minor, _ = _arch_order(needed)
    for architecture in built_for:
        if needed in (architecture, architecture.removesuffix("+PTX")):
            return True
        if needed.endswith("+PTX") or architecture.rstrip("+PTX")[-1:] in "af":
            continue
        its_major, its_minor, _ = _arch_order(architecture)
        if its_major == major and its_minor <= minor:
            return True
        if architecture.endswith("+PTX") and (its_major, its_minor) <= (major, minor):
            return True
    return False


def gencode_flags(architectures: tuple[str, ...]) -> tuple[str, ...]:
    """Nvcc's flags for these architectures."""
    flags = []
    for architecture in architectures:
        number = architecture.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if architecture.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return tuple(flags)


@functools.lru_cache(maxsize=1)
def nvml_capabilities() -> tuple[str, ...]:
    """The architecture of each GPU that the driver sees."""
    # NVML, not torch.cuda.get_device_capability: that would initialise CUDA, and a process that
    # has initialised CUDA can no longer fork.
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return ()
    if nvml.nvmlInit_v2() != 0:
        return ()
    try:
        count = ctypes.c_uint()
        nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        found = []
        for index in range(count.value):
            device, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
            if (
                nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)) == 0
                and nvml.nvmlDeviceGetCudaComputeCapability(
                    device, ctypes.byref(major), ctypes.byref(minor)
                )
                == 0
            ):
                found.append(f"{major.value}.{minor.value}")
        return tuple(found)
    finally:
        nvml.nvmlShutdown()
