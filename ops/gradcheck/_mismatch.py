"""The difference between two lists of results and gradients, in words."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# The allowed difference between two ways to one result, relative to the largest element. float64
# and float32 get a few hundred roundings. Half precisions get four, including that of the result.
AGREEMENT = {
    torch.float64: 1e-9,
    torch.float32: 2e-5,
    torch.bfloat16: 2**-6,
    torch.float16: 2**-9,
}


def differ(
    labels: Sequence[str],
    ours: Sequence[Tensor | None],
    theirs: Sequence[Tensor | None],
    tolerance: float,
    here: str,
    there: str,
    spread: Sequence[Tensor | None] | None = None,
    scale: float | None = None,
) -> str:
    """The largest difference in words; empty if none exceeds ``tolerance`` times the largest value.

    ``here`` and ``there`` name the two sides, for example "in float32". The largest value is that
    of each tensor, but at least ``scale``. By default ``scale`` is a thousandth of the largest of
    all, because values that cancel are only as exact as the rest. ``spread`` is allowed on top.
    """
    if scale is None:
        scale = 1e-3 * max((largest(t) for t in theirs if t is not None), default=0.0)
    worst, problem = 0.0, ""
    for place, (label, mine, its) in enumerate(zip(labels, ours, theirs, strict=True)):
        if mine is None or its is None:
            if _something(mine):
                return f"{label} is missing {there}, but not {here}"
            if _something(its):
                return f"{label} is missing {here}, but not {there}"
            continue
        if mine.shape != its.shape:
            return f"{label}: shape {list(mine.shape)} {here}, {list(its.shape)} {there}"
        one, other = mine.detach().to(its.device).double(), its.detach().double()
        its_scale = max(scale, largest(other))
        extra = spread[place] if spread else None
        allowed = tolerance * its_scale + (0 if extra is None else extra)
        excess = (one - other).abs() - allowed
        wrong = ~((excess <= 0) | (one == other) | (one.isnan() & other.isnan()))
        if not wrong.any():
            continue
        error = torch.where(wrong, (one - other).abs().nan_to_num(torch.inf), -1.0)
        if error.max().item() >= worst * its_scale:
            at = torch.unravel_index(error.argmax(), error.shape)
            index = f"[{', '.join(str(int(i)) for i in at)}]" if at else ""
            worst = error.max().item() / (its_scale or 1.0)
            problem = (
                f"{label}{index}: {one[at].item():.8g} {here}, {other[at].item():.8g} {there} "
                f"({int(wrong.sum())} of {wrong.numel()} elements differ)"
            )
    return problem


def largest(values: Tensor) -> float:
    finite = values[values.isfinite()].abs()
    return finite.max().item() if finite.numel() else 0.0


def identical(one: Tensor, other: Tensor) -> bool:
    """Whether all elements are equal, counting NaN as equal to NaN."""
    one, other = one.detach(), other.detach()
    if one.shape != other.shape:
        return False
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def _something(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.any())
