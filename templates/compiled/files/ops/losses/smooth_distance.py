"""The distance of rows, smoothed near zero: one pass over its inputs forward, one backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ops._core import autograd, checks
from ops._core.fused import FusedOp
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
        BackendUnavailableError: the back end asked for cannot run here.

    Gradients:
        For both inputs, of any order. Forward mode and :mod:`torch.func` run on the pure-torch
        path.

    Numerics:
        bfloat16 and float16 accumulate in float32. Compiled, all sums run in float64, and the
        result is the same, bit for bit, from run to run and for any number of CPU threads.
    """
    tensors = checks.floating_rows(input=input, target=target)
    width = checks.check_number("width", width)
    if width <= 0:
        raise ArgumentError(f"width must be greater than 0, got {width}")
    return _fused(*tensors, width, checks.check_reduction(reduction))


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


def _definition(input: Tensor, target: Tensor, width: float, reduction: int) -> Tensor:
    """The formula in tensor code, which autograd differentiates."""
    difference = checks.widened(input) - checks.widened(target)
    loss = (difference.square().sum(-1) + width * width).sqrt()
    return autograd.reduce(loss, reduction).to(input.dtype)


_fused = FusedOp(
    "smooth_distance",
    _definition,
    results=["loss"],
    saved=["roots"],  # the losses of the rows, not rounded
    backward=["input", "target", "roots", "reduction"],
    shapes=lambda input, target, width, reduction: (
        input.new_empty(input.shape[:-1] if reduction == 0 else ()),
        input.new_empty(input.shape[:-1], dtype=torch.float64),
    ),
)


def samples() -> Iterator[checks.Sample]:
    """Where ``jitops check`` checks the gradients."""
    for reduction in checks.REDUCTIONS:
        loss = SmoothDistance(width=0.5, reduction=reduction)
        yield f"reduction={reduction!r}", loss, tuple(torch.randn(2, 4, 5))
