"""Everything a binary depends on, as a digest and as a manifest.

A look-up must not run a compiler, so the dependencies come in two parts. What is known without one
(:func:`request`) makes the digest. What only a build can tell (:func:`facts`: who the compilers
are, which headers were really included) stands in the entry's manifest, and :func:`accepts`
compares it. All of it is content: no path and no time of a file enters, so that a cache, a checkout
or an environment can move. torch's, CUDA's and the system's headers are covered by the identities
of torch, nvcc and the compiler.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch

from ops.jit import _hardware, _store, _toolchain
from ops.jit._spec import Spec

FORMAT = 1  # of the digest and the manifest: a change makes every entry a miss

# Variables that change what the compilers do without any flag saying so.
_ENVIRONMENT = ("CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "GCC_EXEC_PREFIX")
_CUDA_ENVIRONMENT = ("CC", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "CUDA_INC_PATH")


def request(spec: Spec) -> dict[str, Any]:
    """What is asked for, and the environment it is asked in: readable, and free of paths."""
    flags = (*spec.extra_cflags, *spec.extra_cuda_cflags)
    names = (*_ENVIRONMENT, *(_CUDA_ENVIRONMENT if spec.with_cuda else ()))
    return {
        "format": FORMAT,
        "name": spec.name,
        "sources": [[path.name, _store.sha256(path.read_bytes())] for path in spec.sources],
        "cpp_sources": [_store.sha256(text.encode()) for text in spec.cpp_sources],
        "cuda_sources": [_store.sha256(text.encode()) for text in spec.cuda_sources],
        "functions": spec.functions,
        "implicit_headers": spec.inline and not spec.no_implicit_headers,
        "cflags": spec.extra_cflags,
        "cuda_cflags": spec.extra_cuda_cflags,
        "ldflags": spec.extra_ldflags,
        "cxx_arguments": _toolchain.words_of(os.environ.get("CXX", ""))[1:],
        "torch": [torch.__version__, torch.version.git_version, torch.version.cuda],
        "cxx11_abi": torch.compiled_with_cxx11_abi(),
        "python": sysconfig.get_config_var("SOABI") if spec.is_python_module else None,
        "platform": [sys.platform, platform.machine(), _libc()],
        "cpu": sorted(_hardware.cpu_features()) if any("=native" in flag for flag in flags) else [],
        "architectures": architectures(spec),
        "environment": {name: os.environ[name] for name in names if name in os.environ},
    }


def digest(asked: dict[str, Any]) -> str:
    """The request as a hash."""
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def architectures(spec: Spec) -> tuple[str, ...]:
    """GPU architectures the loader chooses: none where the flags name their own."""
    if not spec.with_cuda or any("arch" in flag for flag in spec.extra_cuda_cflags):
        return ()
    return _hardware.cuda_architectures()


def _libc() -> str:
    names = os.confstr_names if hasattr(os, "confstr_names") else {}
    return (os.confstr("CS_GNU_LIBC_VERSION") or "") if "CS_GNU_LIBC_VERSION" in names else ""


# ---- what only a build can tell ------------------------------------------------------------------


def facts(spec: Spec, headers: list[Path]) -> dict[str, Any]:
    """The compilers that built an entry and the headers they read, for its manifest."""
    compilers = {}
    for name, tool in _tools(spec).items():
        if tool is not None:
            version, identity = _toolchain.identity(tool)
            compilers[name] = {"version": version, "identity": identity}
    located = [_locate(spec, header) for header in headers]
    return {
        "compilers": compilers,
        "headers": sorted([root, name, _hash_header(spec, root, name)] for root, name in located),
    }


def changed(spec: Spec, digest_before: str, headers: list[Path], since: float) -> str | None:
    """What was edited while the compilers were at it: nobody knows which version they read."""
    if digest(request(spec)) != digest_before:
        return "a source"
    now = time.time()  # a clock ahead of ours, on a network file system, is no edit
    edited = (path for path in headers if path.is_file() and since < path.stat().st_mtime <= now)
    return next(map(str, edited), None)


def remember_compilers(spec: Spec, root: Path) -> None:
    """Keep who the compilers are under size and time of their files, for look-ups to come."""
    for tool in _tools(spec).values():
        if tool is not None:
            _store.remember(root, tool.stamp(), _toolchain.identity(tool)[1])


def accepts(spec: Spec, manifest: dict[str, Any], ask: bool) -> bool:
    """Whether an entry of the same digest is also of the same compilers and headers.

    Args:
        ask: may an unknown compiler be run and asked who it is?

    A compiler that is not on this machine cannot disagree: its entries serve.
    """
    try:
        for root, name, expected in manifest["headers"]:
            if _hash_header(spec, root, name) != expected:
                return False
        for kind, tool in _tools(spec).items():
            recorded = manifest["compilers"].get(kind)
            if tool is None or recorded is None:
                continue
            known = _store.recall(tool.stamp())
            if known is None and ask:
                known = _toolchain.identity(tool)[1]
            if known != recorded["identity"]:
                return False
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError):
        return False  # not a manifest of ours
    return True


def _tools(spec: Spec) -> dict[str, _toolchain.Tool | None]:
    tools = {"cxx": _toolchain.cxx()}
    if spec.with_cuda:
        tools["nvcc"] = _toolchain.nvcc()
    return tools


def _locate(spec: Spec, header: Path) -> tuple[int, str]:
    """A header as (number of its root, path below it), or (-1, absolute path) outside of all."""
    for number, root in enumerate(spec.header_roots):
        if header.is_relative_to(root):
            return number, str(header.relative_to(root))
    return -1, str(header)


def _hash_header(spec: Spec, root: int, name: str) -> str:
    """Its content, and which other folders have a header of that name, which may hide it."""
    roots = spec.header_roots
    path = Path(name) if root < 0 else roots[root] / name
    others = [
        str(number)
        for number, folder in enumerate(roots)
        if 0 <= root != number and (folder / name).is_file()
    ]
    try:
        return ":".join([_store.sha256(path.read_bytes()), *others])
    except OSError:
        return "missing"
