"""The nearest neighbours of points, without the matrix of distances."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ops._core import checks, neighbours
from ops._core.fused import FusedOp
from ops._errors import ArgumentError

__all__ = ["KNN", "knn_points"]

MOST = 32  # neighbours of a point


class KNN(NamedTuple):
    """The result of :func:`knn_points`: distances, indices and, if requested, the points."""

    dists: Tensor
    idx: Tensor
    knn: Tensor | None


def knn_points(
    p1: Tensor,
    p2: Tensor,
    lengths1: Tensor | None = None,
    lengths2: Tensor | None = None,
    norm: int = 2,
    K: int = 1,  # noqa: N803 - as in pytorch3d
    return_nn: bool = False,
    return_sorted: bool = True,
) -> KNN:
    """The K nearest points of a cloud for each point of another cloud.

    .. math::

        d(p, q) = Σ_k |p_k − q_k|^norm

    This is the search beneath the Chamfer distance, interpolation on point clouds, and the codebook
    of vector quantisation. Arguments and results are those of ``pytorch3d.ops.knn_points``.

    Args:
        p1: the points that have neighbours, ``(B, N, D)``, floating point, any strides.
        p2: the points that are neighbours, ``(B, M, D)``, like ``p1``.
        lengths1: ``(B,)``, integers from 0 to N: only the first points of each cloud count. The
            others are padding with any content. By default all count.
        lengths2: likewise for ``p2``, from 0 to M.
        norm: 2 for squared Euclidean distances, 1 for sums of absolute differences.
        K: the number of neighbours, from 1 to 32.
        return_nn: whether to return the neighbours themselves too.
        return_sorted: whether the nearest neighbour must come first, which it always does.

    Returns:
        A :class:`KNN`. ``dists`` are the distances, ``(B, N, K)``, in the dtype of the inputs, and
        ``idx`` the indices in ``p2``, ``(B, N, K)``, int64. ``knn`` are the neighbours,
        ``(B, N, K, D)``, or ``None``. All three are 0 where a cloud has fewer than K points, and
        for points beyond ``lengths1``.

    Raises:
        ArgumentTypeError: inputs that are not tensors of float64, float32, bfloat16 or float16;
            lengths that are not tensors of integers; a norm or K that is no integer.
        ArgumentError: shapes that do not fit together, different devices, lengths below 0 or beyond
            the tensor, another norm, or K out of range.
        BackendUnavailableError: the requested back end cannot run.

    Gradients:
        For ``p1`` and ``p2``, of any order, with the neighbours held fixed. ``idx`` has none. With
        norm 1 the gradient is 0 where coordinates are equal. Forward mode and :mod:`torch.func` run
        on the pure-torch path.

    Numerics:
        Distances are sums of differences, so close points far from the origin keep their precision.
        The neighbours are exact up to the rounding of their distances. Of equal distances the
        lowest index comes first. A NaN distance counts as infinite: a point with NaN is nobody's
        neighbour while there are K others. Half precisions compute in float32. Compiled kernels are
        bitwise deterministic for any number of threads. Under autocast the inputs are cast to
        float32.

    Memory:
        The N × M distances are never stored. Compiled back ends take memory for a copy of the
        points, and O(N K).
    """
    p1, p2 = neighbours.clouds(p1=p1, p2=p2)
    lengths1 = neighbours.lengths("lengths1", lengths1, p1)
    lengths2 = neighbours.lengths("lengths2", lengths2, p2)
    count = checks.check_count("K", K)
    if count > MOST:
        raise ArgumentError(f"K must be at most {MOST}, got {count}")
    dists, idx, _, _ = fused(p1, p2, lengths1, lengths2, count, neighbours.norm(norm), False)
    knn = None
    if return_nn:
        within = neighbours.real(idx, lengths1, lengths2, p2.shape[1])
        knn = neighbours.gathered(p2, idx, within)
    return KNN(dists.to(p1.dtype), idx, knn)


def _definition(
    p1: Tensor,
    p2: Tensor,
    lengths1: Tensor | None,
    lengths2: Tensor | None,
    k: int,
    norm: int,
    both: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The pure-torch path: distances and neighbours of p1, and of p2 too if ``both``."""
    x, y = checks.widened(p1), checks.widened(p2)
    idx = neighbours.nearest(p1, p2, lengths1, lengths2, k, norm)
    within = neighbours.real(idx, lengths1, lengths2, p2.shape[1])
    dists = neighbours.distances(x, y, idx, within, norm)
    if not both:
        return dists, idx, dists.new_empty(0), idx.new_empty(0)
    idx_back = neighbours.nearest(p2, p1, lengths2, lengths1, k, norm)
    within = neighbours.real(idx_back, lengths2, lengths1, p1.shape[1])
    return dists, idx, neighbours.distances(y, x, idx_back, within, norm), idx_back


def _shapes(
    p1: Tensor, p2: Tensor, lengths1: Any, lengths2: Any, k: int, norm: int, both: bool
) -> tuple[Tensor, ...]:
    wide = checks.widened(p1).dtype
    shapes = ((*p1.shape[:2], k), (*p2.shape[:2], k) if both else (0,))
    return tuple(
        p1.new_empty(shape, dtype=dtype) for shape in shapes for dtype in (wide, torch.int64)
    )


# Distances are float32 for half precisions, because losses sum them up.
fused = FusedOp(
    "knn_points",
    _definition,
    results=["dists", "idx", "dists_back", "idx_back"],
    backward=["p1", "p2", "lengths1", "lengths2", "idx", "idx_back", "norm"],
    constants=["lengths1", "lengths2", "idx", "idx_back"],
    shapes=_shapes,
)


def samples() -> Iterator[checks.Sample]:
    """Where ``jitops check`` checks the gradients."""
    for norm in (1, 2):

        def dists(p1: Tensor, p2: Tensor, norm: int = norm) -> Tensor:
            return knn_points(p1, p2, norm=norm, K=3).dists

        yield f"norm={norm}", dists, (torch.randn(2, 5, 3), torch.randn(2, 6, 3))
