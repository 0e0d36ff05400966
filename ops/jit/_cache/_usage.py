"""Which entries are in use: a byte for each load, and a lock for as long as the process lives."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

_held: list[int] = []  # open for as long as this process lives: the kernel ends the locks with it


def hold(folder: Path) -> bool:
    """Say that this process uses the entry in ``folder``, from now to its end.

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
        _held.append(descriptor)
        break
    return True


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
