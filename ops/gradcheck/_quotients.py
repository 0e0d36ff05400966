"""Comparison of derivatives with difference quotients, element by element.

If the quotient with the first step disagrees, or rounding hides it, slopes with many steps decide
(``_slopes``):

- If they converge, the derivative must equal the limit.
- If the slopes of the two sides differ at every step, the point is a kink, and any slope between
  the two is right.
- If the function jumps, the derivative must be a slope beside the jump.
- If several kinks meet there, any slope between those at points nearby is right (``_ties``).
- If rounding hides all of them, the check cannot tell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ops.gradcheck._comparison import Comparison, Element, Tolerance
from ops.gradcheck._kinks import is_vertical, sides_of_jump, sides_of_kink
from ops.gradcheck._slopes import Estimate, Line, Noise, Rung, Values, estimate, noise, safely
from ops.gradcheck._ties import Nearby

_CLEAR = 1e-3  # one step is enough if rounding errors are below this part of the derivative
# Otherwise rounding errors must be below one of these parts: of the derivative itself, of the
# largest of its input, of the largest of all, and of the slopes with large steps.
_TELLING, _ITS_OWN, _NEGLIGIBLE, _FLAT = 0.25, 0.05, 1e-7, 1e-3
_BLOCKS = 32  # number of blocks of an input with too many elements to compare each
_RIGHT, _KINK, _UNCLEAR, _WRONG = range(4)


@dataclass(frozen=True)
class Compared:
    """A function, its derivatives, and how to compare.

    Attributes:
        names: the names of the inputs.
        inputs: the point: contiguous tensors of one floating dtype.
        analytic: for each input, the derivatives: ``(number of sums, *input.shape)``.
        values: the function.
        weights: the weighted sums of results to compare: ``(number of sums, number of results)``.
        tolerance: the allowed difference.
        at_most: the largest number of elements of an input to compare one by one. A larger input
            is compared at evenly spread elements, and in blocks, each in a random direction.
        narrow: the relative precision of the function, if it is worse than that of its inputs.
    """

    names: Sequence[str]
    inputs: Sequence[Tensor]
    analytic: Sequence[Tensor]
    values: Values
    weights: Tensor
    tolerance: Tolerance
    at_most: int
    narrow: float | None = None


def compare(given: Compared, only: Sequence[Sequence[int]] | None = None) -> Comparison:
    """Compare derivatives with difference quotients, of all elements or of those in ``only``."""
    result = Comparison()
    points = [tensor.detach().clone() for tensor in given.inputs]
    here = given.values(points)
    hidden = noise(points, given.values, given.narrow)
    rows = [d.reshape(len(d), d[0].numel()) for d in given.analytic]
    largest = [_largest(row) for row in rows]
    everything = torch.stack(largest).amax(0)
    for place, (name, point) in enumerate(zip(given.names, points, strict=True)):
        scales = torch.maximum(_ITS_OWN * largest[place], _NEGLIGIBLE * everything).tolist()
        judge = _Judge(given, points, place, here, hidden, scales)
        count = point.numel()
        result.total += count if only is None else len(only[place])
        wanted = rows[place]
        for at in _spread(count, given.at_most) if only is None else only[place]:
            index = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), point.shape))
            # No step moves an infinite element or NaN, so only NaN is surely wrong there.
            if point.view(-1)[at].isfinite() or wanted[:, at].isnan().any():
                line = judge.along_element(at)
                judge(line, wanted[:, at].tolist(), name, index, result, at)
        judge.all_kinks(wanted, name, result)
        if only is None and count > given.at_most:
            rest = Comparison()
            for block in torch.arange(count).chunk(_BLOCKS):
                line, direction = judge.along_block(block)
                total = (wanted.double() @ direction).tolist()
                where = f"{name}, elements {block[0]} to {block[-1]} in a random direction,"
                judge(line, total, where, (), rest)
            result.wrong += rest.wrong
            result.elements += rest.wrong
    return result


def _largest(rows: Tensor) -> Tensor:
    """The largest magnitude of each row, in float64."""
    sizes = rows.double().abs().nan_to_num(0, 0, 0)
    return torch.cat([sizes, sizes.new_zeros(len(sizes), 1)], 1).amax(1)


def _spread(count: int, at_most: int) -> Iterator[int]:
    if count <= at_most:
        return iter(range(count))
    return iter(torch.linspace(0, count - 1, at_most, dtype=torch.float64).long().tolist())


class _Judge:
    """Classifies elements of one input as right, wrong, unclear or at a kink."""

    def __init__(
        self,
        given: Compared,
        points: list[Tensor],
        place: int,
        here: Tensor,
        hidden: Noise,
        scales: list[float],
    ) -> None:
        self.given, self.points, self.place = given, points, place
        self.here, self.hidden, self.scales = here, hidden, scales
        self.kinks: list[int] = []
        self.nearby = Nearby(given.values, points, here, given.weights, hidden)
        self.ties = given.narrow is None  # whether wrong elements may lie at ties

    def along_element(self, at: int) -> Line:
        flat = self.points[self.place].view(-1)
        start = flat[at].item()

        def values(t: float) -> tuple[float, Tensor]:
            flat[at] = start + t
            moved = flat[at].item() - start
            try:
                return moved, safely(self.given.values, self.points)
            finally:
                flat[at] = start

        return self._line(values, abs(start))

    def along_block(self, block: Tensor) -> tuple[Line, Tensor]:
        """The line along which these elements move in a random direction, and that direction."""
        point = self.points[self.place]
        generator = torch.Generator().manual_seed(0)
        direction = torch.zeros(point.numel(), dtype=point.dtype)
        direction[block] = (
            torch.randint(0, 2, block.shape, generator=generator).to(point.dtype) * 2 - 1
        )
        direction = direction.to(point.device)

        def values(t: float) -> tuple[float, Tensor]:
            moved = [*self.points]
            moved[self.place] = point + t * direction.view(point.shape)
            return t, safely(self.given.values, moved)

        return self._line(values, point.abs().max().item()), direction.double()

    def _line(self, values: Callable[[float], tuple[float, Tensor]], size: float) -> Line:
        first = self.given.tolerance.step * max(1.0, size)
        return Line(values, self.here, self.given.weights, self.hidden, first, size)

    def __call__(
        self,
        line: Line,
        analytic: list[float],
        name: str,
        index: tuple[int, ...],
        result: Comparison,
        at: int | None = None,
    ) -> None:
        """Compare all sums at one element, and record the worst one."""
        found = []
        slopes, errors = (both.tolist() for both in line.slopes(-line.first, line.first))
        far = None
        for which, (mine, slope, error) in enumerate(zip(analytic, slopes, errors, strict=True)):
            if mine == slope == 0:
                # No result changes. Large results change only with a larger step.
                far = far or line.slopes(-line.far, line.far)[0].tolist()
                verdict = (_RIGHT, Estimate(0.0, 0.0)) if far[which] == 0 else None
            elif error <= _CLEAR * max(abs(mine), abs(slope)):
                allowed = self.given.tolerance.allowed(max(abs(mine), abs(slope)), error)
                good = abs(mine - slope) <= allowed
                verdict = (_RIGHT, Estimate(slope, error)) if good else None
            else:
                verdict = None
            verdict = verdict or self._look_closely(line, which, mine)
            allowed = self.given.tolerance.allowed(
                max(abs(mine), abs(verdict[1].slope)), verdict[1].error
            )
            found.append((verdict[0], Element(name, index, mine, verdict[1].slope, allowed)))
        if at is not None and self.ties and any(status == _WRONG for status, _ in found):
            found = self._at_tie(at, found)
        status = max(status for status, _ in found)
        worst = max(
            (element for its, element in found if its == status),
            key=lambda e: e.error / max(e.allowed, 1e-300) if math.isfinite(e.error) else math.inf,
        )
        result.elements.append(worst)
        lists = {_WRONG: result.wrong, _KINK: result.kinks, _UNCLEAR: result.unclear}
        if status != _RIGHT:
            lists[status].append(worst)
        if status == _KINK and at is not None:
            self.kinks.append(at)

    def _at_tie(self, at: int, found: list[tuple[int, Element]]) -> list[tuple[int, Element]]:
        """The same, with wrong derivatives at kinks if slopes nearby allow them."""
        wrong = [which for which, (status, _) in enumerate(found) if status == _WRONG]
        limits = self.nearby.at_kink(self.place, self._along([at]))
        # Once a derivative is wrong in any case, there is no need to look closely at others.
        self.ties = limits is not None and all(
            low <= found[which][1].analytic <= high and high - low > 0.05 * max(abs(low), abs(high))
            for which in wrong
            for low, high in [[side[which].item() for side in limits]]
        )
        return [(_KINK, e) if self.ties and s == _WRONG else (s, e) for s, e in found]

    def all_kinks(self, wanted: Tensor, name: str, result: Comparison) -> None:
        """Compare the derivatives along all elements at kinks at once, because they may cancel."""
        if len(self.kinks) < 2:
            return
        limits = self.nearby.at_kink(self.place, self._along(self.kinks))
        its = wanted[:, self.kinks].double()
        total, sizes = its.sum(1).tolist(), its.abs().sum(1).tolist()
        if limits is None or not all(map(math.isfinite, sizes)):
            return
        lows, highs = (side.tolist() for side in limits)
        for mine, size, low, high in zip(total, sizes, lows, highs, strict=True):
            nearest, allowed = (
                min(max(mine, low), high),
                self.given.tolerance.allowed(size, 1e-4 * size),
            )
            if abs(mine - nearest) > allowed:
                place = f"{name}, along its {len(self.kinks)} elements at kinks together"
                result.wrong.append(Element(place, (), mine, nearest, allowed))
                result.elements.append(result.wrong[-1])
                return

    def _along(self, elements: Sequence[int]) -> Tensor:
        point = self.points[self.place]
        direction = torch.zeros(point.numel(), dtype=point.dtype, device=point.device)
        direction[list(elements)] = 1
        return direction.view(point.shape)

    def _look_closely(self, line: Line, which: int, analytic: float) -> tuple[int, Estimate]:
        rungs = line.coarse(which)
        status, found = self._verdict(line, rungs, which, analytic)
        if status != _RIGHT:
            sizes = [abs(rung.central) for rung in rungs] + [abs(analytic)]
            rungs += line.fine(which, max(filter(math.isfinite, sizes), default=0.0))
            status, found = self._verdict(line, rungs, which, analytic)
        return status, found

    def _verdict(
        self, line: Line, rungs: list[Rung], which: int, analytic: float
    ) -> tuple[int, Estimate]:
        found = estimate(rungs, "central") or estimate(rungs, "right") or estimate(rungs, "left")
        if found is None:
            return _WRONG, Estimate(math.nan, 0.0)
        if not math.isfinite(analytic):
            return (_KINK if is_vertical(line, rungs, analytic) else _WRONG), found
        size = max(abs(analytic), abs(found.slope))
        allowed = self.given.tolerance.allowed(size, found.error)
        if abs(analytic - found.slope) <= allowed:
            steepest = max((abs(r.central) for r in rungs if math.isfinite(r.central)), default=0.0)
            telling = max(_TELLING * size, self.scales[which], _FLAT * steepest)
            return (_RIGHT if found.error <= telling else _UNCLEAR), found
        sides = sides_of_jump(line, rungs, which) or sides_of_kink(rungs)
        if sides:
            allowed = self.given.tolerance.allowed(max(abs(side) for side in sides), 0.0)
            if sides[0] - allowed <= analytic <= sides[1] + allowed:
                return _KINK, found
        elif is_vertical(line, rungs, analytic):
            return _KINK, found
        return _WRONG, found
