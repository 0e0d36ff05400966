"""One builder per key: a lock that the kernel takes back when its holder dies.

The lock spares work and is not needed for safety. Two builders at once would each work in a staging
folder of their own and publish by one rename.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ops._errors import BuildTimeoutError

_PATIENCE = 2.0  # seconds of waiting before a word is said about it
_PAUSE = 0.05  # seconds between two attempts
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EIO)


@dataclass(frozen=True)
class Lock:
    """A lock that is held; its file tells those that wait who holds it, and why a build failed."""

    descriptor: int
    is_exclusive: bool
    told: dict[str, Any]  # by the holder before

    def failure(self, since: float) -> dict[str, Any] | None:
        """Return what the holder before told of its failure, if that was after a time."""
        failed = self.told.get("failed") and self.told.get("since", 0.0) >= since
        return self.told if failed else None

    def fail(self, message: str, log: str | None) -> None:
        """Tell those that wait for this lock that the build failed."""
        _write(self.descriptor, failed=message, log=log)


@contextlib.contextmanager
def exclusive(
    path: Path, what: str, timeout: float, on_wait: Callable[[str], None]
) -> Iterator[Lock]:
    """Hold the lock at ``path`` while building ``what``.

    Args:
        path: lock file; created, and left in place.
        what: named in messages.
        timeout: seconds to wait for another holder.
        on_wait: called once the wait is noticeable, with a line that says who is waited for.

    Raises:
        BuildTimeoutError: the other holder is still at it after ``timeout`` seconds.
    """
    started, told = time.monotonic(), False
    descriptor = _open(path)
    try:
        while (held := try_lock(descriptor)) is False or not _is_at(descriptor, path):
            if held:  # the file was deleted meanwhile, and others lock its successor
                os.close(descriptor)
                descriptor = _open(path)
                continue
            waited = time.monotonic() - started
            if waited >= timeout:
                raise BuildTimeoutError(
                    f"{what}: {_owner(descriptor)} has been building it for more than "
                    f"{timeout:g} s. If that process hangs, end it (the lock goes with it) and "
                    f"run this again; if it is only slow, raise JITOPS_BUILD_TIMEOUT"
                )
            if waited >= _PATIENCE and not told:
                told = True
                on_wait(f"waiting for {_owner(descriptor)}, which is building {what}")
            time.sleep(min(_PAUSE, timeout))
        lock = Lock(descriptor, bool(held), _read(descriptor))
        _write(descriptor, pid=os.getpid(), host=platform.node())
        yield lock
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def last_failure(path: Path) -> dict[str, Any] | None:
    """Return what the holder of a lock that is no longer held told of its failure."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return Lock(descriptor, False, _read(descriptor)).failure(0.0)
    finally:
        os.close(descriptor)


def try_lock(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool | None:
    """Try to lock a file; ``None`` where the file system has no locks."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return True


def _open(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    if path.parent.stat().st_mode & 0o020:  # a group that is trusted shares it
        with contextlib.suppress(OSError):  # somebody else's
            os.fchmod(descriptor, 0o664)
    return descriptor


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


def _write(descriptor: int, **told: Any) -> None:
    content = json.dumps({**told, "since": time.time()}).encode()
    with contextlib.suppress(OSError):  # a full disk is no reason to fail
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, content, 0)


def _read(descriptor: int) -> dict[str, Any]:
    try:
        told = json.loads(os.pread(descriptor, 1 << 20, 0))
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def _owner(descriptor: int) -> str:
    told = _read(descriptor)
    if "pid" not in told:
        return "another process"  # it holds the lock but has not signed yet, or has just left
    seconds = max(0, round(time.time() - told["since"]))
    return f"process {told['pid']} on {told.get('host')} (for {seconds} s so far)"
