"""The parts of the loader that the ops and the commands of this package use, in one place."""

from __future__ import annotations

from ops.jit import _key
from ops.jit._build_directory import commands_of
from ops.jit._cache import _entries, _lock, _publish
from ops.jit._cache._bundle import export, import_into, read as read_bundle, verify as verify_bundle
from ops.jit._cache._entries import Entry, verify
from ops.jit._cache._eviction import Item, clean, evict, items
from ops.jit._cache._location import (
    configured_root,
    file_system,
    readable_roots,
    unusable,
    writable_root,
)
from ops.jit._cache._lock import exclusive
from ops.jit._compile import _compilers as compilers, _cpu as cpu, _gpu_archs as gpu_archs
from ops.jit._explain_miss import against, sentence
from ops.jit._spec import Spec


def last_failure(spec: Spec) -> str | None:
    """Return the error of the last build of this very extension, if that failed."""
    name = _entries.entry_name(spec.name, _key.digest(_key.request(spec)))
    for root in readable_roots():
        failure = _lock.last_failure(_publish.lock_path(root, name))
        if failure:
            return str(failure["failed"])
    return None


__all__ = [
    "Entry",
    "Item",
    "against",
    "clean",
    "commands_of",
    "compilers",
    "configured_root",
    "cpu",
    "evict",
    "exclusive",
    "export",
    "file_system",
    "gpu_archs",
    "import_into",
    "items",
    "last_failure",
    "read_bundle",
    "readable_roots",
    "sentence",
    "unusable",
    "verify",
    "verify_bundle",
    "writable_root",
]
