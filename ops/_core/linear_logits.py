"""Losses of the logits of a linear layer, without the matrix of all logits.

A logit is z_ij = x_i·w_j + b_j, and with a softcap c it is c tanh(z_ij / c). All logits of a block
of rows are computed at a time, by torch's own matrix product. Their block is also that of their
gradients: these need two more products.

Here are the parts of that, and values of each row. Their backward pass computes the logits again,
so both passes take four products. :mod:`ops._core.linear_loss` has sums over rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ops._core import autograd, blocks, checks
from ops._core.fused import FusedOp
from ops._core.logits import NEGLIGIBLE, exp_, finite
from ops._errors import ArgumentError

# What stands in the place of a label: the row does not count, or the label names no class.
IGNORED, UNKNOWN = -1, -2
# A block has this many logits, 16 MB in float32. It has more if these are few rows: each block
# reads and writes all of the weight's gradient, which would take longer than the product of few
# rows.
ELEMENTS = 1 << 22
FEWEST_ROWS = 128

# ---- labels --------------------------------------------------------------------------------------


def labels(target: Tensor, ignore_index: int, classes: int) -> Tensor:
    """The classes of the rows, with ``IGNORED`` instead of ``ignore_index``.

    A label outside the vocabulary raises an error on a CPU. Other devices do not wait for the
    answer: there it becomes ``UNKNOWN``, and makes the loss and the gradients of its row NaN.

    Args:
        target: ``(N,)``, int64.
        ignore_index: the label of rows that do not count.
        classes: the size of the vocabulary.

    Raises:
        ArgumentError: a label outside the vocabulary, on a CPU.
    """
    found: Tensor = torch.ops.jitops.class_labels(target, ignore_index, classes)
    return found


def _labels(target: Tensor, ignore_index: int, classes: int) -> Tensor:
    known = (target >= 0) & (target < classes)
    label = torch.where(known, target, UNKNOWN).masked_fill_(target == ignore_index, IGNORED)
    if label.is_cpu:
        unknown = target[label == UNKNOWN]
        if unknown.numel():
            raise ArgumentError(
                f"target must hold classes from 0 to {classes - 1}, or ignore_index "
                f"{ignore_index}, got {unknown[0].item()}"
            )
    return label


autograd.define_in_torch(
    "class_labels(Tensor target, int ignore_index, SymInt classes) -> Tensor",
    _labels,
    lambda target, ignore_index, classes: torch.empty_like(target),
)

# ---- the definition ------------------------------------------------------------------------------


def row_definition(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    label: Tensor,
    class_weight: Tensor | None,
    softcap: float,
    weighted: bool,
    entropy: bool,
    others: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The formula in tensor code, with the whole matrix.

    With ``others`` the log-sum is that of the other logits than the target's.
    """
    skipped = label == IGNORED
    x = checks.widened(input).masked_fill(skipped[:, None], 0.0)
    with checks.without_autocast(x):
        z = x @ checks.widened(linear_weight).mT
        if linear_bias is not None:
            z = z + checks.widened(linear_bias)
        if softcap:
            z = softcap * torch.tanh(z / softcap)
        place = label.clamp(min=0)[:, None]
        log_sum = torch.logsumexp(z.scatter(1, place, -torch.inf) if others else z, 1)
        of_target = z.gather(1, place)[:, 0]
        of_target = of_target * torch.where(label == UNKNOWN, torch.nan, 1.0)
        found = [log_sum, of_target]
        if weighted:
            found.append(z.sum(1) if class_weight is None else z @ class_weight)
        if entropy:
            log_p = z - log_sum[:, None]
            p = log_p.exp()
            found.append(-(p * torch.where(p == 0, torch.zeros_like(p), log_p)).sum(1))
    found = [torch.where(skipped, torch.zeros_like(one), one) for one in found]
    none = log_sum[:0]
    return (
        found[0],
        found[1],
        found[2] if weighted else none,
        found[-1] if entropy else none,
    )


