"""Which folders the cache may live in: the configured one, and a private one to fall back on.

Nothing is loaded from a folder that someone else could have written to.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import stat
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from ops import _config
from ops._errors import CacheError, CacheWarning

PARTS = ("staging", "locks", "logs", "failures", "notes")


def configured_root() -> Path:
    """``JITOPS_CACHE_DIR``, else a folder in ``TORCH_EXTENSIONS_DIR``, else the platform's."""
    chosen = _config.settings().cache_dir
    if chosen is not None:
        return chosen
    torchs = os.environ.get("TORCH_EXTENSIONS_DIR")
    if torchs:
        return Path(torchs).absolute() / "jitops"
    if sys.platform != "linux":
        import platformdirs

        return platformdirs.user_cache_path("jitops")
    # By hand: importing platformdirs is a third of a warm load.
    base = os.environ.get("XDG_CACHE_HOME", "")
    home = os.path.expanduser("~/.cache")
    if not os.path.isabs(base):
        base = home
    return Path(base) / "jitops" if os.path.isabs(base) else _temporary()  # no home at all


def private_root() -> Path:
    """Where to go when the configured folder cannot be used: a temporary one of this user.

    Another one for each configured folder: whoever names a fresh cache means one.
    """
    configured = configured_root()
    temporary = _temporary()
    if configured == temporary:
        return temporary
    of = hashlib.sha256(os.fsencode(configured)).hexdigest()[:8]
    return temporary.with_name(f"{temporary.name}-{of}")


def _temporary() -> Path:
    return Path(os.environ.get("TMPDIR") or "/tmp").absolute() / f"jitops-{os.getuid()}"


def distrust(folder: Path) -> str | None:
    """Why nothing in ``folder`` may be loaded: someone else could have put it there."""
    try:
        status = folder.stat()
    except OSError:
        return None  # not there, so nothing of it is loaded
    if status.st_uid not in (os.getuid(), 0):
        return f"{folder} belongs to user {status.st_uid}, not to you or root"
    return writable_by_others(folder)


def writable_by_others(path: Path) -> str | None:
    """That it is, if it is."""
    status = path.stat()
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{path} can be written by others (mode {stat.S_IMODE(status.st_mode):04o})"
    return None


@functools.cache
def _trusted(folder: Path) -> bool:
    reason = distrust(folder) or _noexec(folder)
    if reason:
        warnings.warn(f"ignoring the cache: {reason}", CacheWarning, stacklevel=2)
    return reason is None


def readable_roots() -> Iterator[Path]:
    """The folders to look for entries in."""
    for root in (configured_root(), private_root()):
        if _is_folder(root) and _trusted(root):
            yield root


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False  # below a folder that this user may not enter


def writable_root() -> Path:
    """The folder to build in, created if need be.

    Raises:
        CacheError: neither the configured nor the private folder can be used.
    """
    reasons: list[str] = []
    for root in (configured_root(), private_root()):
        reason = unusable(root)
        if reason is None:
            if reasons:
                warnings.warn(
                    f"using {root} as the cache, since {reasons[0]}", CacheWarning, stacklevel=2
                )
            return root
        reasons.append(reason)
    raise CacheError(
        f"no folder can be used as the cache: {'; '.join(reasons)}. Set JITOPS_CACHE_DIR"
    )


def unusable(root: Path) -> str | None:
    """Why nothing can be built in ``root``, which is created if need be."""
    try:
        # One by one: mkdir(parents=True) would leave what lies between to the umask.
        for folder in (*reversed(root.parents), root):
            if not folder.is_dir():
                folder.mkdir(mode=0o755, exist_ok=True)
        for part in PARTS:
            (root / part).mkdir(mode=0o755, exist_ok=True)
        with tempfile.TemporaryFile(dir=root / "staging"):
            pass
    except OSError as error:
        return f"{root} cannot be written ({error.strerror})"
    return distrust(root) or _noexec(root)


def _noexec(root: Path) -> str | None:
    if os.statvfs(root).f_flag & getattr(os, "ST_NOEXEC", 0):
        return f"{root} is on a file system mounted noexec, from which no library can be loaded"
    return None


# ---- hosts ---------------------------------------------------------------------------------------

_SHARED = (
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "lustre",
    "gpfs",
    "ceph",
    "fuse",
    "9p",
    "glusterfs",
    "afs",
)


def this_host() -> str:
    """Tells the kernels apart that may share a file system: locks are sure within one only."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()


def file_system(path: Path) -> str:
    """The type of the file system that ``path`` is on."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return "unknown file system"
    place = path.resolve()
    around = [(len(m[1]), m[2]) for m in mounts if place.is_relative_to(m[1])]
    return max(around, default=(0, "unknown file system"))[1]


def is_shared(path: Path) -> bool:
    """Whether other hosts may use what is there, unseen from here."""
    return file_system(path).startswith(_SHARED)
