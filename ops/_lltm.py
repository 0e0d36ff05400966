"""What :mod:`ops.lltm` runs: its pure-torch path, its Function, its operators."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ops import _autograd, _checks
from ops._op import built_in

_op = built_in("lltm")


def quick(dim: int, *tensors: Tensor) -> tuple[Tensor, Tensor] | None:
    """What :func:`run` gives, of tensors that only the compiled operator has checked.

    Its checks are complete, and those in Python a tenth of a small step. ``None`` where it does not
    take part, or refuses: then whatever is wrong with the tensors is found by those in Python.
    """
    input = tensors[0]
    if (
        not isinstance(input, Tensor)
        or input.dim() != dim
        or _autograd.needs_torch_path()
        or torch.compiler.is_compiling()
        or _op.backend_for(input) == "torch"
        or torch.is_autocast_enabled("cpu" if input.is_cpu else "cuda")
    ):
        return None
    try:
        return _autograd.apply(LLTMFunction, *tensors)
    except (RuntimeError, TypeError):
        return None  # said again by run, unless the checks say it better


def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and last cell of checked tensors, on the back end that is asked for."""
    if _autograd.needs_torch_path() or _op.backend_for(tensors[0]) == "torch":
        return _torch_path(*tensors)
    if torch.compiler.is_compiling():
        return torch.ops.jitops.lltm(*tensors)
    return _autograd.apply(LLTMFunction, *tensors)


# ---- the pure-torch path: the definition ---------------------------------------------------------


def _torch_path(
    input: Tensor, weights: Tensor, bias: Tensor, h: Tensor, cell: Tensor
) -> tuple[Tensor, Tensor]:
    """The outputs, with the time if ``input`` has one, and the last cell."""
    dtype = cell.dtype
    cell = _checks.widened(cell)
    outputs = []
    for step in input if input.dim() == 3 else [input]:
        gates = F.linear(torch.cat((h, step), 1), weights, bias.reshape(-1))
        input_gate, output_gate, candidate = _checks.widened(gates).chunk(3, 1)
        cell = cell + F.elu(candidate) * input_gate.sigmoid()
        h = (cell.tanh() * output_gate.sigmoid()).to(dtype)
        outputs.append(h)
    return (torch.stack(outputs) if input.dim() == 3 else h), cell.to(dtype)


# ---- the compiled path ---------------------------------------------------------------------------


class LLTMFunction(torch.autograd.Function):
    """Fused forward and backward pass of a step or a sequence; the latter is differentiable."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weights: Tensor, bias: Tensor, h: Tensor, cell: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keeps the gates and, of a sequence, the outputs and the cells."""
        output, cells, gates = torch.ops.jitops.lltm_forward.default(input, weights, bias, h, cell)
        ctx.set_materialize_grads(False)  # of an output that is not used
        if input.dim() == 2:
            ctx.save_for_backward(input, weights, bias, h, cell, None, None, gates)
            return output, cells
        ctx.save_for_backward(input, weights, bias, h, cell, output, cells, gates)
        return output, cells[-1].to(cell.dtype, copy=True)

    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_cell: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Back through time once, then a product for each gradient asked for."""
        input, weights, bias, h, cell, output, cells, gates = ctx.saved_tensors
        grads, needed = (grad_output, grad_cell), ctx.needs_input_grad
        if grad_output is None and grad_cell is None:
            return None, None, None, None, None
        if _autograd.needs_torch_backward(*grads):
            inputs = (input, weights, bias, h, cell)
            gradients = _autograd.differentiable(_torch_path, inputs, (), needed, grads)
        else:
            gradients = torch.ops.jitops.lltm_backward.default(
                *grads, input, weights, bias, h, cell, output, cells, gates, *needed
            )
        return tuple(_autograd.place(gradients, needed))


# ---- operators: schemas and shapes (kernels: cuda_src/lltm.*) ------------------------------------


def _forward_shapes(
    input: Tensor, weights: Tensor, bias: Tensor, h: Tensor, cell: Tensor
) -> tuple[Tensor, ...]:
    steps, size = input.shape[:-1], h.shape[1]
    dtype = _checks.widened(input).dtype if input.dim() == 3 else input.dtype
    return (
        input.new_empty(*steps, size),
        input.new_empty(*steps, size, dtype=dtype),
        input.new_empty(*steps, 3 * size),
    )


def _backward_shapes(
    grad_output: Tensor | None, grad_cell: Tensor | None, *rest: Any
) -> list[Tensor]:
    return [
        tensor.new_empty(tensor.shape)
        for tensor, need in zip(rest[:5], rest[8:], strict=True)
        if need
    ]


_autograd.define(
    "lltm_forward(Tensor input, Tensor weights, Tensor bias, Tensor h, Tensor cell) "
    "-> (Tensor, Tensor, Tensor)",
    _forward_shapes,
)
_autograd.define(
    "lltm_backward(Tensor? grad_output, Tensor? grad_cell, Tensor input, Tensor weights, "
    "Tensor bias, Tensor h, Tensor cell, Tensor? output, Tensor? cells, Tensor gates, "
    "bool needs_input, "
    "bool needs_weights, bool needs_bias, bool needs_h, bool needs_cell) -> Tensor[]",
    _backward_shapes,
)
_autograd.define_in_graphs(
    "lltm(Tensor input, Tensor weights, Tensor bias, Tensor h, Tensor cell) -> (Tensor, Tensor)",
    LLTMFunction.apply,
)

_op.prepare()
