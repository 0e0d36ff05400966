"""Shared by the tests of ops on point clouds: inputs and their lengths, bad arguments."""

from __future__ import annotations

import pytest
import torch

import ops


def inputs(shape, dtype, device):
    """Two clouds, of a shape (batch, points of the first, points of the second, columns)."""
    batch, n, m, columns = shape
    return [
        torch.randn(batch, count, columns, dtype=torch.float64, device=device).to(dtype)
        for count in (n, m)
    ]


def lengths_of(x, step=1):
    """Lengths from all points of the first cloud down to 0, in turns."""
    if x.is_nested or not x.shape[1]:
        return torch.zeros(2 if x.is_nested else x.shape[0], dtype=torch.int64, device=x.device)
    batch = torch.arange(x.shape[0], device=x.device)
    return x.shape[1] - step * batch % (x.shape[1] + 1)


def all_distances(x, y, norm):
    """The whole tensor of distances."""
    difference = x[:, :, None] - y[:, None]
    return difference.abs().sum(-1) if norm == 1 else difference.square().sum(-1)


def nearest(x, y, of_x, of_y, norm, k):
    """Distances and indices of the k nearest, padded with 0, by sorting all."""
    d = all_distances(x, y, norm)
    dists, idx = x.new_zeros(*x.shape[:2], k), x.new_zeros((*x.shape[:2], k), dtype=torch.int64)
    dists = dists + 0 * (x[:, :, :0].sum() + y[:, :, :0].sum())
    for b, (n, m) in enumerate(zip(of_x.tolist(), of_y.tolist(), strict=True)):
        count = min(k, m)
        order = d[b, :n, :m].detach().nan_to_num(nan=torch.inf, posinf=torch.inf)
        order = order.argsort(dim=1, stable=True)[:, :count]
        idx[b, :n, :count] = order
        kept = torch.zeros_like(dists)
        kept[b, :n, :count] = 1
        values = torch.zeros_like(dists)
        values[b, :n, :count] = d[b, :n, :m].gather(1, order)
        dists = torch.where(kept != 0, values, dists)
    return dists, idx


def whole(x):
    return torch.full((x.shape[0],), x.shape[1], dtype=torch.int64, device=x.device)


# A change of good arguments, the error, and its words; {0} and {1} name the two clouds.
BAD_INPUT = (
    ({0: [[0.0]]}, ops.ArgumentTypeError, "{0} must be a torch.Tensor, got list"),
    ({0: torch.ones(4, 2)}, ops.ArgumentError, r"{0} must have shape \(B, points, D\), got \[4, 2"),
    ({1: torch.ones(2, 4, 4)}, ops.ArgumentError, r"{1} must have shape \[2, points, 3\], as {0}"),
    ({1: torch.ones(3, 4, 3)}, ops.ArgumentError, r"{1} must have .*, got \[3, 4, 3\]"),
    ({1: torch.ones(2, 4, 3).double()}, ops.ArgumentTypeError, "{1} must have {0}'s dtype float32"),
    ({0: torch.ones(2, 4, 3).int()}, ops.ArgumentTypeError, "{0} must have dtype float64, float32"),
    ({"norm": 3}, ops.ArgumentError, "norm must be 1 or 2, got 3"),
    ({"norm": 2.0}, ops.ArgumentTypeError, "norm must be an int, got float"),
)


def bad_lengths(name):
    return (
        (
            {name: torch.tensor([4, 6])},
            ops.ArgumentError,
            f"{name} must be between 0 and .* 5, got 6",
        ),
        (
            {name: torch.tensor([-1, 2])},
            ops.ArgumentError,
            f"{name} must be between 0 and .*, got -1",
        ),
        (
            {name: torch.tensor([4])},
            ops.ArgumentError,
            rf"{name} must have shape \[2\], one length",
        ),
        (
            {name: torch.ones(2)},
            ops.ArgumentTypeError,
            f"{name} must have an integer dtype, got flo",
        ),
        ({name: [4, 4]}, ops.ArgumentTypeError, f"{name} must be a torch.Tensor, got list"),
    )


def check_bad_input(op, names, device, change, error, text):
    """The op refuses good arguments with this change."""
    values = {names[0]: torch.ones(2, 5, 3), names[1]: torch.ones(2, 5, 3)}
    values |= {names[key] if isinstance(key, int) else key: one for key, one in change.items()}
    for name, value in values.items():
        values[name] = value.to(device) if isinstance(value, torch.Tensor) else value
    with pytest.raises(error, match=text.replace("{0}", names[0]).replace("{1}", names[1])):
        op(**values)
