"""The operators of compiled kernels, where the library of the kernels is not loaded.

Exported programs and compiled graphs hold these operators, and may run in another process or on
another machine. There the first call loads the library. If it cannot be had, the forward pass runs
tensor code. The kernels that a library registers for a device come before these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ops._core.dispatch import Op
from ops._errors import BackendUnavailableError


def forward_of(
    op: Op,
    name: str,
    definition: Callable[..., Any],
    shapes: Callable[..., Any],
    tensor_code: Callable[..., Any] | None,
) -> Callable[..., Any]:
    """The forward kernel: results of the definition, and blanks for the saved tensors.

    ``tensor_code`` returns saved tensors too. It is for gradients that the forward pass forms,
    because those that arrive multiply them without a kernel.
    """

    def forward(*arguments: Any) -> Any:
        if op.backend_in_graphs(arguments[0]) != "torch":
            return getattr(torch.ops.jitops, f"{name}_forward")(*arguments)
        if tensor_code is not None:
            return tensor_code(*arguments)
        results = definition(*arguments)
        results = (results,) if isinstance(results, Tensor) else tuple(results)
        outputs = shapes(*arguments)
        if isinstance(outputs, Tensor):
            return results[0]
        return *results, *(_blank(saved) for saved in outputs[len(results) :])

    return forward


def backward_of(op: Op, name: str) -> Callable[..., Any]:
    """The backward kernel: it has no tensor code, because that saves other tensors."""

    def backward(*arguments: Any) -> Any:
        tensor = next(value for value in arguments if isinstance(value, Tensor))
        if op.backend_in_graphs(tensor) == "torch":
            raise BackendUnavailableError(
                f"{op.name}: this graph has the backward kernel of a compiled back end, which "
                f"cannot run here: export or compile the graph here"
            )
        return getattr(torch.ops.jitops, f"{name}_backward")(*arguments)

    return backward


def _blank(saved: Tensor) -> Tensor:
    """A saved tensor that only a backward kernel reads, as NaN, or as indices within bounds."""
    return saved.fill_(float("nan")) if saved.is_floating_point() else saved.zero_()
