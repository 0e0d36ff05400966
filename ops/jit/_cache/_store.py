"""Content-addressed folders: find, verify, publish, mark as used. Knows nothing of C++.

::

    <root>/<name>-<digest>/<variant>/    one published entry: manifest.json, the library, and so on
    <root>/staging/<name>-<digest>.*     builds in progress, one private folder each
    <root>/locks/<name>-<digest>.lock    held by the builder of that digest
    <root>/logs/<name>-<digest>.log      the last failed build's log
    <root>/failures/<name>-<digest>.json what is remembered of it
    <root>/notes/                        small remembered facts

An entry appears by one rename and never changes, so a reader needs no lock. A reader verifies the
library's hash, so that a truncated, corrupted or swapped file is a miss and never loaded. The one
file that grows is ``used``: a byte for each load, where the loader may write. Its size counts them,
its time is that of the last, and a lock on it says that a live process has the library loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ops._errors import CacheError
from ops.jit._cache import _roots, _staging

Manifest = dict[str, Any]
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Entry:
    """A published library."""

    folder: Path
    manifest: Manifest

    @property
    def library(self) -> Path:
        """The shared library."""
        return self.folder / str(self.manifest["library"]["file"])

    @property
    def place(self) -> str:
        """Where it lies, for people."""
        return str(self.library)

    def files(self) -> list[str]:
        """What is in it."""
        return sorted(path.name for path in self.folder.iterdir() if path.is_file())

    def content(self, name: str) -> bytes | None:
        """A file of it; ``None`` if it has none of that name."""
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError:
            return None


# ---- find ----------------------------------------------------------------------------------------


def stem(name: str, digest: str) -> str:
    """What all files of one digest are called."""
    return f"{name}-{digest[:16]}"


def find(stem: str, wanted: Callable[[Manifest], bool]) -> Entry | None:
    """An entry of this stem whose manifest is wanted, its library verified; or ``None``."""
    return _find(stem, wanted, verify)


def glance(stem: str, wanted: Callable[[Manifest], bool]) -> Entry | None:
    """As :func:`find`, the library yet to be verified: it is there, of the right size."""
    return _find(stem, wanted, _is_there)


def _find(
    stem: str, wanted: Callable[[Manifest], bool], sound: Callable[[Entry], bool]
) -> Entry | None:
    for root in _roots.readable_roots():
        for folder in _subfolders(root / stem):
            entry = open_entry(folder)
            if (
                entry
                and wanted(entry.manifest)
                and _roots.distrust(folder) is None
                and sound(entry)
            ):
                return entry
    return None


def _subfolders(folder: Path) -> list[Path]:
    try:
        return [folder / name for name in sorted(os.listdir(folder))]
    except OSError:
        return []


def open_entry(folder: Path) -> Entry | None:
    """The entry in a folder, its library not verified; ``None`` if there is none."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        return Entry(folder, manifest) if isinstance(manifest, dict) else None
    except (OSError, ValueError, RecursionError):
        return None  # not an entry, or no longer one


def verify(entry: Entry) -> bool:
    """Whether the library is, byte for byte, the one that was published."""
    try:
        expected = entry.manifest["library"]
        library = entry.library
        if library.parent != entry.folder or _roots.distrust(library):
            return False
        size, digest = _measure(library)
        return bool(size == expected["size"] and digest == expected["sha256"])
    except (OSError, KeyError, TypeError, ValueError):
        return False


def _is_there(entry: Entry) -> bool:
    try:
        return bool(entry.library.stat().st_size == entry.manifest["library"]["size"])
    except (OSError, KeyError, TypeError, ValueError):
        return False


def sha256(content: bytes) -> str:
    """Hexadecimal digest."""
    return hashlib.sha256(content).hexdigest()


def _measure(path: Path) -> tuple[int, str]:
    """Size and digest; in blocks, since a precompiled header is most of a gigabyte."""
    size, digest = 0, hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            size += len(block)
            digest.update(block)
    return size, digest.hexdigest()


# ---- publish -------------------------------------------------------------------------------------


def lock_path(root: Path, stem: str) -> Path:
    """The lock of the builder of this stem."""
    return root / "locks" / f"{stem}.lock"


def log_path(root: Path, stem: str) -> Path:
    """Where the log of this stem's last failed build is kept."""
    return root / "logs" / f"{stem}.log"


def publish(
    root: Path,
    folder: Path,
    library: Path,
    facts: Manifest,
    about: Manifest,
    keep: Sequence[str] = (),
) -> Entry:
    """Make the library built in ``folder`` an entry: flushed to disk, then renamed into place.

    ``about`` holds at least ``name`` and ``digest``; ``facts`` tell this entry from others of the
    same digest; ``keep`` names other files to keep. Where another builder has published the same in
    the meantime, theirs stays and ours is dropped.
    """
    size, digest = _measure(library)
    manifest: Manifest = {
        **about,
        **facts,
        "library": {"file": library.name, "size": size, "sha256": digest},
    }
    for path in folder.iterdir():
        if path.name not in (library.name, _staging.ALIVE, *keep):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    (folder / "used").touch(mode=0o644)
    for path in (folder / "manifest.json", library):
        path.chmod(path.stat().st_mode & 0o555)
        _flush(path)
    _flush(folder)

    variant = sha256(json.dumps(facts, sort_keys=True).encode())[:16]
    target = root / stem(about["name"], about["digest"]) / variant
    return place(root, folder, target) or Entry(target, manifest)


def place(root: Path, folder: Path, target: Path) -> Entry | None:
    """Rename a finished folder into place; the entry that was there before, if it is whole."""
    (folder / _staging.ALIVE).unlink(missing_ok=True)
    for _ in range(3):
        target.parent.mkdir(mode=0o755, exist_ok=True)
        try:
            os.rename(folder, target)
        except OSError:
            theirs = open_entry(target)
            if theirs and verify(theirs):
                return theirs
            _staging.discard(root, target)  # there, but damaged
        else:
            _flush(target.parent)
            return None
    raise CacheError(f"{target} cannot be replaced")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
