"""Inputs of alignments of two sequences, for the tests of soft-DTW and of the DTW path."""

from __future__ import annotations

import pytest
import torch

import ops


def ragged_lengths(rows, cols, batch):
    """Lengths from 1 on, that differ by no more than ``rows`` and ``cols``."""
    x = 1 + torch.arange(batch) * 5 % rows
    return x, (x + cols - rows).clamp(1, cols)


def band(rows, cols, slack):
    """A band wider by ``slack`` than the lengths need."""
    return None if slack is None else abs(rows - cols) + slack


def keywords_of(rows, cols, batch, device, slack, ragged):
    keywords = {"bandwidth": band(rows, cols, slack)}
    if ragged:
        lengths = (one.to(device) for one in ragged_lengths(rows, cols, batch))
        keywords |= dict(zip(("lengths_x", "lengths_y"), lengths, strict=True))
    return keywords


def inputs(shape, dtype, device):
    """Two batches of sequences, for a shape (B, N, M, D)."""
    batch, rows, cols, features = shape
    tensors = [torch.randn(batch, steps, features).double() for steps in (rows, cols)]
    return [t.to(device, dtype) for t in tensors]


def costs(shape, dtype, device):
    return [torch.randn(shape[:3]).double().to(device, dtype)]


# Parts of a strip, several strips, several tiles of 256 rows.
LAUNCHES = ((1, 1, 3, 1), (2, 33, 3, 2), (1, 260, 2, 1), (1, 2, 40, 1))

GOOD = {"x": torch.ones(2, 4, 3), "y": torch.ones(2, 6, 3)}
LENGTHS = torch.tensor([4, 4])
BAD_INPUT = (
    ({"x": [1.0]}, ops.ArgumentTypeError, "x must be a torch.Tensor, got list"),
    ({"x": torch.ones(2, 4, 3).int()}, ops.ArgumentTypeError, "x must have dtype float64, "),
    ({"y": torch.ones(2, 6, 3).double()}, ops.ArgumentTypeError, "y must have x's dtype"),
    ({"x": torch.ones(3)}, ops.ArgumentError, r"x must have shape \(B, N, D\) or \(N, D\)"),
    ({"y": torch.ones(6, 3)}, ops.ArgumentError, r"y must have shape \(2, M, 3\), like x, got"),
    ({"y": torch.ones(3, 6, 3)}, ops.ArgumentError, r"y must have shape \(2, M, 3\), like x"),
    ({"x": torch.ones(2, 0, 3)}, ops.ArgumentError, "x must have at least one step, got shape"),
    ({"bandwidth": 1.5}, ops.ArgumentTypeError, "bandwidth must be an int or None, got float"),
    ({"bandwidth": -1}, ops.ArgumentError, "bandwidth must be at least 0, got -1"),
    ({"bandwidth": 1}, ops.ArgumentError, "bandwidth must be at least 2 for lengths 4 and 6"),
    (
        {"bandwidth": 2, "lengths_x": torch.tensor([4, 3])},
        ops.ArgumentError,
        "bandwidth must be at least 3 for lengths 3 and 6, got 2",
    ),
    ({"lengths_x": [4, 4]}, ops.ArgumentTypeError, "lengths_x must be a torch.Tensor, got li"),
    ({"lengths_x": LENGTHS.float()}, ops.ArgumentTypeError, "lengths_x must have an integer"),
    (
        {"lengths_x": torch.empty(2, dtype=torch.int64, device="meta")},
        ops.ArgumentError,
        "lengths_x must be on device .*, got meta",
    ),
    ({"lengths_y": LENGTHS[:1]}, ops.ArgumentError, r"lengths_y must be of shape \[2\], got"),
    ({"lengths_x": 0 * LENGTHS}, ops.ArgumentError, "lengths_x must hold numbers from 1 to 4"),
    ({"lengths_y": 2 * LENGTHS}, ops.ArgumentError, "lengths_y must hold numbers from 1 to 6"),
    (
        {"x": torch.ones(4, 3), "y": torch.ones(6, 3), "lengths_x": LENGTHS[:1]},
        ops.ArgumentError,
        r"lengths_x must be None for a single pair, got shape \[1\]",
    ),
)
BAD_COSTS = (
    ([1.0], ops.ArgumentTypeError, "cost must be a torch.Tensor, got list"),
    (torch.ones(3), ops.ArgumentError, r"cost must have shape \(B, N, M\) or \(N, M\), got"),
    (torch.ones(2, 3, 0), ops.ArgumentError, "cost must have at least one row and column, got"),
)


def refused(call, change, error, text, device):
    """``call`` raises this error for good arguments with a change."""
    arguments = {
        name: value.to(device) if isinstance(value, torch.Tensor) and not value.is_meta else value
        for name, value in (GOOD | change).items()
    }
    with pytest.raises(error, match=text):
        call(**arguments)
