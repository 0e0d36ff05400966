"""An op with kernels, declared once: all that torch has to know of it follows from the declaration.

Functions here use the combined ``forward(ctx, ...)`` rather than ``setup_context``: torch binds the
arguments of the latter by :mod:`inspect` at every call, nine microseconds where a small loss takes
forty. :mod:`torch.func`, which needs ``setup_context``, runs on the pure-torch path instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ops._core import autograd
from ops._core.dispatch import built_in

# An annotation of the definition, and the type in torch's schema language.
_TYPES = {"Tensor": "Tensor", "Tensor | None": "Tensor?"}
_TYPES |= {name: name for name in ("float", "int", "bool")}
PASSES = ("forward", "backward")


class FusedOp:
    """An op that has a pure-torch definition and kernels for both of its passes.

    It declares the operators ``jitops::<name>_forward`` and ``<name>_backward``, whose kernels the
    extension registers, and ``jitops::<name>``, which stands for both in the graphs of
    :func:`torch.compile`. ``Function`` is the :class:`torch.autograd.Function` over them. A call
    runs the definition, the Function or the operator in graphs.

    The forward kernel takes the arguments of the definition, and returns its results and then the
    tensors that are saved. The backward kernel takes a gradient for each differentiable result, the
    arguments, results and saved tensors that ``backward`` names, and for each differentiable
    argument whether its gradient is needed. It returns the gradients that are.

    Args:
        name: the name of the op.
        definition: the pure-torch path. Its annotations are the schema: ``Tensor``,
            ``Tensor | None``, ``float``, ``int`` or ``bool``. It returns one tensor or a tuple.
        results: names for the tensors that the definition returns.
        saved: names for the tensors that the forward kernel returns beside them.
        backward: names of the values that the backward kernel takes, in its order.
        constants: names of the tensors, among arguments and results, that have no gradient.
        shapes: the results and saved tensors of the forward kernel, with no content, from the
            arguments of the definition.
        source: the stem of the op's files in ``cuda_src``, by default ``name``.
        title: begins the name of the Function, by default ``name`` in CamelCase.
    """

    def __init__(
        self,
        name: str,
        definition: Callable[..., Any],
        *,
        results: Sequence[str],
        saved: Sequence[str] = (),
        backward: Sequence[str],
        constants: Sequence[str] = (),
        shapes: Callable[..., Any],
        source: str | None = None,
        title: str | None = None,
    ) -> None:
        signature = _Signature(definition, results, saved, backward, constants)
        autograd.define(f"{name}_forward{signature.forward_schema}", shapes)
        autograd.define(f"{name}_backward{signature.backward_schema}", signature.gradient_shapes)
        kernels = [getattr(torch.ops.jitops, f"{name}_{one}").default for one in PASSES]
        function = _function(signature, *kernels)
        function.__name__ = title or "".join(part.title() for part in name.split("_"))
        function.__name__ += "Function"
        function.__qualname__ = function.__name__
        autograd.define_in_graphs(f"{name}{signature.schema}", function.apply)
        self.definition = definition
        self.Function: type[torch.autograd.Function] = function
        self.op = built_in(source or name)
        self._in_graphs = getattr(torch.ops.jitops, name)
        self._first = signature.tensors[0]
        self.op.prepare()

    def __call__(self, *arguments: Any) -> Any:
        """The results, on the back end that the first tensor and the settings choose."""
        first = arguments[self._first]
        if autograd.needs_torch_path() or self.op.backend_for(first) == "torch":
            return self.definition(*arguments)
        if torch.compiler.is_compiling():
            return self._in_graphs(*arguments)
        return autograd.apply(self.Function, *arguments)

    def unchecked(self, *arguments: Any) -> Any:
        """The results of arguments that only the kernels' own checks have seen, or ``None``.

        ``None`` means that the kernels do not take part in this call, or refuse the arguments.
        Then the caller checks them in Python, whose errors say more.
        """
        first = arguments[self._first]
        if (
            not isinstance(first, Tensor)
            or autograd.needs_torch_path()
            or torch.compiler.is_compiling()
            or self.op.backend_for(first) == "torch"
            or torch.is_autocast_enabled("cpu" if first.is_cpu else "cuda")
        ):
            return None
        try:
            return autograd.apply(self.Function, *arguments)
        except (RuntimeError, TypeError):
            return None


class _Signature:
    """The values of an op by name and by place.

    A place is a position in the row of all values: arguments, results, saved tensors.
    """

    def __init__(
        self,
        definition: Callable[..., Any],
        results: Sequence[str],
        saved: Sequence[str],
        backward: Sequence[str],
        constants: Sequence[str],
    ) -> None:
        parameters = inspect.signature(definition).parameters
        types = {name: _TYPES[one.annotation] for name, one in parameters.items()}
        values = [*types, *results, *saved]
        tensors = [name for name in types if types[name].startswith("Tensor")]
        differentiable = [name for name in tensors if name not in constants]
        grads = [name for name in results if name not in constants]

        def places(names: Sequence[str]) -> list[int]:
            return [values.index(name) for name in names]

        self.definition = definition
        self.count, self.results, self.outputs = len(types), len(results), len(results) + len(saved)
        self.tensors = places(tensors)
        self.parameters = places([name for name in types if name not in tensors])
        self.differentiable = places(differentiable)
        self.constant_results = [results.index(name) for name in results if name in constants]
        self.backward = places(backward)
        # The definition takes all tensors again where the backward pass is differentiated.
        self.kept = sorted({*self.tensors, *places([n for n in backward if n not in parameters])})

        listed = ", ".join(f"{type_} {name}" for name, type_ in types.items())
        maybe = "?" if len(grads) > 1 else ""  # a result that is not used has no gradient
        takes = [
            *(f"Tensor{maybe} grad_{name}" for name in grads),
            *(f"{types.get(name, 'Tensor')} {name}" for name in backward),
            *(f"bool needs_{name}" for name in differentiable),
        ]
        self.schema = f"({listed}) -> {_tensors(len(results))}"
        self.forward_schema = f"({listed}) -> {_tensors(self.outputs)}"
        self.backward_schema = f"({', '.join(takes)}) -> Tensor[]"
        self._like = [len(grads) + list(backward).index(name) for name in differentiable]

    def gradient_shapes(self, *arguments: Any) -> list[Tensor]:
        """The results of the backward kernel from its arguments, with no content."""
        needed = zip(self._like, arguments[-len(self._like) :], strict=True)
        return [
            torch.empty_like(arguments[place], memory_format=torch.contiguous_format)
            for place, need in needed
            if need
        ]


def _tensors(count: int) -> str:
    return "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"


def _function(
    signature: _Signature, forward: Callable[..., Any], backward: Callable[..., Any]
) -> type[torch.autograd.Function]:
    """The autograd Function over the two kernels."""
    # Local names: a call must not look up an attribute for each.
    count, results, kept = signature.count, signature.results, signature.kept
    parameters, differentiable = signature.parameters, signature.differentiable
    constant_results = signature.constant_results

    class Function(torch.autograd.Function):
        """Both passes fused; the backward pass is differentiable."""

        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            """Keep the tensors that the backward pass takes."""
            outputs = forward(*arguments)
            values = (*arguments, outputs) if isinstance(outputs, Tensor) else arguments + outputs
            ctx.save_for_backward(*[values[place] for place in kept])
            ctx.parameters = [arguments[place] for place in parameters]
            ctx.set_materialize_grads(False)
            if constant_results:
                ctx.mark_non_differentiable(*[outputs[place] for place in constant_results])
            return values[count] if results == 1 else values[count : count + results]

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            """Compute the gradients that are needed, and no others."""
            gradients: list[Tensor | None] = [None] * count
            if constant_results:
                its = enumerate(grads)
                grads = tuple(grad for place, grad in its if place not in constant_results)
            if all(grad is None for grad in grads):
                return tuple(gradients)
            values: list[Any] = [None] * (count + signature.outputs)
            for place, tensor in zip(kept, ctx.saved_tensors, strict=True):
                values[place] = tensor
            for place, value in zip(parameters, ctx.parameters, strict=True):
                values[place] = value
            needed = [ctx.needs_input_grad[place] for place in differentiable]
            if autograd.needs_torch_backward(*grads):
                found = autograd.differentiable(
                    signature.definition,
                    values[:count],
                    differentiable,
                    needed,
                    grads,
                    constant_results,
                )
            else:
                found = backward(*grads, *[values[place] for place in signature.backward], *needed)
            rest = iter(found)
            for place, need in zip(differentiable, needed, strict=True):
                if need:
                    gradients[place] = next(rest)
            return tuple(gradients)

    return Function
