"""Soft-DTW in tensor code: its recursion over the anti-diagonals of the costs of a batch.

The cells of an anti-diagonal depend on the two anti-diagonals before alone. All numbers are float64
and in units of gamma, because differences of neighbouring costs of paths are small beside them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ops._core import autograd
from ops._errors import ArgumentError

# The cost of a cell outside of the matrix or its band, and of an infinite one. Sums along a path
# stay finite. Beyond half of it, a value is infinite.
FAR = 1e290

# ---- lengths -------------------------------------------------------------------------------------


def lengths(x: Tensor, y: Tensor, rows: int, cols: int, bandwidth: int) -> Tensor:
    """The lengths of all pairs, ``(2, B)``.

    Lengths that do not fit raise an error on a CPU. Other devices do not wait for the answer: there
    the lengths of the pair become 0, and its value becomes NaN.

    Args:
        x, y: ``(B,)``, int64.
        rows, cols: their largest values.
        bandwidth: how far their difference may be; negative if any is right.

    Raises:
        ArgumentError: a length out of range, or a band too narrow, on a CPU.
    """
    found: Tensor = torch.ops.jitops.pair_lengths(x, y, rows, cols, bandwidth)
    return found


def _lengths(x: Tensor, y: Tensor, rows: int, cols: int, bandwidth: int) -> Tensor:
    both = torch.stack((x, y))
    for name, one, most in (("lengths_x", x, rows), ("lengths_y", y, cols)):
        wrong = (one < 1) | (one > most)
        if one.is_cpu and wrong.any():
            raise ArgumentError(
                f"{name} must hold numbers from 1 to {most}, got {int(one[wrong][0])}"
            )
        both.masked_fill_(wrong, 0)
    if bandwidth >= 0:
        wrong = (x - y).abs() > bandwidth
        if x.is_cpu and wrong.any():
            check_band(int(x[wrong][0]), int(y[wrong][0]), bandwidth)
        both.masked_fill_(wrong, 0)
    return both


autograd.define_in_torch(
    "pair_lengths(Tensor x, Tensor y, SymInt rows, SymInt cols, int bandwidth) -> Tensor",
    _lengths,
    lambda x, y, rows, cols, bandwidth: x.new_empty(2, *x.shape),
)


def check_band(rows: int, cols: int, bandwidth: int) -> None:
    """A path from the first cell to the last one stays within the band.

    Raises:
        ArgumentError: it does not.
    """
    if abs(rows - cols) > bandwidth:
        raise ArgumentError(
            f"bandwidth must be at least {abs(rows - cols)} for lengths {rows} and {cols}, "
            f"got {bandwidth}"
        )


# ---- the definition ------------------------------------------------------------------------------


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """The costs of all pairs of steps in float64, from differences: ``(B, N, M)``."""
    return (x.double()[:, :, None] - y.double()[:, None]).square().sum(-1)


def definition(cost: Tensor, lengths: Tensor | None, gamma: float, bandwidth: int) -> Tensor:
    """Soft-DTW of a batch of costs, ``(B, N, M)``, in float64, which autograd differentiates."""
    batch, rows, cols = cost.shape
    cost = cost.double() / gamma
    row = torch.arange(rows, device=cost.device)
    if bandwidth >= 0:
        column = torch.arange(cols, device=cost.device)
        cost = cost.masked_fill((row[:, None] - column).abs() > bandwidth, 0)
    # clamp passes no NaN on to the gradients of NaN and infinite costs, but the other term does.
    cost = cost.clamp(-FAR, FAR) + 0 * cost.sigmoid()
    # Row i begins at column i: its elements are those of anti-diagonals.
    skewed = F.pad(cost, (0, rows)).flatten(1)[:, : rows * (rows + cols - 1)]
    skewed = skewed.view(batch, rows, rows + cols - 1)
    outside = cost.new_full((batch, 1), FAR)
    earlier, last = cost.new_full((2, batch, rows + 1), FAR)
    earlier = torch.cat((torch.zeros_like(outside), earlier[:, 1:]), 1)  # the origin
    diagonals = []
    # Not by index: the gradient of each would be a whole matrix.
    for k, costs in enumerate(skewed.unbind(2)):
        before = torch.stack((last[:, :-1], last[:, 1:], earlier[:, :-1]))
        cell = costs - (-before).logsumexp(0)
        column = k - row
        valid = (column >= 0) & (column < cols)
        if bandwidth >= 0:
            valid = valid & ((row - column).abs() <= bandwidth)
        earlier, last = last, torch.cat((outside, torch.where(valid, cell, FAR)), 1)
        diagonals.append(last[:, 1:])
    if lengths is None:
        value = last[:, -1]
    else:
        ends = lengths.sum(0) - 2
        known = ends >= 0
        pair = torch.arange(batch, device=cost.device)
        every = torch.stack(diagonals)
        value = every[torch.where(known, ends, 0), pair, (lengths[0] - 1).clamp(min=0)]
        value = torch.where(known, value, torch.nan)
    return _finite(value) * gamma


def _finite(value: Tensor) -> Tensor:
    """The value, which is infinite if it is far. Then, or if it is NaN, its gradient is NaN."""
    far = ~(value.abs() <= FAR / 2)
    # Elsewhere 1, whose derivatives are finite.
    infinite = torch.where(far, value, 1.0) * torch.where(far, torch.inf, 1.0)
    return torch.where(far, infinite.hypot(torch.zeros_like(value)) * value.sign(), value)


def masked(tensor: Tensor, lengths: Tensor | None, places: tuple[int, ...] = (0,)) -> Tensor:
    """The tensor with zeros as padding, along dimension 1, or along dimensions 1 and 2.

    Args:
        lengths: ``(2, B)``, or ``None``: there is no padding.
        places: for each dimension, the row of ``lengths`` that counts.
    """
    if lengths is None:
        return tensor
    for dim, place in enumerate(places, 1):
        step = torch.arange(tensor.shape[dim], device=tensor.device)
        padding = step >= lengths[place][:, None]
        shape = [len(tensor), *(len(step) if d == dim else 1 for d in range(1, tensor.dim()))]
        tensor = tensor.masked_fill(padding.view(shape), 0)
    return tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of weights and flows."""
    return torch.float64 if dtype is torch.float64 else torch.float32


