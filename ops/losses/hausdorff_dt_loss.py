"""The Hausdorff distance-transform loss for segmentation.

:func:`scipy.ndimage.distance_transform_edt` computes the distances on the CPU. The rest is tensor
code on the device of the inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ops._core import autograd, checks, dtensors
from ops._errors import ArgumentError, ArgumentTypeError
from ops.arrays.conversions import require
from ops.arrays.from_numpy import from_numpy

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

__all__ = ["HausdorffDTLoss", "hausdorff_dt_loss"]


def hausdorff_dt_loss(
    input: Tensor,
    target: Tensor,
    alpha: float = 2.0,
    include_background: bool = False,
    to_onehot_y: bool = False,
    sigmoid: bool = False,
    softmax: bool = False,
    batch: bool = False,
    spacing: Sequence[float] | None = None,
    reduction: checks.Reduction = "mean",
) -> Tensor:
    """The Hausdorff distance-transform loss for segmentation.

    .. math::

        ℓ = 1/|Ω| Σ_Ω (p − q)² (d_pᵅ + d_qᵅ)

    Ω are the pixels of one channel of one image, p their probabilities and q their targets. d_p is
    the Euclidean distance of a pixel to the border of the predicted object, p > 1/2. d_q is its
    distance to the border of the true object. A wrong pixel far from both borders weighs most, as
    it does in the Hausdorff distance.

    From D. Karimi, S. E. Salcudean, "Reducing the Hausdorff Distance in Medical Image Segmentation
    with Convolutional Neural Networks", IEEE Transactions on Medical Imaging 39(2), 2020
    (arXiv:1904.10030), equation 8. The arguments are those of MONAI's ``HausdorffDTLoss``.

    Args:
        input: ``(B, C, H, W)`` or ``(B, C, H, W, D)``: probabilities, or with ``sigmoid`` or
            ``softmax`` logits.
        target: same shape and dtype as ``input``. With ``to_onehot_y``: the class number of each
            pixel, ``(B, 1, H, W)`` or ``(B, 1, H, W, D)``, any dtype.
        alpha: power of the distances; at least 0.
        include_background: whether channel 0 counts. A single channel always counts.
        to_onehot_y: whether ``target`` holds class numbers. This and ``softmax`` need several
            channels. MONAI only warns, and ignores either, if there is one.
        sigmoid: whether to apply a sigmoid to ``input``.
        softmax: whether to apply a softmax over the channels to ``input``.
        batch: whether to average over pixels *and* batch before ``reduction``, which then reduces
            C values.
        spacing: size of a pixel along each dimension, in the unit of the distances; 1 by default.
        reduction: ``mean`` over the channels of all images, ``sum``, or ``none``.

    Returns:
        A scalar in the dtype of ``input``. With ``reduction="none"``: ``(B, C, 1, 1)``, or
        ``(1, C, 1, 1)`` with ``batch``, where C are the channels that count. Volumes have one
        more 1.

    Raises:
        ArgumentTypeError: inputs that are not floating tensors of one dtype; a parameter of a
            wrong type.
        ArgumentError: shapes that do not fit, different devices, class numbers out of range, both
            ``sigmoid`` and ``softmax``, an unknown reduction, a negative ``alpha``.
        DependencyError: SciPy is not installed (the extra ``scipy``).

    Gradients:
        For ``input`` and ``target``, of any order. The distances are constants, because they only
        change in jumps, when a pixel passes 1/2. Forward mode and :mod:`torch.func` work.

    Numerics:
        dtypes float64, float32, bfloat16 and float16. Half precisions compute in float32; under
        autocast they also return float32. A channel that is all object or all background has no
        border, so its distances are 0. (If all is object, SciPy and MONAI measure distances to a
        point outside the image.) Deterministic where torch's mean is.
    """
    input, target = _probabilities(input, target, to_onehot_y, sigmoid, softmax)
    alpha = checks.check_number("alpha", alpha)
    if alpha < 0:
        raise ArgumentError(f"alpha must be at least 0, got {alpha}")
    number = checks.check_reduction(reduction)
    dtype, pixels = input.dtype, tuple(range(2, input.dim()))
    if spacing is not None:
        if not isinstance(spacing, Iterable):
            raise ArgumentTypeError(
                f"spacing must be a list of numbers, one per dimension, got "
                f"{type(spacing).__name__}"
            )
        spacing = tuple(checks.check_number("each of spacing", size) for size in spacing)
        if len(spacing) != len(pixels) or not all(0 < size < float("inf") for size in spacing):
            raise ArgumentError(
                f"spacing must be {len(pixels)} positive sizes, one per dimension, got {spacing}"
            )
    if input.shape[1] > 1 and not include_background:
        input, target = input[:, 1:], target[:, 1:]
    input, target = checks.widened(input), checks.widened(target)
    to_border = sum(_distances(mask.detach(), spacing=spacing) ** alpha for mask in (input, target))
    loss = (input - target).square() * to_border
    loss = loss.mean((0, *pixels) if batch else pixels, keepdim=True)
    return autograd.reduce(loss, number).to(dtype)


class HausdorffDTLoss(nn.Module):
    """:func:`hausdorff_dt_loss` as a module, with its parameters set once.

    Args:
        alpha, include_background, to_onehot_y, sigmoid, softmax, batch, spacing, reduction: see
            :func:`hausdorff_dt_loss`.
    """

    def __init__(
        self,
        alpha: float = 2.0,
        include_background: bool = False,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        batch: bool = False,
        spacing: Sequence[float] | None = None,
        reduction: checks.Reduction = "mean",
    ) -> None:
        super().__init__()
        self.alpha = checks.check_number("alpha", alpha)
        self.include_background = include_background
        self.to_onehot_y = to_onehot_y
        self.sigmoid = sigmoid
        self.softmax = softmax
        self.batch = batch
        self.spacing = spacing
        self.reduction = checks.one_of("reduction", reduction, checks.REDUCTIONS)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of ``(B, C, H, W)`` or ``(B, C, H, W, D)`` inputs."""
        return hausdorff_dt_loss(
            input,
            target,
            self.alpha,
            self.include_background,
            self.to_onehot_y,
            self.sigmoid,
            self.softmax,
            self.batch,
            self.spacing,
            self.reduction,
        )

    def extra_repr(self) -> str:
        """The parameters, for ``print(module)``."""
        return (
            f"alpha={self.alpha}, include_background={self.include_background}, "
            f"to_onehot_y={self.to_onehot_y}, sigmoid={self.sigmoid}, softmax={self.softmax}, "
            f"batch={self.batch}, spacing={self.spacing}, reduction={self.reduction!r}"
        )


