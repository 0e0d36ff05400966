"""The cache: content-addressed folders. Find, verify, stage, publish. Knows nothing of C++.

::

    <root>/<name>-<digest>/<variant>/    manifest.json and the library: one published entry
    <root>/<name>-<digest>.lock          held by the builder of that digest
    <root>/staging/<name>-<digest>.*     builds in progress, one private folder each
    <root>/logs/<name>-<digest>.log      the last build's log
    <root>/notes/                        small remembered facts

An entry appears by one rename and never changes, so a reader needs no lock. A reader verifies the
library's hash, so that a truncated, corrupted or swapped file is a miss and never loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ops._errors import CacheError
from ops.jit import _roots

Manifest = dict[str, Any]

_ABANDONED_AFTER = 24 * 3600.0  # seconds: a staging folder of another host that old is rubbish


@dataclass(frozen=True)
class Entry:
    """A published, verified library."""

    folder: Path
    manifest: Manifest

    @property
    def library(self) -> Path:
        """The shared library."""
        return self.folder / str(self.manifest["library"]["file"])


# ---- find ----------------------------------------------------------------------------------------


def _stem(name: str, digest: str) -> str:
    return f"{name}-{digest[:16]}"


def find(name: str, digest: str, accepts: Callable[[Manifest], bool]) -> Entry | None:
    """The entry for this digest that ``accepts`` takes, its library verified; or ``None``."""
    for root in _roots.readable_roots():
        try:
            variants = sorted(os.listdir(root / _stem(name, digest)))
        except OSError:
            continue
        for variant in variants:
            entry = _open(root / _stem(name, digest) / variant)
            if (
                entry
                and entry.manifest.get("digest") == digest
                and accepts(entry.manifest)
                and _roots.distrust(entry.folder) is None
                and verify(entry)
            ):
                return entry
    return None


def _open(folder: Path) -> Entry | None:
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        return Entry(folder, manifest) if isinstance(manifest, dict) else None
    except (OSError, ValueError, RecursionError):
        return None  # not an entry, or no longer one


def verify(entry: Entry) -> bool:
    """Whether the library is, byte for byte, the one that was published."""
    try:
        expected = entry.manifest["library"]
        if entry.library.parent != entry.folder or _roots.distrust(entry.library):
            return False
        content = entry.library.read_bytes()
        return bool(len(content) == expected["size"] and sha256(content) == expected["sha256"])
    except (OSError, KeyError, TypeError, ValueError):
        return False


def sha256(content: bytes) -> str:
    """Hexadecimal digest."""
    return hashlib.sha256(content).hexdigest()


# ---- publish -------------------------------------------------------------------------------------


def lock_path(root: Path, name: str, digest: str) -> Path:
    """The lock of the builder of this digest."""
    return root / f"{_stem(name, digest)}.lock"


def log_path(root: Path, name: str, digest: str) -> Path:
    """Where the log of this digest's last build is kept."""
    return root / "logs" / f"{_stem(name, digest)}.log"


@contextlib.contextmanager
def staging(root: Path, name: str, digest: str) -> Iterator[Path]:
    """A private folder to build in. Sweeps away those that dead builders left."""
    for left in (root / "staging").iterdir():
        if _abandoned(left):
            shutil.rmtree(left, ignore_errors=True)
    signed = f"{_stem(name, digest)}.{platform.node()}.{os.getpid()}.{secrets.token_hex(4)}"
    folder = root / "staging" / signed
    folder.mkdir(mode=0o755)  # readable to all, within the umask: an image's cache serves any user
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # published: it is no longer there


def _abandoned(folder: Path) -> bool:
    _, _, signature = folder.name.removesuffix(".damaged").partition(".")
    host, pid, _ = [*signature.rsplit(".", 2), "", ""][:3]
    if host != platform.node() or not pid.isdigit():
        try:
            return time.time() - folder.stat().st_mtime > _ABANDONED_AFTER
        except OSError:
            return False
    if int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


def publish(
    root: Path,
    name: str,
    digest: str,
    folder: Path,
    library: Path,
    facts: Manifest,
    about: Manifest,
) -> Entry:
    """Make the library built in ``folder`` an entry: flushed to disk, then renamed into place.

    ``facts`` tell this entry from others of the same digest; ``about`` is for people. Where another
    builder has published the same in the meantime, theirs stays and ours is dropped.
    """
    content = library.read_bytes()
    manifest: Manifest = {
        "name": name,
        "digest": digest,
        "library": {"file": library.name, "size": len(content), "sha256": sha256(content)},
        **facts,
        **about,
    }
    for path in folder.iterdir():
        if path != library:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for path in (folder / "manifest.json", library, folder):
        if path != folder:
            path.chmod(path.stat().st_mode & 0o555)
        _flush(path)

    variant = sha256(json.dumps(facts, sort_keys=True).encode())[:16]
    parent = root / _stem(name, digest)
    parent.mkdir(mode=0o755, exist_ok=True)
    target = parent / variant
    for _ in range(3):
        try:
            os.rename(folder, target)
        except OSError:
            theirs = _open(target)
            if theirs and verify(theirs):
                return theirs
            # There, but damaged: out of the way with it, in one rename, and try again.
            aside = root / "staging" / f"{folder.name}.damaged"
            shutil.rmtree(aside, ignore_errors=True)
            with contextlib.suppress(FileNotFoundError):
                os.rename(target, aside)
        else:
            _flush(parent)
            return Entry(target, manifest)
        finally:
            shutil.rmtree(root / "staging" / f"{folder.name}.damaged", ignore_errors=True)
    raise CacheError(f"{target} cannot be replaced")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- notes ---------------------------------------------------------------------------------------


def recall(key: str) -> str | None:
    """The note kept under ``key``."""
    for root in _roots.readable_roots():
        try:
            return (root / "notes" / sha256(key.encode())[:32]).read_text()
        except OSError:
            continue
    return None


def remember(root: Path, key: str, note: str) -> None:
    """Keep a note. It spares work later and is worth no error: a full disk goes unmentioned."""
    try:
        path = root / "notes" / sha256(key.encode())[:32]
        draft = path.with_suffix(f".{secrets.token_hex(4)}")
        draft.write_text(note)
        draft.replace(path)
    except OSError:
        pass
