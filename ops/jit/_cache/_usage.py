"""Which entries are in use: a byte for each load, and a lock for as long as it is in use."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

# By the entry's folder, open for as long as this process uses it: the kernel ends the locks.
_held: dict[Path, int] = {}


def hold(folder: Path) -> bool:
    """Say that this process uses the entry in ``folder``, from now until it is let go.

    A hit never waits for this and does not need it: where it cannot be written, it goes unsaid.

    Returns:
        ``False`` if somebody is just deleting the entry.
    """
    for flags in (os.O_RDWR | os.O_APPEND, os.O_RDONLY):
        try:
            descriptor = os.open(folder / "used", flags | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if flags != os.O_RDONLY:
                os.write(descriptor, b".")
        except BlockingIOError:
            os.close(descriptor)
            return False
        except OSError:
            pass  # no locks, or no space, on this file system
        let_go(folder)  # one of that name that is no longer there, or its lock held twice
        _held[folder] = descriptor
        break
    return True


def is_held(folder: Path) -> bool:
    """Whether this process says that it uses the entry in ``folder``."""
    return folder in _held


def let_go(folder: Path) -> None:
    """Take back what :func:`hold` said: the entry may be deleted."""
    descriptor = _held.pop(folder, None)
    if descriptor is not None:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool | None]:
    """Whether nobody else has locked a file, and nobody can within the block.

    ``None`` where there are no locks, so that nobody knows.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        yield None if isinstance(error, FileNotFoundError) else False
        return
    mine: bool | None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine = True
    except BlockingIOError:
        mine = False
    except OSError:
        mine = None
    try:
        yield mine
    finally:
        os.close(descriptor)
