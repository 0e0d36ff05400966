"""All triplets of a batch with labels, in tensor code: the formula, and kernels over blocks.

A triplet is an anchor, a positive with its label and a negative with another one. The formula makes
the tensor of all triplets. The kernels take some anchors at a time, and for these some positives.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ops._core import autograd, blocks, checks, pairs

# Which triplets count, by the numbers of cuda_src/batch_all_triplet_loss.h.
ALL, SEMI_HARD, NEAREST = range(3)


# ---- the formula ---------------------------------------------------------------------------------


def _fallback(negatives: Tensor) -> tuple[Tensor, Tensor]:
    """The index of the farthest negative, or of one with a NaN distance; and whether it is NaN.

    Infinity is in the place of other candidates.
    """
    finite = torch.where(negatives == torch.inf, -torch.inf, negatives)
    farthest, at = finite.max(1, keepdim=True)
    return at.unsqueeze(1), farthest.isnan().unsqueeze(1)


def _nearest(positives: Tensor, negatives: Tensor, fallback: Tensor, is_nan: Tensor) -> Tensor:
    """For each positive the index of the nearest negative beyond it, or else the fallback."""
    others = negatives.unsqueeze(1)
    beyond = torch.where(others > positives.unsqueeze(2), others, torch.inf)
    nearest, at = beyond.min(2, keepdim=True)
    return torch.where((nearest < torch.inf) & ~is_nan, at, fallback)


def _masks(labels: Tensor, ref_labels: Tensor | None, begin: int, end: int) -> list[Tensor]:
    """Which candidates are positives, and which are negatives, of the anchors of a block."""
    candidates = labels if ref_labels is None else ref_labels
    positive = labels[begin:end, None] == candidates
    negative = ~positive
    if ref_labels is None:
        columns = torch.arange(labels.shape[0], device=labels.device)
        positive = positive & (columns[begin:end, None] != columns)
    return [positive, negative]


def _divisor(counted: Tensor, every: Tensor, counts_all: bool, reduction: int) -> Tensor:
    """The number that divides the sum of losses, in float64."""
    if reduction != 1:
        return torch.ones_like(counted, dtype=torch.float64)
    return (every if counts_all else counted).clamp(min=1).double()


def _fraction(counted: Tensor, every: Tensor) -> Tensor:
    return counted.double() / every.clamp(min=1)


def definition(
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None,
    ref_labels: Tensor | None,
    margin: float,
    soft: bool,
    squared: bool,
    rule: int,
    counts_all: bool,
    reduction: int,
    needs_embeddings: bool,
    needs_ref_emb: bool,
) -> tuple[Tensor, Tensor]:
    """The formula, which autograd differentiates."""
    x = checks.widened(embeddings)
    y = x if ref_emb is None else checks.widened(ref_emb)
    d = pairs.distances(x, y, squared)
    positive, negative = _masks(labels, ref_labels, 0, labels.shape[0])
    positives, negatives = d.unsqueeze(2), d.unsqueeze(1)
    valid = positive.unsqueeze(2) & negative.unsqueeze(1)
    every = valid.sum()
    if rule == NEAREST and d.numel():
        to_negatives = torch.where(negative, d, torch.inf)
        at = _nearest(d, to_negatives, *_fallback(to_negatives))
        negatives = torch.gather(negatives.expand_as(valid), 2, at)
        valid = valid.any(2, keepdim=True)
    # An infinitely far negative has no loss, whatever the positive is.
    margins = torch.where(negatives == torch.inf, -torch.inf, positives - negatives)
    if soft:
        losses, on = autograd.softplus(margins), valid
    else:
        losses = margins + margin
        on = valid & ~(losses <= 0)  # NaN is on
        if rule == SEMI_HARD:
            on = on & ~(negatives <= positives)
    losses = torch.where(on, losses, torch.zeros_like(losses))
    counted = (valid if rule == NEAREST else on).sum()
    loss = losses.sum((1, 2) if reduction == 0 else (0, 1, 2))
    loss = loss / _divisor(counted, every, counts_all, reduction).to(x.dtype)
    return loss.to(embeddings.dtype), _fraction(counted, every).to(x.dtype)


# ---- kernels over blocks -------------------------------------------------------------------------


class _Candidates:
    """All candidates; of float32 the differences from their mean in float64, and the lengths."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.by_product = rows.dtype is not torch.float64
        if self.by_product:
            self.centre = rows.mean(0, dtype=torch.float64)
            self.centred = rows - self.centre
            self.lengths = self.centred.square().sum(1)


