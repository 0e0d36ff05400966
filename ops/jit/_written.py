"""Files that the loader writes among a user's own: which are as it left them, and how one is put.

What it has written to a folder it notes there, by content, so that whoever else writes a file of
such a name, or edits one, keeps it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import tempfile
from pathlib import Path

RECORD = ".jitops"  # only ever added to, so that processes need not wait for each other
FILE, FOLDER, LINK = "a file", "a folder", "a symbolic link"
_KINDS = {stat.S_IFREG: FILE, stat.S_IFDIR: FOLDER, stat.S_IFLNK: LINK}
_LINE = re.compile(rb"[0-9a-f]{64} [^ *\n][^\n]*\n?")  # sha256sum's have two blanks, or a star
SPECIAL = "a special file"  # whose mere opening may block, or do something


def kind(path: Path) -> str | None:
    """What is there, without opening or following it."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return None
    return _KINDS.get(stat.S_IFMT(mode), SPECIAL)


def is_plain(path: Path) -> bool:
    """Whether a file is there that is neither a link nor special."""
    return kind(path) == FILE


def read(path: Path) -> bytes:
    """The content of a plain file; it may have been exchanged for something else meanwhile."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags), "rb") as file:
        return file.read()


def is_ours(path: Path, content: bytes) -> bool:
    """Whether we have put this content there."""
    return _line(path, content) in _record(path.parent)


def put(path: Path, content: bytes, mode: int) -> None:
    """Write a file, or write it over: in one rename, through no link, and noted before."""
    if not is_ours(path, content):
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        with os.fdopen(os.open(path.parent / RECORD, flags | os.O_CLOEXEC, 0o644), "ab") as record:
            record.write(_line(path, content))
    # A name that nobody can foresee, created by nobody else.
    descriptor, draft = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            os.fchmod(descriptor, mode)
        os.replace(draft, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error tells more
            os.unlink(draft)
        raise


def is_foreign(path: Path) -> bool:
    """Whether a file that is called as our record is somebody else's."""
    return is_plain(path) and not all(map(_LINE.fullmatch, read(path).splitlines(keepends=True)))


def _record(folder: Path) -> set[bytes]:
    path = folder / RECORD
    return set(read(path).splitlines(keepends=True)) if is_plain(path) else set()


def _line(path: Path, content: bytes) -> bytes:
    return f"{hashlib.sha256(content).hexdigest()} {path.name}\n".encode()
