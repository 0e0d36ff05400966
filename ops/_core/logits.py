"""Sums over the logits of all pairs of rows, tile by tile: their matrix is never stored.

A logit is z_ij = scale x_i·y_j + bias_j. A tile of them comes from torch's own matrix product. It
stays in a CPU's cache while it is summed up. The backward pass computes each tile again. So both
passes cost four matrix products, and no memory beyond the gradients but a copy of x and two tiles.

Without y, both sides of a pair are rows of x. Then z is symmetric, and each pair of tiles is
computed once: two products.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ops._core import autograd, checks
from ops._core.fused import FusedOp

# Elements of a tile for each thread of a CPU: in float32 1 MB, half of a level-2 cache.
ELEMENTS_OF_A_THREAD = 1 << 18
ELEMENTS_ELSEWHERE = 1 << 22
# One exponential of each pair, relative to a common level, is accurate if all log-sums are this
# close to the level. The backward pass multiplies it by a gradient and by exp(level − log-sum).
REACH, REACH_BACKWARD = 30.0, 15.0
PROBED = 32  # rows that suggest the level
# Exponentials below these exponents are 0, because subnormal numbers take many times as long in a
# matrix product. In float32 they are below exp(−70 + 30) of a sum, and exp(−50 + 15) of a gradient.
NEGLIGIBLE, NEGLIGIBLE_BACKWARD = -70.0, -50.0
NEGLIGIBLE_FLOAT64 = -600.0


class Sums(NamedTuple):
    """The sums over each row of logits, over each column, and the entropy of each row's softmax.

    Those that were not requested are empty.
    """

    rows: Tensor
    columns: Tensor
    entropy: Tensor


def sums(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    *,
    bias: Tensor | None = None,
    labels: Tensor | None = None,
    ref_labels: Tensor | None = None,
    excluded: Tensor | None = None,
    sigmoid: bool = False,
    columns: bool = False,
    entropy: bool = False,
) -> Sums:
    """The log-sum log Σ_j exp(z_ij) for each row, or Σ_j log(1 + exp(z_ij)).

    Sums are over the pairs that are allowed. The result has the dtype of ``x``, but float32 for
    half precisions. A row without any allowed pair has the log-sum −∞, entropy 0, and no gradient.
    Gradients are of any order. Those of the second order store the matrix.

    Args:
        x: ``(N, D)``, checked floating point.
        y: ``(M, D)``, like ``x``; or ``None``: the rows of ``x`` themselves, without a bias.
        scale: ``()``, of any floating dtype.
        bias: ``(M,)``, of any floating dtype.
        labels: ``(N,)``, integers: pairs with equal labels are left out.
        ref_labels: ``(M,)``, the labels of ``y``; required with both ``labels`` and ``y``.
        excluded: ``(N, K)``, int64: K columns for each row that are left out; −1 leaves out none.
            Without ``y``, j must be left out for i if i is left out for j.
        sigmoid: sum softplus instead of taking the log-sum-exp; over rows alone.
        columns: sum over columns too, from the same tiles.
        entropy: of the softmax over each row.
    """
    if y is None and (bias is not None or sigmoid or columns or entropy):
        raise ValueError("a matrix without y has log-sums over rows alone, and no bias")
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    bias = None if bias is None else bias.to(wide)
    if y is None and labels is not None:
        ref_labels = labels
    flags = (sigmoid, columns, entropy)
    return Sums(*_fused(x, y, scale.to(wide), bias, labels, ref_labels, excluded, *flags))


# ---- the definition ------------------------------------------------------------------------------


def _definition(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    ref_labels: Tensor | None,
    excluded: Tensor | None,
    sigmoid: bool,
    columns: bool,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The formula in tensor code, with the whole matrix."""
    x = checks.widened(x)
    y = x if y is None else checks.widened(y)
    with checks.without_autocast(x):
        z = (scale * x) @ y.mT
    if bias is not None:
        z = z + bias
    none = x.flatten()[:0]
    hidden = torch.zeros_like(z, dtype=torch.bool)
    if labels is not None and ref_labels is not None:
        hidden = labels[:, None] == ref_labels
    if excluded is not None:
        numbers = torch.arange(y.shape[0], device=x.device)
        hidden = hidden | (excluded[:, :, None] == numbers).any(1)
    if sigmoid:
        terms = autograd.softplus(z)
        return torch.where(hidden, torch.zeros_like(z), terms).sum(1), none, none
    z = z.masked_fill(hidden, -torch.inf)
    rows = _log_sum_exp(z, 1)
    return (
        rows,
        _log_sum_exp(z, 0) if columns else none,
        _entropy(z, rows, hidden) if entropy else none,
    )


