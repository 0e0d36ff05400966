"""Cache entries in commands: their names, and their description in words."""

from __future__ import annotations

from collections.abc import Sequence

from ops._core import dispatch
from ops._core.selection import DEVICE_OF
from ops._errors import ArgumentError
from ops.jit import Extension, _admin

HELP = "an op, or the start of an extension's name or of an entry's digest"
_SHORTEST = 4  # characters of a digest


def items() -> list[_admin.eviction.Item]:
    """All entries of all caches."""
    return [one for root in _admin.location.readable_roots() for one in _admin.eviction.items(root)]


def of_op(name: str) -> dict[str, Extension]:
    """The extensions of an op, by back end; empty if the op does not exist."""
    op = dispatch.known().get(name)
    found = {backend: op.extension(backend) for backend in DEVICE_OF} if op else {}
    return {backend: extension for backend, extension in found.items() if extension}


def of_extension(name: str) -> Extension | None:
    """The extension of an op that has this name."""
    for op in dispatch.known():
        for extension in of_op(op).values():
            if extension.name == name:
                return extension
    return None


def matching(name: str, among: Sequence[_admin.eviction.Item]) -> list[_admin.eviction.Item]:
    """The entries that a name stands for."""
    names = {extension.name for extension in of_op(name).values()}
    return [item for item in among if item.name in names or _is_meant(name, item)]


def _is_meant(name: str, item: _admin.eviction.Item) -> bool:
    place = "/".join(item.entry.folder.parts[-2:])  # name-digest/variant
    digest = str(item.entry.manifest.get("digest"))
    return place.startswith(name) or (len(name) >= _SHORTEST and digest.startswith(name))


def refuse(name: str) -> ArgumentError:
    """The error for an unknown name."""
    return ArgumentError(
        f"NAME must be {HELP} in the cache, got {name!r}; the ops are {', '.join(dispatch.known())}"
    )


def entries(count: int, kind: str = "") -> str:
    """A number of entries, in words; ``kind`` as in ``new ``."""
    return f"{count} {kind}entr{'y' if count == 1 else 'ies'}"


def target(entry: _admin.entries.Entry) -> str:
    """The machines that an entry is for: a CPU level, and the architectures of GPUs."""
    _, machine = entry.manifest.get("request", {}).get("platform", ("", "such"))
    flags = entry.manifest.get("request", {}).get("extra_cflags", ())
    levels = [flag.removeprefix("-march=") for flag in flags if flag.startswith("-march=")]
    level = levels[-1] if levels else f"any {machine} CPU"
    return ", ".join([level, *entry.manifest.get("architectures", ())])
