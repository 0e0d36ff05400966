"""Nearest neighbours, forward + backward, against tensor code, its compile and SciPy's tree."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import ops
from benchmarks.common import COMPILED, Kernel, devices
from benchmarks.losses import clouds

TITLE = "Nearest neighbours"
MODULE = sys.modules[__name__]
OF_CLOUDS, OF_A_CODEBOOK = 8, 1  # neighbours
CLOUDS = tuple((1, points, points, 3) for points in (1024, 2048, 4096, 8192, 16384))
# A codebook of 1024 vectors, as for vector quantisation.
CODES = ((1, 8192, 1024, 8), (1, 8192, 1024, 64), (1, 8192, 1024, 256), (1, 2048, 1024, 1024))


def neighbours_of(columns: int) -> int:
    return OF_CLOUDS if columns == 3 else OF_A_CODEBOOK


class Eager(nn.Module):
    """The search as one writes it, with the whole tensor of distances."""

    mode = "donot_use_mm_for_euclid_dist"  # a matrix product would lose the digits of near points

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        d = torch.cdist(x.detach(), y.detach(), compute_mode=self.mode)
        k = neighbours_of(x.shape[2])
        idx = d.argmin(2, keepdim=True) if k == 1 else d.topk(k, 2, largest=False).indices
        return (x[:, :, None] - clouds.gathered(y, idx)).square().sum()


class Product(Eager):
    mode = "use_mm_for_euclid_dist"


def products() -> dict[str, Callable[..., Tensor]]:
    return {"eager, by a product": Product()}


def ours() -> Callable[..., Tensor]:
    return lambda x, y: ops.knn_points(x, y, K=neighbours_of(x.shape[2])).dists.sum()


def by_tree(x: Tensor, y: Tensor) -> Tensor:
    idx = clouds.tree_neighbours(x, y, neighbours_of(x.shape[2]))
    return (x[:, :, None] - clouds.gathered(y, idx)).square().sum()


def peers(shape: clouds.Shape) -> dict[str, Callable[..., Tensor]]:
    here = shape[3] == 3 and importlib.util.find_spec("scipy")
    return {"cKDTree": by_tree} if here else {}


def run() -> dict:
    found = {}
    for device in devices():
        points = clouds.speed(MODULE, f"{TITLE}, K = {OF_CLOUDS}", CLOUDS, device)
        found[COMPILED[device]] = {
            "clouds": points,
            "codes": clouds.speed(MODULE, f"{TITLE}, K = {OF_A_CODEBOOK}", CODES, device),
            "exponent": clouds.exponent(points, TITLE),
            "memory": clouds.memory(MODULE, TITLE, CODES[1], device),
        }
    return found


def kernels(device: str, dtype: torch.dtype) -> Iterator[Kernel]:
    """Both passes, of points in space and of a codebook."""
    for shape, k in ((CLOUDS[-1], 1), (CLOUDS[-1], OF_CLOUDS), (CODES[2], 1)):
        x, y = (t.detach().to(dtype) for t in clouds.inputs(shape, device))
        forward = torch.ops.jitops.knn_points_forward.default
        arguments = (x, y, None, None, k, 2, False)
        moves = x.nbytes + y.nbytes
        product = ((shape[1], shape[3], shape[2]),) * 2
        yield Kernel(f"neighbours, K = {k}, forward", shape, forward, arguments, moves, product)
        dists, idx, _, idx_back = forward(*arguments)
        backward = torch.ops.jitops.knn_points_backward.default
        call = (torch.ones_like(dists), None, x, y, None, None, idx, idx_back, 2, True, True)
        yield Kernel(
            f"neighbours, K = {k}, backward", shape, backward, call, 2 * moves + idx.nbytes
        )
