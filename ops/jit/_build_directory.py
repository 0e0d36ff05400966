"""``build_directory``: it gets copies, and no file is written over that a loader did not write.

The contents that this loader has written to a folder are noted there, in ``.jitops``, so that
whoever else writes a file of such a name, or edits one, keeps it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import stat
import tempfile
from pathlib import Path
from typing import Any

from ops._errors import ArgumentError, CacheError
from ops.jit._cache._entries import Entry
from ops.jit._spec import COMMANDS, HERE, Spec

_RECORD = ".jitops"  # only ever added to, so that processes need not wait for each other
_LINE = re.compile(rb"[0-9a-f]{64} [^ *\n][^\n]*\n?")  # sha256sum's have two blanks, or a star
_FIRST_LINES = {  # of the files that torch's own loader makes of text
    "main.cpp": b"#include <torch/extension.h>\n",
    "cuda.cu": b"#include <torch/types.h>\n#include <cuda.h>\n#include <cuda_runtime.h>\n",
}
_BINDINGS = re.compile(
    rb'\nPYBIND11_MODULE\(TORCH_EXTENSION_NAME, m\) \{\n(m\.def\("[^\n]*\);\n)+\}\Z'
)


def prepare(folder: Path, spec: Spec) -> Path:
    """Make the folder before anything is built for it, and look at the files in it.

    Raises:
        ArgumentError: it cannot be made, or holds a file that is somebody else's.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(
            f"build_directory must be a folder that is there or can be made, got {folder}: {error}"
        ) from error
    record = folder / _RECORD
    if _kind(record) == "file":
        lines = _read(record).splitlines(keepends=True)
        if not all(map(_LINE.fullmatch, lines)):
            raise _not_ours(record)
    names = [spec.name if spec.is_standalone else f"{spec.name}.so", COMMANDS]
    if spec.inline:
        names += ["main.cpp", *(["cuda.cu"] if spec.cuda_sources else [])]
    for name in names:
        _check(folder / name, spec)
    return folder


def fill(spec: Spec, entry: Entry, folder: Path) -> Path:
    """Copy an entry to where the caller wants it; return the path of the library or program.

    Raises:
        ArgumentError: a file of somebody else's has come in its way.
        CacheError: the folder cannot take it.
    """
    try:
        commands = json.dumps(commands_of(entry, folder), indent=1)
        target = folder / COMMANDS
        if _kind(target) is None or (_kind(target) == "file" and _is_ours(target)):
            _put(target, commands.encode(), 0o644)
        for name in (entry.library.name, "main.cpp", "cuda.cu"):
            content, target = entry.content(name), folder / name
            if content is None:
                continue
            _check(target, spec)
            if name != entry.library.name:
                _put(target, content, 0o644)
            elif spec.is_standalone or not _link(entry.library, target):
                _put(target, content, 0o755)
    except OSError as error:
        raise CacheError(f"{spec.name} cannot be copied to {folder}: {error}") from error
    return folder / entry.library.name


def commands_of(entry: Entry, folder: Path | None = None) -> list[dict[str, Any]]:
    """Return the commands that compiled an entry, as if they had run in ``folder``."""
    place = str(folder or entry.folder)
    places = {"command": shlex.quote(place)}  # the shell's, where the others are paths
    return [
        {key: value.replace(HERE, places.get(key, place)) for key, value in one.items()}
        for one in json.loads(entry.content(COMMANDS) or b"[]")
    ]


def _check(path: Path, spec: Spec) -> None:
    """Refuse a file that neither this loader nor torch's has written.

    A library, and the editors' file, are never refused, unless they are special: the first is a
    product of the same source, and the second is left alone.
    """
    kind = _kind(path)
    if kind == "special file":  # whose mere opening may block, or do something
        raise _not_ours(path, ", a special file")
    if kind in (None, "folder") or path.name in (COMMANDS, f"{spec.name}.so"):
        return
    if kind == "link":
        raise _not_ours(path, ", a symbolic link")
    try:
        ours = _is_ours(path) or _is_torchs(path, spec)
    except OSError as error:
        raise _not_ours(path, f", which cannot be read: {error}") from error
    if not ours:
        raise _not_ours(path)


