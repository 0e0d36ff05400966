"""The arguments of alignments of two sequences: sequences or costs, lengths, and a band."""

from __future__ import annotations

import torch
from torch import Tensor

from ops._core import autograd, checks
from ops._errors import ArgumentError


def sequences(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, bool]:
    """The two batches of sequences, and whether they are single ones."""
    x, y = checks.widened_under_autocast({"x": x, "y": y}).values()
    checks.same_kind(x=x, y=y)
    if x.dim() not in (2, 3):
        raise ArgumentError(f"x must have shape (B, N, D) or (N, D), got {list(x.shape)}")
    batch = list(x.shape[:-2])
    if y.dim() != x.dim() or [*y.shape[:-2], y.shape[-1]] != [*batch, x.shape[-1]]:
        wanted = ", ".join(map(str, [*batch, "M", x.shape[-1]]))
        raise ArgumentError(f"y must have shape ({wanted}), like x, got {list(y.shape)}")
    for name, one in (("x", x), ("y", y)):
        if one.shape[-2] == 0:
            raise ArgumentError(f"{name} must have at least one step, got shape {list(one.shape)}")
    return (x, y, False) if batch else (x[None], y[None], True)


def costs(cost: Tensor) -> tuple[Tensor, bool]:
    """The batch of costs, and whether it is a single matrix."""
    cost = checks.widened_under_autocast({"cost": cost})["cost"]
    checks.same_kind(cost=cost)
    if cost.dim() not in (2, 3):
        raise ArgumentError(f"cost must have shape (B, N, M) or (N, M), got {list(cost.shape)}")
    if 0 in cost.shape[-2:]:
        raise ArgumentError(f"cost must have at least one row and column, got {list(cost.shape)}")
    return (cost, False) if cost.dim() == 3 else (cost[None], True)


_WIDEST = 1 << 40  # a band wider than any sequence, with room in 64 bits


def band(bandwidth: int | None) -> int:
    """The width of the band, or -1."""
    if bandwidth is None:
        return -1
    bandwidth = checks.check_int("bandwidth", bandwidth, "an int or None")
    if bandwidth < 0:
        raise ArgumentError(f"bandwidth must be at least 0, got {bandwidth}")
    return min(bandwidth, _WIDEST)


def lengths(
    first: Tensor,
    cols: int,
    lengths_x: Tensor | None,
    lengths_y: Tensor | None,
    bandwidth: int,
    single: bool,
) -> Tensor | None:
    """The lengths of all pairs, ``(2, B)``, or ``None`` if there is no padding.

    Lengths that do not fit raise an error on a CPU. Other devices do not wait for the answer: there
    the lengths of the pair become 0, and its value becomes NaN.

    Args:
        first: the first batch of sequences, or the costs.
        cols: the largest length in y.
        bandwidth: how far the lengths may differ; negative if any is right.

    Raises:
        ArgumentTypeError: lengths that are not tensors of integers.
        ArgumentError: a length out of range or a band too narrow, on a CPU; another shape.
    """
    rows = first.shape[1]
    if lengths_x is None and lengths_y is None:
        if bandwidth >= 0:
            _check_band(rows, cols, bandwidth)
        return None
    x = one_length("lengths_x", lengths_x, first, rows, single)
    y = one_length("lengths_y", lengths_y, first, cols, single)
    found: Tensor = torch.ops.jitops.pair_lengths(x, y, rows, cols, bandwidth)
    return found


def one_length(name: str, value: Tensor | None, first: Tensor, most: int, single: bool) -> Tensor:
    """The length of one side of all pairs, ``(B,)``, or ``most`` where there is none.

    Args:
        first: a tensor of the batch, on its device.

    Raises:
        ArgumentTypeError: not a tensor of integers.
        ArgumentError: another shape.
    """
    batch = len(first)
    if value is None:
        return torch.full((batch,), most, dtype=torch.int64, device=first.device)
    checks.integers(name, value)
    if value.is_meta and not first.is_meta:
        raise ArgumentError(f"{name} must be on device {first.device}, got meta")
    if single or value.shape != (batch,):
        wanted = "None for a single pair" if single else f"of shape [{batch}]"
        raise ArgumentError(f"{name} must be {wanted}, got shape {list(value.shape)}")
    return value.to(first.device, torch.int64)


def out_of_range(name: str, one: Tensor, least: int, most: int) -> Tensor:
    """Which lengths are out of range. On a CPU they raise an error.

    Raises:
        ArgumentError: a length is out of range, on a CPU.
    """
    wrong = (one < least) | (one > most)
    if one.is_cpu and wrong.any():
        raise ArgumentError(
            f"{name} must hold numbers from {least} to {most}, got {int(one[wrong][0])}"
        )
    return wrong


def _checked_lengths(x: Tensor, y: Tensor, rows: int, cols: int, bandwidth: int) -> Tensor:
    both = torch.stack((x, y))
    for name, one, most in (("lengths_x", x, rows), ("lengths_y", y, cols)):
        both.masked_fill_(out_of_range(name, one, 1, most), 0)
    if bandwidth >= 0:
        wrong = (x - y).abs() > bandwidth
        if x.is_cpu and wrong.any():
            _check_band(int(x[wrong][0]), int(y[wrong][0]), bandwidth)
        both.masked_fill_(wrong, 0)
    return both


autograd.define_in_torch(
    "pair_lengths(Tensor x, Tensor y, SymInt rows, SymInt cols, int bandwidth) -> Tensor",
    _checked_lengths,
    lambda x, y, rows, cols, bandwidth: x.new_empty(2, *x.shape),
)


def _check_band(rows: int, cols: int, bandwidth: int) -> None:
    """A path from the first cell to the last one stays within the band.

    Raises:
        ArgumentError: it does not.
    """
    if abs(rows - cols) > bandwidth:
        raise ArgumentError(
            f"bandwidth must be at least {abs(rows - cols)} for lengths {rows} and {cols}, "
            f"got {bandwidth}"
        )
