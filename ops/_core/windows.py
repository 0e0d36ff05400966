"""Losses of local windows of two images: arguments, weights, means of windows, blocks of planes.

A window is separable. Its means are sums of shifted images.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ops._core import blocks, checks
from ops._errors import ArgumentError, ArgumentTypeError

Padding = Literal["valid", "same", "reflect"]
Window = Literal["gaussian", "rectangular", "triangular"]
# By the numbers of cuda_src/common/windows.h and window_inputs.h.
PADDINGS: dict[Padding, int] = {"valid": 0, "same": 1, "reflect": 2}
WINDOWS: dict[Window, int] = {"gaussian": 0, "rectangular": 1, "triangular": 2}
LARGEST = 51

_NAMES = {3: "(B, C, W)", 4: "(B, C, H, W)", 5: "(B, C, D, H, W)"}


# ---- arguments -----------------------------------------------------------------------------------


def images(input: Any, target: Any, dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The images, checked: dense, floating, of one shape, dtype and device.

    Under autocast half precisions become float32.
    """
    tensors = checks.widened_under_autocast({"input": input, "target": target})
    checks.same_kind(**tensors)
    input, target = tensors.values()
    if input.dim() not in dims:
        shapes = " or ".join(_NAMES[dim] for dim in dims)
        raise ArgumentError(f"input must have shape {shapes}, got {list(input.shape)}")
    if target.shape != input.shape:
        raise ArgumentError(
            f"target must have input's shape {list(input.shape)}, got {list(target.shape)}"
        )
    return input, target


def window_size(value: Any, name: str = "window_size") -> int:
    """An odd number of pixels."""
    value = checks.check_int(name, value)
    if not 1 <= value <= LARGEST or value % 2 == 0:
        raise ArgumentError(f"{name} must be an odd number from 1 to {LARGEST}, got {value}")
    return int(value)


def fits(input: Tensor, size: int, padding: Padding, name: str = "window_size") -> None:
    """The images are large enough for the window and the padding."""
    sizes = list(input.shape[2:])
    if padding == "valid":
        least, why = size, f"{name} with padding 'valid'"
    elif padding == "reflect":
        least, why = size // 2 + 1, f"{name} // 2 + 1 with padding 'reflect'"
    else:
        least, why = 1, "every image needs a pixel"
    if min(sizes) < least:
        raise ArgumentError(
            f"input must have at least {least} pixels along each dimension ({why}), got {sizes}"
        )


def positive(name: str, value: Any, what: str = "") -> float:
    """A finite number above 0."""
    if value is None and what:
        raise ArgumentTypeError(f"{name} must be {what}, got None")
    value = checks.check_number(name, value)
    if not 0 < value < math.inf:
        raise ArgumentError(f"{name} must be a finite number greater than 0, got {value}")
    return value


def not_negative(name: str, value: Any) -> float:
    """A finite number of at least 0."""
    value = checks.check_number(name, value)
    if not 0 <= value < math.inf:
        raise ArgumentError(f"{name} must be a finite number of at least 0, got {value}")
    return value


# ---- means of windows ----------------------------------------------------------------------------


