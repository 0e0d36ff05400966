"""Entries of the cache: found, verified, marked as in use. Knows nothing of C++.

::

    <root>/<name>-<digest>/<variant>/    one published entry: manifest.json, the library, and so on
    <root>/staging/<name>-<digest>.*     builds in progress, one private folder each
    <root>/locks/<name>-<1 digit>.lock   held by the builder of that digest
    <root>/logs/<name>-<digest>.log      the last failed build's log
    <root>/bundles/                      bundles in use, unpacked

An entry appears by one rename and never changes, so a reader needs no lock. A reader verifies the
library's digest, so that a damaged or exchanged file is a miss and never loaded. Only the file
``used`` grows, by a byte for each load, where the loader may write. A lock on it says that a live
process uses the entry.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ops.jit._cache import _location

Manifest = dict[str, Any]
USED = "used"
# By the entry's folder, open for as long as this process uses it: the kernel ends the locks.
_in_use: dict[Path, int] = {}


@dataclass(frozen=True)
class Entry:
    """A published library."""

    folder: Path
    manifest: Manifest

    @property
    def library(self) -> Path:
        """The shared library, or the program."""
        return self.folder / str(self.manifest["library"]["file"])

    @property
    def name(self) -> str:
        """The entry's own two folders, as commands show them."""
        return "/".join(self.folder.parts[-2:])


def entry_name(name: str, digest: str) -> str:
    """Return the name that all files of one digest begin with."""
    return f"{name}-{digest[:16]}"


def find(
    name: str, accepts: Callable[[Manifest], bool], first: Sequence[Path] = ()
) -> Entry | None:
    """Find an entry of this name whose manifest is accepted, and verify it.

    ``first`` are folders to look into before the caches.
    """
    for root in (*first, *_location.readable_roots()):
        for folder in sorted((root / name).glob("*")):
            entry = open_entry(folder)
            if entry and accepts(entry.manifest) and problem(entry) is None:
                return entry
    return None


def open_entry(folder: Path) -> Entry | None:
    """Read the entry in a folder, without its library; ``None`` if there is none."""
    path = folder / "manifest.json"
    try:
        # To open a special file may block.
        manifest = json.loads(path.read_bytes()) if path.is_file() else {}
        return Entry(folder, manifest) if "file" in manifest["library"] else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None  # not an entry, or no longer one


def problem(entry: Entry) -> str | None:
    """Return why an entry may not be loaded: it is not, byte for byte, what its builder left."""
    try:
        expected, library, folder = entry.manifest["library"], entry.library, entry.folder
        if library.parent == folder and library.is_file():
            places = (folder.parent, folder, folder / "manifest.json", library)
            if reason := next(filter(None, map(_location.distrust, places)), None):
                return reason
            if digest_of(library) == expected["sha256"]:
                return None
    except (OSError, KeyError, TypeError, ValueError):
        pass  # its manifest is not one, or something of it has just gone
    return "its library is damaged"


def sha256(content: bytes) -> str:
    """Return the hexadecimal digest."""
    return hashlib.sha256(content).hexdigest()


def digest_of(path: Path | str) -> str:
    """Return the digest of a file, read in blocks because it may be a gigabyte."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def mark_in_use(folder: Path) -> bool:
    """Say that this process uses the entry in ``folder``, from now until it is released.

    Best effort: where there are no locks, or this user cannot write, the load goes on without.
    """
    try:
        descriptor = os.open(folder / USED, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    except OSError:
        pass  # no locks on this file system
    with contextlib.suppress(OSError), open(folder / USED, "ab", 0) as used:
        used.write(b".")
    release(folder)  # one of that name that is no longer there, or its lock held twice
    _in_use[folder] = descriptor
    return True


def release(folder: Path) -> None:
    """Undo :func:`mark_in_use`, so that the entry may be deleted."""
    descriptor = _in_use.pop(folder, None)
    if descriptor is not None:
        os.close(descriptor)