class _Distances:
    """The distances of some anchors x to all candidates y, and the gradients of losses.

    Float32 takes a matrix product in float64, which is much faster than differences. Its rounding
    would show in the distances of near pairs only. If a pair is so near, the block takes
    differences. Float64 always does.
    """

    def __init__(self, x: Tensor, candidates: _Candidates, in_use: Tensor) -> None:
        self.x, self.y = x, candidates.rows
        self.by_product = candidates.by_product
        if self.by_product:
            a, b = x - candidates.centre, candidates.centred
            lengths = a.square().sum(1, keepdim=True) + candidates.lengths
            squares = torch.addmm(lengths, a, b.mT, alpha=-2)
            # The product is off by up to about cols * 2^-52 of the lengths: here 2^-27 of a square.
            far = squares >= lengths * ((x.shape[1] + 8) * 2.0**-25)  # not where anything is NaN
            self.by_product = bool((far | ~in_use).all())
        if self.by_product:
            self.x, self.y, self.values = a, b, squares.clamp_(min=0).to(x.dtype).sqrt_()
        else:
            self.values = torch.cdist(x, self.y, compute_mode="donot_use_mm_for_euclid_dist")

    def gradient_of_x(self, factors: Tensor) -> Tensor:
        """The sums of ``factors * (x - y)`` over all candidates."""
        return self._gradient(factors, self.x, self.y)

    def gradient_of_y(self, factors: Tensor) -> Tensor:
        """The sums of ``factors * (y - x)`` over the anchors."""
        return self._gradient(factors.mT, self.y, self.x)

    def _gradient(self, factors: Tensor, a: Tensor, b: Tensor) -> Tensor:
        if self.by_product:
            factors = factors.double()
            return torch.addmm(factors.sum(1, keepdim=True) * a, factors, b, alpha=-1)
        factors = factors.contiguous()
        # With distances of 1 this is the sum of factors times differences.
        gradient: Tensor = torch.ops.aten._cdist_backward(
            factors, a, b, 2.0, torch.ones_like(factors)
        )
        return gradient


class _Block(NamedTuple):
    """Some anchors: their distances to all candidates, and sums over the triplets of each.

    Attributes:
        factors: of the differences between anchor and candidate, in the gradient of its loss; of
            a forward pass, nothing.
    """

    rows: slice
    distances: _Distances
    losses: Tensor
    counted: Tensor
    every: Tensor
    factors: Tensor


