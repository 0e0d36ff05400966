"""``build_directory``: what torch leaves there is left there too, and nothing else written over."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from ops._errors import ArgumentError, CacheError
from ops.jit import _compile_commands
from ops.jit._cache._store import Entry
from ops.jit._spec import Spec

# The last line of text that is written there, with a digest of what comes before it: whoever else
# writes that file, or edits it, wants to keep it.
_SIGNED = b"// written by jitops, and not changed since: "
_TORCHS = {  # what torch's own loader writes before text
    "main.cpp": "#include <torch/extension.h>\n",
    "cuda.cu": "#include <torch/types.h>\n#include <cuda.h>\n#include <cuda_runtime.h>\n",
}
_BINARY = (b"\x7fELF", b"\xcf\xfa\xed\xfe")


def made(folder: Path, spec: Spec) -> Path:
    """The folder, made before anything is built for it.

    Raises:
        ArgumentError: it cannot be made, or holds a file that is somebody else's.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(
            f"build_directory must be a folder that is there or can be made, got {folder}: {error}"
        ) from error
    names = [spec.name] if spec.is_standalone else []
    if spec.inline:
        names += ["main.cpp", *(["cuda.cu"] if spec.cuda_sources else [])]
    for name in names:
        _refuse(folder / name, spec)
    return folder


def put(spec: Spec, entry: Entry, folder: Path) -> Path:
    """Copy what there is of an entry to where the caller wants it, each file in one rename.

    Raises:
        ArgumentError: a file of somebody else's has come in its way.
        CacheError: the folder cannot take it.
    """
    library = str(entry.manifest["library"]["file"])
    try:
        _compile_commands.put(entry, folder)
        for name in (library, *_TORCHS):
            content = entry.content(name)
            if content is None:
                continue
            if name != library:
                content = _signed(content)
            target = folder / name
            if target.is_file() and target.read_bytes() == content:
                continue
            if name != library or spec.is_standalone:
                _refuse(target, spec)
            draft = folder / f".{name}.{os.getpid()}"
            draft.write_bytes(content)
            draft.chmod(0o755 if name == library else 0o644)
            draft.replace(target)
    except OSError as error:
        raise CacheError(f"{spec.name} cannot be copied to {folder}: {error}") from error
    return folder / library


def _refuse(path: Path, spec: Spec) -> None:
    """A file that cannot be told to be a product of ours or of torch's."""
    try:
        content = path.read_bytes()
    except OSError:
        return  # none there; or a folder, which nothing is written over
    if path.name not in _TORCHS:
        product = content.startswith(_BINARY)
    else:
        texts = spec.cpp_sources if path.name == "main.cpp" else spec.cuda_sources
        text = _TORCHS[path.name] + "\n".join(texts)
        product = _is_signed(content) or content.startswith(text.encode())
    if content and not product:
        raise ArgumentError(
            f"build_directory must have no {path.name} but one that the loader wrote, got {path}: "
            f"move or delete it, or name another folder"
        )


def _signed(content: bytes) -> bytes:
    return content + b"\n" + _SIGNED + _digest(content) + b"\n"


def _is_signed(content: bytes) -> bool:
    before, _, digest = content.rpartition(b"\n" + _SIGNED)
    return bool(digest) and digest.strip() == _digest(before)


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()
