"""What is known of a binary before it is built: the request, and its digest.

A look-up must not run a compiler, so what a binary depends on comes in two parts. What is known
without one makes the digest, here. What only a build can tell stands in the entry's manifest, and
:mod:`ops.jit._facts` compares it. All of it is content: no path and no time of a file enters, so
that a cache, a checkout or an environment can move.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch

from ops._errors import ArgumentError
from ops.jit import _flags
from ops.jit._compile import _hardware, _toolchain
from ops.jit._spec import Spec

FORMAT = 4  # of the digest and the manifest: a change makes every entry a miss

# Variables that change what the compilers do without any flag saying so.
_ENVIRONMENT = ("CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "GCC_EXEC_PREFIX")
_CUDA_ENVIRONMENT = ("CC", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "CUDA_INC_PATH")


def request(spec: Spec) -> dict[str, Any]:
    """What is asked for, and the environment it is asked in: readable, and free of paths.

    Raises:
        ArgumentError: a source cannot be read.
    """
    flags = (*spec.extra_cflags, *spec.extra_cuda_cflags)
    native = any("=native" in flag for flag in flags)
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
        "files": _files(spec),
        "cuda": spec.uses_cuda,
        "standalone": spec.is_standalone,
        **_here(cuda=spec.uses_cuda, python=spec.is_python_module, native=native),
    }


def _here(*, cuda: bool, python: bool, native: bool) -> dict[str, Any]:
    """The part of a request that is of this machine."""
    names = (*_ENVIRONMENT, *(_CUDA_ENVIRONMENT if cuda else ()))
    return {
        "cxx_arguments": _toolchain.words_in("CXX")[1:],
        "torch": [torch.__version__, torch.version.git_version, torch.version.cuda],
        "cxx11_abi": torch.compiled_with_cxx11_abi(),
        "python": sysconfig.get_config_var("SOABI") if python else None,
        "platform": [sys.platform, platform.machine()],
        "cpu": sorted(_hardware.cpu_features()) if native else [],
        "environment": {name: os.environ[name] for name in names if name in os.environ},
    }


def again(before: dict[str, Any]) -> dict[str, Any]:
    """An earlier request, as it would be made of this machine, its sources and flags unchanged."""
    machine = _here(
        cuda=bool(before["cuda"]), python=bool(before["python"]), native=bool(before["cpu"])
    )
    return {**before, "format": FORMAT, **machine}


def digest(asked: dict[str, Any]) -> str:
    """The request as a hash."""
    return _sha256(json.dumps(asked, sort_keys=True).encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _content(path: Path, argument: str = "sources") -> str:
    try:
        return _sha256(path.read_bytes())
    except OSError as error:
        raise ArgumentError(f"{argument} must be readable files, got {path}: {error}") from error


def _files(spec: Spec) -> list[list[str]]:
    """Files that flags name and that become part of the binary."""
    found = []
    for argument in ("extra_cflags", "extra_cuda_cflags", "extra_ldflags"):
        for path in _flags.files(getattr(spec, argument)):
            found.append([path.name, _content(path, f"{argument}: files named in it")])
    return found
