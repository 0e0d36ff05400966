"""NumPy and SciPy functions as differentiable torch ops.

A function on arrays, and another one for its gradient, become an op on tensors of any device and
dtype. This module handles devices, dtypes, memory and autograd for all of them. Arrays are computed
on the CPU, so use this for functions that torch lacks, not for speed.
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
    """Make a torch op from a NumPy function and its gradient.

    Args:
        forward: ``forward(*arrays, **keywords)`` returns an array, or a tuple of arrays.
        backward: ``backward(*gradients, *arrays, **keywords)`` takes a gradient for each output of
            ``forward``, then the arguments of ``forward``. The gradient of an unused output, or of
            one that was ``None``, is zeros. It returns a gradient for each array, as a tuple, or as
            one array if there is one. ``None`` stands for an array without a gradient, such as an
            array of integers. To differentiate twice, give an op that :func:`from_numpy` made
            from a function and its gradient. Without ``backward``, the op has no gradient.
        name: the name in messages; by default that of ``forward``.

    Returns:
        A :class:`NumpyOp`. Call it with tensors as positional arguments and anything else as
        keyword arguments.

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
    """An op made by :func:`from_numpy`. Call it with tensors and keywords.

    Its functions get read-only views of CPU tensors, and copies of others. bfloat16 and float16
    arrive as float32. Real results have the dtype of the first floating input and the device of the
    first input. Integer and boolean results keep their dtype and have no gradient. Infinities and
    NaN cause no warning, as in tensor code.

    Raises:
        ArgumentTypeError: a positional argument is not a tensor; a keyword argument is a tensor,
            whose gradient would be dropped; a function does not return real arrays.
        ArgumentError: no tensor at all, tensors on several devices, or a gradient whose shape is
            not that of its input.
        GradientError: a gradient is requested that the op does not have.

    Note:
        Differentiable one time more than ``backward``. :func:`torch.func.grad` works, and
        :func:`~torch.func.vmap` calls the function in a loop. Forward mode does not work.
        :func:`torch.compile` breaks the graph around it.
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
        """Apply the op to tensors."""
        return self._apply(tensors, keywords, none_allowed=False)

    # torch.compile would replace NumPy's functions by torch's. torch.compiler.disable does the
    # same as this decorator, but it imports torch._dynamo at once.
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
        """Run as the backward of another op, and check the gradients against that op's inputs."""
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
                    f"{self.name} must return an array for input {place}, because its gradient is "
                    f"requested, got None"
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
    """One call of an op: everything but the tensors."""

    def __init__(self, op: NumpyOp, keywords: dict[str, Any], none_allowed: bool) -> None:
        self.op = op
        self.keywords = keywords
        self.none_allowed = none_allowed  # a gradient may be None
        self.single = True  # the function returned one array, not a tuple

    def on(self, tensors: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Run the function on arrays; its results, as tensors."""
        arrays = [conversions.to_array(tensor) for tensor in tensors]
        import numpy as np

        with np.errstate(all="ignore"):  # no warning for infinities and NaN, as in tensor code
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
    """The autograd Function of every :class:`NumpyOp`."""

    @staticmethod
    def forward(call: _Call, *tensors: Tensor) -> tuple[Tensor | None, ...]:
        """Run the function on arrays."""
        return call.on(tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        """Save the inputs, because the backward function takes them too."""
        ctx.call, *tensors = inputs
        ctx.save_for_backward(*tensors)
        results = [result for result in output if result is not None]
        ctx.mark_non_differentiable(*(x for x in results if not x.is_floating_point()))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Run the backward op, which is differentiable if it has a backward of its own."""
        op, tensors = ctx.call.op, ctx.saved_tensors
        if op.backward is None:
            raise GradientError(f"{op.name} has no backward function, but a gradient is requested")
        if any(grad is None for grad in grads):  # an output that is a gradient may have been None
            like = next(grad for grad in grads if grad is not None)
            its = zip(grads, tensors[-len(grads) :], strict=True)
            grads = tuple(like.new_zeros(t.shape) if grad is None else grad for grad, t in its)
        needed = ctx.needs_input_grad[1:]
        return None, *op.backward.gradients(grads, tensors, needed, ctx.call.keywords)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], call: _Call, *tensors: Tensor) -> Any:
        """Call the function once for each element, because NumPy cannot batch it."""
        pairs = list(zip(tensors, in_dims[1:], strict=True))
        count = info.batch_size

        def element(index: int) -> Any:
            at = (t if dim is None else t.select(dim, index) for t, dim in pairs)
            return NumpyFunction.apply(call, *at)

        if count == 0:  # run on one element of zeros, to learn shapes and dtypes
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
