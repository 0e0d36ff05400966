"""Derivatives against difference quotients, element by element, with an eye for kinks.

A difference quotient says something of the derivative only where the function has one. Where a
quotient disagrees, it is taken again with smaller steps and from each side alone:

- if the smaller steps agree, the first one had crossed a kink nearby;
- if the two one-sided slopes differ, however small the step, the point *is* a kink, and any slope
  between the two is right;
- if the quotient grows as the step shrinks, the function jumps, and has no slope to compare with;
- else the derivative is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# A function of the inputs: some scalars (differently weighted sums of one result), and for each the
# sum of the magnitudes that it adds up, which its rounding errors are in proportion to.
Sums = Callable[[list[Tensor]], tuple[Tensor, Tensor]]

_EPS = torch.finfo(torch.float64).eps
_ROUNDINGS = 64 * _EPS  # of a sum that takes a few operations a term
_SMALLER = (2, 8, 64, 512)  # divisors of the step, to look again


@dataclass(frozen=True)
class Tolerance:
    """How far apart the two may be: ``absolute + relative * size``, and what rounding explains."""

    relative: float
    absolute: float
    step: float

    def allowed(self, size: Tensor, rounded: Tensor, step: float) -> Tensor:
        """For derivatives of this size, of sums of this magnitude, with this step."""
        return self.absolute + self.relative * size + _ROUNDINGS * rounded / step


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
        """How far apart the two derivatives are."""
        return abs(self.analytic - self.numeric)

    @property
    def place(self) -> str:
        """As one writes it: ``weight[0, 3]``."""
        return f"{self.input}[{', '.join(map(str, self.index))}]" if self.index else self.input

    def __str__(self) -> str:
        return (
            f"{self.place}: analytic {self.analytic:.6g}, numeric {self.numeric:.6g}, "
            f"error {self.error:.2g} (allowed {self.allowed:.2g})"
        )


@dataclass
class Comparison:
    """All elements compared, the wrong ones, and those at kinks."""

    total: int = 0
    elements: list[Element] = field(default_factory=list)
    wrong: list[Element] = field(default_factory=list)
    kinks: list[Element] = field(default_factory=list)

    @property
    def worst(self) -> Element | None:
        """The wrong element with the largest error, else the one nearest to being wrong."""
        if self.wrong:
            return max(self.wrong, key=lambda e: e.error if e.error == e.error else float("inf"))
        kinks = set(self.kinks)
        smooth = [element for element in self.elements if element not in kinks]
        return max(smooth, key=lambda e: e.error / max(e.allowed, 1e-300), default=None)


def compare(
    names: Sequence[str],
    inputs: Sequence[Tensor],
    analytic: Sequence[Tensor],
    sums: Sums,
    tolerance: Tolerance,
    at_most: int,
) -> Comparison:
    """Compare derivatives with difference quotients.

    Args:
        names: of the inputs.
        inputs: float64, contiguous; restored when this returns.
        analytic: for each input, the derivatives: ``(number of sums, *input.shape)``.
        sums: the function.
        tolerance: what is allowed.
        at_most: how many elements of an input to look at; if it has more, evenly spread ones.
    """
    result = Comparison()
    points = [tensor.detach().clone() for tensor in inputs]
    noise = _noise(points, sums)
    for name, point, derivatives in zip(names, points, analytic, strict=True):
        result.total += point.numel()
        flat = point.view(-1)
        wanted = derivatives.reshape(len(derivatives), -1)
        for place in _spread(flat.numel(), at_most):
            look = _Look(points, flat, place, sums, tolerance, noise)
            index = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), point.shape))
            _judge(look, name, index, wanted[:, place], result)
    return result


def _noise(points: list[Tensor], sums: Sums) -> Tensor:
    """What the sums hide of the magnitudes they were made of, where these cancel.

    In units of a rounding: how far the sums move when the inputs do by one or two. What moves by
    more than that, jumps.
    """
    sums_here, size = sums(points)
    generator = torch.Generator().manual_seed(0)
    moved = torch.zeros_like(size)
    for _ in range(4):
        signs = [torch.randint(-2, 3, p.shape, generator=generator).to(p) for p in points]
        near = [p + p * _EPS * sign for p, sign in zip(points, signs, strict=True)]
        moved = torch.maximum(moved, (sums(near)[0] - sums_here).abs())
    magnitudes = [p.abs().max() for p in points if p.numel()]
    largest = torch.stack([size.max(), *(m.to(size.device) for m in magnitudes)]).max()
    return torch.where(moved <= 1e-9 * largest, moved, 0) / _EPS


def _spread(count: int, at_most: int) -> Iterator[int]:
    if count <= at_most:
        return iter(range(count))
    return iter(torch.linspace(0, count - 1, at_most, dtype=torch.float64).long().tolist())


class _Look:
    """Slopes along one element, with any step."""

    def __init__(
        self,
        points: list[Tensor],
        flat: Tensor,
        place: int,
        sums: Sums,
        tolerance: Tolerance,
        noise: Tensor,
    ) -> None:
        self.points, self.flat, self.place = points, flat, place
        self.sums, self.tolerance, self.noise = sums, tolerance, noise
        self.at = flat[place].item()
        self.step = tolerance.step * max(1.0, abs(self.at))

    def _sums_at(self, value: float) -> tuple[Tensor, Tensor]:
        self.flat[self.place] = value
        try:
            return self.sums(self.points)
        finally:
            self.flat[self.place] = self.at

    def central(self, divisor: int = 1) -> tuple[Tensor, Tensor]:
        """The slope, and the magnitude of the sums."""
        high, low = self.at + self.step / divisor, self.at - self.step / divisor
        (up, size), (down, _) = self._sums_at(high), self._sums_at(low)
        return (up - down) / (high - low), torch.maximum(size, self.noise)

    def sides(self, divisor: int = 1) -> tuple[Tensor, Tensor]:
        """The slopes on the left and on the right."""
        high, low = self.at + self.step / divisor, self.at - self.step / divisor
        here = self._sums_at(self.at)[0]
        left = (here - self._sums_at(low)[0]) / (self.at - low)
        return left, (self._sums_at(high)[0] - here) / (high - self.at)

    def allowed(self, analytic: Tensor, numeric: Tensor, size: Tensor, divisor: int = 1) -> Tensor:
        """How far apart they may be."""
        larger = torch.maximum(analytic.abs(), numeric.abs())
        return self.tolerance.allowed(larger, size, self.step / divisor)


def _judge(
    look: _Look, name: str, index: tuple[int, ...], analytic: Tensor, result: Comparison
) -> None:
    """Put one element where it belongs; of several sums, the one that is farthest off speaks."""
    numeric, size = look.central()
    allowed = look.allowed(analytic, numeric, size)
    right = _within(analytic, numeric, allowed)
    kink = torch.zeros_like(right)
    if not right.all():
        kink, numeric, allowed = _look_again(look, analytic, numeric, allowed)
        right = _within(analytic, numeric, allowed)
    wrong = ~(right | kink)
    error = (analytic - numeric).abs() / allowed.clamp(min=torch.finfo(allowed.dtype).tiny)
    chosen = int((torch.where(wrong, error, -1.0) if wrong.any() else error).argmax())
    element = Element(
        name, index, analytic[chosen].item(), numeric[chosen].item(), allowed[chosen].item()
    )
    result.elements.append(element)
    if wrong.any():
        result.wrong.append(element)
    elif kink.any():
        result.kinks.append(element)


def _within(analytic: Tensor, numeric: Tensor, allowed: Tensor) -> Tensor:
    """Never where one of them is NaN."""
    return (analytic - numeric).abs() <= allowed


def _look_again(
    look: _Look, analytic: Tensor, numeric: Tensor, allowed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Which sums have a kink here, and better quotients for the others."""
    first = numeric
    left, right = look.sides()
    gap = (right - left).abs()
    kink = torch.zeros_like(gap, dtype=torch.bool)
    for divisor in _SMALLER:
        again, size = look.central(divisor)
        bound = look.allowed(analytic, again, size, divisor)
        # Smaller steps allow for more rounding: only a quotient that has moved says anything new.
        moved = ~((again - numeric).abs() <= bound / 4)
        better = moved & _within(analytic, again, bound) & ~_within(analytic, numeric, allowed)
        # The gap of a smooth function shrinks with the step; that of a kink passed by vanishes.
        left, right = look.sides(divisor)
        vanishes = (right - left).abs() < gap / divisor / 2
        kink |= better & vanishes & (gap > 10 * bound)
        numeric, allowed = torch.where(better, again, numeric), torch.where(better, bound, allowed)
    low, high = torch.minimum(left, right), torch.maximum(left, right)
    bends = (high - low > gap / 4) & (high - low > 10 * bound)
    between = (analytic >= low - bound) & (analytic <= high + bound)
    # Rounding errors grow as the step shrinks too, but not beyond what is allowed for them.
    jumps = (again.abs() > divisor / 2 * first.abs()) & (again.abs() > bound) & analytic.isfinite()
    kink |= (bends & between | jumps) & ~_within(analytic, numeric, allowed)
    return kink, numeric, allowed
