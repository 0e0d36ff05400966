"""The magnitude of the two-dimensional Fourier transform: the model of an op made with NumPy.

It has one back end, NumPy, on the CPU. On a GPU use ``torch.fft.rfft2(x).abs()``, which has the
same values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ops._core import checks
from ops._errors import ArgumentError
from ops.arrays.conversions import require
from ops.arrays.from_numpy import from_numpy

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

__all__ = ["rfft2_magnitude"]


def rfft2_magnitude(input: Tensor) -> Tensor:
    """The magnitudes of the two-dimensional real Fourier transform.

    .. math::

        y = |X|
        Xₖₗ = Σₘₙ xₘₙ exp(−2πi (k m / H + l n / W))

    It transforms the last two dimensions and computes the columns l = 0 to W // 2, because the
    others mirror them.

    Args:
        input: x, ``(*, H, W)``, real; H and W at least 1.

    Returns:
        y, ``(*, H, W // 2 + 1)``, in the dtype and on the device of ``input``.

    Raises:
        ArgumentTypeError: ``input`` is not a floating tensor.
        ArgumentError: fewer than two dimensions, or one of the last two is empty.
        DependencyError: NumPy is not installed.

    Gradients:
        For ``input``, differentiable twice. g_y is the gradient that arrives for y:

        .. math:: g_x = adjoint(g_y X / |X|)

        The adjoint of the transform is not its inverse, because half of the spectrum is left out. A
        well-known tutorial uses the inverse, so its gradient is wrong, and it says so. A zero
        magnitude is a kink; its gradient is zero, which is a subgradient. :func:`torch.func.grad`
        and :func:`~torch.func.vmap` work. Forward mode and batched gradients raise an error.

    Note:
        dtypes float64, float32, bfloat16 and float16. Half precisions compute in float32; under
        autocast they also return float32. Deterministic.
    """
    (input,) = checks.floating_rows(input=input)
    if input.dim() < 2 or 0 in input.shape[-2:]:
        raise ArgumentError(
            f"input must have shape (*, H, W) with H and W at least 1, got {list(input.shape)}"
        )
    return _magnitude(input)


def samples() -> Iterator[checks.Sample]:
    """The inputs at which ``jitops check`` checks the gradients: an even and an odd width."""
    for width in (4, 5):
        yield f"width {width}", rfft2_magnitude, (torch.randn(2, 3, width),)


def _forward(x: Array) -> Array:
    return abs(_transform(x))


def _backward(grad: Array, x: Array) -> Array:
    return _adjoint(grad * _sign(_transform(x)), x.shape[-1])


def _second(grad_x: Array, grad: Array, x: Array) -> tuple[Array, Array]:
    """The gradients of :func:`_backward`: of ``grad``, in which it is linear, and of ``x``."""
    along, spectrum = _transform(grad_x), _transform(x)
    sign = _sign(spectrum)
    radial = (sign.conj() * along).real
    magnitude = abs(spectrum)
    turned = (along - sign * radial) / (magnitude + (magnitude == 0))  # 0 / 1 for a zero
    return radial, _adjoint(grad * turned * (magnitude > 0), x.shape[-1])


def _transform(x: Array) -> Array:
    return require("numpy.fft", "rfft2_magnitude").rfft2(x)


def _adjoint(spectrum: Array, width: int) -> Array:
    """The adjoint of the transform.

    The inverse transform counts each column that has a mirror image twice, and scales.
    """
    fft = require("numpy.fft", "rfft2_magnitude")
    spectrum = spectrum.copy()
    spectrum[..., 1 : (width + 1) // 2] /= 2
    height = spectrum.shape[-2]
    return fft.irfft2(spectrum, s=(height, width), norm="forward")


def _sign(spectrum: Array) -> Array:
    magnitude = abs(spectrum)
    magnitude = magnitude + (magnitude == 0)
    # Not a quotient of complex numbers, whose inverse of a subnormal magnitude is infinite.
    sign = spectrum.copy()
    sign.real /= magnitude
    sign.imag /= magnitude
    return sign


_gradient = from_numpy(_backward, _second, name="the backward of rfft2_magnitude")
_magnitude = from_numpy(_forward, _gradient, name="rfft2_magnitude")
