"""The Chamfer distance of point clouds, without the matrix of distances."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from ops._core import autograd, checks, neighbours
from ops._core.modules import LossModule
from ops._errors import ArgumentError
from ops.losses import knn_points

__all__ = ["ChamferDistance", "chamfer_distance"]

BatchReduction = Literal["mean", "sum"]
PointReduction = Literal["mean", "sum", "max"]
Loss = Tensor | tuple[Tensor, Tensor]


def chamfer_distance(
    x: Tensor,
    y: Tensor,
    x_lengths: Tensor | None = None,
    y_lengths: Tensor | None = None,
    x_normals: Tensor | None = None,
    y_normals: Tensor | None = None,
    weights: Tensor | None = None,
    batch_reduction: BatchReduction | None = "mean",
    point_reduction: PointReduction | None = "mean",
    norm: int = 2,
    single_directional: bool = False,
    abs_cosine: bool = True,
    return_indices: bool = False,
) -> tuple[Any, ...]:
    """The distance from each point of a cloud to the nearest of another one, in both directions.

    .. math::

        ℓ_b = 1/N Σᵢ min_j d(xᵢ, yⱼ) + 1/M Σ_j min_i d(xᵢ, yⱼ)
        d(x, y) = Σ_k |x_k − y_k|^norm

    From H. Fan, H. Su, L. Guibas, "A Point Set Generation Network for 3D Object Reconstruction from
    a Single Image", CVPR 2017. Arguments and results are those of
    ``pytorch3d.loss.chamfer_distance``.

    Args:
        x: B clouds, ``(B, N, D)``, floating point, any strides.
        y: B clouds, ``(B, M, D)``, like ``x``.
        x_lengths: ``(B,)``, integers from 0 to N: only the first points of each cloud count. The
            others are padding with any content. By default all count.
        y_lengths: likewise for ``y``, from 0 to M.
        x_normals: the normals of the points, ``(B, N, C)``, like ``x``. Either both clouds have
            normals or neither has.
        y_normals: ``(B, M, C)``.
        weights: ``(B,)``, a factor for each cloud, not negative. The mean divides by their sum.
        batch_reduction: ``mean`` over the clouds, ``sum``, or ``None``.
        point_reduction: ``mean`` over the points of a cloud, ``sum``, or ``max``, which is the
            Hausdorff distance. With ``None``, which requires ``batch_reduction=None``, the losses
            of all points.
        norm: 2 for squared Euclidean distances, 1 for sums of absolute differences.
        single_directional: whether to leave out the distances from points of ``y``.
        abs_cosine: whether normals that point in opposite directions are alike.
        return_indices: whether to return the nearest points too.

    Returns:
        The pair ``(loss, loss_normals)``. ``loss`` is a scalar; without ``batch_reduction``
        ``(B,)``; without ``point_reduction`` a pair of ``(B, N)`` and ``(B, M)``, or the first of
        them with ``single_directional``; in the dtype of ``x``. ``loss_normals`` is the same for
        1 − cos of the angle of the normals of matched points, or ``None`` without normals. With
        ``return_indices`` two more follow: for each point of ``x`` the index of the nearest one in
        ``y``, ``(B, N)``, int64, and the reverse, ``(B, M)``, or ``None`` with
        ``single_directional``.
        Padding and the points opposite an empty cloud have the loss 0 and the index 0. An empty
        batch, and weights that are all 0, have the loss 0.

    Raises:
        ArgumentTypeError: inputs that are not tensors of one dtype among float64, float32, bfloat16
            and float16; lengths that are not tensors of integers; a norm that is no integer.
        ArgumentError: shapes that do not fit together, different devices, lengths below 0 or beyond
            the tensor, another norm, an unknown reduction, ``batch_reduction`` without
            ``point_reduction``, normals of one cloud alone or with ``max``, or negative weights.
        BackendUnavailableError: the requested back end cannot run.

    Gradients:
        For clouds, normals and weights, of any order, with the matches held fixed. With norm 1 the
        gradient is 0 where coordinates are equal. Forward mode and :mod:`torch.func` run on the
        pure-torch path.

    Numerics:
        Distances are sums of differences, so close points far from the origin keep their precision.
        Of equal distances the lowest index is taken. A NaN distance counts as infinite: a point
        with NaN matches no other point, and its own distance is NaN. Half precisions compute in
        float32. Compiled kernels are bitwise deterministic for any number of threads. Under
        autocast the inputs are cast to float32.

    Memory:
        The N × M distances are never stored. Compiled back ends take memory for a copy of the
        points.

    Note:
        The values of weights are not checked inside :func:`torch.compile` and :mod:`torch.func`.
    """
    x, y = neighbours.clouds(x=x, y=y)
    lengths = (
        neighbours.lengths("x_lengths", x_lengths, x),
        neighbours.lengths("y_lengths", y_lengths, y),
    )
    normals = _normals(x, y, x_normals, y_normals)
    factors = _weights(weights, x)
    if batch_reduction is not None:
        checks.one_of("batch_reduction", batch_reduction, ("mean", "sum"), " or None")
    if point_reduction is not None:
        checks.one_of("point_reduction", point_reduction, ("mean", "sum", "max"), " or None")
    elif batch_reduction is not None:
        raise ArgumentError(
            f"batch_reduction must be None without point_reduction, got {batch_reduction!r}"
        )
    if normals is not None and point_reduction == "max":
        raise ArgumentError("point_reduction must not be max with normals, got 'max'")
    number = neighbours.norm(norm)
    dists, idx, dists_back, idx_back = knn_points.fused(
        x, y, *lengths, 1, number, not single_directional
    )
    directions = [(dists, idx, 0), (dists_back, idx_back, 1)][: 1 if single_directional else 2]
    clouds = (x, y)
    losses, of_normals = [], []
    for distances, matched, side in directions:
        own, other = lengths[side], lengths[1 - side]
        losses.append(_of_points(distances[..., 0], own, point_reduction, factors))
        if normals is not None:
            within = neighbours.real(matched, own, other, clouds[1 - side].shape[1])
            near = neighbours.gathered(normals[1 - side], matched, within)[:, :, 0]
            mine = normals[side]
            if within is not None:  # NaN in padding would make NaN of its gradient
                mine = torch.where(within, mine, 0.0)
            unlike = _unlike(mine, near, abs_cosine)
            if within is not None:
                unlike = torch.where(within[..., 0], unlike, 0.0)
            of_normals.append(_of_points(unlike, own, point_reduction, factors))
    loss = _reduced(losses, factors, point_reduction, batch_reduction, x.dtype)
    loss_normals = (
        _reduced(of_normals, factors, point_reduction, batch_reduction, x.dtype)
        if of_normals
        else None
    )
    if not return_indices:
        return loss, loss_normals
    return loss, loss_normals, idx[..., 0], None if single_directional else idx_back[..., 0]


class ChamferDistance(LossModule):
    """:func:`chamfer_distance` as a module, with its parameters set once.

    Args:
        batch_reduction, point_reduction, norm, single_directional, abs_cosine, return_indices: see
            :func:`chamfer_distance`.
    """

    function = staticmethod(chamfer_distance)

    def __init__(
        self,
        batch_reduction: BatchReduction | None = "mean",
        point_reduction: PointReduction | None = "mean",
        norm: int = 2,
        single_directional: bool = False,
        abs_cosine: bool = True,
        return_indices: bool = False,
    ) -> None:
        super().__init__(
            batch_reduction=batch_reduction,
            point_reduction=point_reduction,
            single_directional=single_directional,
            abs_cosine=abs_cosine,
            return_indices=return_indices,
        )
        self.norm = neighbours.norm(norm)

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        x_lengths: Tensor | None = None,
        y_lengths: Tensor | None = None,
        x_normals: Tensor | None = None,
        y_normals: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> tuple[Any, ...]:
        """The result of :func:`chamfer_distance` for these clouds."""
        result: tuple[Any, ...] = self.loss(
            x,
            y,
            x_lengths=x_lengths,
            y_lengths=y_lengths,
            x_normals=x_normals,
            y_normals=y_normals,
            weights=weights,
            norm=self.norm,
        )
        return result

    def extra_repr(self) -> str:
        """The parameters, for ``print(module)``."""
        return f"{super().extra_repr()}, norm={self.norm}"


# ---- arguments -----------------------------------------------------------------------------------


def _normals(x: Tensor, y: Tensor, x_normals: Any, y_normals: Any) -> tuple[Tensor, Tensor] | None:
    if x_normals is None and y_normals is None:
        return None
    for name, value, other in (
        ("x_normals", x_normals, "y_normals"),
        ("y_normals", y_normals, "x_normals"),
    ):
        if value is None:
            raise ArgumentError(f"{name} must be given with {other}, got None")
    normals = neighbours.clouds(x_normals=x_normals, y_normals=y_normals)
    for name, value, of, points in zip(
        ("x_normals", "y_normals"), normals, ("x", "y"), (x, y), strict=True
    ):
        if value.shape[:2] != points.shape[:2]:
            raise ArgumentError(
                f"{name} must have shape [{points.shape[0]}, {points.shape[1]}, C], one normal for "
                f"each point, got {list(value.shape)}"
            )
        checks.same_kind(**{of: points, name: value})
    first, second = (checks.widened(one) for one in normals)
    return first, second


def _weights(weights: Any, x: Tensor) -> Tensor | None:
    if weights is None:
        return None
    weights = checks.widened_under_autocast({"weights": weights})["weights"]
    checks.same_kind(x=x, weights=weights)
    if weights.shape != x.shape[:1]:
        raise ArgumentError(
            f"weights must have shape [{x.shape[0]}], one for each cloud, got {list(weights.shape)}"
        )
    looks = not (torch.compiler.is_compiling() or autograd.needs_torch_path() or weights.is_meta)
    if looks and bool((weights < 0).any()):
        raise ArgumentError(f"weights must not be negative, got {weights.min().item()}")
    wide: Tensor = checks.widened(weights)
    return wide


# ---- the reductions ------------------------------------------------------------------------------


def _unlike(normals: Tensor, near: Tensor, abs_cosine: bool) -> Tensor:
    cosine = torch.nn.functional.cosine_similarity(normals, near, dim=2, eps=1e-6)
    return 1 - (cosine.abs() if abs_cosine else cosine)


def _of_points(
    loss: Tensor, lengths: Tensor | None, reduction: PointReduction | None, weights: Tensor | None
) -> Tensor:
    """The losses of all points, those of padding being 0, or their reduction."""
    if weights is not None:
        loss = loss * weights[:, None]
    if reduction is None:
        return loss
    if reduction == "max" and loss.shape[1] > 0:
        return loss.max(1).values
    total = loss.sum(1)
    if reduction != "mean":
        return total
    return total / (max(1, loss.shape[1]) if lengths is None else lengths.clamp(min=1))


def _reduced(
    losses: list[Tensor],
    weights: Tensor | None,
    point_reduction: PointReduction | None,
    batch_reduction: BatchReduction | None,
    dtype: torch.dtype,
) -> Loss:
    """The loss of one or both directions."""
    if point_reduction is None:
        rounded = tuple(loss.to(dtype) for loss in losses)
        return rounded[0] if len(rounded) == 1 else (rounded[0], rounded[1])
    loss = losses[0]
    if len(losses) == 2:
        loss = torch.maximum(*losses) if point_reduction == "max" else losses[0] + losses[1]
    if batch_reduction is not None:
        count = loss.shape[0]
        loss = loss.sum()
        if batch_reduction == "mean" and weights is None:
            loss = loss / max(1, count)
        elif batch_reduction == "mean" and weights is not None:
            total = weights.sum()
            loss = loss / torch.where(total == 0, 1.0, total)
    return loss.to(dtype)


def samples() -> Iterator[checks.Sample]:
    """Where ``jitops check`` checks the gradients."""
    for norm in (1, 2):
        loss = ChamferDistance(norm=norm)

        def distance(x: Tensor, y: Tensor, loss: ChamferDistance = loss) -> Tensor:
            value: Tensor = loss(x, y)[0]
            return value

        yield f"norm={norm}", distance, (torch.randn(2, 3, 3), torch.randn(2, 4, 3))
