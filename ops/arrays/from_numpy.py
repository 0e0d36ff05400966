"""NumPy and SciPy functions as differentiable torch ops.

A function and another for its gradient, both on arrays, become an op on tensors of any device and
dtype; all that lies in between (devices, dtypes, memory, autograd) is done once, here. The arrays
are computed on the CPU: this is for what torch does not have, not for speed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from ops._errors import ArgumentError, ArgumentTypeError, GradientError
from ops.arrays import conversions

__all__ = ["NumpyOp", "from_numpy"]


def from_numpy(
    forward: Callable[..., Any],
    backward: Callable[..., Any] | NumpyOp | None = None,
    *,
    name: str | None = None,
) -> NumpyOp:
    """Make a torch op of a NumPy function and its gradient.

    Args:
        forward: ``forward(*arrays, **keywords)`` returns an array, or a tuple of arrays.
        backward: ``backward(*gradients, *arrays, **keywords)`` takes a gradient for each output of
            ``forward`` (zeros for one that is not used, or that was ``None``), then what
            ``forward`` took. It returns a gradient for each array: a tuple of arrays, or for one
            array the array. ``None`` stands for an array without a gradient, such as one of
            integers. To differentiate twice, give an op that :func:`from_numpy` made of a pair in
            its turn. Without ``backward``, asking for a gradient is an error.
        name: for messages; the name of ``forward`` by default.

    Returns:
        The op, to be called with tensors as positional and anything else as keyword arguments.

    Raises:
        ArgumentTypeError: ``forward`` or ``backward`` cannot be called.

    Example:
        >>> import numpy as np
        >>> sinc = from_numpy(np.sinc, lambda g, x: g * (np.cos(np.pi * x) - np.sinc(x)) / x)
        >>> sinc(torch.tensor([0.5], requires_grad=True))
        tensor([0.6366], grad_fn=<NumpyFunctionBackward>)
    """
    return NumpyOp(forward, backward, name=name)


class NumpyOp:
    """What :func:`from_numpy` makes. Call it with tensors and keywords.

    The arrays are read-only views of the tensors where these are on the CPU, and copies elsewhere;
    bfloat16 and float16 come as float32. Real results come back in the dtype of the first floating
    input and on the device of the first input; results of integers or booleans keep their dtype and
    have no gradient. Infinities and NaN cause no warning, as in tensor code.

    Raises:
        ArgumentTypeError: a positional argument is no tensor, a keyword argument is one (its
            gradient would be dropped), or a function returns something else than real arrays.
        ArgumentError: no tensor at all, tensors on several devices, or a gradient of another shape
            than its input.
        GradientError: a gradient is asked for, and there is none to be had.

    Note:
        Differentiable once, or as often as ``backward`` is; under :func:`torch.func.grad` and
        :func:`~torch.func.vmap` (which loops) too, not in forward mode. :func:`torch.compile`
        breaks the graph around it.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        backward: Callable[..., Any] | NumpyOp | None = None,
        *,
        name: str | None = None,
    ) -> None:
        for argument, value in (("forward", forward), ("backward", backward)):
            if not callable(value) and not (argument == "backward" and value is None):
                raise ArgumentTypeError(f"{argument} must be callable, got {type(value).__name__}")
        self.forward = forward
        self.name = name or str(getattr(forward, "__name__", type(forward).__name__))
        self.backward: NumpyOp | None
        if backward is None or isinstance(backward, NumpyOp):
            self.backward = backward
        else:
            self.backward = NumpyOp(backward, name=f"the backward of {self.name}")

    def __call__(self, *tensors: Tensor, **keywords: Any) -> Any:
        """Apply the op."""
        return self._apply(tensors, keywords, none_allowed=False)

    # torch.compile would make something else of NumPy. What torch.compiler.disable does, but that
    # imports torch._dynamo at once.
    @_disable_dynamo
    def _apply(
        self, tensors: Sequence[Tensor], keywords: dict[str, Any], none_allowed: bool
    ) -> Any:
        conversions.check(self.name, tensors, keywords)
        call = _Call(self, keywords, none_allowed)
        results = NumpyFunction.apply(call, *tensors)
        return results[0] if call.single else results

    def __repr__(self) -> str:
        return f"from_numpy({self.name})"

    def gradients(
        self,
        grads: Sequence[Tensor],
        tensors: Sequence[Tensor],
        needed: Sequence[bool],
        keywords: dict[str, Any],
    ) -> list[Tensor | None]:
        """As the backward of another op: what it returns, checked against that op's inputs."""
        returned = self._apply((*grads, *tensors), keywords, none_allowed=True)
        results = returned if isinstance(returned, tuple) else (returned,)
        if len(results) != len(tensors):
            raise ArgumentTypeError(
                f"{self.name} must return a gradient for each of the {len(tensors)} inputs, "
                f"got {len(results)}"
            )
        gradients: list[Tensor | None] = []
        for place, (result, tensor, need) in enumerate(zip(results, tensors, needed, strict=True)):
            if not need:
                gradients.append(None)
            elif result is None:
                raise GradientError(
                    f"{self.name} returned None for input {place}, whose gradient is asked for"
                )
            elif result.shape != tensor.shape:
                raise ArgumentError(
                    f"{self.name} must return a gradient of shape {list(tensor.shape)} for input "
                    f"{place}, got {list(result.shape)}"
                )
            else:
                gradients.append(result.to(tensor.dtype))
        return gradients


