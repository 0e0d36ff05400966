"""A loss that sums up terms of the logits of a linear layer, with gradients from the forward pass.

The gradients of a sum are known in the forward pass, up to a factor. So it forms them there, while
it has the logits of a block of rows: by three matrix products in all, instead of four.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ops._core import blocks
from ops._core.fused import FusedOp
from ops._core.linear_logits import (
    IGNORED,
    Gradients,
    capped_,
    row_definition,
    rows_of_logits,
    slopes_,
    softmax_,
    sum_of_logits,
    target_logits,
)


def factors_of(
    label: Tensor,
    classes: int,
    class_weight: Tensor | None,
    smoothing: float,
    z_factor: float,
    mean: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The factors of :func:`combined` for each row, and the divisor of the mean."""
    counts = label != IGNORED
    ones = counts.to(dtype)
    of_target = ones
    of_all: float | Tensor = float(classes)
    if class_weight is not None:
        of_target = torch.where(counts, class_weight[label.clamp(min=0)], 0.0)
        of_all = class_weight.sum()
    total = of_target.sum()
    to_target, to_all, to_square = (
        of_target * (1.0 - smoothing),
        ones * (smoothing / classes),
        ones * z_factor,
    )
    if mean:
        to_target, to_all, to_square = to_target / total, to_all / total, to_square / ones.sum()
    return torch.stack([to_target + to_all * of_all, to_target, to_all, to_square]), total


def combined(factors: Tensor, log_sum: Tensor, of_target: Tensor, of_all: Tensor | None) -> Tensor:
    """The loss of each row, which is linear but for the square of its log-sum."""
    to_log_sum, to_target, to_all, to_square = factors.unbind()
    loss = to_log_sum * log_sum - to_target * of_target + to_square * log_sum.square()
    return loss if of_all is None else loss - to_all * of_all


def _definition(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    label: Tensor,
    factors: Tensor,
    class_weight: Tensor | None,
    softcap: float,
    weighted: bool,
    needs_input: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> Tensor:
    log_sum, of_target, of_all, _ = row_definition(
        input, linear_weight, linear_bias, label, class_weight, softcap, weighted, False, False
    )
    loss = combined(factors, log_sum, of_target, of_all if weighted else None)
    return torch.where(label == IGNORED, torch.zeros_like(loss), loss).sum()


def _forward(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    label: Tensor,
    factors: Tensor,
    class_weight: Tensor | None,
    softcap: float,
    weighted: bool,
    *needed: bool,
) -> tuple[Tensor, ...]:
    gradients = Gradients(input, linear_weight, linear_bias, needed)
    losses = factors.new_zeros(label.shape)
    factors = factors.masked_fill(label == IGNORED, 0.0)
    for rows, x, logits in rows_of_logits(input, linear_weight, linear_bias, label):
        of_rows = factors.index_select(1, rows)
        parts = blocks.blocks(logits, label[rows], rows, of_rows.mT)
        for z, its_label, numbers, its_factors in parts:
            to_log_sum, to_target, to_all, to_square = its_factors.mT
            capped = capped_(z, softcap)
            of_target = target_logits(z, its_label)
            of_all = sum_of_logits(z, class_weight) if weighted else None
            log_sum = softmax_(z)
            losses[numbers] = combined(its_factors.mT, log_sum, of_target, of_all)
            if any(needed):
                z.mul_((to_log_sum + 2 * to_square * log_sum)[:, None])
                slopes_(
                    z, capped, its_label, class_weight, -to_target, -to_all if weighted else None
                )
        gradients.add(rows, x, logits)
    dtype = _stored(input.dtype)
    formed = (losses.new_empty(0) if one is None else one.to(dtype) for one in gradients.sums)
    return losses.sum(), *formed


def _stored(dtype: torch.dtype) -> torch.dtype:
    """The dtype of gradients that lack their factor: without it, they may underflow in float16."""
    return torch.float32 if dtype is torch.float16 else dtype


def _shapes(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    label: Tensor,
    factors: Tensor,
    class_weight: Tensor | None,
    softcap: float,
    weighted: bool,
    *needed: bool,
) -> tuple[Tensor, ...]:
    tensors, dtype = (input, linear_weight, linear_bias), _stored(input.dtype)
    return factors.new_empty(()), *(
        factors.new_empty(0)
        if tensor is None or not need
        else tensor.new_empty(tensor.shape, dtype=dtype)
        for tensor, need in zip(tensors, needed, strict=True)
    )


linear_loss = FusedOp(
    "linear_cross_entropy",
    _definition,
    results=["loss"],
    saved=["to_input", "to_weight", "to_bias"],
    formed=["to_input", "to_weight", "to_bias"],
    constants=["label", "factors", "class_weight"],
    tensor_code=[_forward],
    opaque_shapes=_shapes,
)
