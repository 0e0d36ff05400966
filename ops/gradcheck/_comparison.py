"""The compared derivatives: tolerances, results, and a description of the errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Tolerance:
    """The allowed difference of two derivatives beyond rounding, and the first step."""

    relative: float
    absolute: float
    step: float

    def allowed(self, size: float, error: float) -> float:
        """The allowed difference of derivatives of a size, if one of them has an error."""
        return self.absolute + self.relative * size + error


@dataclass(frozen=True)
class Element:
    """One element of one input, with its two derivatives."""

    input: str
    index: tuple[int, ...]
    analytic: float
    numeric: float
    allowed: float

    @property
    def error(self) -> float:
        """The difference of the two derivatives."""
        return abs(self.analytic - self.numeric)

    @property
    def place(self) -> str:
        """The element as an expression: ``weight[0, 3]``."""
        return f"{self.input}[{', '.join(map(str, self.index))}]" if self.index else self.input

    def __str__(self) -> str:
        return (
            f"{self.place}: analytic {self.analytic:.6g}, numeric {self.numeric:.6g}, "
            f"error {self.error:.2g} (allowed {self.allowed:.2g})"
        )


@dataclass
class Comparison:
    """All compared elements, the wrong ones, those at kinks, and those that rounding hides."""

    total: int = 0
    elements: list[Element] = field(default_factory=list)
    wrong: list[Element] = field(default_factory=list)
    kinks: list[Element] = field(default_factory=list)
    unclear: list[Element] = field(default_factory=list)

    def add(self, other: Comparison) -> None:
        """Add the results of another comparison."""
        self.total += other.total
        self.elements += other.elements
        self.wrong += other.wrong
        self.kinks += other.kinks
        self.unclear += other.unclear

    @property
    def worst(self) -> Element | None:
        """The wrong element with the largest error, else the one nearest to being wrong."""
        if self.wrong:
            return max(self.wrong, key=lambda e: e.error if e.error == e.error else float("inf"))
        kinks = set(self.kinks)
        smooth = [element for element in self.elements if element not in kinks]
        return max(smooth, key=lambda e: e.error / max(e.allowed, 1e-300), default=None)

    @property
    def problem(self) -> str:
        """A description of the wrong elements; empty if there are none."""
        if not self.wrong or self.worst is None:
            return ""
        inputs = list(dict.fromkeys(element.input for element in self.wrong))
        lines = [
            f"{len(self.wrong)} of {len(self.elements)} elements are wrong, in {', '.join(inputs)}",
            f"worst: {self.worst}",
        ]
        if any(not math.isfinite(element.numeric) for element in self.wrong):
            lines.append("the function itself is not finite there; choose inputs where it is")
        for name in inputs:
            guess = _guess([e for e in self.elements if e.input == name and e not in self.kinks])
            if guess:
                lines.append(f"{name}: {guess}")
        return "\n".join(lines)

    @property
    def doubt(self) -> str:
        """A description of the derivatives that rounding hides; empty if there are none."""
        if not self.unclear:
            return ""
        inputs = list(dict.fromkeys(element.input for element in self.unclear))
        return (
            f"{len(self.unclear)} of {len(self.elements)} derivatives are lost in rounding errors, "
            f"in {', '.join(inputs)}, because a result is too large beside its change\n"
            f"one of them: {self.unclear[0]}"
        )


def _guess(elements: Sequence[Element]) -> str:
    """A pattern that explains all errors of one input; empty if there is none."""
    large = max(abs(element.numeric) for element in elements)
    if all(element.analytic == 0 for element in elements):
        return "the gradient is zero or missing, but the results depend on it"
    ratios = torch.tensor(
        [e.analytic / e.numeric for e in elements if abs(e.numeric) > 1e-3 * large],
        dtype=torch.float64,
    )
    ratio = ratios.median().item() if len(ratios) > 1 else float("nan")
    if not ((ratios - ratio).abs() <= 1e-4 * abs(ratio)).all() or ratio != ratio:
        return ""
    if abs(ratio + 1) < 1e-4:
        return "all signs are flipped"
    return f"a factor is missing: analytic = {ratio:.4g} numeric, everywhere"
