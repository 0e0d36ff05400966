"""The size, the age and the use of entries; and the removal of the least used."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ops.jit._cache import _entries, _location, _publish

_UNSEEN_FOR = 30 * 24 * 3600.0  # seconds that another host may use an entry without a lock


@dataclass(frozen=True)
class Item:
    """An entry, with its size and its use."""

    entry: _entries.Entry
    name: str  # of the extension
    is_replaceable: bool  # the loader makes it again by itself, and nobody waits for that
    size: int
    built: float
    used: float
    hits: int


def items(root: Path) -> list[Item]:
    """List all entries of a cache, the last used first."""
    found = map(_item, (path.parent for path in root.glob("*-????????????????/*/manifest.json")))
    return sorted(filter(None, found), key=lambda item: item.used, reverse=True)


def _item(folder: Path) -> Item | None:
    entry = _entries.open_entry(folder)
    if entry is None:
        return None
    size, used, hits = 0, 0.0, 0
    try:
        for path in os.scandir(folder):
            status = path.stat()
            size += status.st_blocks * 512
            if path.name == _entries.USED:
                used, hits = status.st_mtime, status.st_size
        built = (folder / "manifest.json").stat().st_mtime
    except OSError:
        return None  # deleted meanwhile
    name, replaceable = str(entry.manifest.get("name", "?")), entry.manifest.get("replaceable")
    return Item(entry, name, replaceable is True, size, built, max(used, built), hits)


def evict(root: Path, limit: int, newest: Path | None = None) -> list[Item]:
    """Delete the entries not used for longest until the cache is at most ``limit`` bytes.

    An entry that a live process uses stays, and so does ``newest``. Precompiled headers are evicted
    first, a new one too, so that it never evicts anything else.
    """
    present = items(root)
    total = sum(item.size for item in present)
    evicted = []
    for item in sorted(present, key=lambda item: (not item.is_replaceable, item.used)):
        if total <= limit:
            break
        is_newest = item.entry.folder == newest and not item.is_replaceable
        if not is_newest and remove(root, item):
            total -= item.size
            evicted.append(item)
    return evicted


def remove(root: Path, item: Item) -> bool:
    """Delete an entry unless a live process uses it; return whether it was deleted.

    Where the locks of other hosts may not be seen, one that was loaded of late stays.
    """
    try:
        used = item.entry.folder / _entries.USED
        descriptor = os.open(used, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError:  # it is gone, or belongs to somebody else
        return False
    try:
        mine = _publish.try_lock(descriptor)
        unseen = mine is None or _location.is_shared(root)
        unused = mine is not False and not (unseen and time.time() - item.used < _UNSEEN_FOR)
        if unused:
            _publish.discard(root, item.entry.folder)
        return unused
    finally:
        _publish.unlock(descriptor)


def clean(root: Path, is_unwanted: Callable[[Item], bool]) -> list[Item]:
    """Delete unwanted entries that are not in use, and what dead builders left."""
    _publish.sweep(root)
    return [item for item in items(root) if is_unwanted(item) and remove(root, item)]
