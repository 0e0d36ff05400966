"""Declare an op once, and derive torch's operators and the autograd Function from that.

A kernel is compiled code, or a Python function that calls torch.

Functions here use the combined ``forward(ctx, ...)`` rather than ``setup_context``: torch binds the
arguments of the latter by :mod:`inspect` at every call, nine microseconds where a small loss takes
forty. :mod:`torch.func`, which needs ``setup_context``, runs on the pure-torch path instead.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ops._core import autograd, dtensors, graph_kernels
from ops._core.dispatch import Op, built_in

# An annotation of the definition, and the type in torch's schema language.
_TYPES = {"Tensor": "Tensor", "Tensor | None": "Tensor?"}
_TYPES |= {name: name for name in ("float", "int", "bool")}
PASSES = ("forward", "backward")
_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))


class FusedOp:
    """An op that has a pure-torch definition and kernels for both of its passes.

    It may have compiled kernels, kernels of tensor code, or both. Kernels of tensor code are for
    ops where autograd would store or move more memory than the formula needs.

    A call runs the definition under :mod:`torch.func` and in forward mode. Otherwise it runs a
    :class:`torch.autograd.Function` over the kernels of the back end. Graphs of
    :func:`torch.compile` hold the definition, or an operator that stands for the compiled kernels.

    For compiled kernels, FusedOp declares the operators ``jitops::<name>_forward`` and
    ``<name>_backward``, whose kernels the extension registers, and ``jitops::<name>``, which stands
    for both in graphs.

    The forward kernel takes the arguments of the definition, and returns its results and then the
    tensors that are saved. The backward kernel takes a gradient for each differentiable result, the
    arguments, results and saved tensors that ``backward`` names, and for each differentiable
    argument whether its gradient is needed. It returns the gradients that are.

    Args:
        name: the name of the op.
        definition: the op in tensor code that autograd differentiates. Its annotations are the
            schema: ``Tensor``, ``Tensor | None``, ``float``, ``int`` or ``bool``. It returns one
            tensor or a tuple.
        results: names for the tensors that the definition returns.
        saved: names for the tensors that the forward kernel returns beside them.
        backward: names of the values that the backward kernel takes, in its order.
        constants: names of the tensors, among arguments and results, that have no gradient.
        shapes: for an op with compiled kernels: the results and saved tensors of the forward
            kernel, with no content, from the arguments of the definition.
        tensor_code: the forward and the backward kernel of the pure-torch path, or the forward
            kernel alone: then gradients that it has not formed are those of the definition. Without
            ``tensor_code`` that path runs the definition. What these two save may differ in shape
            and dtype from what the compiled kernels save.
        opaque_shapes: like ``shapes``, for the forward kernel of tensor code. With it, graphs of
            :func:`torch.compile` hold these kernels as operators that it does not look into. It is
            for definitions that stay slow, or take much memory, when torch.compile fuses them.
        formed: names of saved tensors, one for each differentiable argument: its gradient for a
            ``grad`` of 1, if the forward kernel has formed it, or else an empty tensor. If all that
            are needed were formed, the backward pass multiplies them, and runs no kernel.
        factor: the name of a saved scalar by which the formed gradients are multiplied too.
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
        backward: Sequence[str] = (),
        constants: Sequence[str] = (),
        formed: Sequence[str] = (),
        factor: str | None = None,
        shapes: Callable[..., Any] | None = None,
        tensor_code: Sequence[Callable[..., Any]] | None = None,
        opaque_shapes: Callable[..., Any] | None = None,
        source: str | None = None,
        title: str | None = None,
    ) -> None:
        if shapes is None and tensor_code is None:
            raise ValueError(f"{name} has neither compiled kernels nor kernels of tensor code")
        signature = _Signature(definition, results, saved, backward, constants, formed, factor)
        title = title or "".join(part.title() for part in name.split("_"))
        self.name = name
        self.definition = definition
        self.op: Op | None = None
        self.Function: type[torch.autograd.Function]
        self._tensors = signature.tensors
        # The pure-torch path, outside of graphs and inside.
        self._run_tensor_code = self._trace_tensor_code = definition
        forming = tensor_code[0] if tensor_code is not None and formed else None
        if tensor_code is not None:
            suffix = "Function" if shapes is None else "TorchFunction"
            if opaque_shapes is not None:
                tensor_code = _opaque(f"{name}_in_torch", signature, tensor_code, opaque_shapes)
            self.Function, self._run_tensor_code = _function(
                f"{title}{suffix}", signature, *tensor_code
            )
            if opaque_shapes is not None:
                autograd.define_in_graphs(
                    f"{name}_in_torch{signature.schema}", self._run_tensor_code
                )
                self._trace_tensor_code = getattr(torch.ops.jitops, f"{name}_in_torch")
        if shapes is not None:
            self.op = built_in(source or name)
            autograd.define(
                f"{name}_forward{signature.forward_schema}",
                graph_kernels.forward_of(self.op, name, definition, shapes, forming),
                shapes,
            )
            autograd.define(
                f"{name}_backward{signature.backward_schema}",
                graph_kernels.backward_of(self.op, name),
                signature.gradient_shapes(),
            )
            kernels = [getattr(torch.ops.jitops, f"{name}_{one}").default for one in PASSES]
            self.Function, self._run_kernels = _function(f"{title}Function", signature, *kernels)
            autograd.define_in_graphs(f"{name}{signature.schema}", self._run_in_graph)
            self._operator_of_graphs = getattr(torch.ops.jitops, name)
            self.op.prepare()

    def __call__(self, *arguments: Any) -> Any:
        """The results, on the back end that the first tensor and the settings choose."""
        if autograd.needs_torch_path():
            return self.definition(*arguments)
        if dtensors.among(arguments[: self._tensors]):
            if self.op is not None:
                self.op.only_torch(arguments[0], dtensors.NO_KERNEL)
            return dtensors.run(self.name, self.definition, *arguments)
        if self.op is None or self.op.backend_for(arguments[0]) == "torch":
            if torch.compiler.is_compiling():
                return self._trace_tensor_code(*arguments)
            # Other classes may not support the out= and in-place calls of tensor code.
            if _PLAIN.issuperset(map(type, arguments[: self._tensors])):
                return self._run_tensor_code(*arguments)
            return self.definition(*arguments)
        if torch.compiler.is_compiling():
            return self._operator_of_graphs(*arguments)
        return self._run_kernels(*arguments)

    def _run_in_graph(self, *arguments: Any) -> Any:
        """The operator that stands for the compiled kernels in graphs, also in other processes."""
        if self.op is None or autograd.needs_torch_path():
            return self.definition(*arguments)
        if self.op.backend_in_graphs(arguments[0]) != "torch":
            return self._run_kernels(*arguments)
        if _PLAIN.issuperset(map(type, arguments[: self._tensors])):
            return self._run_tensor_code(*arguments)
        return self._trace_tensor_code(*arguments)

    def unchecked(self, *arguments: Any, check: Callable[..., object]) -> Any:
        """The results of arguments that only the kernels check, or ``None``.

        ``None`` means that the kernels do not take part in this call. Then the caller checks the
        arguments in Python.

        Args:
            arguments: those of the definition.
            check: checks them in Python, whose errors say more. It is called if the kernels fail.
        """
        first = arguments[0]
        if (
            self.op is None
            or not isinstance(first, Tensor)
            or autograd.needs_torch_path()
            or torch.compiler.is_compiling()
            or self.op.backend_for(first) == "torch"
            or torch.is_autocast_enabled("cpu" if first.is_cpu else "cuda")
            or dtensors.among(arguments[: self._tensors])
        ):
            return None
        try:
            return self._run_kernels(*arguments)
        except (RuntimeError, TypeError):
            check(*arguments)
            raise


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
        formed: Sequence[str],
        factor: str | None,
    ) -> None:
        parameters = inspect.signature(definition).parameters
        for name, one in parameters.items():
            if one.annotation not in _TYPES:
                raise ValueError(
                    f"{name} must be annotated with one of {', '.join(_TYPES)}, "
                    f"got {one.annotation!r}"
                )
        types = {name: _TYPES[one.annotation] for name, one in parameters.items()}
        values = [*types, *results, *saved]
        tensors = [name for name in types if types[name].startswith("Tensor")]
        if list(types)[: len(tensors)] != tensors:
            raise ValueError("the definition must take its tensors first, then its parameters")
        factors = [] if factor is None else [factor]
        for names, allowed in (
            (backward, values),
            (constants, [*tensors, *results]),
            ([*formed, *factors], saved),
        ):
            for name in names:
                if name not in allowed:
                    raise ValueError(f"a name must be one of {', '.join(allowed)}, got {name!r}")
        differentiable = [name for name in tensors if name not in constants]
        grads = [name for name in results if name not in constants]
        if formed and (len(formed) != len(differentiable) or len(grads) != 1):
            raise ValueError(
                "formed must name a gradient for each differentiable argument, of one result"
            )

        def places(names: Sequence[str]) -> list[int]:
            return [values.index(name) for name in names]

        self.definition = definition
        self.tensors, self.count = len(tensors), len(types)
        self.results, self.outputs = len(results), len(results) + len(saved)
        self.differentiable = places(differentiable)
        self.constant_results = [results.index(name) for name in results if name in constants]
        self.backward, self.formed, self.factor = places(backward), places(formed), places(factors)
        # All tensors, because the definition takes them again where the backward pass is
        # differentiated.
        taken = [name for name in backward if name in tensors or name not in types]
        self.kept = sorted({*range(len(tensors)), *places([*taken, *formed, *factors])})

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
        self._backward_takes = [*(f"grad_{name}" for name in grads), *backward]
        self._differentiable = differentiable

    def gradient_shapes(self) -> Callable[..., list[Tensor]]:
        """What makes the results of the backward kernel from its arguments, with no content."""
        places = [self._backward_takes.index(name) for name in self._differentiable]

        def shapes(*arguments: Any) -> list[Tensor]:
            return [
                torch.empty_like(arguments[place], memory_format=torch.contiguous_format)
                for place, need in zip(places, arguments[-len(places) :], strict=True)
                if need
            ]

        return shapes


def _opaque(
    name: str,
    signature: _Signature,
    kernels: Sequence[Callable[..., Any]],
    shapes: Callable[..., Any],
) -> list[Callable[..., Any]]:
    """The kernels of tensor code as operators."""
    schemas = (signature.forward_schema, signature.backward_schema)
    operators = []
    for one, kernel, schema in zip(PASSES, kernels, schemas, strict=False):
        its_shapes = shapes if one == "forward" else signature.gradient_shapes()
        autograd.define(f"{name}_{one}{schema}", kernel, its_shapes)
        operators.append(getattr(torch.ops.jitops, f"{name}_{one}").default)
    return operators


def _tensors(count: int) -> str:
    return "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"


def _picker(places: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """A function that returns the values at these places, without a loop in Python."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    return lambda values: tuple(values[place] for place in places)


def _function(
    name: str,
    signature: _Signature,
    forward: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
) -> tuple[type[torch.autograd.Function], Callable[..., Any]]:
    """The autograd Function over the kernels, and what applies it to an op's arguments.

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
