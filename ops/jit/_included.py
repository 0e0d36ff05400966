"""The headers of a binary as facts: which were read, by content, and what could hide them."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ops.jit._spec import Spec

_ASKS_FOR = re.compile(rb"__has_include\s*\(\s*[<\"]([^>\"\n]+)[>\"]")
_Roots = tuple[Path, ...]


def facts(spec: Spec, headers: list[Path]) -> dict[str, Any]:
    """For the manifest of what has just been built from these headers."""
    roots = spec.header_roots
    located = sorted(_locate(roots, header) for header in headers)
    asked_for = sorted({name for path in (*spec.sources, *headers) for name in _asks_for(path)})
    return {
        "headers": [[*where, _hash(_path(roots, *where))] for where in located],
        "asks_for": asked_for,
        "hiding": _hiding(roots, located, asked_for),
    }


def differences(spec: Spec, manifest: dict[str, Any]) -> Iterator[str]:
    """What has changed of the headers since."""
    roots = spec.header_roots
    for number, name, expected in manifest["headers"]:
        if _hash(_path(roots, number, name)) != expected:
            yield f"header {name} has changed"
    located = [(number, name) for number, name, _ in manifest["headers"]]
    if _hiding(roots, located, manifest["asks_for"]) != manifest["hiding"]:
        yield "a header has come or gone that may hide another"


def _locate(roots: _Roots, header: Path) -> tuple[int, str]:
    """A header as (number of its root, path below it), or (-1, absolute path) outside of all."""
    for number, root in enumerate(roots):
        if header.is_relative_to(root):
            return number, str(header.relative_to(root))
    return -1, str(header)


def _path(roots: _Roots, number: int, name: str) -> Path:
    return Path(name) if number < 0 else roots[number] / name


def _hash(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return "missing"


def _asks_for(path: Path) -> set[str]:
    """The headers whose mere existence a file asks for."""
    try:
        content = path.read_bytes()
    except OSError:
        return set()
    return {os.fsdecode(name) for name in _ASKS_FOR.findall(content)}


def _hiding(roots: _Roots, located: list[tuple[int, str]], asked_for: list[str]) -> list[str]:
    """Where, in the folders a compiler may look, there are headers of the names that it looks for.

    One that is new there may be found before the one that was read.
    """
    folders = {(number, "") for number in range(len(roots))}
    names = set(asked_for)
    for number, name in located:
        if number >= 0:
            folders.add((number, os.path.dirname(name)))
            names |= {name, os.path.basename(name)}
    found = []
    for number, below in folders:
        folder = roots[number] / below
        try:
            present = set(os.listdir(folder))
        except OSError:
            continue
        for name in names:
            first, _, rest = name.partition("/")
            if first in present and (not rest or (folder / name).is_file()):
                found.append(f"{number}:{below}:{name}")
    return sorted(found)
