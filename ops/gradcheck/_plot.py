"""The picture of a gradient check."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ops._errors import ArgumentError
from ops.arrays.conversions import require
from ops.gradcheck._comparison import Comparison, Element

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class _Check(Protocol):
    @property
    def backend(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def comparison(self) -> Comparison | None: ...
    @property
    def worst(self) -> Element | None: ...


class _Report(Protocol):
    function: str

    @property
    def ok(self) -> bool: ...
    @property
    def checks(self) -> Sequence[_Check]: ...


def check_format(name: str, path: str | Path) -> None:
    """Check that matplotlib can write such a file; ``name`` is the name of the argument.

    Raises:
        ArgumentError: matplotlib does not know the format.
        DependencyError: matplotlib is not installed.
    """
    backends = require("matplotlib.backend_bases", "GradientReport.plot", extra="plot")
    known = backends.FigureCanvasBase.get_supported_filetypes()
    if Path(path).suffix.removeprefix(".").lower() not in {"", *known}:
        kinds = ", ".join(f".{kind}" for kind in sorted(known))
        raise ArgumentError(f"{name} must end in {kinds}, got {str(path)!r}")


def draw(report: _Report, path: str | Path | None) -> Figure:
    """Draw the figure, and save it to ``path`` if that is given."""
    if path is not None:
        check_format("path", path)
    matplotlib = require("matplotlib.figure", "GradientReport.plot", extra="plot")

    class Shown(matplotlib.Figure):  # type: ignore[misc, name-defined]
        """A figure that notebooks show without pyplot."""

        def _repr_png_(self) -> bytes:
            picture = io.BytesIO()
            self.savefig(picture, format="png")
            return picture.getvalue()

    drawn = [c for c in report.checks if c.comparison and c.name == "reverse mode"]
    figure: Figure = Shown(figsize=(10, 4.2 * max(1, len(drawn))))
    axes = figure.subplots(max(1, len(drawn)), 2, squeeze=False)
    figure.suptitle(f"{report.function}: {'ok' if report.ok else 'FAILED'}")
    for (left, right), check in zip(axes, drawn, strict=False):
        _scatter(left, check)
        _error_map(right, check)
    figure.tight_layout()
    if path is not None:
        figure.savefig(path)
    return figure


def _scatter(axes: Axes, check: _Check) -> None:
    if check.comparison is None:
        return
    for label, elements, colour in (
        ("right", check.comparison.elements, "tab:blue"),
        ("at a kink", check.comparison.kinks, "tab:orange"),
        ("lost in rounding", check.comparison.unclear, "tab:gray"),
        ("wrong", check.comparison.wrong, "tab:red"),
    ):
        if elements:
            numeric, analytic = [e.numeric for e in elements], [e.analytic for e in elements]
            axes.scatter(numeric, analytic, s=14, c=colour, label=label)
    axes.axline((0, 0), slope=1, color="0.7", zorder=0)
    axes.set(title=f"{check.backend}: gradient", xlabel="numeric", ylabel="analytic")
    axes.legend()


def _error_map(axes: Axes, check: _Check) -> None:
    """Draw the errors of the input with the worst element, over its last and other dimensions."""
    import numpy as np

    worst = check.worst
    if check.comparison is None or worst is None:
        return
    its = [element for element in check.comparison.elements if element.input == worst.input]
    largest = zip(*(element.index for element in its), strict=True)
    errors = np.full([1 + max(indices) for indices in largest] or [1], np.nan)
    for element in its:
        errors[element.index or 0] = element.error
    image = axes.imshow(errors.reshape(-1, errors.shape[-1]), aspect="auto")
    axes.figure.colorbar(image, ax=axes)
    axes.set(title=f"{check.backend}: error in {worst.input}", xlabel="last dimension")
