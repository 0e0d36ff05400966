"""Points at which a function has no derivative: kinks, jumps, and infinite slopes."""

from __future__ import annotations

import itertools
import math

from ops.gradcheck._slopes import Line, Rung


def sides_of_kink(rungs: list[Rung]) -> tuple[float, float] | None:
    """The lower and the higher slope, if they stay apart at every step."""
    usable = [r for r in rungs if math.isfinite(r.left) and math.isfinite(r.right)]
    gaps = [abs(rung.right - rung.left) for rung in usable]
    for place in range(len(usable) - 1, 2, -1):
        rung, gap = usable[place], gaps[place]
        if gap > 20 * rung.noise:
            # For a smooth function the gap would be 64 times as large three rungs above.
            if gap < gaps[place - 3] / 4:
                return None
            finer = zip(usable[place + 1 :], gaps[place + 1 :], strict=True)
            if any(its < gap / 8 and r.noise < gap / 40 for r, its in finer):
                return None  # the kink is near the point, not at it
            low, high = min(rung.left, rung.right), max(rung.left, rung.right)
            return low - 2 * rung.noise, high + 2 * rung.noise
    return None


def sides_of_jump(line: Line, rungs: list[Rung], which: int) -> tuple[float, float] | None:
    """The slopes beside a jump, whose height stays the same at every step."""
    usable = [rung for rung in rungs if math.isfinite(rung.central)]
    if not usable or not line.is_last(usable[-1]):
        return None
    last = usable[-1]
    height = abs(last.central) * last.step
    above = [rung for rung in usable if rung.step <= line.first]
    if abs(last.central) <= 10 * last.noise or len(above) < 4:
        return None
    if any(not height / 4 < abs(rung.central) * rung.step < 4 * height for rung in above):
        return None
    slopes = []
    for rung in above[:3]:
        for low, high in ((-rung.step, -above[3].step), (above[3].step, rung.step)):
            slope, hidden = line.slopes(low, high)
            slopes += [slope[which].item() - hidden[which].item()]
            slopes += [slope[which].item() + hidden[which].item()]
    return min(slopes), max(slopes)


def is_vertical(line: Line, rungs: list[Rung], analytic: float) -> bool:
    """Whether slopes grow without bound, and the derivative is finite or has their sign."""
    if not rungs or not line.is_last(rungs[-1]) or math.isnan(analytic):
        return False
    for side in ("central", "left", "right"):
        slopes = [getattr(rung, side) for rung in rungs if math.isfinite(getattr(rung, side))]
        pairs = list(itertools.pairwise(slopes[-8:]))
        if len(pairs) == 7 and all(abs(finer) > 1.1 * abs(coarse) for coarse, finer in pairs):
            return math.isfinite(analytic) or slopes[-1] * analytic > 0
    return False
