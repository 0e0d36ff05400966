"""The report of a gradient check: as a table, a picture, JSON or an error."""

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
        name: the name of the check; empty if the whole back end was not run.
        status: ``pass``, ``FAIL``, ``cannot tell`` (rounding hides a derivative), ``not supported``
            (the function raised an error that says so) or ``not run``.
        detail: the problem, the reason why it was not checked, or a note.
        comparison: the derivatives and difference quotients, for checks that compare them.
    """

    backend: str
    name: str
    status: str
    detail: str = ""
    comparison: Comparison | None = None

    @property
    def worst(self) -> Element | None:
        """The element with the largest error."""
        return self.comparison.worst if self.comparison else None

    def to_dict(self) -> dict[str, Any]:
        """The check as a dictionary, as it stands in the JSON."""
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
    """The report of :func:`ops.check_gradients`. It prints as a table, and is true if all is right.

    Attributes:
        function: the name of the checked function.
        inputs: the names and shapes of its inputs.
        checks: every check, with ``backend``, ``name``, ``status`` and ``detail``.
        notes: remarks on how the function was checked.
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
        """Whether at least one check passed and none failed."""
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
        """Return the report itself if nothing is wrong.

        Raises:
            GradientCheckError: a check failed, or none could run. The message is the report.
        """
        if not self.ok:
            raise GradientCheckError(str(self))
        return self

    def summary(self) -> str:
        """One line: the verdict, the back ends, and the unsupported or doubtful checks."""
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
                name = f"{check.backend}, {check.name}" if check.name else check.backend
                lines.append(f"{name}: {check.status}")
                lines += [f"    {line}" for line in check.detail.splitlines()]
        lines += self._kinks() + [f"note: {note}" for note in self.notes]
        lines.append("ok" if self.ok else f"{len(self.failures)} failed")
        return "\n".join(lines)

    __repr__ = __str__

    def _kinks(self) -> list[str]:
        """The elements at kinks, each once, because most back ends have the same ones."""
        places: dict[str, None] = {}
        for check in self.checks:
            if check.name == EXACT_ZEROS:
                continue  # this check moves the inputs to zero
            for element in check.comparison.kinks if check.comparison else ():
                places[element.place] = None
        if not places:
            return []
        shown = list(places)[:5] + (["..."] if len(places) > 5 else [])
        return [f"kinks, where only the slopes on both sides can be compared: {', '.join(shown)}"]

    def to_dict(self) -> dict[str, Any]:
        """The whole report as dictionaries and lists of texts and numbers."""
        return {
            "function": self.function,
            "inputs": self.inputs,
            "ok": self.ok,
            "notes": list(self.notes),
            "checks": [check.to_dict() for check in self.checks],
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """The whole report as JSON, also written to ``path`` if that is given."""
        text = json.dumps(self.to_dict(), indent=2)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw analytic against numeric derivatives, and a map of the errors.

        Args:
            path: file to save the picture to; ``None`` saves nothing.

        Returns:
            The figure, with a row for each back end. Notebooks show it.

        Raises:
            ArgumentError: matplotlib does not know the format of ``path``.
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
