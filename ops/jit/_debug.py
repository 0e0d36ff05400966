"""The flags that ``JITOPS_DEBUG`` and ``JITOPS_SANITIZE`` add to an extension."""

import dataclasses
import platform
from pathlib import Path

from ops import _config
from ops._errors import ConfigError
from ops.jit._spec import Spec

_DEBUG = ("-O0", "-g", "-fno-omit-frame-pointer", "-DJITOPS_DEBUG")
_CUDA_DEBUG = ("-O0", "-g", "-lineinfo", "-DJITOPS_DEBUG")
# The libraries that must be loaded first. That of "address" finds leaks too.
_RUNTIMES = {"address": "libasan", "thread": "libtsan", "leak": "liblsan"}


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
    """Check that the sanitizer's runtime is loaded: else it would end the process."""
    names = _config.settings().sanitize
    runtime = next((its for name, its in _RUNTIMES.items() if name in names), None)
    if runtime is None or platform.system() != "Linux":
        return
    if runtime not in Path("/proc/self/maps").read_text(errors="replace"):
        raise ConfigError(
            f"JITOPS_SANITIZE={','.join(names)} needs the sanitizer's runtime in the process from "
            f'its start: run it with LD_PRELOAD="$(${{CXX:-c++}} -print-file-name={runtime}.so)". '
            f'ASAN_OPTIONS="detect_leaks=0" or LSAN_OPTIONS="exitcode=0" silences reports at the '
            f"end, because Python and torch leave much to it"
        )
