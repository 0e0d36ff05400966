"""The local normalised cross-correlation of images, in one pass over their windows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ops._core import autograd, checks, windows
from ops._core.fused import FusedOp
from ops._core.modules import LossModule

__all__ = ["LNCCLoss", "lncc_loss"]

Smoothing = Literal["maximum", "sum"]


def lncc_loss(
    input: Tensor,
    target: Tensor,
    *,
    kernel_size: int = 3,
    kernel_type: windows.Window = "rectangular",
    smooth_nr: float = 0.0,
    smooth_dr: float = 1e-5,
    smoothing: Smoothing = "maximum",
    reduction: checks.Reduction = "mean",
) -> Tensor:
    """The negative mean of the squared local normalised cross-correlation (LNCC) of images.

    .. math::

        ℓ = −(C² + n) / (max(V_x, d) max(V_y, d))
        C = N cov(x, y)
        V_x = N var(x)

    cov and var are the covariance and variances of a window, N is the sum of its weights, n is
    ``smooth_nr`` and d is ``smooth_dr``. With ``smoothing="sum"`` the denominator is V_x V_y + d.
    The loss is −1 where one image is a linear function of the other in each window. From
    B. B. Avants, C. L. Epstein, M. Grossman, J. C. Gee, "Symmetric Diffeomorphic Image Registration
    with Cross-Correlation", Medical Image Analysis 12(1), 2008. The arguments are those of MONAI's
    ``LocalNormalizedCrossCorrelationLoss``.

    Args:
        input: x, ``(B, C, W)``, ``(B, C, H, W)`` or ``(B, C, D, H, W)``, floating point, any
            strides.
        target: y, like ``input``.
        kernel_size: pixels of the window along each dimension; odd, at most 51.
        kernel_type: the weights along each dimension. ``rectangular``: 1. ``gaussian``: a standard
            deviation of ``kernel_size`` / 3 pixels, and 1 in the middle. ``triangular``: a
            rectangular window of about half the size, averaged with itself. Its weights add up to
            1.
        smooth_nr: n, at least 0.
        smooth_dr: d, at least 0.
        smoothing: ``maximum``, MONAI's, or ``sum``, VoxelMorph's.
        reduction: ``mean`` over all windows, channels and images, ``sum``, or ``none``: the loss of
            each window.

    Returns:
        A scalar, or an image of the inputs' shape with ``reduction="none"``; in the inputs' dtype.

    Raises:
        ArgumentTypeError: inputs that are not tensors of one dtype among float64, float32, bfloat16
            and float16; parameters that are not numbers.
        ArgumentError: wrong or different shapes, an image without pixels, different devices, a
            parameter out of range, an unknown kernel type, smoothing or reduction.
        BackendUnavailableError: the requested back end cannot run here.

    Gradients:
        For both images, of any order. A variance below d has none, with ``maximum``. Forward mode
        and :mod:`torch.func` run on the pure-torch path.

    Numerics:
        All dtypes compute in float64, from differences to a value close to the image's mean. So
        images far from 0 keep their digits, and flat parts have no correlation, where rounding in
        float32 would be divided by variances that are no larger. There is a window for each pixel,
        with zeros around the image. A NaN pixel makes the loss of its windows NaN. Compiled
        kernels are bitwise deterministic for any number of threads.

    Memory:
        Gradients are formed in float64 by the forward pass. Beyond them, a thread keeps 64 rows of
        seven slices more than a window has. On CUDA the derivatives of four million windows at a
        time, or of one plane, are stored. With ``reduction="none"`` the backward pass computes all
        means again.
    """
    input, target = windows.images(input, target, (3, 4, 5))
    kernel_size = windows.window_size(kernel_size, "kernel_size")
    checks.one_of("kernel_type", kernel_type, windows.WINDOWS)
    checks.one_of("smoothing", smoothing, get_args(Smoothing))
    number = checks.check_reduction(reduction)
    windows.fits(input, kernel_size, "same")
    size, sigma, along = kernel_size, kernel_size / 3, float(kernel_size)
    if kernel_type == "gaussian":
        away = range(-(size // 2), size // 2 + 1)
        along = sum(math.exp(-k * k / (2 * sigma * sigma)) for k in away)
    elif kernel_type == "triangular":
        half = (size + 1) // 2
        size, along = 2 * (half - 1 + half % 2) - 1, 1.0
    recorded, reduces = torch.is_grad_enabled(), number != 0
    loss: Tensor = _fused(
        input,
        target,
        windows.WINDOWS[kernel_type],
        size,
        sigma,
        along ** (input.dim() - 2),
        windows.not_negative("smooth_nr", smooth_nr),
        windows.not_negative("smooth_dr", smooth_dr),
        smoothing == "sum",
        reduces,
        recorded and input.requires_grad,
        recorded and target.requires_grad,
    )
    if not reduces:
        return loss
    scale = 1.0 if reduction == "mean" else math.prod(input.shape[2:])
    return (autograd.reduce(loss, number) * scale).to(input.dtype)


class LNCCLoss(LossModule):
    """:func:`lncc_loss` as a module, with its parameters set once.

    Args:
        kernel_size, kernel_type, smooth_nr, smooth_dr, smoothing, reduction: see
            :func:`lncc_loss`.
    """

    function = staticmethod(lncc_loss)

    def __init__(
        self,
        *,
        kernel_size: int = 3,
        kernel_type: windows.Window = "rectangular",
        smooth_nr: float = 0.0,
        smooth_dr: float = 1e-5,
        smoothing: Smoothing = "maximum",
        reduction: checks.Reduction = "mean",
    ) -> None:
        super().__init__(
            kernel_size=windows.window_size(kernel_size, "kernel_size"),
            kernel_type=kernel_type,
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            smoothing=smoothing,
            reduction=reduction,
        )
        self.kernel_size = kernel_size  # an integer, as it was given

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of ``(B, C, W)``, ``(B, C, H, W)`` or ``(B, C, D, H, W)`` images."""
        return self.loss(input, target)


