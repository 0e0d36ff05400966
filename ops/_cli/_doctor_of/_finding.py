"""One line of the report of ``jitops doctor``."""

from __future__ import annotations

from dataclasses import dataclass

GOOD, NOTE, BAD = "ok", "note", "problem"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        topic: the tool or setting that was examined.
        found: its state.
        status: ``ok``, ``note`` (may matter) or ``problem``.
        fix: the advice to the user.
        blocks: the back ends that it keeps from being built.
    """

    topic: str
    found: str
    status: str = GOOD
    fix: str | None = None
    blocks: tuple[str, ...] = ()


COMPILED = ("cpp", "cuda")
