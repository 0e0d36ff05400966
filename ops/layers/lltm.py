"""The long-long-term-memory unit (LLTM), a recurrent unit that cannot forget.

The compiled back ends run one kernel between two matrix products, and a whole sequence in one call.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops._core import checks
from ops._core.fused import FusedOp
from ops._errors import ArgumentError, ArgumentTypeError

__all__ = ["LLTM", "LLTMFunction", "LLTMState", "lltm", "lltm_sequence"]


class LLTMState(NamedTuple):
    """The state that one step passes to the next: ``h`` and ``cell``, ``(B, S)`` each."""

    h: Tensor
    cell: Tensor


# ---- the public functions and module -------------------------------------------------------------


def lltm(input: Tensor, weights: Tensor, bias: Tensor, h: Tensor, cell: Tensor) -> LLTMState:
    """One step of the long-long-term-memory unit, an LSTM without a forget gate and with an ELU.

    .. math::

        [i; o; z] = W [h; x] + b
        c′ = c + elu(z) σ(i)
        h′ = tanh(c′) σ(o)

    i is the input gate, o the output gate, z the candidate and x the ``input``. From
    P. Goldsborough, "Custom C++ and CUDA Extensions", a tutorial of PyTorch. The layout of the
    parameters and their initialisation are those of the tutorial.

    Args:
        input: x, ``(B, F)``.
        weights: W, ``(3S, S + F)``: rows for input gate, output gate and candidate, columns for
            ``h`` and ``input``.
        bias: b, ``(3S,)`` or, as in the tutorial, ``(1, 3S)``.
        h: the last output, ``(B, S)``.
        cell: the last cell c, ``(B, S)``.

    Returns:
        The new :class:`LLTMState`, h′ and c′, in the dtype of the inputs.

    Raises:
        ArgumentTypeError: inputs that are not tensors of one dtype among float64, float32, bfloat16
            and float16.
        ArgumentError: shapes that do not fit together, different devices.
        BackendUnavailableError: the requested back end cannot run here.

    Gradients:
        For all five, of any order; only the requested ones are computed. Forward mode and
        :mod:`torch.func` run on the pure-torch path.

    Numerics:
        Between the matrix products, bfloat16 and float16 compute in float32. The cell and its
        gradient are summed in float32 over all steps of a sequence. Under autocast it computes in
        the autocast dtype, as matrix products do. Deterministic where torch's matrix products are.
    """
    # The kernel's own checks are a tenth faster.
    state = _step.unchecked(input, weights, bias, h, cell, check=_checked_step)
    if state is None:
        state = _step(*_checked_step(input, weights, bias, h, cell))
    return LLTMState(*state)


def lltm_sequence(
    input: Tensor, weights: Tensor, bias: Tensor, h: Tensor, cell: Tensor
) -> tuple[Tensor, LLTMState]:
    """All steps of a sequence, as :func:`lltm` computes them one after the other.

    Args:
        input: ``(T, B, F)``.
        weights, bias, h, cell: see :func:`lltm`.

    Returns:
        The outputs ``h`` of all steps, ``(T, B, S)``, and the last :class:`LLTMState`.

    Errors, gradients and numerics are those of :func:`lltm`.
    """
    input, weights, bias, h, cell = _checked(input, weights, bias, h, cell, dim=3)
    if input.shape[0] == 0:
        return _no_steps(input, weights, bias, h, cell)
    output, cell = _sequence(input, weights, bias, h, cell)
    return output, LLTMState(output[-1], cell)


def _no_steps(*tensors: Tensor) -> tuple[Tensor, LLTMState]:
    """The state as it is. All results depend on all tensors, so each has a gradient, if zeros."""
    *_, h, cell = tensors
    nothing = torch.cat([x.flatten()[:0] for x in tensors])
    new_h, new_cell = (torch.cat((nothing, x.flatten())).view(h.shape) for x in (h, cell))
    return nothing.view(0, *h.shape), LLTMState(new_h, new_cell)


class LLTM(nn.Module):
    """The unit with its parameters, for a step or a sequence.

    Args:
        input_features: F, the number of input features.
        state_size: S, the size of the state.

    Attributes:
        weights: ``(3S, S + F)``, uniform between −1/√S and 1/√S.
        bias: ``(1, 3S)``, likewise.
    """

    def __init__(self, input_features: int, state_size: int) -> None:
        super().__init__()
        self.input_features = checks.check_count("input_features", input_features)
        self.state_size = checks.check_count("state_size", state_size)
        gates, columns = 3 * self.state_size, self.input_features + self.state_size
        self.weights = nn.Parameter(torch.empty(gates, columns))
        self.bias = nn.Parameter(torch.empty(1, gates))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new parameters."""
        bound = 1 / math.sqrt(self.state_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, input: Any, state: Any = None) -> Any:
        """Run a step or a sequence.

        Args:
            input: ``(B, F)`` for a step, ``(T, B, F)`` for a sequence.
            state: the initial ``h`` and ``cell``, a pair of tensors; zeros by default.

        Returns:
            The result of :func:`lltm` for a step, of :func:`lltm_sequence` for a sequence.
        """
        sequence = isinstance(input, Tensor) and input.dim() == 3
        function = lltm_sequence if sequence else lltm
        if isinstance(state, (tuple, list)) and len(state) == 2:
            return function(input, self.weights, self.bias, state[0], state[1])
        if state is None and isinstance(input, Tensor):
            rows = input.shape[-2] if input.dim() > 1 and not input.is_nested else 0
            zeros = input.new_zeros(rows, self.state_size)
            return function(input, self.weights, self.bias, zeros, zeros)
        got = "None" if state is None else type(state).__name__
        raise ArgumentTypeError(
            f"input must be a torch.Tensor and state a pair of them, h and cell, got "
            f"{type(input).__name__} and {got}"
        )

    def extra_repr(self) -> str:
        """The sizes, for ``print(module)``."""
        return f"input_features={self.input_features}, state_size={self.state_size}"


