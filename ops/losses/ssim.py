"""The structural similarity of images, in one pass over their windows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ops._core import autograd, checks, windows
from ops._core.fused import FusedOp
from ops._core.modules import LossModule
from ops._errors import ArgumentError

__all__ = ["SSIMLoss", "ssim", "ssim_loss", "ssim_map"]


def ssim(
    input: Tensor,
    target: Tensor,
    *,
    data_range: float | None = None,
    window_size: int = 11,
    sigma: float = 1.5,
    k1: float = 0.01,
    k2: float = 0.03,
    padding: windows.Padding = "valid",
    reduction: checks.Reduction = "mean",
) -> Tensor:
    """The mean structural similarity (SSIM) of images.

    .. math::

        SSIM = (2 μ_x μ_y + c₁) / (μ_x² + μ_y² + c₁) ⋅ (2 σ_xy + c₂) / (σ_x² + σ_y² + c₂)
        c₁ = (k₁ L)²
        c₂ = (k₂ L)²

    μ, σ² and σ_xy are the means, variances and covariance of a window with Gaussian weights, and L
    is the ``data_range``. The result is the mean over all windows. It is 1 for equal images. From
    Z. Wang, A. C. Bovik, H. R. Sheikh, E. P. Simoncelli, "Image Quality Assessment: From Error
    Visibility to Structural Similarity", IEEE Transactions on Image Processing 13(4), 2004,
    equation 13.

    Args:
        input: x, ``(B, C, H, W)`` or ``(B, C, D, H, W)``, floating point, any strides.
        target: y, like ``input``.
        data_range: L, the largest minus the smallest value that pixels can have: 1 for images in
            [0, 1], 255 for images in [0, 255]. It is required, because a wrong guess gives
            values that look right.
        window_size: pixels of the window along each dimension; odd, at most 51.
        sigma: the standard deviation of the window's weights, in pixels.
        k1: k₁.
        k2: k₂.
        padding: ``valid``, the paper's: windows within the image. ``same``: a window for each
            pixel, with zeros around the image. ``reflect``: likewise, with the image reflected.
        reduction: ``mean`` over all images, ``sum``, or ``none``: the mean of each image.

    Returns:
        A scalar, or ``(B,)`` with ``reduction="none"``; in the inputs' dtype. :func:`ssim_map` has
        the value of each window, and :func:`ssim_loss` is 1 − SSIM.

    Raises:
        ArgumentTypeError: inputs that are not tensors of one dtype among float64, float32, bfloat16
            and float16; no ``data_range``; parameters that are not numbers.
        ArgumentError: wrong or different shapes, images smaller than the window (``valid``) or than
            half of it (``reflect``), different devices, a parameter out of range, an unknown
            padding or reduction.
        BackendUnavailableError: the requested back end cannot run here.

    Gradients:
        For both images, of any order. Forward mode and :mod:`torch.func` run on the pure-torch
        path.

    Numerics:
        Half precisions compute in float32. Variances are means of squared differences from a value
        close to the image's mean, and those of x − y are computed from x − y. So flat images lose
        no digits, however bright they are. The error of a window is about 1e-7 times
        (d / (k₂ L))², where d is the largest difference from the mean. A value is never above 1. A
        NaN pixel makes the values of its windows NaN. Compiled kernels are bitwise deterministic
        for any number of threads.

    Memory:
        Little beyond the gradients. A compiled forward pass forms them, because it has all means
        of windows. Half precisions sum them in float32. :func:`ssim_map` computes the means again
        in its backward pass. A thread keeps some rows of the images, for volumes from three more
        slices than a window has. On CUDA the derivatives of four million windows at a time, or of
        one plane, are stored.
    """
    return _loss(
        input, target, 0.0, 1.0, True, data_range, window_size, sigma, k1, k2, padding, reduction
    )


def ssim_loss(
    input: Tensor,
    target: Tensor,
    *,
    data_range: float | None = None,
    weight: float = 1.0,
    window_size: int = 11,
    sigma: float = 1.5,
    k1: float = 0.01,
    k2: float = 0.03,
    padding: windows.Padding = "valid",
    reduction: checks.Reduction = "mean",
) -> Tensor:
    """1 − SSIM, or its mix with the mean absolute difference of pixels, in the same pass.

    .. math::

        ℓ = (1 − w) mean(|x − y|) + w (1 − SSIM)

    With w = 0.2 this is the loss of B. Kerbl, G. Kopanas, T. Leimkühler, G. Drettakis, "3D Gaussian
    Splatting for Real-Time Radiance Field Rendering", ACM Transactions on Graphics 42(4), 2023,
    whose code pads images with zeros (``padding="same"``).

    Args:
        input, target, data_range: see :func:`ssim`.
        weight: w, from 0 to 1.
        window_size, sigma, k1, k2, padding: see :func:`ssim`.
        reduction: ``mean`` over all images, ``sum``, or ``none``: the loss of each image.

    Returns:
        A scalar, or ``(B,)`` with ``reduction="none"``; in the inputs' dtype. It keeps its digits
        for images that are almost alike, where 1 minus a rounded SSIM has none.

    Errors, gradients, numerics and memory are those of :func:`ssim`. The absolute difference has
    the gradient 0 where x = y. Its mean is over all pixels, for any padding.
    """
    weight = checks.check_number("weight", weight)
    if not 0 <= weight <= 1:
        raise ArgumentError(f"weight must be a number from 0 to 1, got {weight}")
    return _loss(
        input, target, 1 - weight, weight, False, data_range, window_size, sigma, k1, k2, padding,
        reduction,
    )  # fmt: skip


def ssim_map(
    input: Tensor,
    target: Tensor,
    *,
    data_range: float | None = None,
    window_size: int = 11,
    sigma: float = 1.5,
    k1: float = 0.01,
    k2: float = 0.03,
    padding: windows.Padding = "valid",
) -> Tensor:
    """The structural similarity of each window, as an image.

    Args:
        input, target, data_range, window_size, sigma, k1, k2: see :func:`ssim`.
        padding: with ``same`` and ``reflect`` the map has the size of the images.

    Returns:
        ``(B, C, H', W')`` or ``(B, C, D', H', W')``, in the inputs' dtype. With ``valid``, H' is
        H − ``window_size`` + 1.

    Errors, gradients and numerics are those of :func:`ssim`.
    """
    images, parameters = _checked(
        input, target, data_range, window_size, sigma, k1, k2, padding, "none"
    )
    return _fused(*images, *parameters, 0.0, 1.0, False, False, False, False)


class SSIMLoss(LossModule):
    """:func:`ssim_loss` as a module, with its parameters set once.

    Args:
        data_range, weight, window_size, sigma, k1, k2, padding, reduction: see :func:`ssim_loss`.
    """

    function = staticmethod(ssim_loss)

    def __init__(
        self,
        *,
        data_range: float | None = None,
        weight: float = 1.0,
        window_size: int = 11,
        sigma: float = 1.5,
        k1: float = 0.01,
        k2: float = 0.03,
        padding: windows.Padding = "valid",
        reduction: checks.Reduction = "mean",
    ) -> None:
        super().__init__(
            data_range=windows.positive("data_range", data_range, _RANGE),
            weight=weight,
            window_size=windows.window_size(window_size),
            sigma=sigma,
            k1=k1,
            k2=k2,
            padding=padding,
            reduction=reduction,
        )
        self.window_size = window_size  # an integer, as it was given

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of ``(B, C, H, W)`` or ``(B, C, D, H, W)`` images."""
        return self.loss(input, target)


# ---- for the multi-scale similarity too ----------------------------------------------------------

_RANGE = "the largest minus the smallest value that pixels can have, such as 1.0 or 255"


def loss_of_planes(
    images: tuple[Tensor, Tensor],
    parameters: tuple[float, int, float, float, float, int],
    l1_weight: float,
    ssim_weight: float,
    contrast: bool = False,
) -> Tensor:
    """The losses ``(B, C)``, in float64 or float32: means over windows and pixels of 1 − SSIM.

    With ``contrast`` it is 1 minus the factor of variances and covariance alone.
    """
    recorded = torch.is_grad_enabled()
    needs = [recorded and one.requires_grad for one in images]
    loss: Tensor = _fused(*images, *parameters, l1_weight, ssim_weight, contrast, True, *needs)
    return loss.flatten(1)


def checked_numbers(
    data_range: float | None, window_size: int, sigma: float, k1: float, k2: float
) -> tuple[float, int, float, float, float]:
    """The parameters of the similarity of a window."""
    numbers = (
        windows.positive("data_range", data_range, _RANGE),
        windows.window_size(window_size),
        windows.positive("sigma", sigma),
        windows.not_negative("k1", k1),
        windows.not_negative("k2", k2),
    )
    for name, k in (("k1", numbers[3]), ("k2", numbers[4])):
        constant = k * numbers[0]
        if constant * constant == math.inf:
            raise ArgumentError(
                f"{name} times data_range must have a finite square, got {k} times {numbers[0]}"
            )
    return numbers


def _checked(
    input: Tensor, target: Tensor, data_range: float | None, window_size: int, sigma: float,
    k1: float, k2: float, padding: windows.Padding, reduction: checks.Reduction,
) -> tuple[tuple[Tensor, Tensor], tuple[float, int, float, float, float, int]]:  # fmt: skip
    images = windows.images(input, target, (4, 5))
    numbers = checked_numbers(data_range, window_size, sigma, k1, k2)
    checks.one_of("padding", padding, windows.PADDINGS)
    checks.check_reduction(reduction)
    windows.fits(images[0], numbers[1], padding)
    return images, (*numbers, windows.PADDINGS[padding])


def _loss(
    input: Tensor, target: Tensor, l1_weight: float, ssim_weight: float, similarity: bool,
    data_range: float | None, window_size: int, sigma: float, k1: float, k2: float,
    padding: windows.Padding, reduction: checks.Reduction,
) -> Tensor:  # fmt: skip
    images, parameters = _checked(
        input, target, data_range, window_size, sigma, k1, k2, padding, reduction
    )
    loss = loss_of_planes(images, parameters, l1_weight, ssim_weight)
    value = (1 - loss if similarity else loss).mean(1)
    return autograd.reduce(value, checks.REDUCTIONS[reduction]).to(images[0].dtype)


# ---- tensor code ---------------------------------------------------------------------------------


def _loss_of_windows(
    u: Tensor, v: Tensor, weights: list[float], shifts: tuple[Tensor, Tensor], c1: float, c2: float,
    contrast: bool, means: windows.Means,
) -> Tensor:  # fmt: skip
    """1 - SSIM of each window, from u = x + y and v = x - y, as cuda_src/ssim.h has it."""
    averaged = means(torch.cat((u, v, u.square(), v.square()), 1), weights)
    mean_u, mean_v, square_u, square_v = averaged.chunk(4, 1)
    var_u, var_v = windows.variance(square_u, mean_u), windows.variance(square_v, mean_v)
    # An infinite sum makes NaN, because the rest would look like a similarity.
    of_variances = var_u + var_v + 2 * c2
    structure = 2 * var_v / of_variances + 0 * of_variances
    if contrast:
        return structure
    above = 2 * (mean_v + (shifts[0] - shifts[1])).square()
    of_means = (mean_u + (shifts[0] + shifts[1])).square() + above / 2 + 2 * c1
    luminance = above / of_means + 0 * of_means
    return luminance + structure - luminance * structure


def _planes_in_torch(
    input: Tensor, target: Tensor, data_range: float, window_size: int, sigma: float, k1: float,
    k2: float, padding: int, l1_weight: float, ssim_weight: float, contrast: bool, reduces: bool,
    means: windows.Means,
) -> Tensor:  # fmt: skip
    x, y = checks.widened(input), checks.widened(target)
    shifts = windows.shift_of(x), windows.shift_of(y)
    x_near, y_near = (
        windows.padded(one, window_size, padding) - shift
        for one, shift in zip((x, y), shifts, strict=True)
    )
    weights = windows.taps(windows.WINDOWS["gaussian"], window_size, sigma)
    loss = _loss_of_windows(
        x_near + y_near, x_near - y_near, weights, shifts, (k1 * data_range) ** 2,
        (k2 * data_range) ** 2, contrast, means,
    )  # fmt: skip
    if not reduces:
        return (1 - loss).to(input.dtype)
    pixels = tuple(range(2, input.dim()))
    if l1_weight == 0:
        return ssim_weight * loss.mean(pixels, keepdim=True)
    distance = l1_weight * (x - y).abs().mean(pixels, keepdim=True)
    return distance + ssim_weight * loss.mean(pixels, keepdim=True) if ssim_weight else distance


def _definition(
    input: Tensor,
    target: Tensor,
    data_range: float,
    window_size: int,
    sigma: float,
    k1: float,
    k2: float,
    padding: int,
    l1_weight: float,
    ssim_weight: float,
    contrast: bool,
    reduces: bool,
    needs_input: bool,
    needs_target: bool,
) -> Tensor:
    """The formula in tensor code, which autograd differentiates."""
    return _planes_in_torch(
        input, target, data_range, window_size, sigma, k1, k2, padding, l1_weight, ssim_weight,
        contrast, reduces, windows.means,
    )  # fmt: skip


def _shapes(
    input: Tensor, target: Tensor, data_range: float, window_size: int, sigma: float, k1: float,
    k2: float, padding: int, *more: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The results of the forward kernel, with no content."""
    return windows.shapes(input, window_size, padding, more[-3:])


_fused = FusedOp(
    "ssim",
    _definition,
    results=["loss"],
    saved=["to_input", "to_target"],
    backward=["input", "target", "data_range", "window_size", "sigma", "k1", "k2", "padding",
              "l1_weight", "ssim_weight", "contrast", "reduces"],
    formed=["to_input", "to_target"],
    shapes=_shapes,
    tensor_code=windows.kernels(_planes_in_torch),
)  # fmt: skip


def samples() -> Iterator[checks.Sample]:
    """Where ``jitops check`` checks the gradients."""
    for padding in windows.PADDINGS:
        loss = SSIMLoss(data_range=3.0, window_size=5, weight=0.8, padding=padding)
        yield f"padding={padding!r}", loss, tuple(torch.randn(2, 1, 1, 7, 6))
