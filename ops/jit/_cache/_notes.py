"""What is remembered of builds: who a compiler is, and what has failed, until something changes."""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from ops.jit._cache import _roots, _store

# Packages can be installed behind our back: a failure is not held against them for longer.
_FAILURE_LASTS = 3600.0  # seconds


def recall(key: str) -> str | None:
    """The note kept under ``key``."""
    for root in _roots.readable_roots():
        try:
            return (root / "notes" / _store.sha256(key.encode())[:32]).read_text()
        except (OSError, ValueError):
            continue
    return None


def remember(root: Path, key: str, note: str) -> None:
    """Keep a note."""
    _write(root / "notes" / _store.sha256(key.encode())[:32], note)


def _write(path: Path, text: str) -> None:
    """In one rename. It spares work later and is worth no error: a full disk goes unmentioned."""
    draft = path.with_name(f".{secrets.token_hex(8)}")
    try:
        draft.write_text(text)
        draft.chmod(0o644)
        draft.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


# ---- failures ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failure:
    """A build that failed, and what it depended on beyond its digest."""

    digest: str
    surroundings: str
    message: str
    log: str | None
    when: float
    passing: bool

    @property
    def age(self) -> float:
        """Seconds since."""
        return max(0.0, time.time() - self.when)


def failure_of(root: Path, stem: str, digest: str, surroundings: str) -> Failure | None:
    """What is remembered of this build, if all it depended on is as it was."""
    path = root / "failures" / f"{stem}.json"
    try:
        if _roots.distrust(path):
            return None
        failure = Failure(**json.loads(path.read_text()))
        fresh = failure.digest == digest and failure.surroundings == surroundings
        return failure if fresh and failure.age < _FAILURE_LASTS else None
    except (OSError, ValueError, TypeError):
        return None


def remember_failure(root: Path, stem: str, failure: Failure) -> None:
    """Keep it from being tried again by every process."""
    _write(root / "failures" / f"{stem}.json", json.dumps(asdict(failure), indent=1))


def forget_failure(root: Path, stem: str) -> None:
    """It has been mended."""
    for path in (root / "failures" / f"{stem}.json", root / "logs" / f"{stem}.log"):
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
