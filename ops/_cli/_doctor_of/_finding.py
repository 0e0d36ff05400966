"""What ``jitops doctor`` finds, line by line."""

from __future__ import annotations

from dataclasses import dataclass

GOOD, NOTE, BAD = "ok", "note", "problem"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        topic: what was looked at.
        found: what it is.
        status: ``ok``, ``note`` (may matter) or ``problem``.
        fix: what to do about it.
        blocks: the back ends that cannot be built because of it.
    """

    topic: str
    found: str
    status: str = GOOD
    fix: str | None = None
    blocks: tuple[str, ...] = ()


COMPILED = ("cpp", "cuda")
