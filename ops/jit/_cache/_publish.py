"""One builder per key: its lock, its private folder, and the rename that makes the entry.

The kernel takes a lock back when its holder dies. The lock spares work and is not needed for
safety. Two builders at once would each work in a folder of their own and publish by one rename.
"""

import contextlib
import fcntl
import json
import os
import platform
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ops._errors import BuildTimeoutError, CacheError
from ops.jit._cache import _entries, _location
from ops.jit._cache._entries import Entry, Manifest

_PATIENCE = 2.0  # seconds of waiting before a word is said about it
_PAUSE = 0.05  # seconds between two attempts
_YOUNG = 10.0  # seconds after which a living builder has surely locked its folder
_ABANDONED_AFTER = 24 * 3600.0  # seconds, where no lock tells whether the builder lives


def lock_path(root: Path, name: str, digest: str) -> Path:
    """Return the lock file of the builder of an extension.

    An extension has at most 16 of them, however often it is edited, so that none is ever deleted.
    """
    return root / "locks" / f"{name}-{digest[0]}.lock"


def log_path(root: Path, name: str) -> Path:
    """Return where the log of this name's last failed build is kept."""
    return root / "logs" / f"{name}.log"


@dataclass(frozen=True)
class Lock:
    """A lock that is held; its file tells those that wait who holds it, and why a build failed."""

    descriptor: int
    is_exclusive: bool  # False where the file system has no locks
    before: dict[str, Any]  # the note of the last holder: its failure, if it failed

    def write(self, **told: Any) -> None:
        """Tell something to those that wait for this lock."""
        content = json.dumps({"since": time.time(), **told}).encode()
        with contextlib.suppress(OSError):  # a full disk is no reason to fail
            os.ftruncate(self.descriptor, 0)
            os.pwrite(self.descriptor, content, 0)


@contextlib.contextmanager
def exclusive(
    path: Path, name: str, timeout: float, on_wait: Callable[[str], None]
) -> Iterator[Lock]:
    """Hold the lock at ``path`` while building ``name``.

    ``on_wait`` gets a line that says who is waited for, once the wait is noticeable.
    """
    started, told = time.monotonic(), False
    descriptor = _open(path)
    try:
        while (held := try_lock(descriptor)) is False:
            holder, waited = note(path), time.monotonic() - started
            # It holds the lock but has not signed yet, or has just left.
            owner = f"process {holder.get('pid', 'unknown')} on {holder.get('host', 'some host')}"
            if waited >= timeout:
                raise BuildTimeoutError(
                    f"{name}: {owner} has been building it for more than "
                    f"{timeout:g} s. If that process hangs, end it (the lock goes with it) and "
                    f"run this again; if it is only slow, raise JITOPS_BUILD_TIMEOUT"
                )
            if waited >= _PATIENCE and not told:
                told = True
                on_wait(f"waiting for {owner}, which is building {name}")
            time.sleep(min(_PAUSE, timeout))
        lock = Lock(descriptor, bool(held), note(path))
        lock.write(pid=os.getpid(), host=platform.node())
        yield lock
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
    finally:
        unlock(descriptor)


def unlock(descriptor: int) -> None:
    """Close a locked file. A child that was forked meanwhile has it open too, and would keep it."""
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def try_lock(descriptor: int) -> bool | None:
    """Try to lock a file; ``None`` where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _open(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    if path.parent.stat().st_mode & 0o020:  # a group that is trusted shares it
        with contextlib.suppress(OSError):  # somebody else's
            os.fchmod(descriptor, 0o664)
    return descriptor


def note(path: Path) -> dict[str, Any]:
    """Return the note in a lock file. Its holder, or its last holder, wrote it."""
    try:
        told = json.loads(path.read_bytes()) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


@contextlib.contextmanager
def staging(root: Path, name: str) -> Iterator[Path]:
    """Make a private folder to build in, and sweep away those that dead builders left."""
    sweep(root)
    folder = root / "staging" / f"{name}.{secrets.token_hex(4)}"
    _location.make_folder(folder)  # readable to all: the cache of an image serves any user
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # no locks on this file system
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # published: it is no longer there
        os.close(descriptor)


def clear(folder: Path, keep: Sequence[str] = ()) -> None:
    """Empty a staging folder, but for the files to keep."""
    for path in folder.iterdir():
        if path.name not in keep:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def publish(
    root: Path, folder: Path, library: Path, manifest: Manifest, keep: Sequence[str] = ()
) -> Entry:
    """Make the library built in ``folder`` an entry, by one rename.

    Nothing is flushed to the disk, because a reader verifies the library. Where another builder has
    published the same in the meantime, theirs stays and ours is dropped.
    """
    its = {"file": library.name, "sha256": _entries.digest_of(library)}
    whole = {**manifest, "library": its}
    clear(folder, (library.name, *keep))
    (folder / "manifest.json").write_text(json.dumps(whole))
    (folder / _entries.USED).touch(mode=0o644)
    for path in (folder / "manifest.json", library):
        with contextlib.suppress(OSError):  # no modes on this file system
            path.chmod(path.stat().st_mode & 0o555)
    recorded = {k: v for k, v in manifest.items() if k not in ("seconds", "built", "library")}
    variant = _entries.sha256(json.dumps(recorded, sort_keys=True).encode())[:16]
    target = root / _entries.entry_name(manifest["name"], manifest["digest"]) / variant
    return place(root, folder, target) or Entry(target, whole)


def place(root: Path, folder: Path, target: Path) -> Entry | None:
    """Rename a finished folder into place; return the entry that was there, if that is whole."""
    for _ in range(3):
        if _location.distrust(target.parent):
            discard(root, target.parent)
        _location.make_folder(target.parent)
        try:
            os.rename(folder, target)
        except OSError:
            theirs = _entries.open_entry(target)
            if theirs and _entries.problem(theirs) is None:
                return theirs
            discard(root, target)  # there, but damaged, or not to be trusted
        else:
            return None
    raise CacheError(f"{target} cannot be replaced")


def sweep(root: Path) -> None:
    """Delete the folders of dead builders, and old logs."""
    for log in (root / "logs").glob("*"):
        with contextlib.suppress(OSError):
            if time.time() - log.stat().st_mtime > 7 * _ABANDONED_AFTER:
                log.unlink()
    for folder in (root / "staging").iterdir():
        if _is_abandoned(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _is_abandoned(folder: Path) -> bool:
    """Whether its builder is dead; where no lock tells, whether it is a day old."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            age = time.time() - os.fstat(descriptor).st_mtime
            # The lock of another host may not be seen. A builder may just come to lock a young one.
            free = None if _location.is_shared(folder) else age > _YOUNG and try_lock(descriptor)
        finally:
            unlock(descriptor)
        return age > _ABANDONED_AFTER if free is None else free
    return False


def discard(root: Path, folder: Path) -> None:
    """Delete an entry: out of the way in one rename, so that nobody ever sees half of it."""
    aside = root / "staging" / f".discarded.{secrets.token_hex(8)}"
    try:
        os.rename(folder, aside)
    except OSError:
        # Folders in a lower layer of an image cannot be renamed. Without a manifest it is no entry.
        with contextlib.suppress(OSError):
            (folder / "manifest.json").unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(aside, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.parent.rmdir()  # if that was its last
