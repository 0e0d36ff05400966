"""The magnitude of the two-dimensional Fourier transform: a model of an op made with NumPy.

One back end, NumPy, on the CPU. ``torch.fft.rfft2(x).abs()`` has the same values where the work is
to stay on a GPU.
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
    r"""The magnitudes :math:`\lvert \mathrm{rfft2}(x) \rvert` of the last two dimensions.

    .. math::

        y = \lvert X \rvert, \qquad
        X_{kl} = \sum_{m,n} x_{mn} \, e^{-2 \pi i (km/H + ln/W)}, \quad
        0 \le l \le \lfloor W/2 \rfloor

    With :math:`S = X / \lvert X \rvert`, and :math:`F^*` the adjoint of the transform :math:`F`,
    the gradient of a result :math:`\bar y` is :math:`\bar x = F^* (\bar y S)`. The half of the
    spectrum that is not computed makes :math:`F^*` something else than the inverse transform, which
    is what a well-known tutorial takes for it: there the gradient is wrong, knowingly.

    Args:
        input: shape :math:`(*, H, W)`, real; :math:`H` and :math:`W` at least 1.

    Returns:
        Shape :math:`(*, H, \lfloor W/2 \rfloor + 1)`, of ``input``'s dtype, on its device.

    Raises:
        ArgumentTypeError: ``input`` is no floating tensor.
        ArgumentError: fewer than two dimensions, or one of the last two is empty.
        DependencyError: NumPy is not installed.

    Note:
        dtypes float64, float32, bfloat16 and float16; the half precisions compute in float32, and
        under autocast also return it. Differentiable twice; where a magnitude is zero it has a
        kink, and its gradient is taken to be zero, which is a subgradient. Works under
        :func:`torch.func.grad` and :func:`~torch.func.vmap`; forward mode and batched gradients
        are refused. Deterministic.
    """
    (input,) = checks.floating_rows(input=input)
    if input.dim() < 2 or 0 in input.shape[-2:]:
        raise ArgumentError(
            f"input must have shape (*, H, W) with H and W at least 1, got {list(input.shape)}"
        )
    return _magnitude(input)


def samples() -> Iterator[checks.Sample]:
    """Where ``jitops check`` checks the gradients: an even and an odd width."""
    for width in (4, 5):
        yield f"width {width}", rfft2_magnitude, (torch.randn(2, 3, width),)


def _forward(x: Array) -> Array:
    return abs(_transform(x))


def _backward(grad: Array, x: Array) -> Array:
    return _adjoint(grad * _sign(_transform(x)), x.shape[-1])


def _second(grad_x: Array, grad: Array, x: Array) -> tuple[Array, Array]:
    """The gradients of :func:`_backward`: of what it is linear in, and through the sign."""
    along, spectrum = _transform(grad_x), _transform(x)
    sign = _sign(spectrum)
    radial = (sign.conj() * along).real
    magnitude = abs(spectrum)
    turned = (along - sign * radial) / (magnitude + (magnitude == 0))  # 0 / 1 for a zero
    return radial, _adjoint(grad * turned * (magnitude > 0), x.shape[-1])


def _transform(x: Array) -> Array:
    return require("numpy.fft", "rfft2_magnitude").rfft2(x)


def _adjoint(spectrum: Array, width: int) -> Array:
    """Not the inverse, which counts each column that has a mirror image twice, and scales."""
    fft = require("numpy.fft", "rfft2_magnitude")
    spectrum = spectrum.copy()
    spectrum[..., 1 : (width + 1) // 2] /= 2
    height = spectrum.shape[-2]
    return fft.irfft2(spectrum, s=(height, width), norm="forward")


def _sign(spectrum: Array) -> Array:
    magnitude = abs(spectrum)
    return spectrum / (magnitude + (magnitude == 0))


_gradient = from_numpy(_backward, _second, name="the backward of rfft2_magnitude")
_magnitude = from_numpy(_forward, _gradient, name="rfft2_magnitude")
