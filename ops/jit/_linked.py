"""What a linker makes of a file it is given: a shared library, or a script that names others."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

_MOST = 1 << 20  # bytes of a script
_HEAD = 1024
_TOKEN = re.compile(r"\"[^\"]*\"|[()]|[^\s(),;\"]+")
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_FOLDER = "SEARCH_DIR"
_LISTS = ("INPUT", "GROUP", "STARTUP", _FOLDER)


def libraries(name: str, folders: Sequence[Path]) -> list[Path]:
    """Where ``-lname`` may lead."""
    names = [name[1:]] if name.startswith(":") else [f"lib{name}.so", f"lib{name}.a"]
    return [folder / one for folder in folders for one in names]


def is_shared(path: Path) -> bool:
    """Whether a file is a shared library, of which nothing becomes part of what is linked."""
    head = _read(path, _HEAD)
    if head[:4] == b"\x7fELF":
        return int.from_bytes(head[16:18], "little" if head[5:6] == b"\1" else "big") == 3
    return head[:4] == b"\xcf\xfa\xed\xfe" and int.from_bytes(head[12:16], "little") in (6, 8)


def named_by(path: Path, folders: Sequence[Path]) -> list[Path]:
    """The files that a linker script may mean, whether they are there or not.

    Args:
        folders: where the linker looks for libraries.
    """
    head = _read(path, _HEAD)
    if b"\0" in head or head.startswith(b"!<"):  # an object, a library, an archive
        return []
    text = _COMMENT.sub(" ", _read(path, _MOST).decode(errors="surrogateescape"))
    said = list(_said([token.strip('"') for token in _TOKEN.findall(text)]))
    looked_in = [path.parent, *folders, *(Path(name) for kind, name in said if kind == _FOLDER)]
    found: list[Path] = []
    for kind, name in said:
        if kind == _FOLDER:
            continue
        if name.startswith("-l"):
            found += libraries(name[2:], looked_in)
        else:
            found += [folder / name for folder in looked_in]  # an absolute one is itself
    return found


def _said(tokens: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each name in a script's lists and ``INCLUDE`` commands, with what it is named by."""
    command, depth = "", 0
    for before, token in zip(["", *tokens], tokens, strict=False):
        if before == "INCLUDE" and not depth:
            yield before, token
        elif token == "(":
            if not depth:
                command = before
            depth += 1
        elif token == ")":
            depth = max(0, depth - 1)
        elif depth and command in _LISTS and token != "AS_NEEDED":
            yield command, token.removeprefix("=").removeprefix("$SYSROOT")


def _read(path: Path, most: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(most)
    except OSError:
        return b""  # whoever needs the content says so