class _Call:
    """One call of an op: what is passed along beside the tensors."""

    def __init__(self, op: NumpyOp, keywords: dict[str, Any], none_allowed: bool) -> None:
        self.op = op
        self.keywords = keywords
        self.none_allowed = none_allowed  # of a gradient
        self.single = True  # whether the function returned an array, not a tuple of them

    def on(self, tensors: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """The function's results, as tensors."""
        arrays = [conversions.to_array(tensor) for tensor in tensors]
        import numpy as np

        with np.errstate(all="ignore"):  # infinities and NaN pass as in tensor code
            returned = self.op.forward(*arrays, **self.keywords)
        self.single = not isinstance(returned, tuple)
        results = (returned,) if self.single else returned
        floating = [tensor.dtype for tensor in tensors if tensor.is_floating_point()]
        dtype = floating[0] if floating else None
        device = tensors[0].device
        return tuple(
            None
            if value is None and self.none_allowed
            else conversions.to_tensor(self.op.name, value, dtype).to(device)
            for value in results
        )


class NumpyFunction(torch.autograd.Function):
    """The autograd side of every :class:`NumpyOp`."""

    @staticmethod
    def forward(call: _Call, *tensors: Tensor) -> tuple[Tensor | None, ...]:
        """Run the function on arrays."""
        return call.on(tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        """Keep the inputs, for the backward function takes them again."""
        ctx.call, *tensors = inputs
        ctx.save_for_backward(*tensors)
        results = [result for result in output if result is not None]
        ctx.mark_non_differentiable(*(x for x in results if not x.is_floating_point()))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Run the backward op, which is differentiable if it was made of a pair."""
        op, tensors = ctx.call.op, ctx.saved_tensors
        if op.backward is None:
            raise GradientError(f"{op.name} has no backward function, and a gradient is asked for")
        if any(grad is None for grad in grads):  # of a gradient that was None in its turn
            like = next(grad for grad in grads if grad is not None)
            its = zip(grads, tensors[-len(grads) :], strict=True)
            grads = tuple(like.new_zeros(t.shape) if grad is None else grad for grad, t in its)
        needed = ctx.needs_input_grad[1:]
        return None, *op.backward.gradients(grads, tensors, needed, ctx.call.keywords)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], call: _Call, *tensors: Tensor) -> Any:
        """One call an element: NumPy functions know nothing of batches that are not theirs."""
        pairs = list(zip(tensors, in_dims[1:], strict=True))
        count = info.batch_size

        def element(index: int) -> Any:
            at = (t if dim is None else t.select(dim, index) for t, dim in pairs)
            return NumpyFunction.apply(call, *at)

        if count == 0:  # of an element of zeros, to know shapes and dtypes, and then of none
            pairs = [
                (t if dim is None else t.new_zeros((*t.shape[:dim], 1, *t.shape[dim + 1 :])), dim)
                for t, dim in pairs
            ]
        results = [element(index) for index in range(max(1, count))]
        stacked = [
            None if places[0] is None else torch.stack(places)[:count]
            for places in zip(*results, strict=True)
        ]
        return tuple(stacked), tuple(None if result is None else 0 for result in stacked)