def _log_sum_exp(z: Tensor, dim: int) -> Tensor:
    """As torch's, but with the gradient 0 where all are −∞."""
    empty = (z == -torch.inf).all(dim)
    z = torch.where(empty.unsqueeze(dim), torch.zeros_like(z), z)
    return torch.logsumexp(z, dim).masked_fill(empty, -torch.inf)


def _entropy(z: Tensor, rows: Tensor, hidden: Tensor) -> Tensor:
    log_p = z.masked_fill(hidden, 0.0) - rows.masked_fill(rows == -torch.inf, 0.0)[:, None]
    terms = log_p * log_p.exp()
    return -torch.where(hidden, torch.zeros_like(z), terms).sum(1)


# ---- tiles ---------------------------------------------------------------------------------------


class _Tiles:
    """The tiles of the matrix of logits, which take turns in one buffer."""

    def __init__(
        self,
        x: Tensor,
        y: Tensor | None,
        scale: Tensor,
        bias: Tensor | None,
        labels: Tensor | None,
        ref_labels: Tensor | None,
        excluded: Tensor | None,
    ) -> None:
        self.symmetric = y is None
        self.x = checks.widened(x)
        self.scaled = (self.x * scale).contiguous()
        self.y = self.x.contiguous() if y is None else checks.widened(y).contiguous()
        self.bias, self.excluded = bias, excluded
        self.labels, self.ref_labels = labels, ref_labels
        self.rows, self.columns = x.shape[0], self.y.shape[0]
        elements = ELEMENTS_ELSEWHERE
        if x.is_cpu:
            elements = ELEMENTS_OF_A_THREAD * torch.get_num_threads()
        side = math.isqrt(elements)
        self.height, self.width = min(self.rows, side), min(self.columns, side)
        if not self.symmetric and self.rows and self.columns:
            self.width = min(self.columns, elements // self.height)
            self.height = min(self.rows, elements // self.width)
        self._tile, self._other = self.scaled.new_empty(2, self.height * self.width).unbind()

    def __iter__(self) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """Rows, columns, the tile, and a buffer of its shape. Pairs left out are −∞."""
        for top in range(0, self.rows, max(1, self.height)):
            i = slice(top, min(top + self.height, self.rows))
            first = top if self.symmetric else 0
            for left in range(first, self.columns, max(1, self.width)):
                j = slice(left, min(left + self.width, self.columns))
                yield i, j, self.logits(i, j), self._shaped(self._other, i, j)

    def logits(self, i: slice, j: slice) -> Tensor:
        """The tile of these rows and columns, until the next one is computed."""
        z = self._shaped(self._tile, i, j)
        torch.mm(self.scaled[i], self.y[j].mT, out=z)
        if self.bias is not None:
            z += self.bias[j]
        self.hide(z, i, j, -torch.inf)
        return z

    def hide(self, z: Tensor, i: slice, j: slice, value: float) -> None:
        """Write ``value`` where a pair is left out."""
        if self.labels is not None and self.ref_labels is not None:
            z.masked_fill_(self.labels[i, None] == self.ref_labels[j], value)
        if self.excluded is None:
            return
        for number in self.excluded[i].unbind(1):
            place = number - j.start
            inside = (place >= 0) & (place < z.shape[1])
            if z.is_cpu and not inside.any():  # other devices would wait for the answer
                continue
            place = torch.where(inside, place, 0)[:, None]
            z.scatter_(1, place, z.gather(1, place).masked_fill_(inside[:, None], value))

    def twice(self, i: slice, j: slice) -> bool:
        """Whether the tile also stands for its mirror image."""
        return self.symmetric and i != j

    @staticmethod
    def _shaped(buffer: Tensor, i: slice, j: slice) -> Tensor:
        shape = (i.stop - i.start, j.stop - j.start)
        return buffer[: shape[0] * shape[1]].view(shape)


# ---- the forward pass ----------------------------------------------------------------------------


def _forward(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    ref_labels: Tensor | None,
    excluded: Tensor | None,
    sigmoid: bool,
    columns: bool,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    tiles = _Tiles(x, y, scale, bias, labels, ref_labels, excluded)
    if sigmoid:
        rows = tiles.scaled.new_zeros(tiles.rows)
        for i, _, z, other in tiles:
            torch.ops.aten.softplus.out(z, 1, autograd.LINEAR, out=other)
            rows[i] += other.sum(1)
        return rows, rows.new_empty(0), rows.new_empty(0)
    if x.is_cpu and not entropy:
        found = _with_one_exponential(tiles, columns)
        if found is not None:
            return (*found, found[0].new_empty(0))
    of_rows = _Online(tiles.scaled, tiles.rows)
    of_columns = _Online(tiles.scaled, tiles.columns if columns else 0)
    for i, j, z, other in tiles:
        if columns:
            of_columns.add(j, z, 0, other)
        elif tiles.twice(i, j):
            of_rows.add(j, z, 0, other)
        if entropy:
            of_rows.add_with_entropy(tiles, i, j, z, other)
        else:
            of_rows.add(i, z, 1, other)
    rows = of_rows.log_sum()
    return rows, of_columns.log_sum(), of_rows.entropy() if entropy else rows.new_empty(0)


def _with_one_exponential(tiles: _Tiles, columns: bool) -> tuple[Tensor, Tensor] | None:
    """The log-sums over rows and over columns, from one exponential of each pair.

    That is accurate if all of them are close to a common level, which the first rows suggest.
    Otherwise the result is ``None``.
    """
    if tiles.rows == 0 or tiles.columns == 0:
        return None
    some = slice(0, min(tiles.height, PROBED))
    first = torch.logsumexp(tiles.logits(some, slice(0, tiles.width)), 1)
    low, high = first.min().item(), first.max().item()
    if not high - low <= REACH:  # also if one is NaN
        return None
    level = (low + high) / 2 + math.log(tiles.columns / tiles.width)
    if abs(level) <= REACH / 2:
        level = 0.0
    total = tiles.scaled.new_zeros(tiles.rows)
    other_total = tiles.scaled.new_zeros(tiles.columns) if columns else total
    for i, j, z, _ in tiles:
        if level:
            z.sub_(level)
        exp_(z, NEGLIGIBLE)
        total[i] += z.sum(1)
        if columns or tiles.twice(i, j):
            other_total[j] += z.sum(0)
    logs = total.log(), other_total.log()
    if not all(bool((one.abs() <= REACH).all()) for one in logs):  # also if one is NaN
        return None
    return logs[0] + level, logs[1] + level if columns else total.new_empty(0)


class _Online:
    """The log-sum-exp of each row, while its logits arrive in parts (Milakov & Gimelshein 2018).

    Keeps the largest logit, the sum of exponentials relative to it, and the sum of exponentials
    times logits relative to it.
    """

    def __init__(self, like: Tensor, count: int) -> None:
        self.largest = like.new_full((count,), -torch.inf)
        self.total, self.weighted = like.new_zeros(2, count).unbind()

    def add(self, place: slice, z: Tensor, dim: int, other: Tensor) -> None:
        """Take the sums of ``z`` over ``dim`` for the rows at ``place``; overwrite ``other``."""
        level = self._raise(place, z.amax(dim))
        exp_(torch.sub(z, level.unsqueeze(dim), out=other), NEGLIGIBLE)
        self.total[place] += other.sum(dim)

    def add_with_entropy(
        self, tiles: _Tiles, place: slice, columns: slice, z: Tensor, other: Tensor
    ) -> None:
        """As :meth:`add` over dimension 1, and for the entropy too; overwrites ``z`` as well."""
        z -= self._raise(place, z.amax(1))[:, None]
        exp_(other.copy_(z), NEGLIGIBLE)
        tiles.hide(z, place, columns, 0.0)  # instead of −∞, so that the product is 0
        self.total[place] += other.sum(1)
        self.weighted[place] += z.mul_(other).sum(1)

    def _raise(self, place: slice, largest: Tensor) -> Tensor:
        """Make the sums relative to the largest logit so far, and return it."""
        before, total, weighted = (one[place] for one in (self.largest, self.total, self.weighted))
        torch.maximum(before, largest, out=largest)
        level = finite(largest)
        shift = before - level
        weighted += torch.where(total == 0, total, total * shift)
        shrink = shift.exp_()
        weighted *= shrink
        total *= shrink
        before.copy_(largest)
        return level

    def log_sum(self) -> Tensor:
        """The log-sum-exp; −∞ of nothing."""
        return self.total.log() + finite(self.largest)

    def entropy(self) -> Tensor:
        """The entropy of the softmax; 0 of nothing."""
        some = torch.where(self.total == 0, 1.0, self.total)
        return some.log() - self.weighted / some


def exp_(z: Tensor, negligible: float) -> Tensor:
    """The exponential in place, but 0 where it is negligible."""
    limit = NEGLIGIBLE_FLOAT64 if z.dtype is torch.float64 else negligible
    # Exponentials that underflow, and those of −∞, take 20 times as long as others.
    z.clamp_(min=limit).exp_()
    return torch.threshold_(z, 1.01 * math.exp(limit), 0.0)  # NaN stays


def finite(level: Tensor) -> Tensor:
    """0 instead of ±∞, from which nothing can be subtracted."""
    return level.masked_fill(level.isinf(), 0.0)


# ---- the backward pass ---------------------------------------------------------------------------


def _backward(
    grad_rows: Tensor | None,
    grad_columns: Tensor | None,
    grad_entropy: Tensor | None,
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    ref_labels: Tensor | None,
    excluded: Tensor | None,
    of_rows: Tensor,
    of_columns: Tensor,
    of_entropy: Tensor,
    sigmoid: bool,
    columns: bool,
    entropy: bool,
    *needed: bool,
) -> list[Tensor]:
    needs_x, needs_y, needs_scale, needs_bias = needed
    tiles = _Tiles(x, y, scale, bias, labels, ref_labels, excluded)
    grad_columns = grad_columns if columns else None  # those of empty results are empty
    grad_entropy = grad_entropy if entropy else None
    slopes = _Slopes(tiles, grad_rows, grad_columns, grad_entropy, of_rows, of_columns, of_entropy)
    # The gradient of the scale needs that of x, because the scale is a factor of x.
    to_x = torch.zeros_like(tiles.scaled) if needs_x or needs_scale else None
    to_y = torch.zeros_like(tiles.y) if needs_y else None
    to_bias = tiles.scaled.new_zeros(tiles.columns) if needs_bias else None
    for i, j, z, other in tiles:
        if sigmoid:
            slope = (
                torch.threshold_(z, NEGLIGIBLE, -torch.inf)
                .sigmoid_()
                .mul_(slopes.grad_rows[i, None])
            )
        else:
            slope = slopes(i, j, z, other)
        if to_x is not None:
            to_x[i].addmm_(slope, tiles.y[j])
            if tiles.twice(i, j):
                to_x[j].addmm_(slope.mT, tiles.y[i])
        if to_y is not None:
            to_y[j].addmm_(slope.mT, tiles.scaled[i])
        if to_bias is not None:
            to_bias[j] += slope.sum(0)
    gradients = []
    if to_x is not None:
        if needs_scale:
            # Without y each pair counts in the gradients of both of its rows.
            to_scale = (to_x * tiles.x).sum() * (0.5 if tiles.symmetric else 1)
        if needs_x:
            gradients.append(to_x.mul_(scale).to(x.dtype))
    if to_y is not None and y is not None:
        gradients.append(to_y.to(y.dtype))
    if needs_scale:
        gradients.append(to_scale)
    if to_bias is not None:
        gradients.append(to_bias)
    return gradients


class _Slopes:
    """The gradient with respect to the logits, tile by tile.

    Without ``y`` it is that with respect to z_ij and to z_ji together.
    """

    def __init__(
        self,
        tiles: _Tiles,
        grad_rows: Tensor | None,
        grad_columns: Tensor | None,
        grad_entropy: Tensor | None,
        rows: Tensor,
        columns: Tensor,
        entropy: Tensor,
    ) -> None:
        self.tiles = tiles
        self.grad_rows = torch.zeros_like(rows) if grad_rows is None else grad_rows
        self.grad_entropy, self.of_entropy = grad_entropy, entropy
        self.rows = _with_gradient(rows)
        self.both = tiles.symmetric or grad_columns is not None
        self.one_exponential = False
        if not self.both:
            return
        self.grad_columns = self.grad_rows if grad_columns is None else grad_columns
        self.columns = self.rows if tiles.symmetric else _with_gradient(columns)
        if not rows.is_cpu or grad_entropy is not None:
            return
        logs = torch.cat((self.rows, self.columns))
        logs = logs[logs != torch.inf]
        if logs.numel() == 0:
            return
        low, high = logs.min().item(), logs.max().item()
        if high - low <= 2 * REACH_BACKWARD:
            self.one_exponential = True
            self.level = (low + high) / 2
            self.of_rows = (self.level - self.rows).exp_().mul_(self.grad_rows)
            self.of_columns = (self.level - self.columns).exp_().mul_(self.grad_columns)

    def __call__(self, i: slice, j: slice, z: Tensor, other: Tensor) -> Tensor:
        """The gradient with respect to the tile ``z``, which is overwritten, as is ``other``."""
        if self.one_exponential:
            torch.add(self.of_rows[i, None], self.of_columns[j], out=other)
            return exp_(z.sub_(self.level), NEGLIGIBLE_BACKWARD).mul_(other)
        if self.both:
            torch.sub(z, self.columns[j], out=other)
            exp_(other, NEGLIGIBLE_BACKWARD).mul_(self.grad_columns[j])
        z -= self.rows[i, None]
        grad = self.grad_rows[i, None]
        if self.grad_entropy is None:
            exp_(z, NEGLIGIBLE_BACKWARD).mul_(grad)
        else:
            p = exp_(z.clone(), NEGLIGIBLE_BACKWARD)
            self.tiles.hide(z, i, j, 0.0)
            to_entropy = self.grad_entropy[i, None]
            z.mul_(-to_entropy).add_(grad - to_entropy * self.of_entropy[i, None]).mul_(p)
        return z.add_(other) if self.both else z


def _with_gradient(logs: Tensor) -> Tensor:
    """The log-sums, with +∞ for those of nothing: then exp(z − log-sum) is 0."""
    return logs.masked_fill(logs == -torch.inf, torch.inf)


def _shapes(
    x: Tensor, y: Tensor | None, scale: Tensor, bias: Tensor | None, labels: Tensor | None,
    ref_labels: Tensor | None, excluded: Tensor | None, sigmoid: bool, columns: bool, entropy: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    others = 0 if y is None or not columns else y.shape[0]
    return (
        scale.new_empty(x.shape[0]),
        scale.new_empty(others),
        scale.new_empty(x.shape[0] if entropy else 0),
    )


_fused = FusedOp(
    "logit_sums",
    _definition,
    results=["of_rows", "of_columns", "of_entropy"],
    backward=["x", "y", "scale", "bias", "labels", "ref_labels", "excluded",
              "of_rows", "of_columns", "of_entropy", "sigmoid", "columns", "entropy"],
    constants=["labels", "ref_labels", "excluded"],
    opaque_shapes=_shapes,
    tensor_code=(_forward, _backward),
)  # fmt: skip
