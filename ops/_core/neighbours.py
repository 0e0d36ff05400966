"""Nearest neighbours of the points of two clouds: arguments, search in tensor code, distances."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ops._core import autograd, checks
from ops._errors import ArgumentError

_BLOCK = 1 << 18  # elements of a block of the matrix of distances
_FEW_COLUMNS = 8  # up to so many, sums of differences take less time than a matrix product

# ---- arguments -----------------------------------------------------------------------------------


def clouds(**tensors: Any) -> list[Tensor]:
    """Two clouds or more, ``(B, N, D)`` each; under autocast the half precisions in float32.

    Raises:
        ArgumentTypeError: not a tensor, or a wrong dtype.
        ArgumentError: a wrong shape or device.
    """
    tensors = checks.widened_under_autocast(tensors)
    checks.same_kind(**tensors)
    first = next(iter(tensors))
    for name, value in tensors.items():
        if value.dim() != 3:
            raise ArgumentError(f"{name} must have shape (B, points, D), got {list(value.shape)}")
        batch, _, columns = tensors[first].shape
        if value.shape[0] != batch or value.shape[2] != columns:
            raise ArgumentError(
                f"{name} must have shape [{batch}, points, {columns}], as {first} has a batch of "
                f"{batch} and {columns} columns, got {list(value.shape)}"
            )
    return list(tensors.values())


def lengths(name: str, value: Any, of: Tensor) -> Tensor | None:
    """The number of points of each cloud, int64; ``None`` if all points count.

    Raises:
        ArgumentTypeError: not a tensor of integers.
        ArgumentError: a wrong shape or device, or a length below 0 or beyond the tensor.
    """
    if value is None:
        return None
    checks.integers(name, value)
    if value.shape != of.shape[:1]:
        raise ArgumentError(
            f"{name} must have shape [{of.shape[0]}], one length for each cloud, got "
            f"{list(value.shape)}"
        )
    if value.device != of.device:
        raise ArgumentError(f"{name} must be on device {of.device}, got {value.device}")
    checked: Tensor = torch.ops.jitops.lengths_within(value, of.shape[1], name)
    return checked


def _lengths_within(value: Tensor, most: int, name: str) -> Tensor:
    value = value.to(torch.int64, copy=True)
    for length in value.tolist():
        if not 0 <= length <= most:
            raise ArgumentError(
                f"{name} must be between 0 and the number of points, {most}, got {length}"
            )
    return value


# An operator, because graphs and torch.vmap cannot look at values.
autograd.define_in_torch(
    "lengths_within(Tensor value, int most, str name) -> Tensor",
    _lengths_within,
    lambda value, most, name: torch.empty_like(value, dtype=torch.int64),
)


def norm(value: Any) -> int:
    """1 or 2.

    Raises:
        ArgumentTypeError: no integer.
        ArgumentError: another number.
    """
    value = checks.check_int("norm", value)
    if value not in (1, 2):
        raise ArgumentError(f"norm must be 1 or 2, got {value}")
    return value


# ---- distances to given neighbours ---------------------------------------------------------------


def real(idx: Tensor, of: Tensor | None, others: Tensor | None, count: int) -> Tensor | None:
    """Where ``idx`` ``(B, N, K)`` is a neighbour and not padding; ``None`` if it is everywhere.

    Args:
        idx: the neighbours.
        of: the lengths of the clouds whose points have these neighbours.
        others: the lengths of the clouds that the neighbours are in.
        count: the points of those with their padding.
    """
    if of is None and others is None and idx.shape[2] <= count:
        return None
    rows, ranks = (torch.arange(size, device=idx.device) for size in idx.shape[1:])
    within = (ranks < count).expand(idx.shape)
    if of is not None:
        within = within & (rows < of[:, None])[:, :, None]
    if others is not None:
        within = within & (ranks < others[:, None])[:, None, :]
    return within


def gathered(points: Tensor, idx: Tensor, within: Tensor | None) -> Tensor:
    """The points ``(B, N, K, D)`` of each cloud with these indices; zeros where not ``within``."""
    batch, count, columns = points.shape
    if count == 0:  # then no index is real
        return points.new_zeros(*idx.shape, columns) + points.sum(1)[:, None, None, :]
    first = torch.arange(0, batch * count, count, device=idx.device)
    flat = (idx + first[:, None, None]).reshape(-1)
    # Not by indexing, whose gradient is summed in no fixed order.
    found = points.reshape(batch * count, columns).index_select(0, flat).view(*idx.shape, columns)
    return found if within is None else torch.where(within.unsqueeze(-1), found, 0.0)


def distances(x: Tensor, y: Tensor, idx: Tensor, within: Tensor | None, norm: int) -> Tensor:
    """The distances ``(B, N, K)`` from points of x to these points of y; 0 where not ``within``."""
    difference = x.unsqueeze(2) - gathered(y, idx, within)
    if within is not None:
        difference = torch.where(within.unsqueeze(-1), difference, 0.0)
    return difference.abs().sum(-1) if norm == 1 else difference.square().sum(-1)


# ---- search --------------------------------------------------------------------------------------


def nearest(
    p1: Tensor,
    p2: Tensor,
    lengths1: Tensor | None,
    lengths2: Tensor | None,
    k: int,
    norm: int,
) -> Tensor:
    """The indices ``(B, N, K)`` of the nearest points of p2, the nearest first; padded with 0."""
    found: Tensor = torch.ops.jitops.nearest_points(
        p1.detach(), p2.detach(), lengths1, lengths2, k, norm
    )
    return found


def _nearest(
    p1: Tensor,
    p2: Tensor,
    lengths1: Tensor | None,
    lengths2: Tensor | None,
    k: int,
    norm: int,
) -> Tensor:
    x, y = checks.widened(p1), checks.widened(p2)
    batch, count, _ = x.shape
    idx = torch.zeros((batch, count, k), dtype=torch.int64, device=x.device)
    of_x = [count] * batch if lengths1 is None else lengths1.tolist()
    of_y = [y.shape[1]] * batch if lengths2 is None else lengths2.tolist()
    for b, (n, m) in enumerate(zip(of_x, of_y, strict=True)):
        if n > 0 and m > 0:
            _search(x[b, :n], y[b, :m], norm, idx[b, :n, : min(k, m)])
    return idx


autograd.define_in_torch(
    "nearest_points(Tensor p1, Tensor p2, Tensor? lengths1, Tensor? lengths2, int k, int norm)"
    " -> Tensor",
    _nearest,
    lambda p1, p2, lengths1, lengths2, k, norm: p1.new_empty((*p1.shape[:2], k), dtype=torch.int64),
)


def _search(x: Tensor, y: Tensor, norm: int, found: Tensor) -> None:
    """Write the nearest rows of y for each row of x, as many as ``found`` has columns."""
    step = max(1, _BLOCK // y.shape[0])
    if norm == 1 and y.shape[1] > _FEW_COLUMNS:
        for block, out in zip(x.split(step), found.split(step), strict=True):
            _take_nearest(block, y, torch.cdist(block, y, p=1), None, norm, out)
    elif y.shape[1] <= _FEW_COLUMNS:
        columns = y.mT.contiguous()
        for block, out in zip(x.split(step), found.split(step), strict=True):
            _take_nearest(block, y, _by_differences(block, columns, norm), None, norm, out)
    else:
        _search_by_products(x, y, step, found)


def _by_differences(x: Tensor, columns: Tensor, norm: int) -> Tensor:
    total = x.new_zeros(x.shape[0], columns.shape[1])
    difference = torch.empty_like(total)
    for k, column in enumerate(columns):
        torch.sub(x[:, k, None], column, out=difference)
        if norm == 1:
            total += difference.abs_()
        else:
            total.addcmul_(difference, difference)
    return total


def _search_by_products(x: Tensor, y: Tensor, step: int, found: Tensor) -> None:
    """A matrix product gives squared distances with an error that it can bound.

    All candidates within that bound are compared by sums of squared differences.
    """
    centre = y.mean(0)  # distances stay, and the products lose fewer digits
    near_x, near_y = x - centre, y - centre
    length_x, length_y = near_x.square().sum(1), near_y.square().sum(1)
    # The error of a product is at most D roundings of the product of the lengths.
    exact = x.dtype is torch.float64 or torch.get_float32_matmul_precision() == "highest"
    rounding = torch.finfo(x.dtype).eps if exact else 2**-7
    slack = 2 * (x.shape[1] + 8) * rounding * (length_x + length_y.max())
    for begin in range(0, x.shape[0], step):
        block = slice(begin, begin + step)
        approximate = torch.addmm(length_y, near_x[block], near_y.mT, alpha=-2)
        approximate += length_x[block, None]
        _take_nearest(x[block], y, approximate, slack[block], 2, found[block])


def _take_nearest(
    x: Tensor, y: Tensor, total: Tensor, slack: Tensor | None, norm: int, found: Tensor
) -> None:
    """Write the columns with the least distances of each row.

    Args:
        x: ``(N, D)``.
        y: ``(M, D)``.
        total: the distances ``(N, M)``; NaN counts as infinite.
        slack: the error of a row of ``total`` twice, or ``None`` if they are exact.
        norm: of the distances.
        found: ``(N, K)``.
    """
    count = found.shape[1]
    wide = total.nan_to_num(nan=torch.inf, posinf=torch.inf)
    if slack is None and count == 1:
        torch.min(wide, 1, keepdim=True, out=(wide.new_empty(len(x), 1), found))
        return
    last = wide.amin(1) if count == 1 else wide.topk(count, 1, largest=False).values[:, -1]
    limit = last if slack is None else last + slack
    # NaN is compared as well, because it is not above anything.
    rows, columns = (~(total > limit[:, None])).nonzero(as_tuple=True)
    if slack is None:
        values = wide[rows, columns]
    else:
        values = _distances_of_pairs(x, y, rows, columns).nan_to_num_(nan=torch.inf)
    order = values.argsort(stable=True)
    rows, by_row = rows[order].sort(stable=True)
    sizes = rows.bincount(minlength=len(x))
    rank = torch.arange(len(rows), device=rows.device) - (sizes.cumsum(0) - sizes)[rows]
    kept = rank < count
    found[rows[kept], rank[kept]] = columns[order][by_row][kept]


def _distances_of_pairs(x: Tensor, y: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    size = max(1, _BLOCK // max(1, x.shape[1]))
    parts = zip(rows.split(size), columns.split(size), strict=True)
    return torch.cat([(x[r] - y[c]).square().sum(-1) for r, c in parts])
