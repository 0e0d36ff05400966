"""Slopes beside a point where several kinks meet, as at equal elements.

There, moving one element does not show all slopes. A median of three equal numbers stays the same,
for example. Slopes at random points nearby do. A gradient is right if it lies between these slopes,
of each result alone (Clarke's generalized gradient).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ops.gradcheck._slopes import Noise, Values, fitting, safely, sizes

_NEAR = (1e-6, 1e-8)  # distances of the points; at a kink, all show the same slopes
_POINTS = 16  # number of points at each distance
_STEP = 1e-2  # step of the slopes, relative to the distance
_ROUNDING = 1e-4  # error of the slopes, because such steps are rounded


@dataclass(frozen=True)
class Nearby:
    """The points beside a point, and the weighted sums of results there."""

    values: Values
    points: Sequence[Tensor]
    here: Tensor
    weights: Tensor
    noise: Noise

    def at_kink(self, place: int, direction: Tensor) -> tuple[Tensor, Tensor] | None:
        """For each sum, the lowest and highest slope of one input in a direction.

        ``None`` if rounding hides the slopes, or if they depend on the distance.
        """
        if any(torch.finfo(p.dtype).eps > 1e-15 for p in self.points if p.is_floating_point()):
            return None
        far, near = (self._range(place, direction, by) for by in _NEAR)
        if far is None or near is None:
            return None
        size = torch.maximum(near[0].abs(), near[1].abs()).clamp(min=1e-300)
        apart = (near[0] - far[0]).abs().maximum((near[1] - far[1]).abs())
        if bool((apart > _STEP * size).any()) or bool((near[2] > _STEP * size).any()):
            return None
        slack = _ROUNDING * size
        return near[0] - slack, near[1] + slack

    def _range(
        self, place: int, direction: Tensor, near: float
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        generator = torch.Generator().manual_seed(0)
        scales = [sizes(p).clamp(min=1) for p in self.points]
        step = _STEP * near * scales[place].max().item()
        slopes, errors = [], []
        for _ in range(_POINTS):
            moved = [
                p + near * s * (2 * torch.rand(p.shape, generator=generator).to(p) - 1)
                for p, s in zip(self.points, scales, strict=True)
            ]
            low, high = (
                fitting(
                    self.here,
                    safely(self.values, [*moved[:place], moved[place] + by, *moved[place + 1 :]]),
                )
                for by in (-step * direction, step * direction)
            )
            if bool((high - low).isfinite().all()):
                slopes.append((high - low) / (2 * step))
                errors.append(self.noise.between(low, high) / step)
        if len(slopes) < _POINTS / 2:
            return None
        found = self.weights[:, None] * torch.stack(slopes)
        error = self.weights.abs() @ torch.stack(errors).amax(0)
        return found.amin(1).sum(-1), found.amax(1).sum(-1), error
