"""A bundle: entries in one archive that can be copied anywhere, checksummed, used in place or not.

A zip file of ``<name>-<digest>/<variant>/...``, as in a cache, and ``bundle.json``: the size and
SHA-256 of every other file. Unpacked, it works too.
"""

from __future__ import annotations

import json
import secrets
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ops._errors import BundleError
from ops.jit._cache import _staging, _store
from ops.jit._cache._store import Entry, Manifest

_INDEX = "bundle.json"
_FORMAT = 1
# What zipfile, zlib and json say of bytes that are not what they should be.
_DAMAGE = (
    OSError,
    EOFError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    RuntimeError,
    zlib.error,
    zipfile.BadZipFile,
)
_NOT_ITS = ("used", _staging.ALIVE)  # what a cache notes of an entry


# What a manifest must tell, for the library to be found and loaded.
_FIELDS = {"name": str, "digest": str, "library": dict}
_KINDS = {str: "a string", dict: "an object"}


# ---- making --------------------------------------------------------------------------------------


def export(path: Path, entries: Iterable[Entry]) -> int:
    """Write a bundle of these entries, in one rename; how many files are in it."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    files: dict[str, dict[str, Any]] = {}
    try:
        with zipfile.ZipFile(draft, "w", zipfile.ZIP_DEFLATED) as archive:
            for entry in entries:
                for file in entry.files():
                    content = None if file in _NOT_ITS else entry.content(file)
                    if content is not None:
                        name = "/".join((*entry.folder.parts[-2:], file))
                        files[name] = {"size": len(content), "sha256": _store.sha256(content)}
                        archive.writestr(name, content)
            archive.writestr(_INDEX, json.dumps({"format": _FORMAT, "files": files}, indent=1))
        draft.replace(path)
    except OSError as error:
        raise BundleError(f"{path} cannot be written: {error}") from error
    finally:
        draft.unlink(missing_ok=True)
    return len(files)


# ---- reading -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bundle:
    """An open bundle: what is in it, and how to read that."""

    path: Path
    files: dict[str, dict[str, Any]]
    read: Callable[[str], bytes]

    def content(self, name: str) -> bytes:
        """A file's content.

        Raises:
            BundleError: it is not what was written.
        """
        try:
            content = self.read(name)
        except _DAMAGE as error:
            if isinstance(error, BundleError):
                raise
            raise BundleError(f"{self.path}: {name} cannot be read: {error}") from error
        expected = self.files[name]
        if len(content) != expected["size"] or _store.sha256(content) != expected["sha256"]:
            raise BundleError(f"{self.path}: {name} is damaged")
        return content

    def manifest(self, folder: str) -> Manifest:
        """The manifest of the entry in a folder.

        Raises:
            BundleError: it is damaged, or does not tell what an entry must tell.
        """
        place = f"{folder}/manifest.json"
        try:
            manifest = json.loads(self.content(place))
            if not isinstance(manifest, dict):
                raise ValueError(f"it must be an object, got {type(manifest).__name__}")
            for field, kind in _FIELDS.items():
                if not isinstance(manifest.get(field), kind):
                    raise ValueError(f"{field} must be {_KINDS[kind]}, got {manifest.get(field)!r}")
            library = manifest["library"]
            name = f"{folder}/{library.get('file')}"
            if name not in self.files:
                raise ValueError(f"its library {library.get('file')!r} is not in the bundle")
            if any(library.get(what) != self.files[name][what] for what in ("size", "sha256")):
                raise ValueError(f"it tells another size or checksum of {library['file']!r}")
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{self.path}: {place} is no manifest: {error}") from error
        return manifest

    def stems(self) -> dict[str, list[str]]:
        """The folders of entries, by stem."""
        found: dict[str, list[str]] = {}
        for name in self.files:
            folder, _, file = name.rpartition("/")
            if file == "manifest.json":
                found.setdefault(folder.partition("/")[0], []).append(folder)
        return found


def read(path: Path, distrust: Callable[[Path, str], str | None] | None = None) -> Bundle:
    """Open a bundle, an archive or a folder.

    Args:
        distrust: why a file of a folder is not to be read, if it is not; it is given both.

    Raises:
        BundleError: it is none.
    """

    def unpacked(name: str) -> bytes:
        if distrust and (reason := distrust(path, name)):
            raise BundleError(f"{path} is refused: {reason}")
        return (path / name).read_bytes()

    try:
        reader = unpacked if path.is_dir() else zipfile.ZipFile(path).read
        index = json.loads(reader(_INDEX))
        if index["format"] != _FORMAT:
            raise BundleError(f"{path} is a bundle of format {index['format']}, not {_FORMAT}")
        bundle = Bundle(path, dict(index["files"]), reader)
        for name in bundle.files:
            parts = PurePosixPath(name).parts
            if len(parts) != 3 or ".." in parts or name.startswith("/"):
                raise BundleError(f"{path} has a file in an impossible place: {name!r}")
            size, digest = bundle.files[name]["size"], bundle.files[name]["sha256"]
            if not isinstance(size, int) or not isinstance(digest, str):
                raise BundleError(f"{path} does not tell size and checksum of {name!r}")
    except _DAMAGE as error:
        if isinstance(error, BundleError):
            raise
        raise BundleError(f"{path} is not a bundle: {error}") from error
    return bundle


def verify(path: Path) -> list[str]:
    """What is wrong with a bundle, a line for each file; nothing if it is whole."""
    bundle, wrong = read(path), []
    for name in bundle.files:
        folder, _, file = name.rpartition("/")
        try:
            if file == "manifest.json":
                bundle.manifest(folder)
            else:
                bundle.content(name)
        except BundleError as error:
            wrong.append(str(error))
    return wrong
