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
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from ops._errors import ArgumentError
from ops.jit import _flags, _shell
from ops.jit._compile import _hardware, _toolchain
from ops.jit._spec import Spec

FORMAT = 6  # of the digest and the manifest: a change makes every entry a miss

# Variables that change what the compilers do without any flag saying so: LATER is none of a
# header's business. LD_LIBRARY_PATH, which linkers read too, changes nothing in what they write.
LATER = ("LIBRARY_PATH", "LD_RUN_PATH", "LDEMULATION", "GNUTARGET", "SOURCE_DATE_EPOCH")
_ENVIRONMENT = (
    *(*_flags.LEAD_TO_HEADERS, "GCC_EXEC_PREFIX", "COMPILER_PATH", "CCC_OVERRIDE_OPTIONS"),
    *("SDKROOT", "MACOSX_DEPLOYMENT_TARGET", *LATER),
)
_CUDA_ENVIRONMENT = (*_toolchain.NVCCS_VARIABLES, "NVCC_CCBIN", "CUDA_INC_PATH")
_FLAGS = ("extra_cflags", "extra_cuda_cflags", "extra_ldflags")


def request(spec: Spec) -> dict[str, Any]:
    """What is asked for, and the environment it is asked in: readable, and free of paths.

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
        "expanded": [word for one in _FLAGS for word in _shell.expanded(getattr(spec, one))],
        "files": _files(spec),
        "cuda": spec.uses_cuda,
        "standalone": spec.is_standalone,
        **_here(cuda=spec.uses_cuda, python=spec.is_python_module, native=_native(flags)),
    }


def _here(*, cuda: bool, python: bool, native: bool) -> dict[str, Any]:
    """The part of a request that is of this machine."""
    native = native or _native(_of_commands(cuda))
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


def _native(flags: Sequence[str]) -> bool:
    if not any(one in flag for flag in flags for one in ("native", "@")):
        return False  # at once: nearly always
    return any("=native" in word for word in _flags.words(flags))


def _of_commands(cuda: bool) -> list[str]:
    """The flags that variables add to the compilers' commands."""
    said = _toolchain.words_in("CXX")[1:]
    if cuda:
        command, *flags = _toolchain.NVCCS_VARIABLES
        said += [*_toolchain.words_in(command)[1:], *chain(*map(_toolchain.words_in, flags))]
    return _shell.quoted(said)


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
    for argument in _FLAGS:
        for path in _flags.files(getattr(spec, argument)):
            found.append([path.name, _content(path, f"{argument}: files named in it")])
    for path in _flags.files(_of_commands(spec.uses_cuda)):
        if not os.access(path, os.X_OK):  # a program counts by who it is
            found.append(
                [path.name, _content(path, "the compilers' variables: files named in them")]
            )
    return found
