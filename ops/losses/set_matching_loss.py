"""Set matching: the loss of the best assignment of predictions to targets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ops._core import checks, dtensors
from ops._errors import ArgumentError, ArgumentTypeError
from ops.arrays.conversions import require
from ops.arrays.from_numpy import from_numpy

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

__all__ = ["SetMatching", "SetMatchingLoss", "set_matching_loss"]


class SetMatching(NamedTuple):
    """The result of :func:`set_matching_loss`: the loss and the matched pairs.

    The pairs are ordered by image, then by prediction. ``predicted[m.image, m.prediction]`` are the
    matched predictions, in the order of their targets ``m.target``.
    """

    loss: Tensor
    image: Tensor
    prediction: Tensor
    target: Tensor


def set_matching_loss(
    cost: Tensor | list[Tensor] | tuple[Tensor, ...],
    sizes: Sequence[int] | Tensor | None = None,
    reduction: checks.Reduction = "mean",
) -> SetMatching:
    """Match predictions with targets at the least cost, and return that cost.

    .. math::

        ℓ = Σ_b Σ_j C_b[σ_b(j), j]
        σ_b = argmin Σ_j C_b[σ(j), j] over all σ

    C_b[i, j] is the cost of matching prediction i of image b with its target j. An assignment σ
    gives each target a prediction of its own. With fewer predictions than targets, it gives each
    prediction a target of its own.

    The matching is that of N. Carion, F. Massa, G. Synnaeve, N. Usunier, A. Kirillov,
    S. Zagoruyko, "End-to-End Object Detection with Transformers" (DETR), ECCV 2020, after
    H. W. Kuhn, "The Hungarian Method for the Assignment Problem", 1955. It is computed by
    :func:`scipy.optimize.linear_sum_assignment` on the CPU.

    Args:
        cost: the cost of matching each of N predictions with each of M targets, ``(B, N, M)``. Or
            a list or tuple of B matrices ``(N, M)``, each with its own N and M.
        sizes: the number of targets of each of the B images. Only the first ``sizes[b]`` columns
            of image b count; the others are padding with any content. By default all count.
        reduction: ``mean`` over all pairs of the batch, ``sum``, or ``none``.

    Returns:
        A :class:`SetMatching` of P pairs. ``loss`` is a scalar, or with ``reduction="none"`` the
        cost of each pair, ``(P,)``. ``image``, ``prediction`` and ``target`` are the pairs,
        ``(P,)`` each, int64. Without any pair the mean is 0, because training data may well
        have batches without targets.

    Raises:
        ArgumentTypeError: ``cost`` is not a floating tensor, its tensors differ in dtype, or
            ``sizes`` are not integers.
        ArgumentError: a wrong shape, sizes out of range, tensors on several devices, NaN or
            negative infinity among the costs, or so many infinities that no assignment is left.
        DependencyError: SciPy is not installed (the extra ``scipy``).

    Gradients:
        For ``cost``, of any order: 1 (or ``1/P`` for the mean) at each pair, 0 elsewhere. If
        several assignments have the least cost, this is a subgradient. Forward mode and
        :mod:`torch.func` work; :func:`~torch.func.vmap` needs matrices of one size.

    Note:
        dtypes float64, float32, bfloat16 and float16. Half precisions are summed in float32.
        Deterministic. The matrices of a batch reach the CPU in one copy.
    """
    number = checks.check_reduction(reduction)
    matrices = _matrices(cost, sizes)
    if not matrices:  # an empty batch is cut from cost, so that cost has a gradient of zeros
        flat = cost.reshape(-1)[:0] if isinstance(cost, Tensor) else torch.zeros(0, device="cpu")
    else:
        flat = torch.cat([matrix.reshape(-1) for matrix in matrices])
    shapes = [tuple(matrix.shape) for matrix in matrices]
    image, prediction, target, place = _pairs(flat.detach(), shapes=shapes)
    costs = flat[place]
    loss = costs if number == 0 else checks.widened(costs).sum()
    if number == 1:
        loss = loss / max(1, len(place))
    return SetMatching(loss.to(costs.dtype), image, prediction, target)


class SetMatchingLoss(nn.Module):
    """:func:`set_matching_loss` as a module, with its reduction set once.

    Args:
        reduction: see :func:`set_matching_loss`.
    """

    def __init__(self, reduction: checks.Reduction = "mean") -> None:
        super().__init__()
        self.reduction = checks.one_of("reduction", reduction, checks.REDUCTIONS)

    def forward(
        self,
        cost: Tensor | list[Tensor] | tuple[Tensor, ...],
        sizes: Sequence[int] | Tensor | None = None,
    ) -> SetMatching:
        """The loss and the pairs of ``(B, N, M)`` costs."""
        return set_matching_loss(cost, sizes, self.reduction)

    def extra_repr(self) -> str:
        """The parameters, for ``print(module)``."""
        return f"reduction={self.reduction!r}"


def samples() -> Iterator[checks.Sample]:
    """The inputs at which ``jitops check`` checks the gradients."""
    for reduction in checks.REDUCTIONS:
        loss = SetMatchingLoss(reduction)
        yield f"reduction={reduction!r}", loss, (torch.randn(2, 4, 3), [3, 2])


# ---- a matrix for each image ---------------------------------------------------------------------


def _matrices(
    cost: Tensor | list[Tensor] | tuple[Tensor, ...], sizes: Sequence[int] | Tensor | None
) -> list[Tensor]:
    if isinstance(cost, Tensor):
        tensors = checks.widened_under_autocast({"cost": cost})
        checks.same_kind(**tensors)
        if cost.dim() != 3:
            raise ArgumentError(f"cost must have shape (B, N, M), got {list(cost.shape)}")
        matrices = list(tensors["cost"])
    elif isinstance(cost, (list, tuple)):
        tensors = {f"cost[{place}]": one for place, one in enumerate(cost)}
        tensors = checks.widened_under_autocast(tensors)
        if tensors:
            checks.same_kind(**tensors)
        matrices = list(tensors.values())
        for name, one in tensors.items():
            if one.dim() != 2:
                raise ArgumentError(f"{name} must have shape (N, M), got {list(one.shape)}")
    else:
        raise ArgumentTypeError(
            f"cost must be a torch.Tensor or a list of them, got {type(cost).__name__}"
        )
    if sizes is None:
        return matrices
    counts = _counts(sizes)
    if len(counts) != len(matrices):
        raise ArgumentError(
            f"sizes must have an entry for each of the {len(matrices)} images, got {len(counts)}"
        )
    for place, (count, one) in enumerate(zip(counts, matrices, strict=True)):
        if not 0 <= count <= one.shape[1]:
            raise ArgumentError(
                f"sizes[{place}] must be between 0 and the {one.shape[1]} columns of its matrix, "
                f"got {count}"
            )
    return [one[:, :count] for one, count in zip(matrices, counts, strict=True)]


def _counts(sizes: Any) -> list[int]:
    if isinstance(sizes, Tensor):
        dtensors.refuse("sizes", sizes)
        checks.dense("sizes", sizes)
        if (
            sizes.dim() != 1
            or sizes.is_floating_point()
            or sizes.is_complex()
            or (sizes.dtype is torch.bool)
        ):
            raise ArgumentTypeError(
                f"sizes must be integers in one dimension, got {sizes.dtype} of shape "
                f"{list(sizes.shape)} (the loss takes costs and sizes, not predictions and "
                f"targets: compute the cost of each match first)"
            )
        return list(sizes.tolist())
    if not isinstance(sizes, Sequence) and getattr(sizes, "ndim", 0) != 1:  # an array
        raise ArgumentTypeError(
            f"sizes must be a list of ints or a tensor of them, got {type(sizes).__name__}"
        )
    return [checks.check_int(f"sizes[{place}]", count) for place, count in enumerate(sizes)]


# ---- SciPy ---------------------------------------------------------------------------------------


def _assign(flat: Array, shapes: Sequence[tuple[int, int]]) -> tuple[Array, ...]:
    """The image, prediction and target of each pair, and the index of its cost in ``flat``."""
    import numpy as np

    assign = require("scipy.optimize", "set_matching_loss").linear_sum_assignment
    parts, start = [np.zeros((4, 0), np.int64)], 0
    for image, (rows, columns) in enumerate(shapes):
        matrix = flat[start : start + rows * columns].reshape(rows, columns)
        if np.isnan(matrix).any() or np.isneginf(matrix).any():
            raise ArgumentError(
                f"cost of image {image} must be free of nan and -inf, got one among its "
                f"{rows} x {columns} entries"
            )
        try:
            row, column = assign(matrix)
        except ValueError as error:  # "cost matrix is infeasible"
            raise ArgumentError(
                f"cost of image {image} must leave an assignment of finite cost, got {error}"
            ) from None
        parts.append(
            np.stack([np.full_like(row, image), row, column, start + row * columns + column])
        )
        start += rows * columns
    return tuple(np.concatenate(parts, axis=1))


_pairs = from_numpy(_assign, name="set_matching_loss")
