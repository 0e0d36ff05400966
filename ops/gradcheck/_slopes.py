"""Slopes of a function along a line, and their rounding errors.

A difference quotient needs a step that fits the point. Rounding hides the difference of a small
step, and the function may not be smooth within a large one. The right step is unknown, so the check
takes ever smaller ones. :func:`estimate` extrapolates them to the step zero (Richardson). It keeps
the largest step with which all smaller ones agree within their rounding errors (Lepskii's
principle).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# A function of the inputs: all of its results in one vector.
Values = Callable[[list[Tensor]], Tensor]

RATIO = 4  # ratio of one step to the next
_UP = 9  # number of rungs above the first step
_SMALLEST = 1e-30
_ROUNDINGS = 64  # the error of a result that takes a few operations
_ORDER = 8
_SPACING = 1e-9

# ---- rounding errors -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Noise:
    """The rounding errors of results.

    Attributes:
        eps: the eps of the dtype of the inputs.
        fixed: for each result, an error that it has even if it does not change.
    """

    eps: float
    fixed: Tensor

    def between(self, one: Tensor, other: Tensor) -> Tensor:
        """The error of each difference of results; for equal results, their last bit."""
        size = self.eps * torch.maximum(one.abs(), other.abs())
        return torch.where(one != other, _ROUNDINGS * size, size) + self.fixed


def noise(points: list[Tensor], values: Values, narrow: float | None = None) -> Noise:
    """Measure the rounding errors, because numbers may cancel within the function.

    ``narrow`` is the relative precision of the function, if it is worse than that of its inputs.
    """
    eps = max(torch.finfo(point.dtype).eps for point in points)
    here = safely(values, points)
    size = sizes(here)
    if narrow is not None:
        return Noise(eps, 2 * narrow * size)
    # At this spacing, high differences of a smooth function vanish, but those of rounding errors
    # do not. Each side is measured alone, because the point may be a kink.
    generator = torch.Generator().manual_seed(0)
    signs = [torch.randint(0, 2, p.shape, generator=generator).to(p) * 2 - 1 for p in points]
    by = max(_SPACING, 16 * eps)
    sides = []
    for side in (-by, by):
        differences = torch.stack(
            [
                fitting(here, safely(values, [
                    p + side * count * s * sizes(p).clamp(min=1)
                    for p, s in zip(points, signs, strict=True)
                ]))
                for count in range(_ORDER + 1)
            ]
        ).diff(_ORDER, 0)  # fmt: skip
        sides.append(differences[0].abs() / math.comb(2 * _ORDER, _ORDER) ** 0.5)
    rough = torch.minimum(*(side.nan_to_num(torch.inf) for side in sides))
    # A rougher function is not noisy: it varies on so small a scale.
    largest = max((sizes(p).max().item() for p in [*points, size] if p.numel()), default=0.0)
    rough = torch.where(rough <= by * largest, rough, 0)
    return Noise(eps, torch.where(rough > _ROUNDINGS / 4 * eps * size, 16 * rough, 0))


def sizes(values: Tensor) -> Tensor:
    """The magnitudes, with zero for infinite elements and NaN, which no step moves."""
    return values.abs().nan_to_num(0, 0, 0)


def fitting(here: Tensor, values: Tensor) -> Tensor:
    return values if values.shape == here.shape else torch.full_like(here, torch.nan)


def safely(values: Values, points: list[Tensor]) -> Tensor:
    """The results, or NaN if the function raises an error, as it may outside its domain."""
    try:
        return values(points)
    except Exception:  # each function raises its own error outside its domain
        return torch.full((1,), torch.nan, dtype=torch.float64)


# ---- slopes --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rung:
    """The slopes with one step, and the error of the central one; the sides have twice as much."""

    step: float
    left: float
    right: float
    central: float
    noise: float


class Line:
    """A function along a line through a point.

    Args:
        values: the function; it returns the results at the distance ``t`` from the point.
        here: the results at the point.
        weights: the weights of the results, a row for each sum.
        noise: the rounding errors of the results.
        first: the first step.
        scale: the magnitude of the point, because steps are rounded relative to it.
    """

    def __init__(
        self,
        values: Callable[[float], tuple[float, Tensor]],
        here: Tensor,
        weights: Tensor,
        noise: Noise,
        first: float,
        scale: float,
    ) -> None:
        self._values, self._weights, self._noise = values, weights, noise
        self._seen = {0.0: (0.0, here)}
        self.first, self.far = first, first * RATIO**_UP
        self._last = max(_SMALLEST, 16 * noise.eps * scale)

    def _at(self, t: float) -> tuple[float, Tensor]:
        """The distance from the point after rounding, and the results there."""
        if t not in self._seen:
            moved, values = self._values(t)
            self._seen[t] = moved, fitting(self._seen[0.0][1], values)
        return self._seen[t]

    def slopes(self, low: float, high: float) -> tuple[Tensor, Tensor]:
        """The slope of each sum between two places, and its rounding error."""
        (start, before), (end, after) = self._at(low), self._at(high)
        width = end - start if end > start else math.nan
        hidden = self._weights.abs() @ self._noise.between(before, after)
        return self._weights @ (after - before) / width, 2 * hidden / width

    def rung(self, step: float, which: int) -> Rung:
        """The slopes of one sum with one step."""
        found = [self.slopes(*ends) for ends in ((-step, 0.0), (0.0, step), (-step, step))]
        noises = [hidden[which].item() for _, hidden in found]
        left, right, central = (slope[which].item() for slope, _ in found)
        noises[2] *= 2
        error = max(filter(math.isfinite, noises), default=math.nan) / 2
        return Rung(step, left, right, central, error)

    def coarse(self, which: int) -> list[Rung]:
        """The rungs from the largest step to the first one."""
        return [self.rung(self.first * RATIO**up, which) for up in range(_UP, -1, -1)]

    def fine(self, which: int, size: float) -> list[Rung]:
        """The rungs below the first step, until rounding hides a slope of this size."""
        rungs: list[Rung] = []
        step = self.first / RATIO
        while step >= self._last:
            rung = self.rung(step, which)
            slopes = [abs(s) for s in (rung.left, rung.right, rung.central) if math.isfinite(s)]
            if rung.noise > max([size, *slopes]):
                break
            rungs.append(rung)
            step /= RATIO
        return rungs

    def is_last(self, rung: Rung) -> bool:
        """Whether the next step would be lost in the rounding of the point."""
        return rung.step / RATIO < self._last


@dataclass(frozen=True)
class Estimate:
    """A slope and its error."""

    slope: float
    error: float


def estimate(rungs: Sequence[Rung], side: str) -> Estimate | None:
    """The slope by the ``left``, ``right`` or ``central`` slopes of the rungs."""
    usable = [rung for rung in rungs if math.isfinite(getattr(rung, side))]
    if len(usable) < 3:
        return None
    # The error of one-sided slopes shrinks with the step, that of central ones with its square.
    factor, noises = (RATIO**2, 1) if side == "central" else (RATIO, 2)
    plain = [Estimate(getattr(rung, side), noises * rung.noise) for rung in usable]
    extrapolated = [
        Estimate(
            (factor * finer.slope - coarse.slope) / (factor - 1),
            (factor * finer.error + coarse.error) / (factor - 1),
        )
        for coarse, finer in itertools.pairwise(plain)
    ]
    # If the slope hardly changes, plain slopes suffer less from rounding.
    best = min(_settled(plain), _settled([*extrapolated, plain[-1]]), key=lambda e: e.error)
    return best if side == "central" else Estimate(best.slope, 2 * best.error)


def _settled(found: Sequence[Estimate]) -> Estimate:
    """The first estimate, from coarse to fine, that agrees with all that follow."""
    for place, coarse in enumerate(found[:-1]):
        finer = found[place + 1 :]
        if all(abs(coarse.slope - f.slope) <= coarse.error + f.error for f in finer):
            # Each finer estimate bounds its error.
            return Estimate(coarse.slope, min(abs(coarse.slope - f.slope) + f.error for f in finer))
    # They do not converge: the difference of the last two measures the error.
    last, before = found[-1], found[-2]
    return Estimate(last.slope, last.error + abs(last.slope - before.slope))