def taps(window: int, size: int, sigma: float) -> list[float]:
    """The weights along one dimension. They add up to 1."""
    away = [abs(k - size // 2) for k in range(size)]
    if window == WINDOWS["gaussian"]:
        weights = [math.exp(-(k / sigma) * (k / sigma) / 2) for k in away]  # for any sigma
    elif window == WINDOWS["rectangular"]:
        weights = [1.0] * size
    else:
        weights = [size // 2 + 1.0 - k for k in away]
    return [weight / sum(weights) for weight in weights]


def shift_of(image: Tensor) -> Tensor:
    """A constant close to the pixels of each plane: the mean of those that are finite, or 0."""
    image, pixels = image.detach(), tuple(range(2, image.dim()))
    finite = image.isfinite()
    count = finite.sum(pixels, keepdim=True).clamp(min=1)
    mean = torch.where(finite, image, 0.0).sum(pixels, keepdim=True) / count
    return torch.nan_to_num(mean, nan=0.0, posinf=0.0, neginf=0.0)


def padded(image: Tensor, size: int, padding: int) -> Tensor:
    """The images with room for windows of this size at each pixel."""
    if padding == PADDINGS["valid"] or size == 1:
        return image
    pad = [size // 2] * (2 * (image.dim() - 2))
    return F.pad(image, pad, mode="reflect" if padding == PADDINGS["reflect"] else "constant")


def variance(mean_of_square: Tensor, mean: Tensor) -> Tensor:
    """Without what rounding takes below 0. Its derivatives are those of the variance."""
    value = mean_of_square - mean.square()
    return value + torch.relu(-value.detach())


Means = Callable[[Tensor, list[float]], Tensor]


def means(image: Tensor, weights: list[float]) -> Tensor:
    """The weighted mean of each window, in code that autograd differentiates to any order."""
    for dim in range(2, image.dim()):
        if _are_equal(weights):
            image = _sums(image, dim, len(weights)) * weights[0]
            continue
        count = image.shape[dim] - len(weights) + 1
        parts = (weight * image.narrow(dim, k, count) for k, weight in enumerate(weights))
        image = sum(parts, start=next(parts))
    return image


def _are_equal(weights: list[float]) -> bool:
    return weights.count(weights[0]) == len(weights)


def _sums(image: Tensor, dim: int, size: int) -> Tensor:
    """The sums of ``size`` neighbours, from sums of 1, 2, 4, ... of them.

    Nothing is subtracted, as it is from a running sum. So a large pixel, or NaN, leaves no trace in
    the windows beside it.
    """
    count = image.shape[dim] - size + 1
    result, done, length = None, 0, 1
    while True:
        if size & length:
            part = image.narrow(dim, done, count)
            result, done = part if result is None else result + part, done + length
        if done == size:
            return result  # type: ignore[return-value]
        kept = image.shape[dim] - length
        image, length = image.narrow(dim, 0, kept) + image.narrow(dim, length, kept), 2 * length


class _Means(torch.autograd.Function):
    """The same in place, to be differentiated once."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, weights: list[float]) -> Tensor:
        """Add up shifted images, a channel at a time, which may stay in the cache."""
        ctx.weights = weights
        return torch.cat([_means_of_channel(one, weights) for one in image.split(1, 1)], 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """The weights are symmetric, so these are means of the gradient with a border of zeros."""
        (grad,) = grads
        border = [len(ctx.weights) - 1] * (2 * (grad.dim() - 2))
        parts = [_means_of_channel(F.pad(one, border), ctx.weights) for one in grad.split(1, 1)]
        return torch.cat(parts, 1), None


def _means_of_channel(image: Tensor, weights: list[float]) -> Tensor:
    if _are_equal(weights):
        return means(image, weights)
    for dim in range(2, image.dim()):
        count = image.shape[dim] - len(weights) + 1
        result = image.narrow(dim, 0, count) * weights[0]
        for k in range(1, len(weights)):
            result.add_(image.narrow(dim, k, count), alpha=weights[k])
        image = result
    return image


def means_in_place(image: Tensor, weights: list[float]) -> Tensor:
    """As :func:`means`, faster and with less memory, but it can be differentiated only once."""
    result: Tensor = _Means.apply(image, weights)
    return result


# ---- kernels over blocks of planes ---------------------------------------------------------------


def kernels(
    planes: Callable[..., Tensor], wide: torch.dtype | None = None
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The forward and the backward kernel of an op in tensor code.

    The parameters of the op end with ``reduces``, ``needs_input`` and ``needs_target``. The forward
    kernel returns the losses of all planes and the gradients of their sum, or the map. The backward
    kernel computes the means again.

    Args:
        planes: returns the losses of planes or their maps, from the images, the parameters up to
            ``reduces``, and a function such as :func:`means`.
        wide: the dtype of images and gradients, by default float32 for half precisions.
    """

    def forward(input: Tensor, target: Tensor, *parameters: Any) -> tuple[Tensor, Tensor, Tensor]:
        *formula, reduces, needs_input, needs_target = parameters
        needs = reduces and needs_input, reduces and needs_target
        loss = functools.partial(_of_pair, planes, (*formula, reduces))
        result, gradients = _over_planes(loss, input, target, needs, wide)
        return result if reduces else result.to(input.dtype), gradients[0], gradients[1]

    def backward(grad: Tensor, input: Tensor, target: Tensor, *parameters: Any) -> list[Tensor]:
        *formula, needs_input, needs_target = parameters
        needs = needs_input, needs_target
        loss = functools.partial(_of_pair, planes, formula)
        _, gradients = _over_planes(loss, input, target, needs, wide, grad)
        return [one.to(input.dtype) for one, need in zip(gradients, needs, strict=True) if need]

    return forward, backward


def _of_pair(planes: Callable[..., Tensor], formula: Sequence[Any], x: Tensor, y: Tensor) -> Tensor:
    return planes(x, y, *formula, means_in_place)


def _over_planes(
    loss: Callable[[Tensor, Tensor], Tensor],
    input: Tensor,
    target: Tensor,
    needs: tuple[bool, bool],
    wide: torch.dtype | None,
    grad: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """The losses of some planes at a time, and the gradients of their sum or for ``grad``.

    Gradients that are not needed are empty.
    """
    shape = input.shape
    count = shape[0] * shape[1]
    both = [one.reshape(count, 1, *shape[2:]) for one in (input, target)]
    wide = wide or wide_dtype(input)
    gradients = [input.new_empty(shape if need else (0,), dtype=wide) for need in needs]
    step = max(1, blocks.elements_for(input) // max(1, math.prod(shape[2:])))
    parts = []
    for begin in range(0, max(1, count), step):
        block = slice(begin, begin + step)
        pair = [
            one[block].to(wide).detach().requires_grad_(need)
            for one, need in zip(both, needs, strict=True)
        ]
        with torch.enable_grad() if any(needs) else torch.no_grad():
            part = loss(*pair)
        parts.append(part.detach())
        if not any(needs):
            continue
        if grad is None:
            seed = torch.ones_like(part)
        else:
            seed = grad.reshape(count, *part.shape[1:])[block].to(part.dtype)
        wanted = [one for one, need in zip(pair, needs, strict=True) if need]
        found = iter(torch.autograd.grad(part, wanted, seed))
        for gradient, need in zip(gradients, needs, strict=True):
            if need:
                gradient.view(count, 1, *shape[2:])[block] = next(found)
    result = parts[0] if len(parts) == 1 else torch.cat(parts)
    return result.view(*shape[:2], *result.shape[2:]), gradients


def wide_dtype(input: Tensor) -> torch.dtype:
    """The dtype of sums."""
    return torch.float64 if input.dtype is torch.float64 else torch.float32


def shapes(
    input: Tensor,
    size: int,
    padding: int,
    wanted: Sequence[bool],
    wide: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The results of a forward kernel, with no content: losses or map, and two gradients.

    Args:
        wanted: ``reduces``, ``needs_input`` and ``needs_target``.
    """
    reduces, needs_input, needs_target = wanted
    wide = wide or wide_dtype(input)
    less = size - 1 if padding == PADDINGS["valid"] else 0
    sizes = [1 if reduces else one - less for one in input.shape[2:]]
    return (
        input.new_empty((*input.shape[:2], *sizes), dtype=wide if reduces else input.dtype),
        *(
            input.new_empty(input.shape if reduces and need else (0,), dtype=wide)
            for need in (needs_input, needs_target)
        ),
    )  # type: ignore[return-value]
