"""The headers of a binary as facts: which were read, by content, and what could hide them.

What could hide them are files that the compiler would find in their place. The names that it looks
for are kept as a tree, and only as deep as the folders that it looks in have any of it, so that the
names of torch's thousand headers come to one: ``torch``.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ops.jit import _mentioned
from ops.jit._compile import _headers
from ops.jit._spec import Spec

MISSING = "missing"  # in place of a digest
_Roots = tuple[Path, ...]
_Tree = dict[str, Any]
# What every compiler looks in before the system's own folders, and is nobody's.
_EVERYBODYS = Path("/usr/local/include")
_FEW = 8  # names: to ask for each is faster than to list a folder
_UNLISTED = ("..", ".", "/")


def facts(spec: Spec, own: list[Path], vouched: Iterable[Path] = ()) -> dict[str, Any]:
    """For the manifest of what has just been built from these headers; see ``_headers.Read``."""
    roots = spec.header_roots
    located = sorted(_locate(roots, header) for header in own)
    folders = {(number, "") for number, one in enumerate(roots) if not _headers.is_vouched_for(one)}
    folders |= {(number, os.path.dirname(name)) for number, name in located}
    folders.add((-1, str(_EVERYBODYS)))
    names = {name for _, name in located} | {os.path.basename(name) for _, name in located}
    names = {name for name in names if not name.startswith(("/", ".."))}
    names |= _named_in(_headers.texts(spec, own)) | _named_by(list(vouched))
    searched = [(*where, str(_path(roots, *where))) for where in sorted(folders)]
    tree = _pruned(_tree(names), [path for _, _, path in searched])
    return {
        "headers": [[*where, _hash(_path(roots, *where))] for where in located],
        "names": tree,
        "searched": [[number, below, _among(path, tree)] for number, below, path in searched],
    }


def differences(spec: Spec, manifest: dict[str, Any]) -> Iterator[str]:
    """What has changed of the headers since."""
    roots = spec.header_roots
    for number, name, expected in manifest["headers"]:
        if _hash(_path(roots, number, name)) != expected:
            yield f"header {name} has changed"
    for number, below, found in manifest["searched"]:
        if number < 0 and manifest.get("imported"):
            continue  # another machine's folders
        if _among(str(_path(roots, number, below)), manifest["names"]) != found:
            yield "a header has come or gone that may hide another"
            return


def files(spec: Spec, known: dict[str, Any]) -> list[Path]:
    """All that facts tell of: the headers, and what has the name of one."""
    roots = spec.header_roots
    searched = [(_path(roots, number, below), found) for number, below, found in known["searched"]]
    return [
        *(_path(roots, number, name) for number, name, _ in known["headers"]),
        *(folder / name for folder, found in searched for name in found),
    ]


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
        return MISSING


# ---- names ---------------------------------------------------------------------------------------


def _named_in(texts: list[bytes]) -> set[str]:
    """The headers, and the like, that the extension's own texts may look for."""
    computed = any(map(_mentioned.computes, texts))
    found = {name for text in texts for name, _ in _mentioned.headers(text)}
    found |= {name for text in texts for name in _mentioned.defined(text, quoted=computed)}
    return found | _mentioned.files(texts)


def _named_by(headers: list[Path]) -> set[str]:
    """The headers that others may look for, but for those beside them: these are found first."""
    found = set()
    read = set(map(os.path.normpath, headers))
    for header in headers:
        text = _headers.text_of(header)
        found |= _mentioned.defined(text, quoted=False)
        for name, quoted in _mentioned.headers(text):
            beside = os.path.normpath(header.parent / name) if quoted else ""
            if beside not in read and not (quoted and os.path.exists(beside)):
                found.add(name)
    return found


def _tree(names: Iterable[str]) -> _Tree:
    tree: _Tree = {}
    for name in names:
        inner = tree.setdefault("/", {}) if name.startswith("/") else tree
        for part in filter(None, name.split("/")):
            inner = inner.setdefault(part, {})
    return tree


def _pruned(tree: _Tree, folders: list[str]) -> _Tree:
    """The tree without what lies below names that none of the folders has."""
    pruned: _Tree = {}
    for name in sorted(tree):
        inner = [os.path.join(folder, name) for folder in folders] if tree[name] else []
        inner = list(filter(os.path.isdir, inner))
        # No empty dictionaries: reading hundreds of them sets off a garbage collection.
        pruned[name] = _pruned(tree[name], inner) if inner else 0
    return pruned


def _among(folder: str, tree: _Tree) -> list[str]:
    """The names of the tree that a folder has. One that is cut off counts with all below it."""
    if len(tree) <= _FEW:
        present = [name for name in tree if os.path.exists(os.path.join(folder, name))]
    else:
        try:
            listed = os.listdir(folder)
        except OSError:
            return []
        present = [name for name in (*listed, *_UNLISTED) if name in tree]
    found = []
    for name in sorted(present):
        found.append(name)
        if tree[name]:
            inner = _among(os.path.join(folder, name), tree[name])
            found += [os.path.join(name, one) for one in inner]
    return found
