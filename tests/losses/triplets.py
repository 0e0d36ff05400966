"""Shared by the tests of the losses of triplets: inputs, distances, and bad arguments."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import ops


def labels_of(x):
    """Three of a class, and an anchor without a positive where the count is not a multiple."""
    count = 2 if x.is_nested else x.shape[0]
    return torch.arange(count, device=x.device) // 3


def inputs(count):
    def make(shape, dtype, device):
        rows = [shape, (shape[0] + 5, *shape[1:])][:count]
        return [torch.randn(one, dtype=torch.float64, device=device).to(dtype) for one in rows]

    return make


def distances(x, y, distance):
    """The matrix of distances, and which pairs are positives and which are negatives."""
    labels, others = labels_of(x), labels_of(x if y is None else y)
    if distance == "cosine":
        x, y = F.normalize(x, dim=1), y if y is None else F.normalize(y, dim=1)
    squared = (x[:, None] - (x if y is None else y)[None]).square().sum(-1)
    away = squared != 0
    d = {
        "euclidean": torch.where(away, torch.where(away, squared, 1.0).sqrt(), 0.0),
        "squared_euclidean": squared,
        "cosine": squared / 2,
    }[distance]
    different = labels[:, None] != others[None]
    same = ~different
    if y is None:
        same = same & ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    return d, same, different


def check_bad_input(loss, device, change, error, text):
    """The loss refuses good arguments with this change."""
    good = {"embeddings": torch.ones(4, 2), "labels": torch.tensor([0, 0, 1, 1])}
    values = {**good, **change}
    for name, value in values.items():
        values[name] = value.to(device) if isinstance(value, torch.Tensor) else value
    with pytest.raises(error, match=text):
        loss(**values)


# A change of good arguments, the error, and its words.
BAD_INPUT = (
    (
        {"embeddings": [[0.0]]},
        ops.ArgumentTypeError,
        "embeddings must be a torch.Tensor, got l",
    ),
    (
        {"embeddings": torch.ones(4)},
        ops.ArgumentError,
        r"embeddings must have shape \(rows, D\), got \[4\]",
    ),
    (
        {"embeddings": torch.ones(4, 2, dtype=torch.int64)},
        ops.ArgumentTypeError,
        "embeddings must have dtype float64, .*, got int64",
    ),
    (
        {"labels": [0, 0, 1, 1]},
        ops.ArgumentTypeError,
        "labels must be a torch.Tensor, got list",
    ),
    (
        {"labels": torch.zeros(4)},
        ops.ArgumentTypeError,
        "labels must have an integer dtype, got float32",
    ),
    (
        {"labels": torch.zeros(3, dtype=torch.int64)},
        ops.ArgumentError,
        r"labels must have shape \[4\], one label for each row, got \[3\]",
    ),
    ({"margin": float("nan")}, ops.ArgumentError, "margin must be a number, got nan"),
    ({"margin": None}, ops.ArgumentTypeError, "margin must be a real number, got NoneType"),
    ({"distance": "l2"}, ops.ArgumentError, "distance must be one of euclidean, .*, got 'l2'"),
    (
        {"ref_emb": torch.ones(3, 2)},
        ops.ArgumentError,
        "ref_labels must be given with ref_emb, got None",
    ),
    (
        {"ref_labels": torch.zeros(3, dtype=torch.int64)},
        ops.ArgumentError,
        "ref_emb must be given with ref_labels, got None",
    ),
    (
        {"ref_emb": torch.ones(3, 5), "ref_labels": torch.zeros(3, dtype=torch.int64)},
        ops.ArgumentError,
        "ref_emb must have as many columns as embeddings, 2, got 5",
    ),
    (
        {"ref_emb": torch.ones(3, 2).double(), "ref_labels": torch.zeros(3, dtype=torch.int64)},
        ops.ArgumentTypeError,
        "ref_emb must have embeddings's dtype float32, got float64",
    ),
)
