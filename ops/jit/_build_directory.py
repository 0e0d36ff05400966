"""``build_directory``: it gets copies, and no file is written over that a loader did not write.

The loader notes the content of each file that it writes in ``.jitops``, in the same folder. So a
file that somebody else writes or edits stays as it is.
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
# The files that torch's own loader makes of text.
_TORCHS = re.compile(
    rb"#include <torch/extension\.h>\n.*\nPYBIND11_MODULE\(TORCH_EXTENSION_NAME, m\) \{\n"
    rb"(?:m\.def\(\"[^\n]*\);\n)+\}"
    rb"|#include <torch/types\.h>\n#include <cuda\.h>\n#include <cuda_runtime\.h>\n.*",
    re.DOTALL,
)


def prepare(folder: Path, spec: Spec) -> Path:
    """Make the folder before anything is built for it, and look at the files in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(
            f"build_directory must be a folder that is there or can be made, got {folder}: {error}"
        ) from error
    texts = ["main.cpp", "cuda.cu"][: 1 + bool(spec.cuda_sources)] if spec.inline else []
    for name in (_RECORD, spec.name if spec.is_standalone else f"{spec.name}.so", *texts):
        _check(folder / name)
    return folder


def fill(spec: Spec, entry: Entry, folder: Path) -> Path:
    """Copy an entry to the caller's folder; return the path of the library or program."""
    library = entry.library
    contents = {name: entry.content(name) for name in (library.name, "main.cpp", "cuda.cu")}
    try:
        for name, content in contents.items():
            if content is not None:
                _check(folder / name)
                # A library's copy is the same file, so that to load it too does nothing.
                same = library if name == library.name and not spec.is_standalone else None
                _put(folder / name, content, same, 0o755 if name == library.name else 0o644)
        with contextlib.suppress(ArgumentError):  # the editors' file of somebody else stays
            _check(folder / COMMANDS)
            commands = json.dumps(commands_of(entry, folder), indent=1)
            _put(folder / COMMANDS, commands.encode(), None, 0o644)
    except OSError as error:
        raise CacheError(f"{spec.name} cannot be copied to {folder}: {error}") from error
    return folder / library.name


def commands_of(entry: Entry, folder: Path | None = None) -> list[dict[str, Any]]:
    """Return the commands that compiled an entry, as if they had run in ``folder``."""
    place = str(folder or entry.folder)
    places = {"command": shlex.quote(place)}  # the shell's, where the others are paths
    return [
        {key: value.replace(HERE, places.get(key, place)) for key, value in one.items()}
        for one in json.loads(entry.content(COMMANDS) or b"[]")
    ]


def _check(path: Path) -> None:
    """Refuse a file that neither this loader nor torch's has written, or that is no plain file."""
    more = ""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):  # to open a special file may block
            more = ", which is no plain file"
        elif _is_ours(path, path.read_bytes()):
            return
    except FileNotFoundError:
        return
    except OSError as error:
        more = f", which cannot be read: {error}"
    raise ArgumentError(
        f"build_directory must have no {path.name} but one that the loader wrote, got "
        f"{path}{more}: move or delete it, or name another folder"
    )


def _is_ours(path: Path, content: bytes) -> bool:
    recorded = _recorded(path.parent)
    if path.name == _RECORD:
        return all(map(_LINE.fullmatch, recorded))
    return _line(path.name, content) in recorded or _is_torchs(path, content)


def _recorded(folder: Path) -> list[bytes]:
    record = folder / _RECORD
    return record.read_bytes().splitlines(keepends=True) if record.is_file() else []


def _line(name: str, content: bytes) -> bytes:
    return f"{hashlib.sha256(content).hexdigest()} {name}\n".encode()


def _is_torchs(path: Path, content: bytes) -> bool:
    """Whether torch's own loader has written and compiled a file, and nobody has edited it since.

    torch's next build would write over it too.
    """
    script, log = path.parent / "build.ninja", path.parent / ".ninja_log"
    if not script.is_file() or not log.is_file():
        return False
    name, place = re.escape(os.fsencode(path.name)), re.escape(os.fsencode(path))
    line = (
        rb"^build \S+: \w+ %b$" % place
        if _TORCHS.fullmatch(content)
        else rb"^build %b: link" % name
    )
    named = re.search(line, script.read_bytes(), re.MULTILINE)
    return bool(named) and path.stat().st_mtime_ns <= log.stat().st_mtime_ns


def _put(path: Path, content: bytes, same: Path | None, mode: int) -> None:
    """Write a file, noted before, in one rename and through no link, or link it to ``same``."""
    is_same = path.exists() and (same is None or path.samefile(same))
    if is_same and path.read_bytes() == content:
        return
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    if (line := _line(path.name, content)) not in _recorded(path.parent):
        with open(os.open(path.parent / _RECORD, flags, 0o644), "ab") as record:
            record.write(line)
    # A folder whose name nobody can foresee, and in which nobody else can write.
    with tempfile.TemporaryDirectory(prefix=".jitops-", dir=path.parent) as folder:
        draft = Path(folder, path.name)
        if same:
            with contextlib.suppress(OSError):  # another file system, or one without such links
                os.link(same, draft)
        if not draft.exists():
            draft.write_bytes(content)
            draft.chmod(mode)
        os.replace(draft, path)
