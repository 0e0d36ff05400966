"""Private folders to build in, and the removal of those that dead builders left."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from ops.jit._cache import _roots

ALIVE = ".alive"  # in a staging folder, locked by its builder for as long as that lives
_RUBBISH_AFTER = 24 * 3600.0  # seconds, where no lock tells whether the builder lives


@contextlib.contextmanager
def staging(root: Path, stem: str) -> Iterator[Path]:
    """A private folder to build in. Sweeps away those that dead builders left."""
    sweep(root)
    # Hidden until its lock is held, so that nobody takes it for an abandoned one.
    token = secrets.token_hex(4)
    hidden, folder = (root / "staging" / f"{dot}{stem}.{token}" for dot in (".", ""))
    hidden.mkdir(mode=0o755)  # readable to all, within the umask: an image's cache serves any user
    descriptor = os.open(hidden / ALIVE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.write(descriptor, _roots.this_host().encode())
        with contextlib.suppress(OSError):  # no locks here: its age will tell
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        hidden.rename(folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # published: it is no longer there
        shutil.rmtree(hidden, ignore_errors=True)
        os.close(descriptor)


def sweep(root: Path) -> None:
    """Delete what dead builders left."""
    for folder in (root / "staging").iterdir():
        if _abandoned(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _abandoned(folder: Path) -> bool:
    try:
        descriptor = os.open(folder / ALIVE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return _is_old(folder)
    try:
        if os.read(descriptor, 200).decode(errors="replace") != _roots.this_host():
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
        return time.time() - folder.stat().st_mtime > _RUBBISH_AFTER
    except OSError:
        return False


def discard(root: Path, folder: Path) -> None:
    """Delete an entry: out of the way in one rename, so that nobody ever sees half of it."""
    aside = root / "staging" / f".discarded.{secrets.token_hex(8)}"
    with contextlib.suppress(FileNotFoundError):
        os.rename(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.parent.rmdir()  # if that was its last
