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
_SILENT = " and {}: Python and torch leave much to the end of the process, which is reported too"

# The library that must be loaded first, and why reports at the end are to be silenced.
_RUNTIMES = {
    "address": ("libasan", 'ASAN_OPTIONS="detect_leaks=0"'),
    "thread": ("libtsan", ""),
    "leak": ("liblsan", 'LSAN_OPTIONS="exitcode=0"'),
}


def effective_spec(spec: Spec) -> Spec:
    """Return the extension with the flags that the settings add."""
    settings = _config.settings()
    cflags, ldflags = [*(_DEBUG if settings.debug else ())], []
    cuda_cflags = _CUDA_DEBUG if settings.debug and spec.uses_cuda else ()
    if settings.sanitize:
        ldflags = [f"-fsanitize={','.join(settings.sanitize)}"]
        cflags += [*ldflags, "-fno-omit-frame-pointer", "-g"]
    return dataclasses.replace(
        spec,
        extra_cflags=(*spec.extra_cflags, *cflags),
        extra_cuda_cflags=(*spec.extra_cuda_cflags, *cuda_cflags) if spec.uses_cuda else (),
        extra_ldflags=(*spec.extra_ldflags, *ldflags),
    )


def check_runtime() -> None:
    """Check that the sanitizers' runtime is loaded: else it would end the process."""
    names = _config.settings().sanitize
    for name, (runtime, options) in _RUNTIMES.items():
        if name not in names or platform.system() != "Linux":
            continue
        if name == "leak" and "address" in names:
            continue  # part of it
        with open("/proc/self/maps", "rb") as maps:
            if not any(runtime.encode() in os.path.basename(line) for line in maps):
                raise ConfigError(
                    f"JITOPS_SANITIZE={name} needs the sanitizer's runtime in the process from its "
                    f'start: run it with LD_PRELOAD="$(${{CXX:-c++}} -print-file-name={runtime}.so)'
                    f'"{_SILENT.format(options) if options else ""}'
                )
