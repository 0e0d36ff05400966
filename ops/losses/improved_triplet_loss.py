"""The improved triplet loss: one pass over its inputs forward, one backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ops._core import autograd, checks
from ops._core.blocks import blocks, rows_of
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
    reduction: checks.Reduction = "mean",
) -> Tensor:
    """The improved triplet loss.

    .. math::

        ℓᵢ = max(d⁺ᵢ − d⁻ᵢ, t1) + β max(d⁺ᵢ, t2)

        d⁺ᵢ = ‖aᵢ − pᵢ + ε‖²

        d⁻ᵢ = ‖aᵢ − nᵢ + ε‖²

    The first term asks the negative to be farther from the anchor than the positive, by a margin of
    −t1. The second asks the positive to be near, within t2. From D. Cheng,
    Y. Gong, S. Zhou, J. Wang, N. Zheng, "Person Re-Identification by Multi-Channel Parts-Based CNN
    with Improved Triplet Loss Function", CVPR 2016. ε is the ``eps`` of
    :func:`torch.nn.functional.pairwise_distance`.

    Args:
        anchor: ``(*, D)``, floating point, any strides; at least one dimension.
        positive: like ``anchor``; the three shapes broadcast together.
        negative: like ``anchor``.
        t1: lower clamp of d⁺ − d⁻; minus the margin between the two. The paper takes −1.
        t2: lower clamp of d⁺. The paper takes 0.01.
        beta: weight of the second term. The paper takes 0.002.
        eps: added to every difference of coordinates.
        reduction: ``mean`` over all rows, ``sum``, or ``none``.

    Returns:
        A scalar, or ``(*)`` with ``reduction="none"``; in the inputs' dtype. An empty batch
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
        bfloat16 and float16 accumulate in float32. Compiled, float32 sums over rows in float64, and
        the result is the same, bit for bit, from run to run and for any number of CPU threads. The
        pure-torch path sums float32 by :func:`torch.sum`, whose last bits may change with the
        number of threads. NaN and infinities pass through as in tensor code. Under autocast the
        inputs are taken to float32, as torch's distances are.
    """
    tensors = checks.floating_rows(anchor=anchor, positive=positive, negative=negative)
    t1, t2 = checks.check_number("t1", t1), checks.check_number("t2", t2)
    beta, eps = checks.check_number("beta", beta), checks.check_number("eps", eps)
    return _fused(*tensors, t1, t2, beta, eps, checks.check_reduction(reduction))


class ImprovedTripletLoss(LossModule):
    """:func:`improved_triplet_loss` as a module, with its parameters set once.

    Args:
        t1, t2, beta: −1, 0.01 and 0.002 in the paper; see :func:`improved_triplet_loss`.
        eps, reduction: see :func:`improved_triplet_loss`.

    Example:
        >>> criterion = ImprovedTripletLoss(t1=-1.0, t2=0.01, beta=0.002)
        >>> anchor, positive, negative = torch.eye(3, requires_grad=True)
        >>> criterion(anchor, positive, negative)
        tensor(0.0040, grad_fn=<ImprovedTripletLossTorchFunctionBackward>)
    """

    function = staticmethod(improved_triplet_loss)

    def __init__(
        self,
        t1: float,
        t2: float,
        beta: float,
        eps: float = 1e-6,
        reduction: checks.Reduction = "mean",
    ) -> None:
        super().__init__(t1=t1, t2=t2, beta=beta, eps=eps, reduction=reduction)

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """The loss of ``(*, D)`` inputs."""
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
    """The formula in tensor code, which autograd differentiates."""
    dtype = anchor.dtype
    anchor, positive, negative = map(checks.widened, (anchor, positive, negative))
    d_pos = (anchor - positive).add_(eps).square().sum(-1)
    d_neg = (anchor - negative).add_(eps).square().sum(-1)
    t1, t2 = checks.rounded(t1, anchor.dtype), checks.rounded(t2, anchor.dtype)
    loss = (d_pos - d_neg).clamp(min=t1) + beta * d_pos.clamp(min=t2)
    return autograd.reduce(loss, reduction).to(dtype)


def _forward(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    t1: float,
    t2: float,
    beta: float,
    eps: float,
    reduction: int,
) -> tuple[Tensor, Tensor]:
    """The loss, and for each row whether the gradient flows through either clamp."""
    inputs = rows_of(anchor, positive, negative)
    dtype = torch.float64 if anchor.dtype is torch.float64 else torch.float32
    d_pos, d_neg = anchor.new_empty((2, len(inputs[0])), dtype=dtype).unbind()
    for x, p, n, of_p, of_n in blocks(*inputs, d_pos, d_neg):
        a, rest = _shifted(x, eps)
        _square_sum(_difference(p, a, rest), of_p)
        _square_sum(_difference(n, a, rest), of_n)
    margin = d_pos - d_neg
    first = margin.clamp_min(checks.rounded(t1, dtype))
    second = d_pos.clamp_min(checks.rounded(t2, dtype))
    state = torch.stack((first == margin, second == d_pos))
    loss = first.add_(second, alpha=checks.rounded(beta, dtype))
    if reduction == 0:
        loss = loss.view(anchor.shape[:-1])
    return autograd.reduce(loss, reduction).to(anchor.dtype), state


def _backward(
    grad: Tensor,
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    state: Tensor,
    beta: float,
    eps: float,
    reduction: int,
    *needed: bool,
) -> list[Tensor]:
    """The gradients that are needed, from differences that are computed again."""
    rows = state.shape[1]
    grad = checks.widened(grad) * (2 / max(1, rows) if reduction == 1 else 2)
    if reduction == 0:
        grad = grad.reshape(rows)
    kn, kp = torch.where(state, grad, 0.0).unsqueeze_(2).unbind()
    kp = torch.add(kn, kp, alpha=checks.rounded(beta, grad.dtype))
    inputs = rows_of(anchor, positive, negative)
    needs_a, needs_p, needs_n = needed
    wide = anchor.dtype is not grad.dtype
    pairs = zip(inputs, needed, strict=True)
    gradients = [torch.empty_like(x) if need else None for x, need in pairs]
    for x, p, n, to_p, to_n, ga, gp, gn in blocks(*inputs, kp, kn, *gradients):
        a, rest = _shifted(x, eps)
        if needs_a or needs_p:
            u = _difference(p, a, rest, None if wide else gp).mul_(to_p)
        if needs_a or needs_n:
            v = _difference(n, a, rest, None if wide else gn).mul_(to_n)
        if wide and needs_p:
            gp.copy_(u)
        if wide and needs_n:
            gn.copy_(v)
        if needs_a:
            ga.copy_(v.sub_(u)) if wide else torch.sub(v, u, out=ga)
        if needs_n:
            gn.neg_()
    return [x.view(anchor.shape) if anchor.dim() != 2 else x for x in gradients if x is not None]


def _shifted(anchor: Tensor, eps: float) -> tuple[Tensor, float]:
    """The anchor as differences take it, and the ``eps`` that they must still subtract.

    Half precisions get ``eps`` here, in float32: once for both differences. A sum in float32 is off
    by less than a hundredth of the distance between neighbours in half precision.
    """
    if anchor.dtype in (torch.bfloat16, torch.float16):
        return anchor.float().add_(eps), 0.0
    return anchor, eps


def _difference(x: Tensor, anchor: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """``x - anchor - eps`` in the dtype of ``anchor``."""
    if x.dtype is anchor.dtype:
        d = torch.sub(x, anchor, out=out)
    else:
        d = x.to(anchor.dtype).sub_(anchor)  # faster than a difference of two dtypes
    return d.sub_(eps) if eps else d


def _square_sum(d: Tensor, out: Tensor) -> None:
    torch.sum(d.mul_(d), -1, out=out)


_fused = FusedOp(
    "improved_triplet_loss",
    _definition,
    results=["loss"],
    saved=["state"],  # of the clamps, a byte a row
    backward=["anchor", "positive", "negative", "state", "beta", "eps", "reduction"],
    shapes=lambda anchor, positive, negative, t1, t2, beta, eps, reduction: (
        anchor.new_empty(anchor.shape[:-1] if reduction == 0 else ()),
        anchor.new_empty(anchor.shape[:-1], dtype=torch.uint8),
    ),
    tensor_code=(_forward, _backward),
)


def samples() -> Iterator[checks.Sample]:
    """Where ``jitops check`` checks the gradients: with both clamps at work."""
    for reduction in checks.REDUCTIONS:
        loss = ImprovedTripletLoss(t1=-0.3, t2=2.0, beta=0.5, reduction=reduction)
        yield f"reduction={reduction!r}", loss, tuple(0.5 * torch.randn(3, 4, 5))
