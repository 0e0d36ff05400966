"""Slopes of a function along a line, and what rounding hides of them.

A difference quotient says something of the derivative only at a step that fits the point: so large
that rounding does not drown the difference, so small that the function is smooth within it. Nobody
knows that step beforehand. So a ladder of steps is climbed down. :func:`estimate` keeps the largest
step with which all smaller ones agree, within their rounding errors (Lepskii's principle), after an
extrapolation to the step zero (Richardson's).
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

RATIO = 4  # of one step to the next
_UP = 9  # rungs above the first step
_SMALLEST = 1e-30
_ROUNDINGS = 64  # in a result that takes a few operations
_ORDER = 8
_SPACING = 1e-9

# ---- what rounding hides -------------------------------------------------------------------------


@dataclass(frozen=True)
class Noise:
    """How far results may be from those of exact arithmetic.

    Attributes:
        eps: of the dtype of the inputs.
        fixed: for each result, also where it does not change.
    """

    eps: float
    fixed: Tensor

    def between(self, one: Tensor, other: Tensor) -> Tensor:
        """Of each result of a difference; of one that stays the same, bit for bit, its last bit."""
        size = self.eps * torch.maximum(one.abs(), other.abs())
        return torch.where(one != other, _ROUNDINGS * size, size) + self.fixed


def noise(points: list[Tensor], values: Values, narrow: float | None = None) -> Noise:
    """Measured, because numbers may cancel within the function.

    ``narrow`` is the relative precision that the function computes in, if less than its inputs'.
    """
    eps = max(torch.finfo(point.dtype).eps for point in points)
    here = safely(values, points)
    size = here.abs().nan_to_num(0, 0, 0)
    if narrow is not None:
        return Noise(eps, 2 * narrow * size)
    # At this spacing, high differences of a smooth function vanish, and those of rounding errors
    # do not. Each side is measured alone, because the point may be a kink.
    generator = torch.Generator().manual_seed(0)
    signs = [torch.randint(0, 2, p.shape, generator=generator).to(p) * 2 - 1 for p in points]
    by = max(_SPACING, 16 * eps)
    sides = []
    for side in (-by, by):
        differences = torch.stack(
            [
                _fitting(here, safely(values, [
                    p + side * count * s * p.abs().clamp(min=1)
                    for p, s in zip(points, signs, strict=True)
                ]))
                for count in range(_ORDER + 1)
            ]
        ).diff(_ORDER, 0)  # fmt: skip
        sides.append(differences[0].abs() / math.comb(2 * _ORDER, _ORDER) ** 0.5)
    rough = torch.minimum(*(side.nan_to_num(torch.inf) for side in sides))
    # What is rougher than that is a function of so small a scale.
    largest = max((p.abs().max().item() for p in [*points, size] if p.numel()), default=0.0)
    rough = torch.where(rough <= by * largest, rough, 0)
    return Noise(eps, torch.where(rough > _ROUNDINGS / 4 * eps * size, 16 * rough, 0))


def _fitting(here: Tensor, values: Tensor) -> Tensor:
    return values if values.shape == here.shape else torch.full_like(here, torch.nan)


def safely(values: Values, points: list[Tensor]) -> Tensor:
    """The results, or NaN where the function raises, as one does beyond its domain."""
    try:
        return values(points)
    except Exception:  # each function says in its own way that a point is none of its domain
        return torch.full((1,), torch.nan, dtype=torch.float64)


# ---- slopes --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rung:
    """Slopes with one step, and what rounding may change: those of a side twice as much."""

    step: float
    left: float
    right: float
    central: float
    noise: float


class Line:
    """A function along a line through a point.

    Args:
        values: the results ``t`` away from the point.
        here: those at the point.
        weights: of the results, a row for each sum.
        noise: of the results.
        first: the step to begin with.
        scale: of the point, relative to which steps have digits.
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
        """How far from the point it really is, in the digits that there are, and the results."""
        if t not in self._seen:
            moved, values = self._values(t)
            self._seen[t] = moved, _fitting(self._seen[0.0][1], values)
        return self._seen[t]

    def slopes(self, low: float, high: float) -> tuple[Tensor, Tensor]:
        """Of each sum between two places, and what rounding hides of them."""
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
        """The rungs below, as long as rounding leaves something of a slope of this size."""
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
        """Whether a smaller step would be lost in the digits of the point."""
        return rung.step / RATIO < self._last


@dataclass(frozen=True)
class Estimate:
    """A slope, and how far off it may be."""

    slope: float
    error: float


def estimate(rungs: Sequence[Rung], side: str) -> Estimate | None:
    """The slope by the rungs of one side, ``left`` or ``right``, or by the ``central`` ones."""
    usable = [rung for rung in rungs if math.isfinite(getattr(rung, side))]
    if len(usable) < 3:
        return None
    # Slopes of a side come nearer to the derivative with the step, central ones with its square.
    factor, noises = (RATIO**2, 1) if side == "central" else (RATIO, 2)
    plain = [Estimate(getattr(rung, side), noises * rung.noise) for rung in usable]
    extrapolated = [
        Estimate(
            (factor * finer.slope - coarse.slope) / (factor - 1),
            (factor * finer.error + coarse.error) / (factor - 1),
        )
        for coarse, finer in itertools.pairwise(plain)
    ]
    # Where the slope hardly changes, the plain ones suffer less from rounding.
    best = min(_settled(plain), _settled([*extrapolated, plain[-1]]), key=lambda e: e.error)
    return best if side == "central" else Estimate(best.slope, 2 * best.error)


def _settled(found: Sequence[Estimate]) -> Estimate:
    """The first, from coarse to fine, that agrees with all that follow."""
    for place, coarse in enumerate(found[:-1]):
        finer = found[place + 1 :]
        if all(abs(coarse.slope - f.slope) <= coarse.error + f.error for f in finer):
            # They vouch for it.
            return Estimate(coarse.slope, min(abs(coarse.slope - f.slope) + f.error for f in finer))
    # They never settle: the last two tell how far from it they are.
    last, before = found[-1], found[-2]
    return Estimate(last.slope, last.error + abs(last.slope - before.slope))
