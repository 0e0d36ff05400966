"""Bundles in use: put into a cache, or read where they lie."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ops import _config
from ops._errors import BundleError
from ops.jit._cache import _archive, _memory, _roots, _staging, _store
from ops.jit._cache._archive import Bundle
from ops.jit._cache._store import Entry, Manifest


def import_into(path: Path, root: Path) -> list[Path]:
    """Put a bundle's entries into a cache; the folders of those that were not there.

    Raises:
        BundleError: a file is damaged, or a manifest is none; what came before it stays.
    """
    bundle, new = _archive.read(path), []
    for stem, folders in bundle.stems().items():
        for name in folders:
            target = root / name
            present = _store.open_entry(target)
            if present and _store.verify(present):
                continue
            with _staging.staging(root, stem) as folder:
                for file in bundle.files:
                    if file.rpartition("/")[0] == name and not file.endswith("/manifest.json"):
                        place = folder / PurePosixPath(file).name
                        place.write_bytes(bundle.content(file))
                        place.chmod(0o444)
                manifest = _manifest(bundle, name)
                (folder / str(manifest["library"]["file"])).chmod(0o555)
                (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
                (folder / "manifest.json").chmod(0o444)
                (folder / "used").touch(mode=0o644)
                if _store.place(root, folder, target) is None:
                    new.append(target)
    return new


def _manifest(bundle: Bundle, folder: str) -> Manifest:
    """A compiler that is here has not built it, and is not asked."""
    return {**bundle.manifest(folder), "imported": True}


# ---- using in place ------------------------------------------------------------------------------


@dataclass(frozen=True)
class InPlace(Entry):
    """An entry of a bundle, its library in memory."""

    file: Path
    bundle: Bundle

    @property
    def library(self) -> Path:
        """Where it can be loaded from."""
        return self.file

    @property
    def place(self) -> str:
        """The bundle, and the entry in it."""
        return f"{self._name} in the bundle {self.bundle.path}"

    @property
    def _name(self) -> str:
        return "/".join(self.folder.parts[-2:])

    def files(self) -> list[str]:
        """What is in it."""
        start = f"{self._name}/"
        return sorted(name[len(start) :] for name in self.bundle.files if name.startswith(start))

    def content(self, name: str) -> bytes | None:
        """A file of it, verified; ``None`` if it has none of that name."""
        place = f"{self._name}/{name}"
        return self.bundle.content(place) if place in self.bundle.files else None


def _distrust(bundle: Path, name: str) -> str | None:
    """As for a cache: of a bundle that is unpacked, a file and the folders that it lies in."""
    places = (bundle / name, *(bundle / parent for parent in PurePosixPath(name).parents))
    return next((reason for place in places if (reason := _roots.distrust(place))), None)


@functools.lru_cache(maxsize=1)
def _in_force(path: Path) -> Bundle:
    if not path.exists():
        raise BundleError(f"JITOPS_BUNDLE is {path}, which is not there")
    if (reason := _roots.distrust(path)) is not None:
        raise BundleError(f"JITOPS_BUNDLE is refused: {reason}")
    return _archive.read(path, distrust=_distrust)


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


@functools.cache
def _unpacked(path: str, folder: str) -> InPlace:
    bundle = _in_force(Path(path))
    manifest = _manifest(bundle, folder)
    name = str(manifest["library"]["file"])
    request = manifest.get("request")
    is_module = isinstance(request, dict) and bool(request.get("python"))
    # A program is run by others, and torch resolves the path of a library of operators.
    content = bundle.content(f"{folder}/{name}")
    library = _memory.lasting(name, content, named=not is_module)
    return InPlace(Path(path) / folder, manifest, library, bundle)


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
