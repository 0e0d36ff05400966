"""Entries that appear and go: built in a private folder, renamed into place, deleted."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ops._errors import CacheError
from ops.jit._cache import _entries, _location
from ops.jit._cache._entries import Entry, Manifest

ALIVE = ".alive"  # in a staging folder, locked by its builder for as long as that lives
_ABANDONED_AFTER = 24 * 3600.0  # seconds, where no lock tells whether the builder lives


def lock_path(root: Path, name: str) -> Path:
    """Return the lock file of the builder of this name."""
    return root / "locks" / f"{name}.lock"


def log_path(root: Path, name: str) -> Path:
    """Return where the log of this name's last failed build is kept."""
    return root / "logs" / f"{name}.log"


@contextlib.contextmanager
def staging(root: Path, name: str) -> Iterator[Path]:
    """Make a private folder to build in, and sweep away those that dead builders left."""
    sweep(root)
    # Hidden until its lock is held, so that nobody takes it for an abandoned one.
    token = secrets.token_hex(4)
    hidden, folder = (root / "staging" / f"{dot}{name}.{token}" for dot in (".", ""))
    _location.make_folder(hidden)  # readable to all: the cache of an image serves any user
    descriptor = os.open(hidden / ALIVE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.write(descriptor, _location.this_host().encode())
        with contextlib.suppress(OSError):  # no locks here: its age will tell
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        hidden.rename(folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # published: it is no longer there
        shutil.rmtree(hidden, ignore_errors=True)
        os.close(descriptor)


def clear(folder: Path, keep: Sequence[str] = ()) -> None:
    """Delete what is in a staging folder, but for its lock and the files to keep."""
    for path in folder.iterdir():
        if path.name not in (ALIVE, *keep):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def publish(
    root: Path, folder: Path, library: Path, manifest: Manifest, keep: Sequence[str] = ()
) -> Entry:
    """Make the library built in ``folder`` an entry: flushed to disk, then renamed into place.

    Args:
        root: of the cache.
        folder: a staging folder.
        library: in the folder.
        manifest: holds at least ``name`` and ``digest``.
        keep: names of other files to keep.

    Where another builder has published the same in the meantime, theirs stays and ours is dropped.
    """
    size, digest = _entries.measure(library)
    whole = {**manifest, "library": {"file": library.name, "size": size, "sha256": digest}}
    clear(folder, (library.name, *keep))
    (folder / "manifest.json").write_text(json.dumps(whole))
    (folder / _entries.USED).touch(mode=0o644)
    for path in (folder / "manifest.json", library):
        with contextlib.suppress(OSError):  # no modes on this file system
            path.chmod(path.stat().st_mode & 0o555)
        _flush(path)
    _flush(folder)
    recorded = {k: v for k, v in manifest.items() if k not in ("seconds", "built", "library")}
    variant = _entries.sha256(json.dumps(recorded, sort_keys=True).encode())[:16]
    target = root / _entries.entry_name(manifest["name"], manifest["digest"]) / variant
    return place(root, folder, target) or Entry(target, whole)


def place(root: Path, folder: Path, target: Path) -> Entry | None:
    """Rename a finished folder into place; return the entry that was there, if that is whole."""
    (folder / ALIVE).unlink(missing_ok=True)
    for _ in range(3):
        _location.make_folder(target.parent)
        try:
            os.rename(folder, target)
        except OSError:
            theirs = _entries.open_entry(target)
            if theirs and _location.distrust(target) is None and _entries.verify(theirs):
                return theirs
            discard(root, target)  # there, but damaged, or not to be trusted
        else:
            _flush(target.parent)
            return None
    raise CacheError(f"{target} cannot be replaced")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some file systems cannot flush folders
            raise
    finally:
        os.close(descriptor)


# ---- delete --------------------------------------------------------------------------------------


def sweep(root: Path) -> None:
    """Delete what dead builders left."""
    for folder in (root / "staging").iterdir():
        if _is_abandoned(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _is_abandoned(folder: Path) -> bool:
    try:
        descriptor = os.open(folder / ALIVE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return _is_old(folder)
    try:
        if os.read(descriptor, 200).decode(errors="replace") != _location.this_host():
            return _is_old(folder)  # its lock may not be seen from here
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return _is_old(folder)
    else:
        return not folder.name.startswith(".") or _is_old(folder)
    finally:
        os.close(descriptor)


def _is_old(folder: Path) -> bool:
    try:
        return time.time() - folder.stat().st_mtime > _ABANDONED_AFTER
    except OSError:
        return False


def discard(root: Path, folder: Path) -> None:
    """Delete an entry: out of the way in one rename, so that nobody ever sees half of it."""
    aside = root / "staging" / f".discarded.{secrets.token_hex(8)}"
    try:
        os.rename(folder, aside)
    except FileNotFoundError:
        pass
    except OSError:
        # Folders in a lower layer of an image cannot be renamed. Without a manifest it is no entry.
        with contextlib.suppress(OSError):
            (folder / "manifest.json").unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(aside, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.parent.rmdir()  # if that was its last