def _over_blocks(
    x: Tensor, y: Tensor, labels: Tensor, ref_labels: Tensor | None,
    margin: float, soft: bool, squared: bool, rule: int, with_factors: bool,
) -> Iterator[_Block]:  # fmt: skip
    candidates = _Candidates(y)
    # Elsewhere than on a CPU, cdist's backward pass makes a tensor of all differences.
    columns = y.shape[0] * (1 if x.is_cpu else x.shape[1])
    step = max(1, blocks.elements_for(x) // max(1, columns))
    for begin in range(0, x.shape[0] if y.shape[0] else 0, step):
        rows = slice(begin, min(x.shape[0], begin + step))
        positive, negative = _masks(labels, ref_labels, rows.start, rows.stop)
        distances = _Distances(x[rows], candidates, positive | negative)
        d = distances.values.square() if squared else distances.values
        count = positive.sum(1)
        every = count * negative.sum(1)
        # The row of positives of each anchor. Shorter rows end with -infinity, whose losses are 0.
        anchor, column = positive.nonzero(as_tuple=True)
        rank = torch.arange(len(anchor), device=x.device) - (count.cumsum(0) - count)[anchor]
        to_positives = d.new_full((len(count), int(count.max())), -torch.inf)
        to_positives[anchor, rank] = d[anchor, column]
        negative &= (every > 0).unsqueeze(1)
        to_negatives = d.masked_fill(~negative, torch.inf)
        slopes = torch.zeros_like(d) if with_factors else None
        losses, slopes_p = _sum_up(to_positives, to_negatives, margin, soft, rule, slopes)
        if soft:
            counted = every
        elif rule == NEAREST:
            counted = torch.where(every > 0, count, 0)
        else:
            counted = slopes_p.sum(1).long()
        factors = d[:0]
        if slopes is not None:
            slopes[anchor, column] = slopes_p[anchor, rank]
            factors = 2 * slopes if squared else torch.where(d == 0, 0.0, slopes / d)
        yield _Block(rows, distances, losses, counted, every, factors)


def _sum_up(
    positives: Tensor,
    negatives: Tensor,
    margin: float,
    soft: bool,
    rule: int,
    slopes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The loss of each anchor, and the derivatives with respect to the distances.

    Those for negatives are added to ``slopes``, if it is there. Those for positives are returned.
    """
    losses = positives.new_zeros(len(positives), dtype=torch.float64)
    of_positives = torch.zeros_like(positives)
    # Then x is -infinity where one of them is no candidate, even after adding the margin.
    regular = bool((positives < torch.inf).all() & ~negatives.isnan().any())
    regular = regular and margin <= torch.finfo(positives.dtype).max
    fallback = _fallback(negatives) if rule == NEAREST else None
    some = max(1, blocks.elements_for(positives) // negatives.numel())
    for first in range(0, positives.shape[1], some):
        part = slice(first, first + some)
        to_positive, to_negative = positives[:, part].unsqueeze(2), negatives.unsqueeze(1)
        if fallback is not None:
            at = _nearest(positives[:, part], negatives, *fallback)
            to_negative = torch.gather(to_negative.expand(-1, at.shape[1], -1), 2, at)
        x = (to_positive - to_negative).add_(margin)  # 0 if soft
        if not regular:
            other = (to_negative == torch.inf) | (to_positive == -torch.inf)
            x.masked_fill_(other, -torch.inf)
        if soft:
            losses += autograd.softplus(x).sum((1, 2))
            slope = x.sigmoid_()
        else:
            x.clamp_(min=0)
            if rule == SEMI_HARD:
                x.masked_fill_(to_negative <= to_positive, 0)
            losses += x.sum((1, 2))
            slope = x.ne_(0)  # NaN is not 0
        of_positives[:, part] = slope.sum(2)
        if slopes is not None and fallback is None:
            slopes -= slope.sum(1)
        elif slopes is not None:  # sums of ones, which are exact in any order
            slopes.scatter_add_(1, at.squeeze(2), -slope.squeeze(2))
    return losses, of_positives


class _Gradients:
    """The gradients that are needed, as sums over the blocks."""

    def __init__(self, x: Tensor, y: Tensor, same: bool, needs_x: bool, needs_y: bool) -> None:
        self.same = same
        self.of_x = torch.zeros_like(x) if needs_x else None
        self.of_y = self.of_x if same else torch.zeros_like(y) if needs_y else None
        self.needed = self.of_x is not None or self.of_y is not None

    def add(self, block: _Block, factors: Tensor) -> None:
        if self.of_x is not None:
            self.of_x[block.rows] += block.distances.gradient_of_x(factors)
        if self.of_y is not None:
            self.of_y += block.distances.gradient_of_y(factors)

    def sums(self) -> list[Tensor | None]:
        return [self.of_x, None if self.same else self.of_y]


def forward(
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None,
    ref_labels: Tensor | None,
    margin: float,
    soft: bool,
    squared: bool,
    rule: int,
    counts_all: bool,
    reduction: int,
    needs_embeddings: bool,
    needs_ref_emb: bool,
) -> tuple[Tensor, ...]:
    """The loss, the fraction of triplets that count, the factor of the sum in the loss, gradients.

    The gradients are those of the sum. Losses that are not reduced have a factor for each anchor,
    so their gradients are not formed here.
    """
    x = checks.widened(embeddings).contiguous()
    y = x if ref_emb is None else checks.widened(ref_emb).contiguous()
    forms = reduction != 0
    gradients = _Gradients(
        x, y, ref_emb is None, forms and needs_embeddings, forms and needs_ref_emb
    )
    losses = x.new_zeros(x.shape[0], dtype=torch.float64)
    counted, every = labels.new_zeros(2, x.shape[0]).unbind()
    for block in _over_blocks(
        x, y, labels, ref_labels, margin, soft, squared, rule, gradients.needed
    ):
        losses[block.rows] = block.losses
        counted[block.rows], every[block.rows] = block.counted, block.every
        if gradients.needed:
            gradients.add(block, block.factors)
    total, of_all = counted.sum(), every.sum()
    divisor = _divisor(total, of_all, counts_all, reduction)
    loss = losses if reduction == 0 else losses.sum() / divisor
    return (
        loss.to(embeddings.dtype),
        _fraction(total, of_all).to(x.dtype),
        divisor.reciprocal().to(x.dtype),
        *(x.new_empty(0) if one is None else one for one in gradients.sums()),
    )


def backward(
    grad: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None,
    ref_labels: Tensor | None,
    scale: Tensor,
    margin: float,
    soft: bool,
    squared: bool,
    rule: int,
    counts_all: bool,
    reduction: int,
    needs_embeddings: bool,
    needs_ref_emb: bool,
) -> list[Tensor]:
    """The gradients that are needed, from distances that are computed again."""
    x = checks.widened(embeddings).contiguous()
    y = x if ref_emb is None else checks.widened(ref_emb).contiguous()
    scales = (checks.widened(grad) * scale).expand(x.shape[0]).unsqueeze(1)
    gradients = _Gradients(x, y, ref_emb is None, needs_embeddings, needs_ref_emb)
    for block in _over_blocks(x, y, labels, ref_labels, margin, soft, squared, rule, True):
        gradients.add(block, block.factors * scales[block.rows])
    return [one.to(embeddings.dtype) for one in gradients.sums() if one is not None]


def shapes(
    embeddings: Tensor, labels: Tensor, ref_emb: Tensor | None, ref_labels: Tensor | None,
    margin: float, soft: bool, squared: bool, rule: int, counts_all: bool, reduction: int,
    needs_embeddings: bool, needs_ref_emb: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The results of :func:`forward`, with no content."""
    wide = torch.float64 if embeddings.dtype is torch.float64 else torch.float32

    def gradient(tensor: Tensor | None, needed: bool) -> Tensor:
        if tensor is None or not needed or reduction == 0:
            return embeddings.new_empty(0, dtype=wide)
        return embeddings.new_empty(tensor.shape, dtype=wide)

    return (
        embeddings.new_empty((embeddings.shape[0],) if reduction == 0 else ()),
        embeddings.new_empty((), dtype=wide),
        embeddings.new_empty((), dtype=wide),
        gradient(embeddings, needs_embeddings),
        gradient(ref_emb, needs_ref_emb),
    )
