"""The request for an extension: all that is known of a library before it is built.

A look-up must not run a compiler, so a library's dependencies come in two parts. Those known
without a compiler make the digest, here. Those that only a build can tell are in the entry's
manifest, and :mod:`ops.jit._inputs` compares them. The request holds contents, and neither paths
nor times of files, so that a cache, a checkout or an environment can move.
"""

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
from ops.jit._cache._entries import sha256
from ops.jit._compile import _compilers
from ops.jit._spec import Spec

FORMAT = 12  # of the digest and the manifest: a change makes every entry a miss

# Variables that change the output of compilers and linkers without any flag. LD_LIBRARY_PATH, which
# linkers read too, does not.
_ENVIRONMENT = (
    *(*_compilers.HEADER_VARIABLES, "GCC_EXEC_PREFIX", "COMPILER_PATH", "CCC_OVERRIDE_OPTIONS"),
    *("SDKROOT", "MACOSX_DEPLOYMENT_TARGET"),
    *("LIBRARY_PATH", "LD_RUN_PATH", "LDEMULATION", "GNUTARGET", "SOURCE_DATE_EPOCH"),
)
_CUDA_ENVIRONMENT = (*_compilers.NVCC_VARIABLES, "NVCC_CCBIN", "CUDA_INC_PATH")
_FLAGS = ("extra_cflags", "extra_cuda_cflags", "extra_ldflags")
_AS_GIVEN = (*_FLAGS, "name", "functions", "is_standalone", "with_pytorch_error_handling")


def request(spec: Spec) -> dict[str, Any]:
    """Describe an extension and the environment it is requested in, readably and without paths."""
    flags = (*spec.extra_cflags, *spec.extra_cuda_cflags, *spec.extra_ldflags)
    return {
        "format": FORMAT,
        **{field: getattr(spec, field) for field in _AS_GIVEN},
        "sources": [[path.name, _content(path)] for path in spec.sources],
        "cpp_sources": [sha256(text.encode()) for text in spec.cpp_sources],
        "cuda_sources": [sha256(text.encode()) for text in spec.cuda_sources],
        "implicit_headers": spec.inline and not spec.no_implicit_headers,
        "files": _files(spec),
        "folders": _folders(spec),
        "cuda": spec.uses_cuda,
        **_here(cuda=spec.uses_cuda, python=spec.is_python_module, native=_flags.is_native(flags)),
    }


def _folders(spec: Spec) -> dict[str, Any]:
    """Describe how the folders of headers lie to each other, which decides what hides what."""
    roots = spec.header_roots
    within = [
        [i, str(b.relative_to(a))] for a in roots for i, b in enumerate(roots) if a in b.parents
    ]
    return {
        "include_paths": [roots.index(path) for path in spec.extra_include_paths],
        "sources": [roots.index(path.parent) for path in spec.sources],
        "within": within,
    }


def _here(*, cuda: bool, python: bool, native: bool) -> dict[str, Any]:
    """Describe this machine."""
    features: list[str] = []
    if native or _flags.is_native(tuple(_of_commands(cuda))):
        from ops.jit._compile import _cpu  # few extensions need it

        features = sorted(_cpu.features())
    names = (*_ENVIRONMENT, *(_CUDA_ENVIRONMENT if cuda else ()))
    return {
        "cxx_arguments": _compilers.words_in("CXX")[1:],
        "torch": [torch.__version__, torch.version.git_version, torch.version.cuda],
        "cxx11_abi": torch.compiled_with_cxx11_abi(),
        "python": sysconfig.get_config_var("SOABI") if python else None,
        "platform": [sys.platform, platform.machine()],
        "cpu": features,
        "environment": {name: os.environ[name] for name in names if name in os.environ},
    }


def _of_commands(cuda: bool) -> list[str]:
    """Return the flags that variables add to the compilers' commands, quoted as flags are."""
    words = _compilers.words_in("CXX")[1:]
    if cuda:
        command, *flags = _compilers.NVCC_VARIABLES
        words += [*_compilers.words_in(command)[1:], *chain(*map(_compilers.words_in, flags))]
    return [shlex.quote(word).replace("$", "$$") for word in words]


def again(before: dict[str, Any]) -> dict[str, Any]:
    """Make an earlier request anew on this machine, with the same sources and flags."""
    cuda, python, native = (bool(before[name]) for name in ("cuda", "python", "cpu"))
    return {**before, "format": FORMAT, **_here(cuda=cuda, python=python, native=native)}


def digest(asked: dict[str, Any]) -> str:
    """Return the digest of a request."""
    return sha256(json.dumps(asked, sort_keys=True).encode())


def _content(path: Path, argument: str = "sources") -> str:
    try:
        return sha256(path.read_bytes())
    except OSError as error:
        raise ArgumentError(f"{argument} must be readable files, got {path}: {error}") from error


def _files(spec: Spec) -> list[list[str]]:
    """Describe the files that flags name and that no tool reports."""
    found = [
        [path.name, _content(path, f"{argument}: files named in it")]
        for argument in _FLAGS
        for path in _flags.files(getattr(spec, argument), linked=argument == "extra_ldflags")
    ]
    for path in _flags.files(_of_commands(spec.uses_cuda)):
        if not os.access(path, os.X_OK):  # a program counts by who it is
            found.append([path.name, _content(path, "the compilers' variables: files in them")])
    return found
