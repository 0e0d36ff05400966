"""GPU architectures, found without running a program or initialising CUDA."""

import ctypes
import functools
import os
import re
from collections.abc import Iterable

from ops._errors import ToolchainError
from ops.jit._compile import _compilers
from ops.jit._spec import Spec

# The names that torch takes, of GPUs that its CUDA still knows. Longer ones come first because each
# is replaced in the whole text.
_NAMED = {
    "Maxwell+Tegra": "5.3", "Maxwell": "5.0;5.2+PTX", "Pascal": "6.0;6.1+PTX",
    "Volta+Tegra": "7.2", "Volta": "7.0+PTX", "Turing": "7.5+PTX",
    "Ampere+Tegra": "8.7", "Ampere": "8.0;8.6+PTX", "Ada": "8.9+PTX", "Hopper": "9.0+PTX",
    "Blackwell+Tegra": "11.0", "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}  # fmt: skip


def architectures_of(spec: Spec) -> tuple[str, ...]:
    """Choose the architectures for an extension: none where its flags name their own."""
    named = not spec.uses_cuda or any("arch" in flag for flag in spec.extra_cuda_cflags)
    return () if named else architectures()


def architectures() -> tuple[str, ...]:
    """List the architectures to compile for, as in ``("8.0", "9.0+PTX")``, in numeric order.

    ``TORCH_CUDA_ARCH_LIST`` decides; without it, the GPUs of this machine do.
    """
    _compilers.torch_cuda()
    text = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    for name, numbers in _NAMED.items():
        text = text.replace(name, numbers)
    named = text.replace(";", " ").split()
    found = set(of_this_machine() if named in ([], ["native"]) else named)
    for item in found:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", item):
            raise ToolchainError(
                "TORCH_CUDA_ARCH_LIST must hold numbers like 8.0, 9.0a or 9.0+PTX, or names "
                f"like Hopper, got {item!r}"
            )
    if not found:
        raise ToolchainError(
            "no CUDA architecture to compile for: no GPU is visible here, "
            "and TORCH_CUDA_ARCH_LIST (like '8.0 9.0+PTX') is not set"
        )
    return tuple(sorted(found, key=lambda one: (_compilers.numbers(one), one)))


def serves(built_for: Iterable[str], needed: str) -> bool:
    """Whether code for these architectures runs on ``needed``: its own, or PTX it can compile.

    Code runs on a later minor version of its major one, PTX on anything later, and code of a
    specific architecture (``9.0a``) on that one alone.
    """
    version = _compilers.numbers(needed)
    for one in built_for:
        number = one.removesuffix("+PTX")
        if needed in (one, number):
            return True
        if needed.endswith("+PTX") or number[-1] in "af" or _compilers.numbers(one) > version:
            continue
        if one.endswith("+PTX") or _compilers.numbers(one)[0] == version[0]:
            return True
    return False


def gencode_flags(architectures: Iterable[str]) -> list[str]:
    """Return nvcc's flags for these architectures."""
    flags = []
    for one in architectures:
        number = one.removesuffix("+PTX").replace(".", "")
        kinds = ("sm", "compute") if one.endswith("+PTX") else ("sm",)
        flags += [f"-gencode=arch=compute_{number},code={kind}_{number}" for kind in kinds]
    return flags


@functools.cache
def of_this_machine() -> tuple[str, ...]:
    """List the architecture of each GPU that the driver sees."""
    # NVML, because torch.cuda.get_device_capability would initialise CUDA, and a process that has
    # initialised CUDA can no longer fork.
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return ()
    if nvml.nvmlInit_v2() != 0:
        return ()
    count, device = ctypes.c_uint(), ctypes.c_void_p()
    major, minor = ctypes.c_int(), ctypes.c_int()
    numbers = ctypes.byref(major), ctypes.byref(minor)
    found = []
    nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    for index in range(count.value):
        failed = nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device))
        if not failed and not nvml.nvmlDeviceGetCudaComputeCapability(device, *numbers):
            found.append(f"{major.value}.{minor.value}")
    nvml.nvmlShutdown()
    return tuple(found)
