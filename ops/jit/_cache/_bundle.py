"""A bundle: entries in one archive that can be copied anywhere, checksummed, used in place or not.

A zip file of ``<name>-<digest>/<variant>/...``, as in a cache, and ``bundle.json``: the size and
SHA-256 of every other file. Unpacked, it works too.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ops import _config
from ops._errors import BundleError
from ops.jit._cache import _memory, _roots, _staging, _store
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


# ---- making --------------------------------------------------------------------------------------


def export(path: Path, entries: Iterable[Entry]) -> int:
    """Write a bundle of these entries, in one rename; how many files are in it."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    files: dict[str, dict[str, Any]] = {}
    try:
        with zipfile.ZipFile(draft, "w", zipfile.ZIP_DEFLATED) as archive:
            for entry in entries:
                for file in sorted(entry.folder.iterdir()):
                    if file.name not in _NOT_ITS and file.is_file():
                        name = "/".join(file.parts[-3:])
                        content = file.read_bytes()
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
            raise BundleError(f"{self.path}: {name} cannot be read: {error}") from error
        expected = self.files[name]
        if len(content) != expected["size"] or _store.sha256(content) != expected["sha256"]:
            raise BundleError(f"{self.path}: {name} is damaged")
        return content

    def stems(self) -> dict[str, list[str]]:
        """The folders of entries, by stem."""
        found: dict[str, list[str]] = {}
        for name in self.files:
            folder, _, file = name.rpartition("/")
            if file == "manifest.json":
                found.setdefault(folder.partition("/")[0], []).append(folder)
        return found


def read(path: Path) -> Bundle:
    """Open a bundle, an archive or a folder.

    Raises:
        BundleError: it is none.
    """
    try:
        if path.is_dir():
            reader = lambda name: (path / name).read_bytes()  # noqa: E731
        else:
            reader = zipfile.ZipFile(path).read
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
        try:
            bundle.content(name)
        except BundleError as error:
            wrong.append(str(error))
    return wrong


def import_into(path: Path, root: Path) -> list[Path]:
    """Put a bundle's entries into a cache; the folders of those that were not there.

    Raises:
        BundleError: a file is damaged; what came before it stays.
    """
    bundle, new = read(path), []
    for stem, folders in bundle.stems().items():
        for name in folders:
            target = root / name
            present = _store.open_entry(target)
            if present and _store.verify(present):
                continue
            with _staging.staging(root, stem) as folder:
                for file in bundle.files:
                    if file.rpartition("/")[0] == name:
                        place = folder / PurePosixPath(file).name
                        place.write_bytes(bundle.content(file))
                        place.chmod(0o555 if place.suffix == ".so" else 0o444)
                _mark_imported(folder)
                (folder / "used").touch(mode=0o644)
                if _store.place(root, folder, target) is None:
                    new.append(target)
    return new


def _mark_imported(folder: Path) -> None:
    """A compiler that is here has not built it, and is not asked."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_bytes())
    path.chmod(0o644)
    path.write_text(json.dumps({**manifest, "imported": True}, indent=1))
    path.chmod(0o444)


# ---- using in place ------------------------------------------------------------------------------


@dataclass(frozen=True)
class InPlace(Entry):
    """An entry of a bundle, its library in memory."""

    file: Path

    @property
    def library(self) -> Path:
        """Where it can be loaded from."""
        return self.file


@functools.lru_cache(maxsize=1)
def _in_force(path: Path) -> Bundle:
    if not path.exists():
        raise BundleError(f"JITOPS_BUNDLE is {path}, which is not there")
    if (reason := _roots.writable_by_others(path)) is not None:
        raise BundleError(f"JITOPS_BUNDLE is refused: {reason}")
    return read(path)


# An open archive has one place in its file, which parent and child would move for each other.
os.register_at_fork(after_in_child=_in_force.cache_clear)


def find(stem: str, wanted: Callable[[Manifest], bool]) -> Entry | None:
    """The entry of the bundle in force that is wanted, verified.

    Raises:
        BundleError: the bundle, or the file that is wanted, cannot be used.
    """
    path = _config.settings().bundle
    if path is None:
        return None
    bundle = _in_force(path)
    for folder in bundle.stems().get(stem, ()):
        manifest = _manifest(bundle, folder)
        if wanted(manifest):
            return _unpacked(str(path), folder)
    return None


def _manifest(bundle: Bundle, folder: str) -> Manifest:
    return {**json.loads(bundle.content(f"{folder}/manifest.json")), "imported": True}


@functools.cache
def _unpacked(path: str, folder: str) -> InPlace:
    bundle = _in_force(Path(path))
    manifest = _manifest(bundle, folder)
    name = str(manifest["library"]["file"])
    library = _memory.anonymous(name, bundle.content(f"{folder}/{name}"))
    return InPlace(Path(path) / folder, manifest, library)


def all_entries(name: str) -> Iterator[Entry]:
    """The entries of one extension in the bundle in force, their libraries not read."""
    path = _config.settings().bundle
    if path is None:
        return
    bundle = _in_force(path)
    for stem, folders in bundle.stems().items():
        if stem.rpartition("-")[0] == name:
            for folder in folders:
                yield Entry(path / folder, _manifest(bundle, folder))
