"""The Chamfer distance, forward + backward, against tensor code, its compile and SciPy's tree."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

import ops
from benchmarks.common import COMPILED, devices
from benchmarks.losses import clouds

TITLE = "Chamfer distance"
MODULE = sys.modules[__name__]
BATCHES = tuple((8, points, points, 3) for points in (256, 512, 1024, 2048, 4096))
CLOUDS = tuple((1, points, points, 3) for points in (6_250, 12_500, 25_000, 50_000, 100_000))


class Eager(nn.Module):
    """The loss as one writes it, with the whole tensor of distances."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        # Without a matrix product, which would lose the digits of near points.
        d = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
        return d.amin(2).square().mean() + d.amin(1).square().mean()


def products() -> dict[str, Callable[..., Tensor]]:
    return {}


def ours() -> Callable[..., Tensor]:
    return lambda x, y: ops.chamfer_distance(x, y)[0]


def by_tree(x: Tensor, y: Tensor) -> Tensor:
    losses = [
        (one - clouds.gathered(other, clouds.tree_neighbours(one, other, 1))[:, :, 0])
        .square()
        .sum(2)
        .mean()
        for one, other in ((x, y), (y, x))
    ]
    return losses[0] + losses[1]


def peers(shape: clouds.Shape) -> dict[str, Callable[..., Tensor]]:
    return {"cKDTree": by_tree} if importlib.util.find_spec("scipy") else {}


def run() -> dict:
    found = {}
    for device in devices():
        batches = clouds.speed(MODULE, TITLE, BATCHES, device)
        large = clouds.speed(MODULE, TITLE, CLOUDS, device)
        found[COMPILED[device]] = {
            "batches": batches,
            "large": large,
            "exponents": [clouds.exponent(one, TITLE) for one in (batches, large)],
            "memory": clouds.memory(MODULE, TITLE, BATCHES[-1], device),
        }
    return found