# ---- tensor code ---------------------------------------------------------------------------------


def _planes_in_torch(
    input: Tensor, target: Tensor, window: int, kernel_size: int, sigma: float, volume: float,
    smooth_nr: float, smooth_dr: float, adds: bool, reduces: bool, means: windows.Means,
) -> Tensor:  # fmt: skip
    x, y = (
        windows.padded(one, kernel_size, windows.PADDINGS["same"]) - windows.shift_of(one)
        for one in (input.double(), target.double())
    )
    averaged = means(
        torch.cat((x, y, x.square(), y.square(), x * y), 1),
        windows.taps(window, kernel_size, sigma),
    )
    mean_x, mean_y, square_x, square_y, product = averaged.chunk(5, 1)
    cross = volume * (product - mean_x * mean_y)
    var_x = volume * windows.variance(square_x, mean_x)
    var_y = volume * windows.variance(square_y, mean_y)
    if adds:
        below = var_x * var_y + smooth_dr
    else:
        below = var_x.clamp(min=smooth_dr) * var_y.clamp(min=smooth_dr)
    loss = -(cross.square() + smooth_nr) / below
    return loss.mean(tuple(range(2, loss.dim())), keepdim=True) if reduces else loss


def _definition(
    input: Tensor,
    target: Tensor,
    window: int,
    kernel_size: int,
    sigma: float,
    volume: float,
    smooth_nr: float,
    smooth_dr: float,
    adds: bool,
    reduces: bool,
    needs_input: bool,
    needs_target: bool,
) -> Tensor:
    """The formula in tensor code, which autograd differentiates."""
    loss = _planes_in_torch(
        input, target, window, kernel_size, sigma, volume, smooth_nr, smooth_dr, adds, reduces,
        windows.means,
    )  # fmt: skip
    return loss if reduces else loss.to(input.dtype)


def _shapes(
    input: Tensor, target: Tensor, window: int, kernel_size: int, *more: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The results of the forward kernel, with no content."""
    return windows.shapes(input, kernel_size, windows.PADDINGS["same"], more[-3:], torch.float64)


_fused = FusedOp(
    "lncc_loss",
    _definition,
    results=["loss"],
    saved=["to_input", "to_target"],
    backward=["input", "target", "window", "kernel_size", "sigma", "volume", "smooth_nr",
              "smooth_dr", "adds", "reduces"],
    formed=["to_input", "to_target"],
    shapes=_shapes,
    tensor_code=windows.kernels(_planes_in_torch, torch.float64),
)  # fmt: skip


def samples() -> Iterator[checks.Sample]:
    """Where ``jitops check`` checks the gradients."""
    for kernel_type in windows.WINDOWS:
        loss = LNCCLoss(kernel_size=5, kernel_type=kernel_type, smooth_dr=0.1, smoothing="sum")
        yield f"kernel_type={kernel_type!r}", loss, tuple(torch.randn(2, 1, 1, 6, 5))
