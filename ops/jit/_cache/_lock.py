"""One builder per key: a lock that the kernel takes back when its holder dies.

The lock is advisory comfort, not safety: two builders at once would each work in a staging folder
of their own and publish by one rename, so a file system without locks costs time and nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ops._errors import BuildTimeoutError

_PATIENCE = 2.0  # seconds of waiting before a word is said about it
_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EIO)


@contextlib.contextmanager
def exclusive(
    path: Path, what: str, timeout: float, on_wait: Callable[[str], None]
) -> Iterator[bool]:
    """Hold the lock at ``path`` while building ``what``.

    Args:
        path: lock file; created, and left in place.
        what: named in messages.
        timeout: seconds to wait for another holder.
        on_wait: called once the wait is noticeable, with a line that says who is waited for.

    Returns:
        Whether it is held; not on a file system without locks.

    Raises:
        BuildTimeoutError: the other holder is still at it after ``timeout`` seconds.
    """
    from filelock import FileLock, Timeout

    # Without flock filelock would fall back to a lock that outlives its holder: decline that.
    supported = inspect.signature(FileLock.__init__).parameters
    options: dict[str, Any] = {"fallback_to_soft": False} if "fallback_to_soft" in supported else {}
    lock = FileLock(path, mode=0o644, **options)
    owner_file = path.with_suffix(".owner")
    try:
        try:
            lock.acquire(timeout=min(_PATIENCE, timeout))
        except Timeout:
            on_wait(f"waiting for {_owner(owner_file)}, which is building {what}")
            try:
                lock.acquire(timeout=timeout, poll_interval=0.05)
            except Timeout:
                raise BuildTimeoutError(
                    f"{what}: {_owner(owner_file)} has been building it for more than "
                    f"{timeout:g} s. If that process hangs, end it (the lock goes with it) and "
                    f"run this again; if it is only slow, raise JITOPS_BUILD_TIMEOUT"
                ) from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS_HERE:
            raise
        yield False
        return
    try:
        owner_file.write_text(
            json.dumps({"pid": os.getpid(), "host": platform.node(), "since": time.time()})
        )
        yield True
    finally:
        owner_file.unlink(missing_ok=True)
        lock.release()


def _owner(owner_file: Path) -> str:
    try:
        owner = json.loads(owner_file.read_text())
        seconds = max(0, round(time.time() - owner["since"]))
        return f"process {owner['pid']} on {owner['host']} (for {seconds} s so far)"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"  # it holds the lock but has not signed yet, or has just left
