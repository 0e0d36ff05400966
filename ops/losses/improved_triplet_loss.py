"""The improved triplet loss: one pass over its inputs forward, one backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ops._core import autograd, checks
from ops._core.fused import FusedOp
from ops._core.modules import LossModule

__all__ = ["ImprovedTripletLoss", "TripletLossFunc", "improved_triplet_loss"]


def improved_triplet_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    t1: float,
    t2: float,
    beta: float,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    r"""The improved triplet loss.

    .. math::

        \ell_i = \max(d^+_i - d^-_i,\; t_1) + \beta \max(d^+_i,\; t_2), \qquad
        d^+_i = \lVert a_i - p_i + \varepsilon \rVert_2^2, \quad
        d^-_i = \lVert a_i - n_i + \varepsilon \rVert_2^2

    The first term asks the negative to be farther from the anchor than the positive, by a margin
    :math:`-t_1`; the second asks the positive to be near, within :math:`t_2`. From D. Cheng,
    Y. Gong, S. Zhou, J. Wang, N. Zheng, "Person Re-Identification by Multi-Channel Parts-Based CNN
    with Improved Triplet Loss Function", CVPR 2016. :math:`\varepsilon` is the one of
    :func:`torch.nn.functional.pairwise_distance`.

    Args:
        anchor: :math:`(*, D)`, floating point, any strides; at least one dimension.
        positive: like ``anchor``; the three shapes broadcast together.
        negative: like ``anchor``.
        t1: lower clamp of :math:`d^+ - d^-`; minus the margin between the two.
        t2: lower clamp of :math:`d^+`.
        beta: weight of the second term.
        eps: added to every difference of coordinates.
        reduction: ``mean`` over all rows, ``sum``, or ``none``.

    Returns:
        A scalar, or :math:`(*)` with ``reduction="none"``; in the inputs' dtype. An empty batch
        gives NaN as mean and 0 as sum, as torch's own losses do.

    Raises:
        ArgumentTypeError: inputs that are not tensors of one of the dtypes float64, float32,
            bfloat16 and float16, the same for all; parameters that are not numbers.
        ArgumentError: shapes that do not broadcast, different devices, a layout other than
            strided, a scalar input, a NaN parameter, an unknown reduction.
        BackendUnavailableError: the back end asked for cannot run here.

    Gradients:
        For all three inputs, of any order. At a clamp's edge as :func:`torch.clamp` has them: 1 at
        equality. Forward mode and :mod:`torch.func` run on the pure-torch path.

    Numerics:
        bfloat16 and float16 accumulate in float32, float32 sums over rows in float64. The result
        is the same, bit for bit, from run to run and for any number of CPU threads. NaN and
        infinities pass through as in tensor code. Under autocast the inputs are taken to float32,
        as torch's distances are.
    """
    tensors = checks.floating_rows(anchor=anchor, positive=positive, negative=negative)
    t1, t2 = checks.check_number("t1", t1), checks.check_number("t2", t2)
    beta, eps = checks.check_number("beta", beta), checks.check_number("eps", eps)
    return _fused(*tensors, t1, t2, beta, eps, checks.check_reduction(reduction))


class ImprovedTripletLoss(LossModule):
    """:func:`improved_triplet_loss` as a module, with its parameters set once.

    Args:
        t1, t2, beta, eps, reduction: see :func:`improved_triplet_loss`.
    """

    function = staticmethod(improved_triplet_loss)

    def __init__(
        self, t1: float, t2: float, beta: float, eps: float = 1e-6, reduction: str = "mean"
    ) -> None:
        super().__init__(t1=t1, t2=t2, beta=beta, eps=eps, reduction=reduction)

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """The loss of :math:`(*, D)` inputs."""
        return self.loss(anchor, positive, negative)


TripletLossFunc = ImprovedTripletLoss  # the name under which the loss is best known in tutorials


def _definition(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    t1: float,
    t2: float,
    beta: float,
    eps: float,
    reduction: int,
) -> Tensor:
    """The pure-torch path."""
    dtype = anchor.dtype
    anchor, positive, negative = map(checks.widened, (anchor, positive, negative))
    d_pos = (anchor - positive).add_(eps).square().sum(-1)
    d_neg = (anchor - negative).add_(eps).square().sum(-1)
    t1, t2 = checks.rounded(t1, anchor.dtype), checks.rounded(t2, anchor.dtype)
    loss = (d_pos - d_neg).clamp(min=t1) + beta * d_pos.clamp(min=t2)
    return autograd.reduce(loss, reduction).to(dtype)


_fused = FusedOp(
    "improved_triplet_loss",
    _definition,
    results=["loss"],
    saved=["state"],  # a byte a row
    backward=["anchor", "positive", "negative", "state", "beta", "eps", "reduction"],
    shapes=lambda anchor, positive, negative, t1, t2, beta, eps, reduction: (
        anchor.new_empty(anchor.shape[:-1] if reduction == 0 else ()),
        anchor.new_empty(anchor.shape[:-1], dtype=torch.uint8),
    ),
)


def samples() -> Iterator[checks.Sample]:
    """Where ``jitops check`` checks the gradients: with both clamps at work."""
    for reduction in checks.REDUCTIONS:
        loss = ImprovedTripletLoss(t1=-0.3, t2=2.0, beta=0.5, reduction=reduction)
        yield f"reduction={reduction!r}", loss, tuple(0.5 * torch.randn(3, 4, 5))