def samples() -> Iterator[checks.Sample]:
    """The inputs at which ``jitops check`` checks the gradients.

    No probability is near 1/2, because borders jump there.
    """
    for shape in ((2, 2, 4, 3), (1, 2, 3, 3, 2)):
        random = torch.rand(2, *shape)
        away = torch.where(random > 0.5, 0.55 + 0.4 * random, 0.05 + 0.8 * random)
        yield f"{len(shape) - 2}-D", HausdorffDTLoss(include_background=True), tuple(away)


# ---- probabilities of the same shape -------------------------------------------------------------


def _probabilities(
    input: Tensor, target: Tensor, to_onehot_y: bool, sigmoid: bool, softmax: bool
) -> tuple[Tensor, Tensor]:
    if sigmoid and softmax:
        raise ArgumentError("softmax must be false where sigmoid is true, got both")
    if to_onehot_y or softmax:
        checks.same_kind(input=input)
        input = checks.widened_under_autocast({"input": input})["input"]
        _shape(input)
        if input.shape[1] == 1:
            name, why = (
                ("softmax", "it makes every pixel 1")
                if softmax
                else ("to_onehot_y", "its only class number is 0")
            )
            raise ArgumentError(
                f"{name} must be false for a single channel, because {why}, got true"
            )
    if to_onehot_y:
        target = _one_hot(input, target)
    tensors = checks.widened_under_autocast({"input": input, "target": target})
    checks.same_kind(**tensors)
    input, target = tensors["input"], tensors["target"]
    _shape(input)
    if target.shape != input.shape:
        raise ArgumentError(
            f"target must have input's shape {list(input.shape)}, got {list(target.shape)}"
        )
    if sigmoid:
        return input.sigmoid(), target
    return (input.softmax(1) if softmax else input), target


def _shape(input: Tensor) -> None:
    if input.dim() not in (4, 5) or input.shape[1] == 0:
        raise ArgumentError(
            f"input must have shape (B, C, H, W) or (B, C, H, W, D), got {list(input.shape)}"
        )


def _one_hot(input: Tensor, target: Tensor) -> Tensor:
    dtensors.refuse("target", target)
    single = torch.Size((input.shape[0], 1, *input.shape[2:]))
    if not isinstance(target, Tensor) or target.shape != single or target.is_complex():
        got = list(target.shape) if isinstance(target, Tensor) else type(target).__name__
        raise ArgumentError(
            f"target must hold class numbers in shape {list(single)} with to_onehot_y, got {got}"
        )
    classes = torch.arange(input.shape[1], device=target.device).view(1, -1, *[1] * len(single[2:]))
    hot = target == classes
    if not torch.compiler.is_compiling() and not bool(hot.any(1).all()):
        raise ArgumentError(
            f"target must hold the class numbers 0 to {input.shape[1] - 1} with to_onehot_y, got "
            f"other values"
        )
    return hot.to(input.dtype)


# ---- SciPy ---------------------------------------------------------------------------------------


def _to_border(fields: Array, spacing: Sequence[float] | None) -> Array:
    import numpy as np

    transform = require("scipy.ndimage", "hausdorff_dt_loss").distance_transform_edt
    result = np.zeros(fields.shape, np.float64)
    for place in np.ndindex(fields.shape[:2]):
        inside = fields[place] > 0.5
        if inside.any() and not inside.all():
            result[place] = transform(inside, sampling=spacing)
            result[place] += transform(~inside, sampling=spacing)
    return result


_distances = from_numpy(_to_border, name="hausdorff_dt_loss")
