"""The hardest positive and negative of each embedding, in tensor code."""

from __future__ import annotations

import torch
from torch import Tensor

from ops._core import autograd, checks

_BLOCK = 1 << 18  # elements of a block of the matrix of distances


def hardest(
    anchors: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None,
    ref_labels: Tensor | None,
    own: int,
) -> tuple[Tensor, Tensor]:
    """The index of the farthest positive and of the nearest negative of each anchor, or −1.

    A matrix product gives distances with an error that it can bound. All candidates within that
    bound are compared by sums of squared differences. Of equal distances the first one is taken.
    """
    found: tuple[Tensor, Tensor] = torch.ops.jitops.hardest_pairs(
        anchors.detach(), labels, None if ref_emb is None else ref_emb.detach(), ref_labels, own
    )
    return found


def _hardest(
    anchors: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None,
    ref_labels: Tensor | None,
    own: int,
) -> tuple[Tensor, Tensor]:
    x = checks.widened(anchors)
    y = x if ref_emb is None else checks.widened(ref_emb)
    of_y = labels if ref_labels is None else ref_labels
    positive, negative = (labels.new_full(labels.shape, -1) for _ in range(2))
    if y.shape[0] == 0:
        return positive, negative
    centre = y.mean(0)  # distances stay, and the products lose fewer digits
    near_x, near_y = x - centre, y - centre
    length_x, length_y = near_x.square().sum(1), near_y.square().sum(1)
    # The error of a product is at most D roundings of the product of the lengths.
    exact = x.dtype is torch.float64 or torch.get_float32_matmul_precision() == "highest"
    rounding = torch.finfo(x.dtype).eps if exact else 2**-7
    slack = 2 * (x.shape[1] + 8) * rounding * (length_x + length_y.max())
    step = max(1, _BLOCK // y.shape[0])
    for begin in range(0, x.shape[0], step):
        block = slice(begin, begin + step)
        approximate = torch.addmm(length_y, near_x[block], near_y.mT, alpha=-2)
        approximate += length_x[block, None]
        same = labels[block, None] == of_y
        different = ~same
        first = begin if ref_emb is None else begin + own
        if ref_emb is None or own >= 0:
            rows = torch.arange(same.shape[0], device=same.device)
            same[rows, rows + first] = False
        for found, mask, sign in ((positive, same, 1), (negative, different, -1)):
            _take_hardest(x[block], y, approximate, mask, sign, slack[block], found[block])
    return positive, negative


def _take_hardest(
    x: Tensor, y: Tensor, approximate: Tensor, mask: Tensor, sign: int, slack: Tensor, found: Tensor
) -> None:
    """Write the index with the largest ``sign * distance`` among those of ``mask``."""
    hard = (sign * approximate).masked_fill_(~mask, -torch.inf)
    best = hard.nan_to_num(nan=-torch.inf).amax(1, keepdim=True)
    # NaN and infinity are compared as well, because they are not below anything.
    candidates = mask & ~(hard < best - slack[:, None])
    rows, columns = candidates.nonzero(as_tuple=True)
    size = max(1, _BLOCK // max(1, x.shape[1]))
    parts = [
        (x[r] - y[c]).square().sum(-1)
        for r, c in zip(rows.split(size), columns.split(size), strict=True)
    ]
    distances = torch.cat(parts) if parts else x.new_empty(0)
    key = (sign * distances).nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    most = key.new_full(found.shape, -torch.inf).scatter_reduce_(0, rows, key, "amax")
    first = torch.full_like(found, y.shape[0])
    ties = key == most[rows]
    first.scatter_reduce_(0, rows[ties], columns[ties], "amin")
    found.copy_(torch.where(first < y.shape[0], first, -1))


autograd.define_in_torch(
    "hardest_pairs(Tensor anchors, Tensor labels, Tensor? ref_emb, Tensor? ref_labels,"
    " int own)"
    " -> (Tensor, Tensor)",
    _hardest,
    lambda anchors, labels, ref_emb, ref_labels, own: (
        torch.empty_like(labels),
        torch.empty_like(labels),
    ),
)
