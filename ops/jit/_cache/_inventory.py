"""What is in a cache, how large, how old, how much used; and the removal of what is too much."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ops.jit._cache import _roots, _staging, _store, _usage

_BLIND_FOR = 30 * 24 * 3600.0  # seconds
_TRACES_LAST = 7 * 24 * 3600.0  # seconds, for logs, locks and failures of what is no longer there


@dataclass(frozen=True)
class Item:
    """An entry, and what its folder tells of its use."""

    entry: _store.Entry
    size: int
    built: float
    used: float
    hits: int

    @property
    def name(self) -> str:
        """Of the extension."""
        return str(self.entry.manifest.get("name", "?"))

    @property
    def replaceable(self) -> bool:
        """Whether it is made again by itself, and nobody waits for that."""
        return self.entry.manifest.get("replaceable") is True


def items(root: Path) -> list[Item]:
    """All entries of a cache, the last used first."""
    found = [item for folder in _entry_folders(root) if (item := _item(folder))]
    return sorted(found, key=lambda item: item.used, reverse=True)


def _entry_folders(root: Path) -> Iterator[Path]:
    for manifest in root.glob("*-????????????????/*/manifest.json"):
        yield manifest.parent


def _item(folder: Path) -> Item | None:
    entry = _store.open_entry(folder)
    if entry is None:
        return None
    size, used, hits = 0, 0.0, 0
    try:
        for path in os.scandir(folder):
            status = path.stat()
            size += status.st_blocks * 512
            if path.name == "used":
                used, hits = status.st_mtime, status.st_size
        built = (folder / "manifest.json").stat().st_mtime
    except OSError:
        return None  # deleted meanwhile
    return Item(entry, size, built, max(used, built), hits)


# ---- removal -------------------------------------------------------------------------------------


def evict(root: Path, limit: int, spare: Path | None = None) -> list[Item]:
    """Delete what was not used for longest until the cache is at most ``limit`` bytes.

    What a live process has loaded stays, and so does the entry in the folder ``spare``, which has
    just come. What is replaceable goes first, and makes nothing else go: rather than that it goes
    itself.
    """
    present = items(root)
    total = sum(item.size for item in present)
    newest = next((item for item in present if item.entry.folder == spare), None)
    humble = newest is not None and newest.replaceable
    evicted = []
    for item in sorted(present, key=lambda item: (not item.replaceable, item.used)):
        if total <= limit or (humble and not item.replaceable):
            break
        if item is not newest and remove(root, item):
            total -= item.size
            evicted.append(item)
    if newest and humble and total > limit and remove(root, newest):
        evicted.append(newest)
    return evicted


def remove(root: Path, item: Item) -> bool:
    """Delete an entry unless a live process has it loaded; whether it was.

    Where the locks of other hosts may not be seen, one that was loaded of late stays.
    """
    with _usage.locked(item.entry.folder / "used") as mine:
        blind = mine is None or _roots.is_shared(root)
        unused = mine is not False and not (blind and time.time() - item.used < _BLIND_FOR)
        if unused:
            _staging.discard(root, item.entry.folder)
    return unused


def clean(root: Path, unwanted: Callable[[Item], bool]) -> list[Item]:
    """Delete the entries that are unwanted and not in use, and the traces of what is not there."""
    removed = [item for item in items(root) if unwanted(item) and remove(root, item)]
    _staging.sweep(root)
    sweep_traces(root, older_than=0.0)
    return removed


def sweep_traces(root: Path, older_than: float = _TRACES_LAST) -> None:
    """Delete logs, failures and locks of extensions that the cache does not hold."""
    now = time.time()
    for part in ("logs", "failures", "locks"):
        with contextlib.suppress(OSError):
            for path in (root / part).iterdir():
                there = (root / path.stem).is_dir() or (root / path.name.split(".")[0]).is_dir()
                if not there and now - path.stat().st_mtime > older_than:
                    _unlink_unless_locked(path)


def _unlink_unless_locked(path: Path) -> None:
    with _usage.locked(path) as mine, contextlib.suppress(OSError):
        if mine is not False:
            path.unlink()
