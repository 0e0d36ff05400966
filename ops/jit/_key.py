"""The request for an extension, which is all that is known of a library before it is built.

A look-up must not run a compiler, so what a library depends on comes in two parts. What is known
without one makes the digest, here. What only a build can tell is in the entry's manifest, and
:mod:`ops.jit._inputs` compares it. The request holds contents, and neither paths nor times of
files, so that a cache, a checkout or an environment can move.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import sys
import sysconfig
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from ops._errors import ArgumentError
from ops.jit import _flags
from ops.jit._compile import _compilers
from ops.jit._spec import Spec

FORMAT = 7  # of the digest and the manifest: a change makes every entry a miss

# Variables that change what compilers and linkers do without any flag. LD_LIBRARY_PATH, which
# linkers read too, changes nothing in what they write.
_ENVIRONMENT = (
    *(*_compilers.HEADER_VARIABLES, "GCC_EXEC_PREFIX", "COMPILER_PATH", "CCC_OVERRIDE_OPTIONS"),
    *("SDKROOT", "MACOSX_DEPLOYMENT_TARGET"),
    *("LIBRARY_PATH", "LD_RUN_PATH", "LDEMULATION", "GNUTARGET", "SOURCE_DATE_EPOCH"),
)
_CUDA_ENVIRONMENT = (*_compilers.NVCC_VARIABLES, "NVCC_CCBIN", "CUDA_INC_PATH")
_FLAGS = ("extra_cflags", "extra_cuda_cflags", "extra_ldflags")


def request(spec: Spec) -> dict[str, Any]:
    """Describe an extension and the environment it is requested in, readably and without paths.

    Raises:
        ArgumentError: a source cannot be read.
    """
    flags = (*spec.extra_cflags, *spec.extra_cuda_cflags, *spec.extra_ldflags)
    return {
        "format": FORMAT,
        "name": spec.name,
        "sources": [[path.name, _content(path)] for path in spec.sources],
        "cpp_sources": [_sha256(text.encode()) for text in spec.cpp_sources],
        "cuda_sources": [_sha256(text.encode()) for text in spec.cuda_sources],
        "functions": spec.functions,
        "implicit_headers": spec.inline and not spec.no_implicit_headers,
        "error_handling": spec.with_pytorch_error_handling,
        "cflags": spec.extra_cflags,
        "cuda_cflags": spec.extra_cuda_cflags,
        "ldflags": spec.extra_ldflags,
        "expanded": [word for one in _FLAGS for word in _flags.expanded(getattr(spec, one))],
        "files": _files(spec),
        "cuda": spec.uses_cuda,
        "standalone": spec.is_standalone,
        **_here(cuda=spec.uses_cuda, python=spec.is_python_module, native=_flags.is_native(flags)),
    }


def _here(*, cuda: bool, python: bool, native: bool) -> dict[str, Any]:
    """Describe this machine."""
    native = native or _flags.is_native(tuple(_of_commands(cuda)))
    names = (*_ENVIRONMENT, *(_CUDA_ENVIRONMENT if cuda else ()))
    return {
        "cxx_arguments": _compilers.words_in("CXX")[1:],
        "torch": [torch.__version__, torch.version.git_version, torch.version.cuda],
        "cxx11_abi": torch.compiled_with_cxx11_abi(),
        "python": sysconfig.get_config_var("SOABI") if python else None,
        "platform": [sys.platform, platform.machine()],
        "cpu": _cpu_features() if native else [],
        "environment": {name: os.environ[name] for name in names if name in os.environ},
    }


def _cpu_features() -> list[str]:
    from ops.jit._compile import _cpu  # few extensions need it

    return sorted(_cpu.features())


def _of_commands(cuda: bool) -> list[str]:
    """Return the flags that variables add to the compilers' commands, quoted as flags are."""
    words = _compilers.words_in("CXX")[1:]
    if cuda:
        command, *flags = _compilers.NVCC_VARIABLES
        words += [*_compilers.words_in(command)[1:], *chain(*map(_compilers.words_in, flags))]
    return [shlex.quote(word).replace("$", "$$") for word in words]


def again(before: dict[str, Any]) -> dict[str, Any]:
    """Make an earlier request anew on this machine, with the same sources and flags."""
    machine = _here(
        cuda=bool(before["cuda"]), python=bool(before["python"]), native=bool(before["cpu"])
    )
    return {**before, "format": FORMAT, **machine}


def digest(asked: dict[str, Any]) -> str:
    """Return the digest of a request."""
    return _sha256(json.dumps(asked, sort_keys=True).encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _content(path: Path, argument: str = "sources") -> str:
    try:
        return _sha256(path.read_bytes())
    except OSError as error:
        raise ArgumentError(f"{argument} must be readable files, got {path}: {error}") from error


def _files(spec: Spec) -> list[list[str]]:
    """Describe the files that flags name and that no tool reports."""
    found = []
    for argument in _FLAGS:
        for path in _flags.files(getattr(spec, argument)):
            found.append([path.name, _content(path, f"{argument}: files named in it")])
    for path in _flags.files(_of_commands(spec.uses_cuda)):
        if not os.access(path, os.X_OK):  # a program counts by who it is
            found.append(
                [path.name, _content(path, "the compilers' variables: files named in them")]
            )
    return found
