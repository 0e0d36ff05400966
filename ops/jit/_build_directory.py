"""``build_directory``: what torch leaves there is left there too, and nothing else written over."""

from __future__ import annotations

from pathlib import Path

from ops._errors import ArgumentError, CacheError
from ops.jit import _compile_commands, _written
from ops.jit._cache._store import Entry
from ops.jit._spec import Spec

_HEADERS = {  # what torch's own loader writes before text
    "main.cpp": ["#include <torch/extension.h>"],
    "cuda.cu": [
        "#include <torch/types.h>",
        "#include <cuda.h>",
        "#include <cuda_runtime.h>",
    ],
}


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
    record = folder / _written.RECORD
    try:
        foreign = _written.is_foreign(record)
    except OSError as error:
        raise _not_ours(record, f", which cannot be read: {error}") from error
    if foreign:
        raise _not_ours(record)
    for name in names:
        _refuse(folder / name, spec)
    for name in (_compile_commands.NAME, f"{spec.name}.so"):
        _refuse_special(folder / name)
    return folder


def put(spec: Spec, entry: Entry, folder: Path) -> Path:
    """Copy what there is of an entry to where the caller wants it, each file in one rename.

    Raises:
        ArgumentError: a file of somebody else's has come in its way.
        CacheError: the folder cannot take it.
    """
    library = str(entry.manifest["library"]["file"])
    try:
        _put_commands(entry, folder / _compile_commands.NAME)
        for name in (library, *_HEADERS):
            content, target = entry.content(name), folder / name
            if content is None or (_written.is_plain(target) and _written.read(target) == content):
                continue
            if name != library or spec.is_standalone:
                _refuse(target, spec)
            _refuse_special(target)
            _written.put(target, content, 0o755 if name == library else 0o644)
    except OSError as error:
        raise CacheError(f"{spec.name} cannot be copied to {folder}: {error}") from error
    return folder / library


def _put_commands(entry: Entry, target: Path) -> None:
    """The editors' file, unless that of another build is there."""
    _refuse_special(target)
    content = _compile_commands.text(entry, target.parent).encode()
    if _written.kind(target) is not None:
        if not _written.is_plain(target):
            return
        present = _written.read(target)
        if present == content or not _written.is_ours(target, present):
            return
    _written.put(target, content, 0o644)


def _refuse(path: Path, spec: Spec) -> None:
    """What cannot be told to be a product of ours, or text of torch's own loader."""
    _refuse_special(path)
    found = _written.kind(path)
    if found in (None, _written.FOLDER):  # nothing is written over a folder
        return
    if not _written.is_plain(path):
        raise _not_ours(path, f", {found}")
    try:
        content = _written.read(path)
        ours = _written.is_ours(path, content)
    except OSError as error:
        raise _not_ours(path, f", which cannot be read: {error}") from error
    if not ours and content != _torchs(path.name, spec):
        raise _not_ours(path)


def _refuse_special(path: Path) -> None:
    if _written.kind(path) == _written.SPECIAL:
        raise _not_ours(path, f", {_written.SPECIAL}")


def _not_ours(path: Path, what: str = "") -> ArgumentError:
    return ArgumentError(
        f"build_directory must have no {path.name} but one that the loader wrote, got "
        f"{path}{what}: move or delete it, or name another folder"
    )


def _torchs(name: str, spec: Spec) -> bytes | None:
    """What torch's own loader has written if it was called with the same."""
    if name not in _HEADERS or spec.no_implicit_headers:
        return None
    lines = [*_HEADERS[name], *(spec.cpp_sources if name == "main.cpp" else spec.cuda_sources)]
    if name == "main.cpp" and spec.functions is not None:
        wrapped = "torch::wrap_pybind_function({})" if spec.with_pytorch_error_handling else "{}"
        lines.append("PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {")
        lines += [f'm.def("{f}", {wrapped.format(f)}, "{doc}");' for f, doc in spec.functions]
        lines.append("}")
    return "\n".join(lines).encode()
