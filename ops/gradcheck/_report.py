"""What a gradient check found: a table to read, a picture, JSON, an error to raise."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ops._errors import GradientCheckError
from ops.gradcheck._comparison import Comparison, Element
from ops.gradcheck._plot import draw

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PASS, FAIL, UNSUPPORTED, NOT_RUN = "pass", "FAIL", "not supported", "not run"
CANNOT_TELL = "cannot tell"
EXACT_ZEROS = "exact zeros"


@dataclass(frozen=True)
class Check:
    """One property of a function on one back end.

    Attributes:
        backend: the back end.
        name: what was checked; empty where the back end as a whole was not.
        status: ``pass``, ``FAIL``, ``cannot tell`` (rounding hides a derivative), ``not supported``
            (the function says so itself) or ``not run``.
        detail: what is wrong, or why it was not checked, or what there is to know.
        comparison: of derivatives with difference quotients, where that is what was checked.
    """

    backend: str
    name: str
    status: str
    detail: str = ""
    comparison: Comparison | None = None

    @property
    def worst(self) -> Element | None:
        """The element that is farthest off."""
        return self.comparison.worst if self.comparison else None

    def to_dict(self) -> dict[str, Any]:
        """As in the JSON."""
        told: dict[str, Any] = {
            "backend": self.backend,
            "check": self.name,
            "status": self.status,
            "detail": self.detail,
        }
        if self.comparison:
            told["compared"] = len(self.comparison.elements)
            told["elements"] = self.comparison.total
            told["worst"] = _element(self.worst) if self.worst else None
            told["wrong"] = [_element(element) for element in self.comparison.wrong]
            told["kinks"] = [_element(element) for element in self.comparison.kinks]
            told["unclear"] = [_element(element) for element in self.comparison.unclear]
        return told


def _element(element: Element) -> dict[str, Any]:
    return {
        "input": element.input,
        "index": list(element.index),
        **{
            name: value if abs(value) < float("inf") else str(value)  # JSON has no NaN
            for name in ("analytic", "numeric", "error", "allowed")
            for value in (getattr(element, name),)
        },
    }


class GradientReport:
    """What :func:`ops.check_gradients` found. True where nothing is wrong; prints as a table.

    Attributes:
        function: the name of what was checked.
        inputs: what it was checked at, in words.
        checks: every :class:`Check`.
        notes: what there is to know of how it was checked.
    """

    def __init__(
        self, function: str, inputs: str, checks: Sequence[Check], notes: Sequence[str] = ()
    ) -> None:
        self.function = function
        self.inputs = inputs
        self.checks = tuple(checks)
        passed = [check for check in self.checks if check.status == PASS and check.detail]
        of_checks = dict.fromkeys(f"{check.name}: {check.detail}" for check in passed)
        self.notes = (*notes, *of_checks)

    @property
    def ok(self) -> bool:
        """Whether something was checked, and nothing failed."""
        statuses = {check.status for check in self.checks}
        return PASS in statuses and FAIL not in statuses

    def __bool__(self) -> bool:
        return self.ok

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.status == FAIL)

    @property
    def doubts(self) -> tuple[Check, ...]:
        """The checks that cannot tell."""
        return tuple(check for check in self.checks if check.status == CANNOT_TELL)

    def raise_if_failed(self) -> GradientReport:
        """Return the report itself, if nothing is wrong.

        Raises:
            GradientCheckError: a check failed, or none could be run; the text is the report.
        """
        if not self.ok:
            raise GradientCheckError(str(self))
        return self

    def summary(self) -> str:
        """One line: whether it is right, on which back ends, and what is not supported."""
        ran = dict.fromkeys(check.backend for check in self.checks if check.name)
        lacks = dict.fromkeys(c.name for c in self.checks if c.status == UNSUPPORTED)
        unsupported = f"; not supported: {', '.join(lacks)}" if lacks else ""
        doubts = dict.fromkeys(check.name for check in self.doubts)
        unsupported += f"; cannot tell: {', '.join(doubts)}" if doubts else ""
        return f"{'ok  ' if self.ok else 'FAIL'}  {self.function}: {', '.join(ran)}{unsupported}"

    def __str__(self) -> str:
        backends = list(dict.fromkeys(check.backend for check in self.checks if check.name))
        columns = [[c.name for c in self.checks if c.backend == backend] for backend in backends]
        names = max(columns, key=len, default=[])  # the other columns lack some of its rows
        found = {(check.name, check.backend): check for check in self.checks}
        lines = [f"{self.function}({self.inputs})"]
        left = max(map(len, names), default=0)
        widths = [
            max(len(backend), *(len(_cell(found.get((name, backend)))) for name in names))
            for backend in backends
        ]
        for name, cells in (
            ("", backends),
            *(
                (name, [_cell(found.get((name, backend))) for backend in backends])
                for name in names
            ),
        ):
            row = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
            lines.append(f"  {name:{left}}  {row}".rstrip())
        for check in self.checks:
            if check.detail and check.status != PASS:
                what = f"{check.backend}, {check.name}" if check.name else check.backend
                lines.append(f"{what}: {check.status}")
                lines += [f"    {line}" for line in check.detail.splitlines()]
        lines += self._kinks() + [f"note: {note}" for note in self.notes]
        lines.append("ok" if self.ok else f"{len(self.failures)} failed")
        return "\n".join(lines)

    __repr__ = __str__

    def _kinks(self) -> list[str]:
        """The places where a quotient says nothing: the same ones on most back ends."""
        places: dict[str, None] = {}
        for check in self.checks:
            if check.name == EXACT_ZEROS:
                continue  # these are not where the inputs are
            for element in check.comparison.kinks if check.comparison else ():
                places[element.place] = None
        if not places:
            return []
        shown = list(places)[:5] + (["..."] if len(places) > 5 else [])
        return [f"kinks, where only the slopes on both sides can be compared: {', '.join(shown)}"]

    def to_dict(self) -> dict[str, Any]:
        """Everything, in lists, dictionaries, texts and numbers."""
        return {
            "function": self.function,
            "inputs": self.inputs,
            "ok": self.ok,
            "notes": list(self.notes),
            "checks": [check.to_dict() for check in self.checks],
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """The same as JSON, also written to ``path`` if there is one."""
        text = json.dumps(self.to_dict(), indent=2)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw analytic against numeric derivatives, and where the errors are.

        Args:
            path: where to save the picture, if anywhere.

        Returns:
            The figure: a row for each back end. Notebooks show it.

        Raises:
            ArgumentError: matplotlib knows no such format of pictures as ``path`` names.
            DependencyError: matplotlib is not installed.
        """
        return draw(self, path)


def _cell(check: Check | None) -> str:
    if check is None:
        return ""
    if check.status != PASS or not check.comparison:
        return check.status
    compared, kinks = len(check.comparison.elements), len(check.comparison.kinks)
    notes = []
    if compared < check.comparison.total:
        notes.append(f"{compared} of {check.comparison.total} elements")
    if kinks:
        notes.append(f"{kinks} at kinks")
    return f"pass ({', '.join(notes)})" if notes else "pass"