# ---- checks -------------------------------------------------------------------


def _checked(
    input: Tensor, weights: Tensor, bias: Tensor, h: Tensor, cell: Tensor, dim: int
) -> tuple[Tensor, ...]:
    if checks.ready(h, input, weights, bias, cell) and _fits(input, weights, bias, h, cell, dim):
        return input, weights, bias, h, cell
    tensors = {"input": input, "weights": weights, "bias": bias, "h": h, "cell": cell}
    tensors = checks.autocast(tensors)
    checks.same_kind_of_parts(**tensors)
    input, weights, bias, h, cell = tensors.values()
    if _fits(input, weights, bias, h, cell, dim):
        return input, weights, bias, h, cell
    if input.dim() != dim:
        form = "(batch, features)" if dim == 2 else "(time, batch, features)"
        raise ArgumentError(f"input must have shape {form}, got {list(input.shape)}")
    if h.dim() != 2 or h.shape[0] != input.shape[-2] or h.shape[1] == 0:
        raise ArgumentError(
            f"h must have shape ({input.shape[-2]}, state_size), as input has a batch of "
            f"{input.shape[-2]}, got {list(h.shape)}"
        )
    size, features = h.shape[1], input.shape[-1]
    for name, tensor, shape in (
        ("cell", cell, [len(h), size]),
        ("weights", weights, [3 * size, size + features]),
    ):
        if list(tensor.shape) != shape:
            raise ArgumentError(
                f"{name} must have shape {shape} for a state of {size} and {features} input "
                f"features, got {list(tensor.shape)}"
            )
    raise ArgumentError(
        f"bias must have shape {[1, 3 * size]} or {[3 * size]} for a state of {size}, "
        f"got {list(bias.shape)}"
    )


_checked_step = functools.partial(_checked, dim=2)


def _fits(input: Tensor, weights: Tensor, bias: Tensor, h: Tensor, cell: Tensor, dim: int) -> bool:
    shape, inputs, gates = h.shape, input.shape, bias.shape
    if len(shape) != 2 or len(inputs) != dim or cell.shape != shape:
        return False
    batch, size = shape
    return (
        size > 0
        and inputs[-2] == batch
        and weights.shape == (3 * size, size + inputs[-1])
        and gates[-1:] == (3 * size,)
        and (len(gates) == 1 or gates == (1, 3 * size))
    )


# ---- the declarations ----------------------------------------------------------------------------


def _definition(
    input: Tensor, weights: Tensor, bias: Tensor, h: Tensor, cell: Tensor
) -> tuple[Tensor, Tensor]:
    """The pure-torch path: the output of the step, or of all steps of a sequence; the last cell."""
    dtype = cell.dtype
    cell = checks.widened(cell)
    outputs = []
    for step in input if input.dim() == 3 else [input]:
        gates = F.linear(torch.cat((h, step), 1), weights, bias.reshape(-1))
        input_gate, output_gate, candidate = checks.widened(gates).chunk(3, 1)
        cell = cell + F.elu(candidate) * input_gate.sigmoid()
        h = (cell.tanh() * output_gate.sigmoid()).to(dtype)
        outputs.append(h)
    return (torch.stack(outputs) if input.dim() == 3 else h), cell.to(dtype)


_ARGUMENTS = ["input", "weights", "bias", "h", "cell"]

_step = FusedOp(
    "lltm",
    _definition,
    results=["new_h", "new_cell"],
    saved=["gates"],
    backward=[*_ARGUMENTS, "gates"],
    shapes=lambda input, weights, bias, h, cell: (
        input.new_empty(h.shape),
        input.new_empty(h.shape),
        input.new_empty(len(h), 3 * h.shape[1]),
    ),
    title="LLTM",
)
_sequence = FusedOp(
    "lltm_sequence",
    _definition,
    results=["output", "last_cell"],
    saved=["cells", "gates"],
    backward=[*_ARGUMENTS, "output", "cells", "gates"],
    shapes=lambda input, weights, bias, h, cell: (
        input.new_empty(len(input), *h.shape),
        input.new_empty(h.shape),
        # In the dtype of the sums, because the backward pass needs all digits.
        input.new_empty(len(input), *h.shape, dtype=checks.widened(input).dtype),
        input.new_empty(len(input), len(h), 3 * h.shape[1]),
    ),
    source="lltm",
)

LLTMFunction = _step.Function


def samples() -> Iterator[checks.Sample]:
    """The inputs at which ``jitops check`` checks the gradients."""
    parameters = (torch.randn(9, 5), torch.randn(1, 9), torch.randn(2, 3), torch.randn(2, 3))
    yield "step", lltm, (torch.randn(2, 2), *parameters)
    yield "sequence", lltm_sequence, (torch.randn(4, 2, 2), *parameters)