def _not_ours(path: Path, what: str = "") -> ArgumentError:
    return ArgumentError(
        f"build_directory must have no {path.name} but one that the loader wrote, got "
        f"{path}{what}: move or delete it, or name another folder"
    )


def _kind(path: Path) -> str | None:
    """Tell what is there, without opening or following it."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return None
    kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFLNK: "link"}
    return kinds.get(stat.S_IFMT(mode), "special file")


def _read(path: Path) -> bytes:
    """Read a plain file; it may have been exchanged for something else meanwhile."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags), "rb") as file:
        return file.read()


def _line(name: str, content: bytes) -> bytes:
    return f"{hashlib.sha256(content).hexdigest()} {name}\n".encode()


def _is_ours(path: Path) -> bool:
    record = path.parent / _RECORD
    known = _read(record).splitlines(keepends=True) if _kind(record) == "file" else []
    return _line(path.name, _read(path)) in known


def _is_torchs(path: Path, spec: Spec) -> bool:
    """Whether torch's own loader has written a file, and nobody has edited it since."""
    first = _FIRST_LINES.get(path.name)
    if first is None:
        return False
    content = _read(path)
    if content == _as_torch_writes(path.name, spec):
        return True
    # Of other text: torch's ninja file names it, it begins and ends as torch writes it, and it has
    # been compiled since. torch's next build would write over it too.
    script, log = path.parent / "build.ninja", path.parent / ".ninja_log"
    if _kind(script) != "file" or _kind(log) != "file":
        return False
    named = re.search(rb"^build \S+: \w+ %b$" % re.escape(os.fsencode(path)), _read(script), re.M)
    ends = path.name != "main.cpp" or _BINDINGS.search(content)
    compiled = path.stat().st_mtime_ns <= log.stat().st_mtime_ns
    return bool(named and ends and compiled and content.startswith(first))


def _as_torch_writes(name: str, spec: Spec) -> bytes | None:
    if spec.no_implicit_headers:
        return None  # a file of the user's may have the same text
    text = _FIRST_LINES[name]
    text += "\n".join(spec.cpp_sources if name == "main.cpp" else spec.cuda_sources).encode()
    if name == "main.cpp" and spec.functions is not None:
        wrapped = "torch::wrap_pybind_function({})" if spec.with_pytorch_error_handling else "{}"
        lines = [f'm.def("{f}", {wrapped.format(f)}, "{doc}");' for f, doc in spec.functions]
        text += "\n".join(["", "PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {", *lines, "}"]).encode()
    return text


def _link(library: Path, target: Path) -> bool:
    """Make ``target`` the same file as the library, which a second load of it leaves alone."""
    if _kind(target) == "folder":
        raise IsADirectoryError(21, "Is a directory", str(target))
    with contextlib.suppress(OSError):
        if os.path.samefile(library, target):
            return True
    folder = tempfile.mkdtemp(prefix=".jitops-", dir=target.parent)
    try:
        os.link(library, os.path.join(folder, target.name))
        os.replace(os.path.join(folder, target.name), target)
    except OSError:
        return False  # on another file system, or one without such links
    finally:
        with contextlib.suppress(OSError):
            os.rmdir(folder)
    return True


def _put(path: Path, content: bytes, mode: int) -> None:
    """Write a file, or write it over: in one rename, through no link, and noted before."""
    if _kind(path) == "file" and _read(path) == content:
        return
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    with os.fdopen(os.open(path.parent / _RECORD, flags | os.O_CLOEXEC, 0o644), "ab") as record:
        record.write(_line(path.name, content))
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
