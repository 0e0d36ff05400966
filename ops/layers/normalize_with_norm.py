"""Direction and norm of a vector: the model of a Function with several outputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ops._core import autograd, checks
from ops._errors import ArgumentError

__all__ = ["DirectionAndNorm", "NormalizeWithNormFunction", "normalize_with_norm"]


class DirectionAndNorm(NamedTuple):
    """The result of :func:`normalize_with_norm`: direction, norm and a mask of zero vectors."""

    direction: Tensor
    norm: Tensor
    is_zero: Tensor


def normalize_with_norm(input: Tensor, dim: int = -1) -> DirectionAndNorm:
    """Split vectors into direction and Euclidean norm.

    .. math::

        d = x / n
        n = ‖x‖₂

    A zero vector has the direction zero.

    Args:
        input: vectors x along ``dim``; any shape of at least one dimension.
        dim: the dimension of the vectors.

    Returns:
        ``direction``, d, in the shape of ``input``; ``norm``, n, without ``dim``; ``is_zero``, a
        boolean mask of zero norms. The first two have the dtype of ``input``.

    Raises:
        ArgumentTypeError: ``input`` is not a floating tensor, or ``dim`` is not an integer.
        ArgumentError: ``input`` has no dimension ``dim``.

    Gradients:
        For ``input``, of any order; ``is_zero`` has none. With the gradients g_d and g_n that
        arrive for d and n:

        .. math:: g_x = (g_d − d (d · g_d)) / n + g_n d

        For a zero vector they are zero, which is a subgradient of the norm there. An output that
        is not used costs nothing in the backward pass.

    Note:
        dtypes float64, float32, bfloat16 and float16. Half precisions compute in float32; under
        autocast they also return float32. Vectors are scaled first, so no square overflows or
        underflows unless the norm itself does. Deterministic. One back end, ``torch``.
    """
    (input,) = checks.floating_rows(input=input)
    dim = checks.check_int("dim", dim)
    if not -input.dim() <= dim < input.dim():
        raise ArgumentError(
            f"dim must be a dimension of input, which has shape {list(input.shape)}, got {dim}"
        )
    dtype, wide = input.dtype, checks.widened(input)
    plain = autograd.needs_torch_path() or torch.compiler.is_compiling()
    call = _torch_path if plain else NormalizeWithNormFunction.apply
    direction, norm, is_zero = call(wide, dim)
    return DirectionAndNorm(direction.to(dtype), norm.to(dtype), is_zero)


def _torch_path(input: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    is_zero = (input == 0).all(dim, keepdim=True)
    scale = _scale(input, dim)
    # Zero vectors are replaced, because the slope of the root at zero is infinite.
    scaled = torch.where(is_zero, 1, input / scale)
    length = scaled.square().sum(dim, keepdim=True).sqrt()
    direction = torch.where(is_zero, 0, scaled / length)
    norm = torch.where(is_zero, 0, length * scale)
    return direction, norm.squeeze(dim), is_zero.squeeze(dim)


def _scale(input: Tensor, dim: int) -> Tensor:
    """The largest magnitude. Squares of vectors divided by it neither overflow nor underflow."""
    if input.shape[dim] == 0:
        return input.new_ones(()).expand_as(input.sum(dim, keepdim=True))
    largest = input.detach().abs().amax(dim, keepdim=True)
    return torch.where((largest > 0) & largest.isfinite(), largest, 1)


class NormalizeWithNormFunction(torch.autograd.Function):
    """The autograd Function of :func:`normalize_with_norm`.

    Call ``direction, norm, is_zero = NormalizeWithNormFunction.apply(input, dim)``.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the outputs and save them, because the gradients need nothing else."""
        scale = _scale(input, dim)
        direction = input / scale
        length = torch.linalg.vector_norm(direction, dim=dim)
        is_zero = length == 0
        direction /= torch.where(is_zero, 1, length).unsqueeze(dim)
        norm = length * scale.squeeze(dim)
        ctx.dim = dim
        ctx.save_for_backward(direction, norm, is_zero)
        ctx.mark_non_differentiable(is_zero)
        ctx.set_materialize_grads(False)  # an output without a gradient gives None, not zeros
        return direction, norm, is_zero

    @staticmethod
    def backward(
        ctx: Any, grad_direction: Tensor | None, grad_norm: Tensor | None, _: None
    ) -> tuple[Tensor | None, None]:
        """Compute the gradient by differentiable operations, so that autograd can record them."""
        direction, norm, is_zero = ctx.saved_tensors
        grad = None
        if grad_direction is not None:
            along = (direction * grad_direction).sum(ctx.dim, keepdim=True)
            safe = torch.where(is_zero, 1, norm).unsqueeze(ctx.dim)
            across = (grad_direction - direction * along) / safe
            grad = torch.where(is_zero.unsqueeze(ctx.dim), 0, across)
        if grad_norm is not None:
            radial = grad_norm.unsqueeze(ctx.dim) * direction
            grad = radial if grad is None else grad + radial
        return grad, None


def samples() -> Iterator[checks.Sample]:
    """The inputs at which ``jitops check`` checks the gradients."""
    yield "", normalize_with_norm, (torch.randn(4, 3),)
    yield "dim=0", normalize_with_norm, (torch.randn(4, 3), 0)