# ---- kernels of tensor code ----------------------------------------------------------------------


class Sequences:
    """The costs of two sequences, an anti-diagonal at a time, and their gradients."""

    def __init__(self, x: Tensor, y: Tensor, lengths: Tensor | None) -> None:
        self.x = masked(x, lengths).double()
        self.y = masked(y, lengths, (1,)).double().flip(1)
        self.batch, self.rows, _ = x.shape
        self.cols = y.shape[1]

    def _parts(self, k: int, low: int, high: int) -> tuple[slice, slice]:
        first = self.cols - 1 - k
        return slice(low, high), slice(first + low, first + high)

    def costs(self, k: int, low: int, high: int) -> Tensor:
        """The costs of rows ``low`` to ``high`` of the anti-diagonal ``k``, in float64."""
        i, j = self._parts(k, low, high)
        return (self.x[:, i] - self.y[:, j]).square_().sum(-1)

    def begin_gradients(self) -> None:
        """Before :meth:`add_gradients`."""
        self.grad_x, self.grad_y = torch.zeros_like(self.x), torch.zeros_like(self.y)

    def add_gradients(self, k: int, low: int, high: int, flow: Tensor) -> None:
        """``flow`` is the gradient of these costs."""
        i, j = self._parts(k, low, high)
        term = (self.x[:, i] - self.y[:, j]).mul_(2 * flow[..., None])
        self.grad_x[:, i] += term
        self.grad_y[:, j] -= term

    def gradients(self, lengths: Tensor | None) -> list[Tensor]:
        """Those of both sequences."""
        return [masked(self.grad_x, lengths), masked(self.grad_y.flip(1), lengths, (1,))]


class Costs:
    """The same for given costs, copied so that an anti-diagonal lies in one piece."""

    def __init__(self, cost: Tensor, lengths: Tensor | None) -> None:
        self.batch, self.rows, self.cols = cost.shape
        self.steps = self.rows + self.cols - 1
        cost = masked(cost, lengths, (0, 1))
        self.skewed = cost.new_empty(self.batch, self.steps, self.rows)
        for its, out in zip(self._skewed(F.pad(cost, (0, self.rows))), self.skewed, strict=True):
            out.copy_(its.T)

    def _skewed(self, padded: Tensor) -> Tensor:
        """A view of ``(B, N, M + N)`` in which row i begins at column i."""
        size = self.rows * self.steps
        return padded.flatten(1)[:, :size].view(self.batch, self.rows, self.steps)

    def costs(self, k: int, low: int, high: int) -> Tensor:
        """The costs of rows ``low`` to ``high`` of the anti-diagonal ``k``, in float64."""
        return self.skewed[:, k, low:high].double()

    def begin_gradients(self) -> None:
        """Before :meth:`add_gradients`."""
        self.flows = torch.zeros_like(self.skewed, dtype=wide(self.skewed.dtype))

    def add_gradients(self, k: int, low: int, high: int, flow: Tensor) -> None:
        """``flow`` is the gradient of these costs."""
        self.flows[:, k, low:high] = flow

    def gradients(self, lengths: Tensor | None) -> list[Tensor]:
        """Those of the costs."""
        padded = self.flows.new_zeros(self.batch, self.rows, self.rows + self.cols)
        for out, flows in zip(self._skewed(padded), self.flows, strict=True):
            out.copy_(flows.T)
        return [masked(padded[..., : self.cols].contiguous(), lengths, (0, 1))]


Source = Sequences | Costs


