"""The flags that ``JITOPS_DEBUG`` and ``JITOPS_SANITIZE`` add to an extension."""

from __future__ import annotations

import dataclasses
import os
import platform

from ops import _config
from ops._errors import ConfigError
from ops.jit._spec import Spec

_DEBUG = ("-O0", "-g", "-fno-omit-frame-pointer", "-DJITOPS_DEBUG")
_CUDA_DEBUG = ("-O0", "-g", "-lineinfo", "-DJITOPS_DEBUG")

_RUNTIMES = {
    "address": (
        "libasan",
        ' and ASAN_OPTIONS="detect_leaks=0": what Python and torch leave to the end of the process '
        "would be reported too",
    ),
    "thread": ("libtsan", ""),
    "leak": (
        "liblsan",
        ' and LSAN_OPTIONS="exitcode=0": Python and torch leave much to the end of the process, '
        "which is reported beside leaks of your own",
    ),
}


def effective_spec(spec: Spec) -> Spec:
    """Return the extension with the flags that the settings add."""
    settings = _config.settings()
    cflags: list[str] = []
    cuda_cflags: list[str] = []
    ldflags: list[str] = []
    if settings.debug:
        cflags += _DEBUG
        cuda_cflags += _CUDA_DEBUG
    if settings.sanitize:
        sanitizers = f"-fsanitize={','.join(settings.sanitize)}"
        cflags += [sanitizers, "-fno-omit-frame-pointer", "-g"]
        ldflags += [sanitizers]
    return dataclasses.replace(
        spec,
        extra_cflags=(*spec.extra_cflags, *cflags),
        extra_cuda_cflags=(*spec.extra_cuda_cflags, *cuda_cflags) if spec.uses_cuda else (),
        extra_ldflags=(*spec.extra_ldflags, *ldflags),
    )


def check_runtime() -> None:
    """Check that the sanitizers' runtime is there: loading without it would end the process.

    Raises:
        ConfigError: it is not.
    """
    names = _config.settings().sanitize
    for name, (runtime, more) in _RUNTIMES.items():
        if name == "leak" and "address" in names:
            continue  # part of it
        if name in names and platform.system() == "Linux" and not _is_loaded(runtime):
            raise ConfigError(
                f"JITOPS_SANITIZE={name} needs the sanitizer's runtime in the process from its "
                f'start: run it with LD_PRELOAD="$(${{CXX:-c++}} -print-file-name={runtime}.so)"'
                f"{more}"
            )


def _is_loaded(runtime: str) -> bool:
    with open("/proc/self/maps", "rb") as maps:
        return any(runtime.encode() in os.path.basename(line) for line in maps)
