"""Files without a place: libraries and programs that are in no folder they could be used from."""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_number = itertools.count(1)


@contextlib.contextmanager
def anonymous(name: str, content: bytes) -> Iterator[str]:
    """A path to ``content`` within the block; what was loaded from there stays.

    No two are alike: the dynamic linker and CPython know a library by the spelling of its path, and
    would take the next file under one that they have seen for the file they have.
    """
    if hasattr(os, "memfd_create"):
        descriptor = _in_memory(name, content)
        # The kernel gives numbers of closed descriptors anew. Dots and slashes lead nowhere else,
        # so they can count.
        spelled = "".join(".//" if bit == "1" else "./" for bit in f"{next(_number):b}")
        try:
            yield f"/proc/self/fd/{spelled}{descriptor}"
        finally:
            os.close(descriptor)
    else:
        with tempfile.TemporaryDirectory(prefix="jitops-") as folder:
            path = Path(folder) / name
            path.write_bytes(content)
            yield str(path)


def lasting(name: str, content: bytes, *, named: bool) -> Path:
    """A path to ``content`` for as long as this process lives.

    Args:
        named: so that other processes can use it, and its name be resolved: in a folder of this
            process's, where there is one to execute from.
    """
    memory = hasattr(os, "memfd_create")
    if named or not memory:
        try:
            return _in_folder(name, content)
        except OSError:  # full, read-only, noexec
            if not memory:
                raise
    return Path(f"/proc/{os.getpid() if named else 'self'}/fd/{_in_memory(name, content)}")


def _in_memory(name: str, content: bytes) -> int:
    descriptor = os.memfd_create(name)
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(content)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@functools.cache
def _private_folder() -> Path:
    folder, owner = tempfile.mkdtemp(prefix="jitops-"), os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # a forked child ends too
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return Path(folder)


def _in_folder(name: str, content: bytes) -> Path:
    folder = _private_folder()
    if os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0):
        raise PermissionError(errno.EACCES, "mounted noexec", str(folder))
    path = Path(tempfile.mkdtemp(dir=folder)) / name
    path.write_bytes(content)
    path.chmod(0o500)
    return path
