"""The distance of rows, smoothed near zero, in tensor code."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ops._core import autograd, checks
from ops._core.modules import LossModule
from ops._errors import ArgumentError

__all__ = ["SmoothDistance", "smooth_distance"]


def smooth_distance(
    input: Tensor,
    target: Tensor,
    width: float = 1.0,
    reduction: checks.Reduction = "mean",
) -> Tensor:
    """The Euclidean distance of rows, smoothed near zero.

    .. math::

        ℓᵢ = √(‖xᵢ − yᵢ‖² + w²)

    Far from the target the gradient has length 1, and near it the loss is a parabola. From
    P. Charbonnier, L. Blanc-Féraud, G. Aubert, M. Barlaud, "Two Deterministic Half-Quadratic
    Regularization Algorithms for Computed Imaging", ICIP 1994.

    Args:
        input: x, ``(*, D)``, floating point, any strides; at least one dimension.
        target: y, like ``input``; the two shapes broadcast together.
        width: w, the distance up to which the loss is smoothed; greater than 0.
        reduction: ``mean`` over all rows, ``sum``, or ``none``.

    Returns:
        A scalar, or ``(*)`` with ``reduction="none"``; in the inputs' dtype.

    Raises:
        ArgumentTypeError: inputs that are not tensors of one of the dtypes float64, float32,
            bfloat16 and float16, the same for both; a width that is not a number.
        ArgumentError: shapes that do not broadcast, different devices, a layout other than
            strided, a scalar input, a width that is not above 0, an unknown reduction.

    Gradients:
        For both inputs, of any order, also in forward mode and under :mod:`torch.func`.

    Numerics:
        bfloat16 and float16 accumulate in float32.
    """
    input, target = checks.floating_rows(input=input, target=target)
    width = checks.check_number("width", width)
    if width <= 0:
        raise ArgumentError(f"width must be greater than 0, got {width}")
    number = checks.check_reduction(reduction)
    difference = checks.widened(input) - checks.widened(target)
    loss = (difference.square().sum(-1) + width * width).sqrt()
    return autograd.reduce(loss, number).to(input.dtype)


class SmoothDistance(LossModule):
    """:func:`smooth_distance` as a module, with its parameters set once.

    Args:
        width, reduction: see :func:`smooth_distance`.
    """

    function = staticmethod(smooth_distance)

    def __init__(self, width: float = 1.0, reduction: checks.Reduction = "mean") -> None:
        super().__init__(width=width, reduction=reduction)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of ``(*, D)`` inputs."""
        return self.loss(input, target)


def samples() -> Iterator[checks.Sample]:
    """Where ``jitops check`` checks the gradients."""
    for reduction in checks.REDUCTIONS:
        loss = SmoothDistance(width=0.5, reduction=reduction)
        yield f"reduction={reduction!r}", loss, tuple(torch.randn(2, 4, 5))
