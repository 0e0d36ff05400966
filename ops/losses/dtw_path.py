"""Dynamic time warping: the best hard alignment of two sequences, and its cost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ops._core import autograd, checks, sequence_pairs, warping
from ops._core.fused import FusedOp

__all__ = ["DTWPath", "dtw_path", "dtw_path_from_cost"]


class DTWPath(NamedTuple):
    """The result of :func:`dtw_path`: the paths, their lengths, and the costs along them."""

    path: Tensor
    path_lengths: Tensor
    cost: Tensor


def dtw_path(
    x: Tensor,
    y: Tensor,
    *,
    lengths_x: Tensor | None = None,
    lengths_y: Tensor | None = None,
    bandwidth: int | None = None,
) -> DTWPath:
    """The alignment of two sequences with the least cost: dynamic time warping.

    .. math::

        rᵢⱼ = ‖xᵢ − yⱼ‖² + min(rᵢ₋₁ⱼ₋₁, rᵢ₋₁ⱼ, rᵢⱼ₋₁)

    r of the last steps of both is the cost. It is the limit of :func:`ops.soft_dtw` for γ → 0. From
    H. Sakoe, S. Chiba, "Dynamic Programming Algorithm Optimization for Spoken Word Recognition",
    IEEE Transactions on Acoustics, Speech, and Signal Processing 26, 1978.

    Args:
        x: ``(B, N, D)``, floating point, any strides; or ``(N, D)``, a single sequence.
        y: ``(B, M, D)``, or ``(M, D)``, like ``x``.
        lengths_x: ``(B,)``, integers from 1 to N: how many steps of each sequence count. The rest
            is padding. By default all N.
        lengths_y: the same for ``y``, from 1 to M.
        bandwidth: w of the Sakoe-Chiba band: step i of ``x`` may meet step j of ``y`` only if
            ``|i − j| ≤ w``, as in :func:`ops.soft_dtw`. By default there is no band.

    Returns:
        A :class:`DTWPath`. ``path`` holds the pairs (i, j) of the path from (0, 0) on, int64,
        ``(B, N + M − 1, 2)``, with −1 behind its end. ``path_lengths``, ``(B,)``, are the numbers
        of pairs. ``cost``, ``(B,)``, is in the dtype of ``x``. Single sequences have no dimension
        B.

    Raises:
        ArgumentTypeError: sequences that are not tensors of one dtype among float64, float32,
            bfloat16 and float16; lengths that are not tensors of integers; a ``bandwidth`` that is
            no integer.
        ArgumentError: shapes that do not fit together, different devices, sequences without a
            step, lengths out of range, a band too narrow for a pair of lengths. On a GPU the
            lengths are not waited for: a pair whose lengths are wrong has a path of length 0, and a
            cost of NaN.
        BackendUnavailableError: the requested back end cannot run.

    Gradients:
        Of the cost, for ``x`` and ``y``, of any order, with the path held fixed. The path has none.
        Forward mode and :mod:`torch.func` run on the pure-torch path.

    Numerics:
        Costs are sums of squared differences in float64. Of equal sums (i−1, j−1) comes before
        (i−1, j), and that before (i, j−1). No sum is less than NaN, so the path goes to a NaN at
        (i−1, j−1). A NaN at another place does not draw it. Where sums are equal but for their
        rounding, back ends may return other paths of the same cost. Under autocast the sequences
        are cast to float32.

    Memory:
        Compiled kernels take a byte for each of the N × M cells of the pairs that run at once, and
        the pure-torch path takes N + M bytes for each of the N steps of all pairs. On a CPU a band
        saves memory.
    """
    x, y, single = sequence_pairs.sequences(x, y)
    band = sequence_pairs.band(bandwidth)
    lengths = sequence_pairs.lengths(x, y.shape[1], lengths_x, lengths_y, band, single)
    path, path_lengths = _fused(x.detach(), y.detach(), lengths, band)
    here, real = _cells(path, path_lengths)
    # In float64 first, so that gradients sum up in float64 too.
    met = [_gathered(one.double(), at) for one, at in zip((x, y), here, strict=True)]
    difference = torch.where(real[..., None], met[0] - met[1], 0.0)
    return _result(path, path_lengths, difference.square().sum(-1), x.dtype, single)


def dtw_path_from_cost(
    cost: Tensor,
    *,
    lengths_x: Tensor | None = None,
    lengths_y: Tensor | None = None,
    bandwidth: int | None = None,
) -> DTWPath:
    """:func:`dtw_path` of a given matrix of costs: for another distance than the squared Euclidean.

    Args:
        cost: ``(B, N, M)``, or ``(N, M)`` for a single pair. Costs may be negative. An infinite
            cost forbids its cell, if there is another way.
        lengths_x, lengths_y, bandwidth: see :func:`dtw_path`.

    Returns:
        A :class:`DTWPath`. The gradient of its cost is 1 on the path.

    Errors, numerics and gradients are those of :func:`dtw_path`.
    """
    cost, single = sequence_pairs.costs(cost)
    band = sequence_pairs.band(bandwidth)
    lengths = sequence_pairs.lengths(cost, cost.shape[2], lengths_x, lengths_y, band, single)
    path, path_lengths = _fused_from_cost(cost.detach(), lengths, band)
    (i, j), real = _cells(path, path_lengths)
    met = cost.flatten(1).gather(1, i * cost.shape[2] + j).double()
    return _result(path, path_lengths, torch.where(real, met, 0.0), cost.dtype, single)


def _cells(path: Tensor, path_lengths: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The rows and columns of the cells, 0 behind the path, and which are on it."""
    place = torch.arange(path.shape[1], device=path.device)
    i, j = path.clamp(min=0).unbind(2)
    return (i, j), place < path_lengths[:, None]


