"""The folders that the cache may be in: the configured one, and a private one to fall back on.

Nothing is loaded from a folder that somebody else could have written to.
"""

import contextlib
import functools
import hashlib
import os
import re
import stat
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from ops import _config
from ops._errors import CacheError, CacheWarning

PARTS = ("staging", "locks", "logs")
# File systems that other hosts may use too.
_SHARED = (
    *("nfs", "cifs", "smb3", "lustre", "gpfs", "ceph", "fuse", "9p", "virtiofs"),
    *("glusterfs", "afs"),
)


def configured_root() -> Path:
    """Return ``JITOPS_CACHE_DIR``, a folder in ``TORCH_EXTENSIONS_DIR``, or in the user's cache."""
    chosen = _config.settings().cache_dir
    if chosen is not None:
        return chosen
    torchs = os.environ.get("TORCH_EXTENSIONS_DIR")
    if torchs:
        return Path(torchs).absolute() / "jitops"
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        base = os.path.expanduser("~/.cache")
    return Path(base) / "jitops" if os.path.isabs(base) else _temporary()  # no home at all


def private_root() -> Path:
    """Return a temporary folder of this user, for where the configured one cannot be used.

    It is another one for each configured folder, because whoever names a fresh cache means one.
    """
    of = hashlib.sha256(os.fsencode(configured_root())).hexdigest()[:8]
    return Path(f"{_temporary()}-{of}")


def _temporary() -> Path:
    return Path(os.environ.get("TMPDIR") or "/tmp").absolute() / f"jitops-{os.getuid()}"


def distrust(path: Path) -> str | None:
    """Return why nothing at ``path`` may be loaded: somebody else could have put it there."""
    try:
        status = path.stat()
    except OSError:
        return None  # not there, so nothing of it is loaded
    by_group = _config.settings().trust_group and status.st_gid in (os.getegid(), *os.getgroups())
    if status.st_uid not in (os.getuid(), 0) and not by_group and not _is_unmapped(status, path):
        return f"{path} belongs to user {status.st_uid}, not to you or root"
    others = status.st_mode & (stat.S_IWOTH if by_group else stat.S_IWGRP | stat.S_IWOTH)
    if others:
        hint = "; JITOPS_TRUST_GROUP=1 trusts its group" if others == stat.S_IWGRP else ""
        return f"{path} can be written by others (mode {stat.S_IMODE(status.st_mode):04o}{hint})"
    return None


def _is_unmapped(status: os.stat_result, path: Path) -> bool:
    """Whether a file belongs to a user whom this container does not know, and nobody can write it.

    So do root's files where root is not mapped. Whoever mounts a file system read-only into a
    container decides about all that is in the container.
    """
    try:
        overflow = int(Path("/proc/sys/fs/overflowuid").read_text())
        read_only = bool(os.statvfs(path).f_flag & os.ST_RDONLY)
    except (OSError, ValueError):
        return False
    return status.st_uid == overflow and read_only


@functools.cache
def _refused(folder: Path) -> str | None:
    reason = distrust(folder) or _noexec(folder)
    if reason:
        warnings.warn(f"ignoring the cache: {reason}", CacheWarning, stacklevel=2)
    return reason


def _present() -> Iterator[tuple[Path, str | None]]:
    """Yield the caches that are there, each with the reason why nothing is loaded from it."""
    for root in (configured_root(), private_root()):
        with contextlib.suppress(OSError):  # below a folder that this user may not enter
            if root.is_dir():
                yield root, _refused(root)


def readable_roots() -> Iterator[Path]:
    """Yield the folders to look for entries in."""
    return (root for root, reason in _present() if reason is None)


def refusals() -> list[str]:
    """List why caches that are there are not looked into."""
    return [reason for _, reason in _present() if reason]


def writable_root() -> Path:
    """Return the folder to build in, created if need be."""
    reasons: list[str] = []
    for root in (configured_root(), private_root()):
        reason = unusable(root)
        if reason is None:
            if reasons:
                said = f"using {root} as the cache, since {reasons[0]}"
                warnings.warn(said, CacheWarning, stacklevel=2)
            return root
        reasons.append(reason)
    raise CacheError(
        f"no folder can be used as the cache: {'; '.join(reasons)}. Set JITOPS_CACHE_DIR"
    )


def unusable(root: Path) -> str | None:
    """Return why nothing can be built in ``root``, which is created if need be."""
    if not re.fullmatch(rb"[\w @%+=,~./\x80-\xff-]+", os.fsencode(root)):
        return f"{root} has characters in its path that build tools cannot pass on"
    try:
        # One by one, because mkdir(parents=True) would leave the modes of parents to the umask.
        for folder in (*reversed(root.parents), root, *(root / part for part in PARTS)):
            if not folder.is_dir():
                make_folder(folder)
        probe = tempfile.mkdtemp(prefix=".probe.", dir=root / "staging")
        try:
            os.rename(probe, f"{probe}.renamed")  # some file systems cannot rename folders
            probe = f"{probe}.renamed"
        finally:
            os.rmdir(probe)
    except OSError as error:
        return f"{root} cannot be written ({error.strerror})"
    return distrust(root) or _noexec(root)


def make_folder(path: Path) -> None:
    """Make a folder that nobody else may write, or only its group where that is trusted."""
    path.mkdir(mode=0o755, exist_ok=True)
    if _config.settings().trust_group:
        with contextlib.suppress(OSError):  # somebody else's, or no modes on this file system
            path.chmod(path.stat().st_mode | stat.S_IWGRP | stat.S_ISGID)


def _noexec(root: Path) -> str | None:
    with contextlib.suppress(OSError):  # a file system that does not say
        if os.statvfs(root).f_flag & getattr(os, "ST_NOEXEC", 0):
            return f"{root} is on a file system mounted noexec, from which no library can be loaded"
    return None


def file_system(path: Path) -> str:
    """Return the type of the file system that ``path`` is on."""
    with contextlib.suppress(OSError):
        device = path.stat().st_dev
        number = f" {os.major(device)}:{os.minor(device)} "
        for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
            if number in line:
                return line.partition(" - ")[2].partition(" ")[0]
    return "unknown file system"


def is_shared(path: Path) -> bool:
    """Whether other hosts may use a file system, unseen from here."""
    return file_system(path).startswith(_SHARED)
