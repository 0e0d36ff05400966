"""Declare an op once, and derive torch's operators and the autograd Function from that.

A kernel is compiled code, or a Python function that calls torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ops._core import autograd, dtensors, graph_kernels
from ops._core.dispatch import Op, built_in
from ops._core.functions import function_of
from ops._core.signatures import Signature

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
        constants: names of the tensors, among arguments and results, that have no gradient. If all
            are constants, there is no backward kernel. Then the caller detaches the arguments.
        shapes: for an op with compiled kernels: the results and saved tensors of the forward
            kernel, with no content, from the arguments of the definition.
        tensor_code: the forward and the backward kernel of the pure-torch path, or the forward
            kernel alone: then gradients that it has not formed are those of the definition. Without
            ``tensor_code`` that path runs the definition. Its saved tensors may differ in shape
            and dtype from those of the compiled kernels.
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
        signature = Signature(definition, results, saved, backward, constants, formed, factor)
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
            self.Function, self._run_tensor_code = function_of(
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
            if signature.differentiable:
                autograd.define(
                    f"{name}_backward{signature.backward_schema}",
                    graph_kernels.backward_of(self.op, name),
                    signature.gradient_shapes(),
                )
                kernels = [getattr(torch.ops.jitops, f"{name}_{one}").default for one in PASSES]
                self.Function, self._run_kernels = function_of(
                    f"{title}Function", signature, *kernels
                )
            else:
                self._run_kernels = getattr(torch.ops.jitops, f"{name}_forward").default
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


def _opaque(
    name: str,
    signature: Signature,
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