def _gathered(sequence: Tensor, at: Tensor) -> Tensor:
    return sequence.gather(1, at[..., None].expand(-1, -1, sequence.shape[2]))


def _result(
    path: Tensor, path_lengths: Tensor, costs: Tensor, dtype: torch.dtype, single: bool
) -> DTWPath:
    cost = torch.where(path_lengths > 0, costs.sum(1), torch.nan).to(dtype)
    if single:
        return DTWPath(path[0], path_lengths[0], cost[0])
    return DTWPath(path, path_lengths, cost)


# ---- the search ----------------------------------------------------------------------------------

_UP, _LEFT = 1, 2  # the moves, which are 0 for the diagonal


def _search(source: warping.Source, lengths: Tensor | None, bandwidth: int) -> tuple[Tensor, ...]:
    """The recursion over anti-diagonals, and then all paths at once, from their ends."""
    batch, rows, cols = source.batch, source.rows, source.cols
    first = source.costs(0, 0, 1)
    device, places = first.device, rows + cols - 1
    moves = torch.zeros((places, batch, rows), dtype=torch.uint8, device=device)
    # Row i is at place i + 1. Place 0 is above the first row.
    buffers = first.new_full((3, batch, rows + 2), torch.inf)
    buffers[1, :, 0] = 0  # the origin, two anti-diagonals before the first
    for k, low, high, _ in warping.diagonals(source, bandwidth):
        last, earlier, out = buffers[(k - 1) % 3], buffers[(k - 2) % 3], buffers[k % 3]
        out[:, low] = torch.inf
        out[:, high + 1] = torch.inf
        here, above = slice(low + 1, high + 1), slice(low, high)
        diagonal, up, left = earlier[:, above], last[:, above], last[:, here]
        is_up = up < diagonal
        least = torch.where(is_up, up, diagonal)
        is_left = left < least
        moves[k, :, low:high] = torch.where(is_left, _LEFT, is_up.to(torch.uint8))
        torch.add(source.costs(k, low, high), torch.where(is_left, left, least), out=out[:, here])
    if lengths is None:
        lengths = torch.tensor([[rows], [cols]], device=device).expand(2, batch)
    i, j = (lengths - 1).clamp(min=0)
    on = lengths[0] > 0
    pair = torch.arange(batch, device=device)
    path = torch.empty((places, batch, 2), dtype=torch.int64, device=device)
    count = torch.zeros(batch, dtype=torch.int64, device=device)
    for cell in path:
        cell.copy_(torch.where(on[:, None], torch.stack((i, j), 1), -1))
        count += on
        on = on & ((i > 0) | (j > 0))
        move = moves[i + j, pair, i]
        move = torch.where(i == 0, _LEFT, torch.where(j == 0, _UP, move))
        i, j = i - (on & (move != _LEFT)).long(), j - (on & (move != _UP)).long()
    place = torch.arange(places, device=device)[:, None]
    order = torch.where(place < count, count - 1 - place, place)
    return path.gather(0, order[..., None].expand(-1, -1, 2)).transpose(0, 1).contiguous(), count


def _shapes(first: Tensor, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    shapes = ((first.shape[0], rows + cols - 1, 2), first.shape[:1])
    path, lengths = (first.new_empty(shape, dtype=torch.int64) for shape in shapes)
    return path, lengths


autograd.define_in_torch(
    "dtw_path_definition(Tensor x, Tensor y, Tensor? lengths, int bandwidth) -> (Tensor, Tensor)",
    lambda x, y, lengths, bandwidth: _search(warping.Sequences(x, y, lengths), lengths, bandwidth),
    lambda x, y, lengths, bandwidth: _shapes(x, x.shape[1], y.shape[1]),
)
autograd.define_in_torch(
    "dtw_path_definition_from_cost(Tensor cost, Tensor? lengths, int bandwidth)"
    " -> (Tensor, Tensor)",
    lambda cost, lengths, bandwidth: _search(warping.Costs(cost, lengths), lengths, bandwidth),
    lambda cost, lengths, bandwidth: _shapes(cost, cost.shape[1], cost.shape[2]),
)


def _definition(
    x: Tensor, y: Tensor, lengths: Tensor | None, bandwidth: int
) -> tuple[Tensor, Tensor]:
    path, path_lengths = torch.ops.jitops.dtw_path_definition(x, y, lengths, bandwidth)
    return path, path_lengths


def _definition_from_cost(
    cost: Tensor, lengths: Tensor | None, bandwidth: int
) -> tuple[Tensor, Tensor]:
    path, path_lengths = torch.ops.jitops.dtw_path_definition_from_cost(cost, lengths, bandwidth)
    return path, path_lengths


_fused = FusedOp(
    "dtw_path",
    _definition,
    results=["path", "path_lengths"],
    constants=["x", "y", "lengths", "path", "path_lengths"],
    shapes=lambda x, y, lengths, bandwidth: _shapes(x, x.shape[1], y.shape[1]),
)
_fused_from_cost = FusedOp(
    "dtw_path_from_cost",
    _definition_from_cost,
    results=["path", "path_lengths"],
    constants=["cost", "lengths", "path", "path_lengths"],
    shapes=lambda cost, lengths, bandwidth: _shapes(cost, cost.shape[1], cost.shape[2]),
    source="dtw_path",
)


def samples() -> Iterator[checks.Sample]:
    """Where ``jitops check`` checks the gradients: of the cost along the path."""

    def cost(x: Tensor, y: Tensor) -> Tensor:
        return dtw_path(x, y, bandwidth=2).cost

    yield "bandwidth=2", cost, (torch.randn(2, 3, 2), torch.randn(2, 4, 2))
    yield "of costs", lambda cost: dtw_path_from_cost(cost).cost, (torch.randn(2, 4, 5),)
