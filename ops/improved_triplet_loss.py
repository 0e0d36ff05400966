"""The improved triplet loss: one pass over its inputs forward, one backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ops import _autograd, _checks
from ops._op import built_in

__all__ = ["ImprovedTripletLoss", "TripletLossFunc", "improved_triplet_loss"]

_op = built_in("improved_triplet_loss")


# ---- the public function -------------------------------------------------------------------------


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
    anchor, positive, negative = _checks.floating_rows(
        anchor=anchor, positive=positive, negative=negative
    )
    t1, t2 = _checks.check_number("t1", t1), _checks.check_number("t2", t2)
    beta, eps = _checks.check_number("beta", beta), _checks.check_number("eps", eps)
    parameters = (t1, t2, beta, eps, _checks.check_reduction(reduction))
    if _autograd.needs_torch_path() or _op.backend_for(anchor) == "torch":
        return _torch_path(anchor, positive, negative, *parameters)
    if torch.compiler.is_compiling():
        return torch.ops.jitops.improved_triplet_loss(anchor, positive, negative, *parameters)
    return _autograd.apply(ImprovedTripletLossFunction, anchor, positive, negative, parameters)


class ImprovedTripletLoss(nn.Module):
    """:func:`improved_triplet_loss` as a module, with its parameters set once.

    Args:
        t1, t2, beta, eps, reduction: see :func:`improved_triplet_loss`.
    """

    def __init__(
        self, t1: float, t2: float, beta: float, eps: float = 1e-6, reduction: str = "mean"
    ) -> None:
        super().__init__()
        self.t1 = _checks.check_number("t1", t1)
        self.t2 = _checks.check_number("t2", t2)
        self.beta = _checks.check_number("beta", beta)
        self.eps = _checks.check_number("eps", eps)
        _checks.check_reduction(reduction)
        self.reduction = reduction

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """The loss of :math:`(*, D)` inputs."""
        return improved_triplet_loss(
            anchor, positive, negative, self.t1, self.t2, self.beta, self.eps, self.reduction
        )

    def extra_repr(self) -> str:
        """The parameters, for ``print(module)``."""
        return (
            f"t1={self.t1}, t2={self.t2}, beta={self.beta}, eps={self.eps}, "
            f"reduction={self.reduction!r}"
        )


TripletLossFunc = ImprovedTripletLoss  # the name under which the loss is best known in tutorials


# ---- the pure-torch path: the definition ---------------------------------------------------------


def _torch_path(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    t1: float,
    t2: float,
    beta: float,
    eps: float,
    reduction: int,
) -> Tensor:
    dtype = anchor.dtype
    anchor, positive, negative = map(_checks.widened, (anchor, positive, negative))
    d_pos = (anchor - positive).add_(eps).square().sum(-1)
    d_neg = (anchor - negative).add_(eps).square().sum(-1)
    t1, t2 = _checks.rounded(t1, anchor.dtype), _checks.rounded(t2, anchor.dtype)
    loss = (d_pos - d_neg).clamp(min=t1) + beta * d_pos.clamp(min=t2)
    return _autograd.reduce(loss, reduction).to(dtype)


def samples() -> Iterator[_checks.Sample]:
    """Where ``jitops check`` checks the gradients: with both clamps at work."""
    for reduction in _checks.REDUCTIONS:
        loss = ImprovedTripletLoss(t1=-0.3, t2=2.0, beta=0.5, reduction=reduction)
        yield f"reduction={reduction!r}", loss, tuple(0.5 * torch.randn(3, 4, 5))


# ---- the compiled path ---------------------------------------------------------------------------


class ImprovedTripletLossFunction(torch.autograd.Function):
    """The fused forward and backward pass; ``backward`` itself is differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        positive: Tensor,
        negative: Tensor,
        parameters: tuple[float, float, float, float, int],
    ) -> Tensor:
        """One pass over the inputs; keeps one byte a row."""
        loss, state = torch.ops.jitops.improved_triplet_loss_forward.default(
            anchor, positive, negative, *parameters
        )
        ctx.save_for_backward(anchor, positive, negative, state)
        ctx.parameters = parameters
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """One pass over the inputs, writing only the gradients asked for."""
        *inputs, state = ctx.saved_tensors
        *needed, _ = ctx.needs_input_grad
        if _autograd.needs_torch_backward(grad):
            gradients = _autograd.differentiable(
                _torch_path, inputs, ctx.parameters, needed, [grad]
            )
        else:
            gradients = torch.ops.jitops.improved_triplet_loss_backward.default(
                grad, *inputs, state, *ctx.parameters[2:], *needed
            )
        return (*_autograd.place(gradients, needed), None)


# ---- operators: schemas and shapes (kernels: cuda_src/improved_triplet_loss.*) -------------------

_autograd.define(
    "improved_triplet_loss_forward(Tensor anchor, Tensor positive, Tensor negative, float t1, "
    "float t2, float beta, float eps, int reduction) -> (Tensor, Tensor)",
    lambda anchor, positive, negative, t1, t2, beta, eps, reduction: (
        anchor.new_empty(anchor.shape[:-1] if reduction == 0 else ()),
        anchor.new_empty(anchor.shape[:-1], dtype=torch.uint8),
    ),
)
_autograd.define(
    "improved_triplet_loss_backward(Tensor grad_loss, Tensor anchor, Tensor positive, "
    "Tensor negative, Tensor state, float beta, float eps, int reduction, bool needs_anchor, "
    "bool needs_positive, bool needs_negative) -> Tensor[]",
    lambda grad, anchor, positive, negative, state, beta, eps, reduction, *needed: [
        torch.empty_like(anchor, memory_format=torch.contiguous_format) for need in needed if need
    ],
)

_autograd.define_in_graphs(
    "improved_triplet_loss(Tensor anchor, Tensor positive, Tensor negative, float t1, float t2, "
    "float beta, float eps, int reduction) -> Tensor",
    lambda anchor, positive, negative, *parameters: ImprovedTripletLossFunction.apply(
        anchor, positive, negative, parameters
    ),
)

_op.prepare()
