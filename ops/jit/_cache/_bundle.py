"""Bundles: entries in one archive that can be copied anywhere and used as a cache.

A zip file of ``<name>-<digest>/<variant>/...``, as in a cache, and ``bundle.json``, which tells the
format. Unpacked, it is a bundle too. The archive has a checksum of each file, and the manifest of
each entry has the SHA-256 of its library.
"""

import contextlib
import json
import os
import secrets
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

from ops._errors import BundleError
from ops.jit._cache import _entries, _location, _publish
from ops.jit._cache._entries import Entry

_INDEX = "bundle.json"
_FORMAT = 2
# The errors of zipfile, zlib and json for bytes that are damaged.
_DAMAGE = (OSError, EOFError, LookupError, TypeError, ValueError, AttributeError, RuntimeError,
           zlib.error, zipfile.BadZipFile)  # fmt: skip


def export(path: Path, entries: Iterable[Entry]) -> None:
    """Write a bundle of these entries, in one rename."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with zipfile.ZipFile(draft, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(_INDEX, json.dumps({"format": _FORMAT}))
            for entry in entries:
                for file in sorted(entry.folder.iterdir()):
                    content = file.read_bytes()
                    if file.name == "manifest.json":
                        # The other machine's compilers and headers have no part in it.
                        content = json.dumps({**entry.manifest, "imported": True}).encode()
                    if file.name != _entries.USED:
                        archive.writestr(f"{entry.name}/{file.name}", content)
        draft.replace(path)
    except OSError as error:
        raise BundleError(f"{path} cannot be written: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def _unpack(path: Path, folder: Path) -> dict[Path, str | None]:
    """Unpack a bundle; return the folder of each entry, and how it is damaged, if it is."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = json.loads(archive.read(_INDEX))["format"]
            archive.extractall(folder)  # it never writes outside of it
    except _DAMAGE as error:
        raise BundleError(f"{path} is damaged, or not a bundle: {error}") from error
    if found != _FORMAT:
        raise BundleError(f"{path} is a bundle of format {found}, not {_FORMAT}")
    (folder / _INDEX).unlink()
    for one in folder.rglob("*"):
        one.chmod(0o755 if one.is_dir() else 0o555)  # whatever umask says
        if one.is_dir():
            _location.make_folder(one)
    return {one: _damage(path, one) for one in sorted(folder.glob("*/*"))}


def _damage(path: Path, folder: Path) -> str | None:
    entry = _entries.open_entry(folder)
    problem: str | None = "it has no manifest"
    if entry and isinstance(entry.manifest.get("digest"), str):
        problem = _entries.problem(entry)
    return f"{path}: {'/'.join(folder.parts[-2:])} is damaged: {problem}" if problem else None


def verify(path: Path) -> tuple[int, list[str]]:
    """Return how many entries a bundle has, and a line for each that is damaged."""
    with tempfile.TemporaryDirectory(prefix="jitops-") as folder:
        found = _unpack(path, Path(folder))
    return len(found), list(filter(None, found.values()))


def import_into(path: Path, root: Path) -> list[Path]:
    """Put a bundle's entries into a cache; return the folders of those that were not there."""
    new = []
    with _publish.staging(root, "bundle") as staging:
        for folder, problem in _unpack(path, staging).items():
            if problem:
                raise BundleError(problem)
            target = root / folder.relative_to(staging)
            present = _entries.open_entry(target)
            if present is None or _entries.problem(present):
                (folder / _entries.USED).touch(mode=0o644)
                if _publish.place(root, folder, target) is None:
                    new.append(target)
    return new


def root(path: Path) -> Path:
    """Return the folder of a bundle's entries: its own, or one that it is unpacked to, once."""
    if (reason := _location.distrust(path)) is not None:
        raise BundleError(f"JITOPS_BUNDLE is refused: {reason}")
    if path.is_dir():
        return path
    if not path.is_file():  # to open a special file may block
        raise BundleError(f"JITOPS_BUNDLE must be a file or a folder that is there, got {path}")
    status = path.stat()
    of_path = _entries.sha256(os.fsencode(path.resolve()))[:12]
    of_content = f"{status.st_size} {status.st_mtime_ns} {status.st_ino}".encode()
    name = f"{of_path}-{_entries.sha256(of_content)[:12]}"
    for cache in _location.readable_roots():
        if (cache / "bundles" / name).is_dir():
            return cache / "bundles" / name
    cache = _location.writable_root()
    bundles = cache / "bundles"
    _location.make_folder(bundles)
    with _publish.staging(cache, "bundle") as staging:
        if problem := next(filter(None, _unpack(path, staging).values()), None):
            raise BundleError(problem)
        try:
            os.rename(staging, bundles / name)
        except OSError as error:
            if not (bundles / name).is_dir():  # nor has another process just done the same
                raise BundleError(f"{path} cannot be unpacked: {error}") from error
    for older in bundles.glob(f"{of_path}-*"):  # versions of the archive
        if older.name != name and not _location.is_shared(bundles):
            shutil.rmtree(older, ignore_errors=True)
    return bundles / name
