"""Bundles: entries in one archive, or folder, that can be copied anywhere and used as a cache.

A zip file of ``<name>-<digest>/<variant>/...``, as in a cache, and ``bundle.json``: the size and
SHA-256 of every other file. Unpacked, it is a bundle too.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from ops import _config
from ops._errors import BundleError
from ops.jit._cache import _entries, _location, _publish
from ops.jit._cache._entries import Entry, Manifest

_INDEX = "bundle.json"
_FORMAT = 1
# The errors of zipfile, zlib and json for bytes that are not what they should be.
_DAMAGE = (OSError, EOFError, LookupError, TypeError, ValueError, AttributeError, RuntimeError,
           zlib.error, zipfile.BadZipFile)  # fmt: skip
_NOT_EXPORTED = (_entries.USED, _publish.ALIVE)  # the cache's own notes
# What a manifest must have, for the library to be found and loaded.
_FIELDS = {"name": str, "digest": str, "library": dict}
_KINDS = {str: "a string", dict: "an object"}
_COMPLETE = "complete"  # in the folder of a bundle that is unpacked whole


def export(path: Path, entries: Iterable[Entry]) -> int:
    """Write a bundle of these entries, in one rename; return how many files are in it."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    files: dict[str, dict[str, Any]] = {}
    try:
        with zipfile.ZipFile(draft, "w", zipfile.ZIP_DEFLATED) as archive:
            for entry in entries:
                for file in sorted(entry.folder.iterdir()):
                    content = b"" if file.name in _NOT_EXPORTED else file.read_bytes()
                    if file.name == "manifest.json":
                        # The other machine's compilers and headers have no part in it.
                        content = json.dumps({**entry.manifest, "imported": True}).encode()
                    if content:
                        name = f"{entry.name}/{file.name}"
                        files[name] = {"size": len(content), "sha256": _entries.sha256(content)}
                        archive.writestr(name, content)
            archive.writestr(_INDEX, json.dumps({"format": _FORMAT, "files": files}, indent=1))
        draft.replace(path)
    except OSError as error:
        raise BundleError(f"{path} cannot be written: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
    return len(files)


# ---- reading -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bundle:
    """An open bundle: the index of its files, and a function that reads one."""

    path: Path
    files: dict[str, dict[str, Any]]
    read: Callable[[str], bytes]

    def content(self, name: str) -> bytes:
        """Return a file's content.

        Raises:
            BundleError: it is not as it was written.
        """
        try:
            content = self.read(name)
        except _DAMAGE as error:
            if isinstance(error, BundleError):
                raise
            raise BundleError(f"{self.path}: {name} cannot be read: {error}") from error
        expected = self.files[name]
        if len(content) != expected["size"] or _entries.sha256(content) != expected["sha256"]:
            raise BundleError(f"{self.path}: {name} is damaged")
        return content

    def manifest(self, folder: str) -> Manifest:
        """Return the manifest of the entry in a folder.

        Raises:
            BundleError: it is damaged, or lacks what an entry must have.
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

    def folders(self) -> list[str]:
        """List the folders of entries."""
        return [name.rpartition("/")[0] for name in self.files if name.endswith("/manifest.json")]


def read(path: Path) -> Bundle:
    """Open a bundle, an archive or a folder.

    Raises:
        BundleError: it is none.
    """
    try:
        if path.is_dir():
            reader: Callable[[str], bytes] = lambda name: _read_trusted(path, name)  # noqa: E731
        else:
            reader = zipfile.ZipFile(path).read
        index = json.loads(reader(_INDEX))
        if index["format"] != _FORMAT:
            raise BundleError(f"{path} is a bundle of format {index['format']}, not {_FORMAT}")
        bundle = Bundle(path, dict(index["files"]), reader)
        for name, file in bundle.files.items():
            parts = PurePosixPath(name).parts
            if len(parts) != 3 or ".." in parts or name.startswith("/"):
                raise BundleError(f"{path} has a file in an impossible place: {name!r}")
            if not isinstance(file["size"], int) or not isinstance(file["sha256"], str):
                raise BundleError(f"{path} does not tell size and checksum of {name!r}")
    except _DAMAGE as error:
        if isinstance(error, BundleError):
            raise
        raise BundleError(f"{path} is not a bundle: {error}") from error
    return bundle


def _read_trusted(folder: Path, name: str) -> bytes:
    for place in (folder / name, *(folder / parent for parent in PurePosixPath(name).parents)):
        if reason := _location.distrust(place):
            raise BundleError(f"{folder} is refused: {reason}")
    return (folder / name).read_bytes()


def verify(path: Path) -> list[str]:
    """Return what is wrong with a bundle, a line for each file; nothing if it is whole."""
    bundle, wrong = read(path), []
    for name in bundle.files:
        folder, _, file = name.rpartition("/")
        try:
            bundle.manifest(folder) if file == "manifest.json" else bundle.content(name)
        except BundleError as error:
            wrong.append(str(error))
    return wrong


# ---- using ---------------------------------------------------------------------------------------


def import_into(path: Path, root: Path) -> list[Path]:
    """Put a bundle's entries into a cache; return the folders of those that were not there.

    Raises:
        BundleError: a file is damaged, or a manifest is none; entries that came before it stay.
    """
    bundle, new = read(path), []
    for name in bundle.folders():
        target = root / name
        present = _entries.open_entry(target)
        if present and _location.distrust(target) is None and _entries.verify(present):
            continue
        manifest = {**bundle.manifest(name), "imported": True}
        with _publish.staging(root, PurePosixPath(name).parts[0]) as folder:
            for file in bundle.files:
                if file.rpartition("/")[0] == name:
                    place = folder / PurePosixPath(file).name
                    place.write_bytes(bundle.content(file))
                    place.chmod(0o444)
            (folder / str(manifest["library"]["file"])).chmod(0o555)
            (folder / "manifest.json").chmod(0o644)
            (folder / "manifest.json").write_text(json.dumps(manifest))
            (folder / "manifest.json").chmod(0o444)
            (folder / _entries.USED).touch(mode=0o644)
            if _publish.place(root, folder, target) is None:
                new.append(target)
    return new


def find(name: str, accepts: Callable[[Manifest], bool]) -> Entry | None:
    """Find an entry of the bundle in use, if there is one, and verify it.

    Raises:
        BundleError: the bundle, or the entry, cannot be used.
    """
    path = _config.settings().bundle
    for entry in _entries.matching(root(path), name, accepts) if path else ():
        if path and path.is_dir():
            bundle = read(path)
            bundle.content(f"{entry.name}/{bundle.manifest(entry.name)['library']['file']}")
        elif _location.distrust(entry.folder) or not _entries.verify(entry):
            raise BundleError(f"{entry.library}, unpacked from {path}, is damaged: delete it")
        return replace(entry, bundle=path)
    return None


def root(path: Path) -> Path:
    """Return the folder of a bundle's entries: its own, or one that it is unpacked to, once.

    Raises:
        BundleError: it cannot be used.
        CacheError: it is an archive, and there is no folder to unpack it to.
    """
    if not path.exists():
        raise BundleError(f"JITOPS_BUNDLE is {path}, which is not there")
    if (reason := _location.distrust(path)) is not None:
        raise BundleError(f"JITOPS_BUNDLE is refused: {reason}")
    if path.is_dir():
        return path
    status = path.stat()
    of_path = _entries.sha256(os.fsencode(path.resolve()))[:12]
    content = f"{status.st_size} {status.st_mtime_ns} {status.st_ino}"
    name = f"{of_path}-{_entries.sha256(content.encode())[:12]}"
    for cache in _location.readable_roots():
        if (cache / "bundles" / name / _COMPLETE).is_file():
            return cache / "bundles" / name
    bundles = _location.writable_root() / "bundles"
    _location.make_folder(bundles)
    for part in ("", *_location.PARTS):
        _location.make_folder(bundles / name / part)
    import_into(path, bundles / name)
    (bundles / name / _COMPLETE).touch()
    for older in bundles.glob(f"{of_path}-*"):  # what the path held before
        if older.name != name and not _location.is_shared(bundles):
            shutil.rmtree(older, ignore_errors=True)
    return bundles / name


def entries_of(extension: str) -> Iterator[Entry]:
    """Yield the entries of one extension in the bundle in use, not verified."""
    path = _config.settings().bundle
    for manifest in sorted(root(path).glob("*-*/*/manifest.json")) if path else ():
        entry = _entries.open_entry(manifest.parent)
        if entry and entry.manifest.get("name") == extension:
            yield replace(entry, bundle=path)
