"""The multi-scale structural similarity, from one pass over the windows of each scale."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ops._core import autograd, checks, windows
from ops._core.modules import LossModule
from ops._errors import ArgumentError, ArgumentTypeError
from ops.losses.ssim import checked_numbers, loss_of_planes

__all__ = ["MSSSIMLoss", "ms_ssim"]

WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def ms_ssim(
    input: Tensor,
    target: Tensor,
    *,
    data_range: float | None = None,
    weights: Sequence[float] = WEIGHTS,
    window_size: int = 11,
    sigma: float = 1.5,
    k1: float = 0.01,
    k2: float = 0.03,
    reduction: checks.Reduction = "mean",
) -> Tensor:
    """The multi-scale structural similarity (MS-SSIM) of images.

    .. math::

        s = mean(SSIM_S)^{w_S} ∏ⱼ mean(cⱼ)^{wⱼ}

    SSIM_S is the similarity at the coarsest of S scales, and cⱼ the factor of variances and
    covariance at the finer scales j. Each scale has half the pixels of the finer one along each
    dimension. From Z. Wang, E. P. Simoncelli, A. C. Bovik, "Multiscale Structural Similarity for
    Image Quality Assessment", Asilomar Conference on Signals, Systems and Computers, 2003, whose
    weights are the default.

    Args:
        input, target, data_range: see :func:`ssim`.
        weights: wⱼ, from the finest scale to the coarsest. Their number is the number of scales.
        window_size, sigma, k1, k2: see :func:`ssim`. Windows lie within the image.
        reduction: ``mean`` over all images, ``sum``, or ``none``: the mean of the channels of each
            image.

    Returns:
        A scalar, or ``(B,)`` with ``reduction="none"``; in the inputs' dtype.

    Raises:
        ArgumentTypeError, ArgumentError, BackendUnavailableError: as :func:`ssim`; also for weights
            that are not numbers of at least 0, and for images whose coarsest scale is smaller than
            the window. With the defaults an image needs 161 pixels along each dimension.

    Gradients:
        For both images, of any order. Where the mean of a channel is 0 or less, the factor is 0,
        and so are the value and the gradient of this channel. (A power of a negative number is not
        real.)

    Numerics:
        As :func:`ssim`. A coarser pixel is the mean of 2 × 2 pixels, or of those that are left at
        the end of an odd dimension. Half precisions compute all scales in float32.

    Memory:
        The coarser images, which are a third of the images, and the gradients.
    """
    number = checks.check_reduction(reduction)
    value, dtype = _of_images(input, target, data_range, weights, window_size, sigma, k1, k2)
    return autograd.reduce(value, number).to(dtype)


class MSSSIMLoss(LossModule):
    """1 − :func:`ms_ssim` as a module, with its parameters set once.

    Args:
        data_range, weights, window_size, sigma, k1, k2: see :func:`ms_ssim`.
        reduction: see :func:`ms_ssim`; with ``sum`` the sum over all images of 1 − MS-SSIM.
    """

    function = staticmethod(ms_ssim)

    def __init__(
        self,
        *,
        data_range: float | None = None,
        weights: Sequence[float] = WEIGHTS,
        window_size: int = 11,
        sigma: float = 1.5,
        k1: float = 0.01,
        k2: float = 0.03,
        reduction: checks.Reduction = "mean",
    ) -> None:
        numbers = checked_numbers(data_range, window_size, sigma, k1, k2)
        super().__init__(
            data_range=numbers[0],
            weights=_checked_weights(weights),
            window_size=numbers[1],
            sigma=sigma,
            k1=k1,
            k2=k2,
            reduction=reduction,
        )
        self.window_size = window_size  # an integer, as it was given

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of ``(B, C, H, W)`` or ``(B, C, D, H, W)`` images."""
        parameters: dict[str, Any] = {name: getattr(self, name) for name in self._parameter_names}
        number = checks.check_reduction(parameters.pop("reduction"))
        value, dtype = _of_images(input, target, **parameters)
        return autograd.reduce(1 - value, number).to(dtype)


def _of_images(
    input: Tensor, target: Tensor, data_range: float | None, weights: Sequence[float],
    window_size: int, sigma: float, k1: float, k2: float,
) -> tuple[Tensor, torch.dtype]:  # fmt: skip
    """The similarity of each image, not rounded to half precision, and the dtype of results."""
    images = windows.images(input, target, (4, 5))
    scales = _checked_weights(weights)
    numbers = checked_numbers(data_range, window_size, sigma, k1, k2)
    least = (numbers[1] - 1) * 2 ** (len(scales) - 1) + 1
    sizes = list(images[0].shape[2:])
    if min(sizes) < least:
        raise ArgumentError(
            f"input must have at least {least} pixels along each dimension, for {len(scales)} "
            f"weights and a window_size of {numbers[1]}, got {sizes}"
        )
    dtype = images[0].dtype
    parameters = (*numbers, windows.PADDINGS["valid"])
    value: Any = 1.0
    for scale, weight in enumerate(scales):
        if scale:
            images = _halved(images[0]), _halved(images[1])
        finer = scale < len(scales) - 1
        mean = 1 - loss_of_planes(images, parameters, 0.0, 1.0, contrast=finer)
        value = value * _power(mean, weight)
    return value.mean(1), dtype


def _checked_weights(weights: Any) -> tuple[float, ...]:
    if not isinstance(weights, Iterable):
        raise ArgumentTypeError(
            f"weights must be a list of numbers, one for each scale, got {type(weights).__name__}"
        )
    numbers = tuple(checks.check_number("each of weights", weight) for weight in weights)
    if not numbers or not all(0 <= weight < math.inf for weight in numbers):
        raise ArgumentError(
            f"weights must be one finite number of at least 0 for each scale, got {list(numbers)}"
        )
    return numbers


def _halved(image: Tensor) -> Tensor:
    """The means of 2 x 2 pixels. Planes become the batch, because torch pools no 0 channels."""
    planes = checks.widened(image).flatten(0, 1).unsqueeze(1)
    pool = F.avg_pool2d if image.dim() == 4 else F.avg_pool3d
    # A window of two pixels does not fit into one, as a window of one pixel does.
    pooled = pool(planes, [min(2, size) for size in image.shape[2:]], ceil_mode=True)
    return pooled.reshape(*image.shape[:2], *pooled.shape[2:])


def _power(mean: Tensor, weight: float) -> Tensor:
    """``mean ** weight``, and 0 without gradient where the mean is not above 0. NaN stays."""
    counts = ~(mean <= 0)
    power = torch.where(counts, mean, torch.ones_like(mean)) ** weight
    return torch.where(counts, power, torch.zeros_like(mean))


def samples() -> Iterator[checks.Sample]:
    """Where ``jitops check`` checks the gradients."""
    x = torch.rand(1, 1, 6, 7)
    loss = MSSSIMLoss(data_range=1.0, weights=(0.4, 0.6), window_size=3)
    yield "two scales", loss, (x, x + 0.1 * torch.rand_like(x))
