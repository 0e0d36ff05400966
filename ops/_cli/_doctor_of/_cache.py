"""The cache, and lock files that torch's own loader left behind."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ops import _config
from ops._cli import _names
from ops._cli._doctor_of._finding import BAD, COMPILED, NOTE, Finding
from ops._errors import JitopsError
from ops.jit import _admin

_LITTLE_SPACE = 200 << 20


def cache() -> Iterator[Finding]:
    """The folder of the cache, its disk, its locks, its size, and the bundle."""
    root = _admin.location.configured_root()
    reason = _admin.location.unusable(root)
    if reason:
        try:
            other = _admin.location.writable_root()
            yield Finding("cache", reason, NOTE, f"{other} is used instead; set JITOPS_CACHE_DIR")
            root = other
        except JitopsError as error:
            yield Finding(
                "cache", str(error), BAD, "set JITOPS_CACHE_DIR to a folder you own", COMPILED
            )
            return
    else:
        status = root.stat()
        yield Finding("cache", f"{root}, owner {status.st_uid}, mode {status.st_mode & 0o777:04o}")
    yield _space(root)
    yield _locks(root)
    items = _admin.eviction.items(root)
    size, limit = sum(item.size for item in items), _config.settings().cache_max_size
    used = f"{size / 2**20:.0f} of {limit / 2**20:.0f} MiB"
    yield Finding("in it", f"{_names.entries(len(items))}, {used}")
    bundle = _config.settings().bundle
    if bundle is not None:
        try:
            count = len(_admin.eviction.items(_admin.bundle.root(bundle)))
            yield Finding("bundle", f"{bundle}, {_names.entries(count)}")
        except JitopsError as error:
            yield Finding("bundle", str(error), BAD, "export it again", COMPILED)
    yield from _torchs_locks()


def _space(root: Path) -> Finding:
    usage = shutil.disk_usage(root)
    found = f"{usage.free / 2**20:.0f} of {usage.total / 2**20:.0f} MiB free"
    if usage.free < _LITTLE_SPACE:
        fix = "free space there (`jitops cache clean`), or point JITOPS_CACHE_DIR at another disk"
        return Finding("its disk", f"nearly full: {found}", BAD, fix, COMPILED)
    return Finding("its disk", f"{found}, {_admin.location.file_system(root)}")


def _locks(root: Path) -> Finding:
    try:
        with _admin.publish.exclusive(
            root / "locks" / "doctor.lock", "the doctor", 1.0, lambda said: None
        ) as lock:
            held = lock.is_exclusive
        (root / "locks" / "doctor.lock").unlink(missing_ok=True)
    except (JitopsError, OSError) as error:
        return Finding(
            "its locks", f"do not work: {error}", NOTE, "builds may be done twice; no harm"
        )
    if not held:
        return Finding(
            "its locks", "not on this file system", NOTE, "builds may be done twice; no harm"
        )
    return Finding("its locks", "work")


def _torchs_locks() -> Iterator[Finding]:
    """Find lock files that a killed build left, because torch's loader waits for them forever."""
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    for root in [Path(named)] if named else [Path(base, "torch_extensions")]:
        for lock in sorted({*root.glob("*/lock"), *root.glob("*/*/lock")}):
            yield Finding(
                "torch's own lock",
                f"{lock} exists: torch.utils.cpp_extension would wait for it forever",
                NOTE,
                f"if no build is running: rm {lock}. jitops does not use it",
            )
