"""Two-dimensional convolution and correlation by SciPy, with a learned filter.

This is the model of an op made of SciPy functions, with a parameter. Its one back end is SciPy, on
the CPU. :func:`torch.nn.functional.conv2d` is faster; use it on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from ops._core import checks
from ops._errors import ArgumentError
from ops.arrays.conversions import require
from ops.arrays.from_numpy import from_numpy

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

__all__ = ["ScipyConv2d", "scipy_conv2d"]

Mode = Literal["full", "valid", "same"]
_MODES: tuple[Mode, ...] = get_args(Mode)
Operation = Literal["correlate", "convolve"]
_OPERATIONS: tuple[Operation, ...] = get_args(Operation)


# ---- the public function and module --------------------------------------------------------------


def scipy_conv2d(
    input: Tensor,
    filter: Tensor,
    bias: Tensor | None = None,
    mode: Mode = "valid",
    operation: Operation = "correlate",
) -> Tensor:
    """Correlate or convolve each image of a batch with one filter.

    .. math::

        y = x ⋆ w + b
        (x ⋆ w)ₖₗ = Σᵢⱼ x[k + i − p, l + j − q] wᵢⱼ

    x is zero outside the image. ``mode`` selects the part of the result that is kept; p and q are
    its offsets. ``convolve`` first rotates the filter w by 180 degrees.

    Args:
        input: x, ``(*, H, W)``.
        filter: w, ``(h, w)``.
        bias: b, one element of any shape, or ``None``.
        mode: ``full``, the whole result, ``(H + h - 1, W + w - 1)``; ``valid``, the part that needs
            no zeros from outside, ``(H - h + 1, W - w + 1)``; ``same``, the middle of ``full``, in
            the size of the image.
        operation: ``correlate``, as layers named convolution do (:func:`scipy.signal.correlate2d`),
            or ``convolve`` (:func:`scipy.signal.convolve2d`).

    Returns:
        y, ``(*, H', W')`` with the size that ``mode`` gives, in the dtype and on the device of
        ``input``.

    Raises:
        ArgumentTypeError: an argument is not a tensor, or its dtype is not that of ``input``.
        ArgumentError: shapes that do not fit together, an empty image or filter, a device other
            than that of ``input``, an unknown mode or operation.
        DependencyError: SciPy is not installed (the extra ``scipy``).

    Gradients:
        For all three, differentiable twice. The gradient of y is padded to the size of ``full``.
        For ``correlate``, its convolution with w is the gradient of x, and its correlation with x
        that of w. :func:`torch.func.grad` and :func:`~torch.func.vmap` work. Forward mode and
        batched gradients raise an error.

    Note:
        dtypes float64, float32, bfloat16 and float16. Half precisions compute in float32; under
        autocast they also return float32. Deterministic.
    """
    tensors = {"input": input, "filter": filter} | ({} if bias is None else {"bias": bias})
    tensors = checks.widened_under_autocast(tensors)
    checks.same_kind(**tensors)
    input, filter, bias = tensors["input"], tensors["filter"], tensors.get("bias")
    checks.one_of("mode", mode, _MODES)
    checks.one_of("operation", operation, _OPERATIONS)
    if filter.dim() != 2 or filter.numel() == 0:
        raise ArgumentError(
            f"filter must have shape (h, w) with h and w at least 1, got {list(filter.shape)}"
        )
    if input.dim() < 2 or 0 in input.shape[-2:]:
        raise ArgumentError(
            f"input must have shape (*, H, W) with H and W at least 1, got {list(input.shape)}"
        )
    if mode == "valid" and any(
        size < part for size, part in zip(input.shape[-2:], filter.shape, strict=True)
    ):
        raise ArgumentError(
            f"input must be at least as large as filter {list(filter.shape)} with mode='valid', "
            f"got {list(input.shape)}"
        )
    if bias is not None and bias.numel() != 1:
        raise ArgumentError(f"bias must have one element, got shape {list(bias.shape)}")
    wide = [checks.widened(tensor) for tensor in (input, filter)]
    output = _conv2d(*wide, mode=mode, operation=operation)
    if bias is not None:
        output = output + checks.widened(bias).reshape(())
    return output.to(input.dtype)


class ScipyConv2d(nn.Module):
    """:func:`scipy_conv2d` with a learned filter and bias.

    Args:
        filter_height, filter_width: the size of the filter.
        bias: whether the layer has a bias.
        mode, operation: see :func:`scipy_conv2d`.

    Attributes:
        filter: ``(filter_height, filter_width)``, drawn from the standard normal distribution, as
            in the tutorial that made this layer known.
        bias: ``(1, 1)``, drawn likewise, or ``None``.
    """

    def __init__(
        self,
        filter_height: int,
        filter_width: int,
        bias: bool = True,
        mode: Mode = "valid",
        operation: Operation = "correlate",
    ) -> None:
        super().__init__()
        self.mode = checks.one_of("mode", mode, _MODES)
        self.operation = checks.one_of("operation", operation, _OPERATIONS)
        height = checks.check_count("filter_height", filter_height)
        width = checks.check_count("filter_width", filter_width)
        self.filter = nn.Parameter(torch.randn(height, width))
        self.bias = nn.Parameter(torch.randn(1, 1)) if bias else None

    def forward(self, input: Tensor) -> Tensor:
        """The output for ``(*, H, W)`` images."""
        return scipy_conv2d(input, self.filter, self.bias, self.mode, self.operation)

    def extra_repr(self) -> str:
        """The parameters, for ``print(module)``."""
        height, width = self.filter.shape
        return (
            f"{height}, {width}, bias={self.bias is not None}, mode={self.mode!r}, "
            f"operation={self.operation!r}"
        )


def samples() -> Iterator[checks.Sample]:
    """The inputs at which ``jitops check`` checks the gradients."""
    inputs = (torch.randn(2, 5, 6), torch.randn(3, 2), torch.randn(1, 1))
    for operation in _OPERATIONS:
        for mode in _MODES:
            yield f"{operation}, {mode}", scipy_conv2d, (*inputs, mode, operation)


# ---- SciPy ---------------------------------------------------------------------------------------


def _each(function: str, images: Array, others: Array, mode: str) -> Array:
    """Apply a function of SciPy to each image and the filter, or to each pair of images."""
    import numpy as np

    call = getattr(require("scipy.signal", "scipy_conv2d"), function)
    batch = images.shape[:-2]
    own = others.ndim > 2
    images = images.reshape(-1, *images.shape[-2:])
    others = others.reshape(-1, *others.shape[-2:])
    if not len(images):  # an empty batch still has a shape
        empty = call(np.zeros(images.shape[-2:]), np.zeros(others.shape[-2:]), mode)
        return np.zeros((*batch, *empty.shape))
    results = [call(image, others[own * i], mode) for i, image in enumerate(images)]
    return np.stack(results).reshape(*batch, *results[0].shape)


def _forward(x: Array, w: Array, mode: str, operation: str) -> Array:
    return _each(f"{operation}2d", x, w, mode)


def _backward(grad: Array, x: Array, w: Array, mode: str, operation: str) -> tuple[Array, Array]:
    grad = _full(grad, x, w, mode, operation)
    return _of_image(grad, w, operation), _of_filter(grad, x, operation)


def _second(
    to_x: Array, to_w: Array, grad: Array, x: Array, w: Array, mode: str, operation: str
) -> tuple[Array, Array, Array]:
    """The gradients of :func:`_backward`, which is linear in each of its arrays."""
    to_grad = _forward(to_x, w, mode, operation) + _forward(x, to_w, mode, operation)
    grad = _full(grad, x, w, mode, operation)
    return to_grad, _of_image(grad, to_w, operation), _of_filter(grad, to_x, operation)


def _full(grad: Array, x: Array, w: Array, mode: str, operation: str) -> Array:
    """The gradient of the full result, with zeros in the parts that ``mode`` cut off."""
    import numpy as np

    pads = []
    for size, part, kept in zip(x.shape[-2:], w.shape, grad.shape[-2:], strict=True):
        start = {
            "full": 0,
            "valid": part - 1,
            "same": part // 2 if operation == "correlate" else (part - 1) // 2,
        }[mode]
        pads.append((start, size + part - 1 - kept - start))
    return np.pad(grad, [(0, 0)] * (grad.ndim - 2) + pads)


def _of_image(full: Array, w: Array, operation: str) -> Array:
    opposite = "convolve2d" if operation == "correlate" else "correlate2d"
    return _each(opposite, full, w, "valid")


def _of_filter(full: Array, x: Array, operation: str) -> Array:
    parts = _each("correlate2d", full, x if x.ndim > 2 else x[None], "valid")
    total = parts.reshape(-1, *parts.shape[-2:]).sum(0)
    return total[::-1, ::-1] if operation == "correlate" else total


_gradient = from_numpy(_backward, _second, name="the backward of scipy_conv2d")
_conv2d = from_numpy(_forward, _gradient, name="scipy_conv2d")
