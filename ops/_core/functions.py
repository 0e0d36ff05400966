"""The autograd Function over the forward and the backward kernel of an op.

It uses the combined ``forward(ctx, ...)`` rather than ``setup_context``: torch binds the arguments
of the latter by :mod:`inspect` at every call, nine microseconds where a small loss takes forty.
:mod:`torch.func`, which needs ``setup_context``, runs on the pure-torch path instead.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ops._core import autograd
from ops._core.signatures import Signature


def _picker(places: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """A function that returns the values at these places, without a loop in Python."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    return lambda values: tuple(values[place] for place in places)


def function_of(
    name: str,
    signature: Signature,
    forward: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
) -> tuple[type[torch.autograd.Function], Callable[..., Any]]:
    """The autograd Function over the kernels, and the function that applies it to arguments.

    It takes the parameters as one tuple, behind the tensors: torch looks at each argument.
    """
    tensors, count, results = signature.tensors, signature.count, signature.results
    kept, differentiable = signature.kept, signature.differentiable
    constant_results = signature.constant_results
    kept_and_parameters = [*kept, *range(tensors, count)]
    pick_kept = _picker(kept)
    pick_taken = _picker([kept_and_parameters.index(place) for place in signature.backward])
    pick_arguments = _picker([kept_and_parameters.index(place) for place in differentiable])
    pick_formed = _picker([kept_and_parameters.index(place) for place in signature.formed])
    pick_factor = _picker([kept_and_parameters.index(place) for place in signature.factor])
    pick_needed = _picker(differentiable)
    has_parameters, several, forms = count > tensors, results > 1, bool(signature.formed)
    all_differentiable = differentiable == list(range(tensors))

    class Function(torch.autograd.Function):
        """Both passes fused; the backward pass is differentiable."""

        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            """Keep the tensors that the backward pass takes."""
            if has_parameters:
                ctx.parameters = arguments[-1]
                arguments = (*arguments[:-1], *arguments[-1])
            outputs = forward(*arguments)
            values = (*arguments, outputs) if isinstance(outputs, Tensor) else arguments + outputs
            ctx.save_for_backward(*pick_kept(values))
            if forms:
                ctx.hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
            if constant_results:
                ctx.mark_non_differentiable(*[outputs[place] for place in constant_results])
            if several:
                ctx.set_materialize_grads(False)  # an unused result gives None
                return values[count : count + results]
            return values[count]

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            """Compute the gradients that are needed, and no others."""
            if several:
                pairs = enumerate(grads)
                grads = tuple(grad for place, grad in pairs if place not in constant_results)
                if all(grad is None for grad in grads):
                    return (None,) * (tensors + has_parameters)
            values = ctx.saved_tensors
            if has_parameters:
                values += ctx.parameters
            needed = pick_needed(ctx.needs_input_grad)
            computed: list[Tensor] | None = None
            recorded = autograd.needs_torch_backward(*grads)
            if forms and not recorded:
                computed = _multiplied(
                    not ctx.hooked,
                    pick_formed(values),
                    pick_arguments(values),
                    needed,
                    *grads,
                    *pick_factor(values),
                )
            if computed is None:
                if recorded or backward is None:
                    named = dict(zip(kept_and_parameters, values, strict=True))
                    arguments = [named[place] for place in range(count)]
                    computed = autograd.differentiable(
                        signature.definition, arguments, differentiable, needed, grads,
                        constant_results,
                    )  # fmt: skip
                else:
                    computed = backward(*grads, *pick_taken(values), *needed)
            if all_differentiable and len(computed) == tensors:
                return (*computed, None) if has_parameters else tuple(computed)
            rest = iter(computed)
            gradients: list[Tensor | None] = [None] * (tensors + has_parameters)
            for place, need in zip(differentiable, needed, strict=True):
                if need:
                    gradients[place] = next(rest)
            return tuple(gradients)

    # A class of its own, since torch names the node of the backward pass after the class.
    function: Any = type(name, (Function,), {})

    def apply(*arguments: Any) -> Any:
        if has_parameters:
            return autograd.apply(function, *arguments[:tensors], arguments[tensors:])
        return autograd.apply(function, *arguments)

    return function, apply


def _multiplied(
    ours: bool,
    formed: Sequence[Tensor],
    arguments: Sequence[Tensor],
    needed: Sequence[bool],
    grad: Any,
    factor: Tensor | None = None,
) -> list[Tensor] | None:
    """The formed gradients times ``grad``, or ``None`` if one that is needed was not formed."""
    wanted = [
        (one, argument)
        for one, argument, need in zip(formed, arguments, needed, strict=True)
        if need
    ]
    if any(one.shape != argument.shape for one, argument in wanted):
        return None
    grad = grad if factor is None else grad * factor
    # The graph does not need them again, if it is not retained. Hooks on saved tensors may give
    # back memory of theirs. Graphs of torch.compile record this code with tensors of other types,
    # and decide for themselves where results are stored.
    if (
        ours
        and all(type(one) is Tensor for one, _ in wanted)
        and not torch._C._autograd._get_current_graph_task_keep_graph()
    ):
        return [one.mul_(grad).to(argument.dtype) for one, argument in wanted]
    return [(one * grad).to(argument.dtype) for one, argument in wanted]