# ---- blocks of rows ------------------------------------------------------------------------------


def rows_of_logits(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, label: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The numbers of some rows that count, these rows of the input, and all of their logits."""
    weight = checks.widened(linear_weight)
    counted = _counted(label)
    step = max(FEWEST_ROWS, ELEMENTS // weight.shape[0])
    buffer = weight.new_empty(min(step, counted.shape[0]), weight.shape[0])
    for rows in counted.split(step):
        if rows.shape[0]:
            x = checks.widened(input.index_select(0, rows))
            x.masked_fill_(label[rows, None] == IGNORED, 0.0)
            z = torch.mm(x, weight.mT, out=buffer[: rows.shape[0]])
            if linear_bias is not None:
                z += linear_bias
            yield rows, x, z


def _counted(label: Tensor) -> Tensor:
    """The numbers of the rows to compute; on other devices all, because they would wait."""
    if label.is_cpu:
        return (label != IGNORED).nonzero()[:, 0]
    return torch.arange(label.shape[0], device=label.device)


def capped_(z: Tensor, softcap: float) -> Tensor | None:
    """Cap the logits in place, and return the slope of that; ``None`` is 1."""
    if not softcap:
        return None
    slope = z.div_(softcap).tanh_().square().neg_().add_(1.0)
    z.mul_(softcap)
    return slope


def target_logits(z: Tensor, label: Tensor) -> Tensor:
    found = z.gather(1, label.clamp(min=0)[:, None])[:, 0]
    return found.masked_fill_(label == UNKNOWN, torch.nan)


def hide_targets_(z: Tensor, label: Tensor) -> None:
    z.scatter_(1, label.clamp(min=0)[:, None], -torch.inf)


def sum_of_logits(z: Tensor, class_weight: Tensor | None) -> Tensor:
    return z.sum(1) if class_weight is None else torch.mv(z, class_weight)


def softmax_(z: Tensor) -> Tensor:
    """The softmax of each row in place; returns the log-sum-exp."""
    level = finite(z.amax(1))
    exp_(z.sub_(level[:, None]), NEGLIGIBLE)
    total = z.sum(1)
    z.div_(total[:, None])
    return total.log_().add_(level)


def slopes_(
    p: Tensor,
    capped: Tensor | None,
    label: Tensor,
    class_weight: Tensor | None,
    to_target: Tensor | None,
    to_all: Tensor | None,
) -> None:
    """Turn the part of the gradient that comes from the softmax into that of the logits."""
    if to_all is not None:
        if class_weight is None:
            p += to_all[:, None]
        else:
            p.addcmul_(to_all[:, None], class_weight)
    if to_target is not None:
        place = label.clamp(min=0)[:, None]
        to_target = to_target.masked_fill(label == UNKNOWN, torch.nan)
        p.scatter_(1, place, p.gather(1, place).add_(to_target[:, None]))
    if capped is not None:
        p *= capped


class Gradients:
    """The gradients of the arguments, summed up block by block."""

    def __init__(
        self,
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        needed: tuple[bool, ...],
    ) -> None:
        self.weight = checks.widened(linear_weight)
        self.sums = [
            None if tensor is None or not need else self.weight.new_zeros(tensor.shape)
            for tensor, need in zip((input, linear_weight, linear_bias), needed, strict=True)
        ]

    def add(self, rows: Tensor, x: Tensor, slope: Tensor) -> None:
        """Add the gradients of these rows, from that of their logits."""
        to_input, to_weight, to_bias = self.sums
        if to_input is not None:
            to_input.index_copy_(0, rows, torch.mm(slope, self.weight))
        if to_weight is not None:
            to_weight.addmm_(slope.mT, x)
        if to_bias is not None:
            to_bias += slope.sum(0)


# ---- values of each row --------------------------------------------------------------------------


def _row_forward(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    label: Tensor,
    class_weight: Tensor | None,
    softcap: float,
    weighted: bool,
    entropy: bool,
    others: bool,
) -> tuple[Tensor, ...]:
    results = _row_shapes(
        input, linear_weight, linear_bias, label, class_weight, softcap, weighted, entropy, others
    )
    log_sums, of_targets, of_alls, entropies = (one.zero_() for one in results)
    for rows, _, logits in rows_of_logits(input, linear_weight, linear_bias, label):
        for z, its_label, numbers in blocks.blocks(logits, label[rows], rows):
            capped_(z, softcap)
            of_targets[numbers] = target_logits(z, its_label)
            if weighted:
                of_alls[numbers] = sum_of_logits(z, class_weight)
            if others:
                hide_targets_(z, its_label)
            kept = z.clone() if entropy else z
            log_sum = softmax_(z)
            log_sums[numbers] = log_sum
            if entropy:
                entropies[numbers] = -_log_p_(kept, log_sum).mul_(z).sum(1)
    for one in results:
        if one.numel():
            one.masked_fill_(label == IGNORED, 0.0)
    return results


def _log_p_(z: Tensor, log_sum: Tensor) -> Tensor:
    """The logarithm of the softmax in place; a large number instead of −∞, whose product is 0."""
    return z.sub_(log_sum[:, None]).clamp_(min=-1e30)


def _row_backward(
    grad_log_sum: Tensor | None,
    grad_of_target: Tensor | None,
    grad_of_all: Tensor | None,
    grad_entropy: Tensor | None,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    label: Tensor,
    class_weight: Tensor | None,
    entropies: Tensor,
    softcap: float,
    weighted: bool,
    entropy: bool,
    others: bool,
    *needed: bool,
) -> list[Tensor]:
    gradients = Gradients(input, linear_weight, linear_bias, needed)
    arrived = (
        grad_log_sum,
        grad_of_target,
        grad_of_all if weighted else None,  # those of empty results are empty
        grad_entropy if entropy else None,
        entropies if entropy else None,
    )
    skipped = label == IGNORED
    given = tuple(None if one is None else one.masked_fill(skipped, 0.0) for one in arrived)
    for rows, x, logits in rows_of_logits(input, linear_weight, linear_bias, label):
        its = [None if one is None else one[rows] for one in given]
        for z, its_label, to_log_sum, to_target, to_all, to_entropy, its_entropy in blocks.blocks(
            logits, label[rows], *its
        ):
            capped = capped_(z, softcap)
            if others:
                hide_targets_(z, its_label)
            log_p = None if to_entropy is None else z.clone()
            log_sum = softmax_(z)
            factor = torch.zeros_like(log_sum) if to_log_sum is None else to_log_sum
            if log_p is None:
                z.mul_(factor[:, None])
            else:
                to_log_p = to_entropy[:, None]
                factor = factor - to_entropy * its_entropy
                z.mul_(_log_p_(log_p, log_sum).mul_(-to_log_p).add_(factor[:, None]))
            slopes_(z, capped, its_label, class_weight, to_target, to_all)
        gradients.add(rows, x, logits)
    return [one.to(input.dtype) for one in gradients.sums if one is not None]


def _row_shapes(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    label: Tensor,
    class_weight: Tensor | None,
    softcap: float,
    weighted: bool,
    entropy: bool,
    others: bool,
) -> tuple[Tensor, ...]:
    wide = torch.float64 if input.dtype is torch.float64 else torch.float32
    rows = label.shape[0]
    sizes = (rows, rows, rows if weighted else 0, rows if entropy else 0)
    return tuple(input.new_empty(size, dtype=wide) for size in sizes)


of_rows = FusedOp(
    "linear_logit_rows",
    row_definition,
    results=["log_sum", "of_target", "of_all", "entropies"],
    backward=["input", "linear_weight", "linear_bias", "label", "class_weight", "entropies",
              "softcap", "weighted", "entropy", "others"],
    constants=["label", "class_weight"],
    tensor_code=(_row_forward, _row_backward),
    opaque_shapes=_row_shapes,
)  # fmt: skip
