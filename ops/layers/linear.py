"""The affine map: the model of an op without an extension.

It has one back end, ``torch``, because torch's matrix product already reaches the limit of the
hardware. ``benchmarks/layers/bench_linear.py`` measures the cost of its Python code.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ops._core import autograd, checks
from ops._errors import ArgumentError

__all__ = ["LinearFunction", "linear"]


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The affine map, as :func:`torch.nn.functional.linear` computes it.

    .. math:: y = x Wᵀ + b

    Args:
        input: x, ``(*, in_features)``, with any number of leading dimensions, including none.
        weight: W, ``(out_features, in_features)``.
        bias: b, ``(out_features,)``, or ``None``.

    Returns:
        y, ``(*, out_features)``, in the dtype of the inputs.

    Raises:
        ArgumentTypeError: an argument is not a tensor, or its dtype is not that of ``input``.
        ArgumentError: shapes that do not fit together, or a device other than that of ``input``.

    Gradients:
        For all three, of any order; only the requested ones are computed. The forward pass saves
        ``weight`` only if ``input`` needs a gradient, and ``input`` only if ``weight`` does.

    Note:
        dtypes float64, float32, bfloat16 and float16. Under autocast it computes in the autocast
        dtype. Deterministic where torch's matrix product is.
    """
    tensors = {"input": input, "weight": weight} | ({} if bias is None else {"bias": bias})
    tensors = checks.autocast(tensors)
    checks.same_kind_of_parts(**tensors)
    input, weight, bias = tensors["input"], tensors["weight"], tensors.get("bias")
    if weight.dim() != 2:
        raise ArgumentError(
            f"weight must have shape (out_features, in_features), got {list(weight.shape)}"
        )
    if input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        raise ArgumentError(
            f"input must have shape (*, {weight.shape[1]}), as weight has {weight.shape[1]} "
            f"in_features, got {list(input.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ArgumentError(
            f"bias must have shape ({weight.shape[0]},), as weight has {weight.shape[0]} "
            f"out_features, got {list(bias.shape)}"
        )
    if autograd.needs_torch_path() or torch.compiler.is_compiling():
        return F.linear(input, weight, bias)
    return autograd.apply(LinearFunction, input, weight, bias)


class LinearFunction(torch.autograd.Function):
    """The autograd Function of :func:`linear`.

    Call ``LinearFunction.apply(input, weight, bias)``; ``bias`` may be ``None``.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute the output, and save only the tensors that the requested gradients need."""
        needs_input, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(input if needs_weight else None, weight if needs_input else None)
        output = F.linear(input, weight, bias)
        # autograd forbids in-place changes of a Function's result that is a view.
        return torch.ops.aten._unsafe_view(output, output.shape) if output._is_view() else output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients by differentiable operations, so that autograd can record them."""
        input, weight = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad
        rows = _rows(grad)
        grad_input = grad @ weight if needs_input else None
        grad_weight = rows.T @ _rows(input) if needs_weight else None
        grad_bias = rows.sum(0) if needs_bias else None
        return grad_input, grad_weight, grad_bias


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def samples() -> Iterator[checks.Sample]:
    """The inputs at which ``jitops check`` checks the gradients."""
    input, weight, bias = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(5)
    yield "", linear, (input, weight, bias)
    yield "without bias", linear, (input, weight)