def _diagonals(source: Source, bandwidth: int) -> Iterator[tuple[int, int, int, slice]]:
    """Each anti-diagonal ``k`` with its rows within the band, and their place among all cells.

    In a band of width 0 every other one has no rows.
    """
    at = 0
    rows, cols = source.rows, source.cols
    if bandwidth >= 0:  # beyond these no cell is within the band
        rows, cols = min(rows, cols + bandwidth), min(cols, rows + bandwidth)
    for k in range(rows + cols - 1):
        low, high = max(0, k - cols + 1), min(rows, k + 1)
        if bandwidth >= 0:
            low, high = max(low, (k - bandwidth + 1) // 2), min(high, (k + bandwidth) // 2 + 1)
        count = source.batch * (high - low)
        yield k, low, high, slice(at, at + count)
        at += count


def cells(rows: int, cols: int, bandwidth: int) -> int:
    """The number of cells within the band."""

    def beyond(width: int, height: int) -> int:
        longest = max(0, width - bandwidth - 1)
        count = min(longest, height)
        return count * longest - count * (count - 1) // 2

    if bandwidth < 0:
        return rows * cols
    return rows * cols - beyond(rows, cols) - beyond(cols, rows)


def forward(
    source: Source, lengths: Tensor | None, gamma: float, bandwidth: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The values, and two weights of each cell: the shares of the cell above and of that before.

    The third share is the rest. They are kept in ``dtype``.
    """
    batch, rows = source.batch, source.rows
    first = source.costs(0, 0, 1)
    count = batch * cells(rows, source.cols, bandwidth)
    above, before = (first.new_empty((count,), dtype=dtype) for _ in range(2))
    # Row i is at place i + 1. Place 0 is above the first row.
    buffers = first.new_full((3, batch, rows + 2), FAR)
    buffers[1, :, 0] = 0  # the origin, two anti-diagonals before the first
    value = first.new_full((batch,), torch.nan)
    for k, low, high, part in _diagonals(source, bandwidth):
        last, earlier, out = buffers[(k - 1) % 3], buffers[(k - 2) % 3], buffers[k % 3]
        out[:, low] = FAR
        out[:, high + 1] = FAR
        if low == high:
            continue
        here, up = slice(low + 1, high + 1), slice(low, high)
        shares = torch.stack((last[:, up], last[:, here], earlier[:, up]))
        least = shares.amin(0)
        torch.sub(least, shares, out=shares).exp_()
        total = shares.sum(0)
        for weights, share in zip((above, before), shares, strict=False):
            weights[part] = torch.div(share, total, out=share).flatten()
        cell = source.costs(k, low, high).div_(gamma).clamp_(-FAR, FAR)
        cell += least.sub_(total.log_())
        out[:, here] = cell
        if lengths is not None:
            row = lengths[0] - 1
            its = cell.gather(1, (row - low).clamp(0, high - low - 1)[:, None])[:, 0]
            value = torch.where(lengths.sum(0) - 2 == k, its, value)
    if lengths is None:
        value = buffers[(rows + source.cols - 2) % 3, :, rows].clone()
    far = value.abs() > FAR / 2
    return torch.where(far, value * torch.inf, value * gamma), above, before


def backward(
    source: Source,
    grad: Tensor,
    lengths: Tensor | None,
    value: Tensor,
    above: Tensor,
    before: Tensor,
    bandwidth: int,
) -> list[Tensor]:
    """The gradients of the source, in float64. ``above`` and ``before`` are the weights."""
    batch, rows = source.batch, source.rows
    seed = torch.where(value.isfinite(), grad, torch.nan)
    source.begin_gradients()
    buffers = seed.new_zeros((3, 3, batch, rows + 2))
    for k, low, high, part in reversed(list(_diagonals(source, bandwidth))):
        next_, later, out = buffers[(k + 1) % 3], buffers[(k + 2) % 3], buffers[k % 3]
        out[:, :, low] = 0
        out[:, :, high + 1] = 0
        if low == high:
            continue
        here, below = slice(low + 1, high + 1), slice(low + 2, high + 2)
        flow = next_[0][:, below] + next_[1][:, here]
        flow += later[2][:, below]
        if lengths is not None:
            row = lengths[0] - 1 - low
            ends = (lengths.sum(0) - 2 == k) & (row >= 0) & (row < high - low)
            arrived = torch.where(ends, seed, 0.0)[:, None]
            flow.scatter_add_(1, row.clamp(0, high - low - 1)[:, None], arrived)
        elif k == rows + source.cols - 2:
            flow[:, -1] += seed
        source.add_gradients(k, low, high, flow)
        for one, weights in zip(out, (above, before), strict=False):
            shares = weights[part].view(batch, high - low)
            torch.mul(shares.double(), flow, out=one[:, here])
        torch.sub(flow, out[:2, :, here].sum(0), out=out[2, :, here])
    gradients = source.gradients(lengths)  # the flow into padding is NaN if a weight there is
    if lengths is not None:  # a pair with unknown lengths
        unknown = lengths[0] == 0
        gradients = [
            one.masked_fill(unknown.view(-1, *[1] * (one.dim() - 1)), torch.nan)
            for one in gradients
        ]
    return gradients
