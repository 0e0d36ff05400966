"""What only a build can tell of a binary: its compilers, the headers they read, where it can run.

It stands in an entry's manifest. torch's, CUDA's and the system's headers are not among it: the
identities of torch, nvcc and the compiler vouch for them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ops._errors import ToolchainError
from ops.jit import _flags, _included, _key
from ops.jit._cache import _notes
from ops.jit._compile import _hardware, _headers, _toolchain
from ops.jit._spec import Spec

_TOO_MANY = 10_000  # files beside the sources: looking at more takes longer than is worth it


def of(spec: Spec, read: _headers.Read) -> dict[str, Any]:
    """For the manifest of what has just been built, having read these headers."""
    compilers = {}
    for name, tool in _tools(spec.uses_cuda).items():
        if tool is not None:
            version, identity = _toolchain.identity(tool)
            compilers[name] = {"version": version, "identity": identity}
    return {
        "compilers": compilers,
        **_included.facts(spec, read.own, read.vouched),
        "libc": _libc(),
        "architectures": architectures(spec),
    }


def architectures(spec: Spec) -> tuple[str, ...]:
    """GPU architectures the loader chooses: none where the flags name their own.

    Raises:
        ToolchainError: there is nothing to choose from.
    """
    if not spec.uses_cuda or any("arch" in flag for flag in spec.extra_cuda_cflags):
        return ()
    return _hardware.cuda_architectures()


def changed_meanwhile(spec: Spec, digest: str, facts: dict[str, Any], since: float) -> str | None:
    """What was edited while the compilers were at it: nobody knows which version they read.

    Args:
        facts: what :func:`of` has made of it all, in the meantime too.
    """
    if _key.digest(_key.request(spec)) != digest:
        return "a source"
    now = time.time()
    for _, name, content in facts["headers"]:
        if content == _included.MISSING:
            return str(name)
    for path in _included.files(spec, facts):
        if path.is_file():
            status = path.stat()
            # What is moved here keeps the time of its last edit. A clock ahead of ours, on a
            # network file system, is no edit.
            if any(since < when <= now for when in (status.st_mtime, status.st_ctime)):
                return str(path)
    return None


def remember_compilers(spec: Spec, root: Path) -> None:
    """Keep who the compilers are under size and time of their files, for look-ups to come."""
    for tool in _tools(spec.uses_cuda).values():
        if tool is not None:
            _notes.remember(root, tool.stamp(), _toolchain.identity(tool)[1])


def surroundings(spec: Spec) -> str:
    """All that a failed build may have failed of, beyond the request: when it changes, try again.

    Sizes and times of files, not contents: to try once too often does no harm.
    """
    stamps: list[object] = [
        tool.stamp() if tool else None for tool in _tools(spec.uses_cuda).values()
    ]
    stamps += [_state(place) for place in _installed_to(spec)]
    ninja = _toolchain.ninja_folder()
    seen: list[object] = [stamps, str(ninja), os.environ.get("PATH")]
    try:
        seen.append(architectures(spec))
    except ToolchainError as error:
        seen.append(str(error))
    seen += [_state(path) for path in _named(spec)]
    led_to = itertools.chain(*map(_flags.folders_in, _flags.LEAD_TO_HEADERS))
    for root in (*spec.header_roots, *led_to):
        for folder, _, names in os.walk(root):
            for name in names:
                seen.append(_state(Path(folder, name)))
            if len(seen) > _TOO_MANY:
                return f"not looked at: {time.time()}"
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


def _state(path: Path) -> tuple[str, int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return str(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _named(spec: Spec) -> list[Path]:
    """The files that flags name: also the libraries, which may lack what was undefined."""
    flags = (*spec.extra_cflags, *spec.extra_cuda_cflags, *spec.extra_ldflags)
    return _flags.all_files(flags, _folders_of_system_libraries())


def _folders_of_system_libraries() -> list[Path]:
    kind = sysconfig.get_config_var("MULTIARCH") or "none"
    return [Path(one) for one in ("/usr/lib", "/usr/lib64", f"/usr/lib/{kind}", "/usr/local/lib")]


def _installed_to(spec: Spec) -> list[Path]:
    """What changes when a package is installed that may have been missing."""
    kind = sysconfig.get_config_var("MULTIARCH") or "none"
    system = ["/usr/include", f"/usr/include/{kind}", "/usr/local/include", "/etc/ld.so.cache"]
    system += ["/var/lib/dpkg/status", *map(str, _folders_of_system_libraries())]
    ours = [Path(sys.prefix, name) for name in ("include", "lib", "conda-meta")]
    python = [Path(sysconfig.get_path(name)) for name in ("include", "purelib")]
    linked = _flags.library_folders(spec.extra_ldflags)
    return [*map(Path, system), *ours, *python, *linked]


# ---- comparison ----------------------------------------------------------------------------------


def accepts(spec: Spec, manifest: dict[str, Any], ask: bool) -> bool:
    """Whether an entry of the same digest serves here.

    Args:
        ask: run a compiler whose identity is not remembered, to learn it. One that is not on the
            machine cannot disagree.
    """
    return next(differences(spec, manifest, ask), None) is None


def differences(spec: Spec, manifest: dict[str, Any], ask: bool) -> Iterator[str]:
    """Why an entry of the same digest does not serve here; see :func:`accepts`."""
    try:
        yield from _included.differences(spec, manifest)
        for needed in _missing(spec, manifest["architectures"]):
            yield f"GPU architecture {needed} is not in it"
        yield from _of_machine(manifest, spec.uses_cuda, ask)
    except UNREADABLE:
        yield "its manifest cannot be read"


# What comes of a manifest that is none.
UNREADABLE = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, OSError)


def of_machine(manifest: dict[str, Any]) -> Iterator[str]:
    """Why an entry, of whichever extension, does not serve on this machine."""
    return _of_machine(manifest, bool(manifest["request"]["cuda"]), ask=True)


def _of_machine(manifest: dict[str, Any], with_cuda: bool, ask: bool) -> Iterator[str]:
    if _version(manifest["libc"]) > _version(_libc()):
        yield f"libc {manifest['libc']} → {_libc()}"
    for kind, tool in ({} if manifest.get("imported") else _tools(with_cuda)).items():
        recorded = manifest["compilers"].get(kind)
        if tool is None or recorded is None:
            continue
        known = _notes.recall(tool.stamp())
        if known is None and ask:
            known = _toolchain.identity(tool)[1]
        if known != recorded["identity"]:
            now = _toolchain.identity(tool)[0] if ask else "another one, or one not asked yet"
            yield f"{kind}: {recorded['version']} → {now}"


def _tools(with_cuda: bool) -> dict[str, _toolchain.Tool | None]:
    tools = {"cxx": _toolchain.cxx()}
    if with_cuda:
        tools["nvcc"] = _toolchain.nvcc()
    return tools


def _missing(spec: Spec, built_for: list[str]) -> list[str]:
    try:
        needed = architectures(spec)
    except ToolchainError:
        return []  # no GPU here, and none named: nothing can be too little
    return [one for one in needed if not _hardware.serves(built_for, one)]


def _libc() -> str:
    names = os.confstr_names if hasattr(os, "confstr_names") else {}
    return (os.confstr("CS_GNU_LIBC_VERSION") or "") if "CS_GNU_LIBC_VERSION" in names else ""


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)))
