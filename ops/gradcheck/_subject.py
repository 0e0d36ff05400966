"""The subject of a gradient check: any function or module, as a function of a list of tensors."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ops._errors import ArgumentError, ArgumentTypeError


class Subject:
    """A function with its arguments, or a module with its arguments and parameters.

    Attributes:
        name: the name of the function.
        arguments: the number of tensors that are arguments.
        names: the names of the tensors: arguments, then parameters and buffers.
        chosen: whether there are several floating arguments, and none requires a gradient.
        variable: for each tensor, whether it has a gradient. Parameters and arguments that require
            one do. If no argument requires one, all floating arguments do.
    """

    def __init__(
        self, function: Callable[..., Any], arguments: Sequence[Any], name: str | None = None
    ) -> None:
        if not callable(function):
            raise ArgumentTypeError(
                f"function must be a function or a module, got {type(function).__name__}"
            )
        self.function = function
        named: Any = function
        called: Callable[..., Any] = function
        owner = getattr(function, "__self__", None)
        if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
            named, called = owner, functools.partial(owner.forward, None)  # without its ctx
        elif isinstance(function, nn.Module):
            called = function.forward
        self.name = name or str(getattr(named, "__name__", type(named).__name__))
        found, self._spec = pytree.tree_flatten_with_path(tuple(arguments))
        parameters = _parameters_of(called, len(arguments))
        self._leaves = [leaf for _, leaf in found]
        self._places = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
        # The first key of a path is the argument's place: the arguments are a tuple.
        names = [parameters[path[0].idx] + pytree.keystr(path[1:]) for path, _ in found]  # type: ignore[attr-defined]
        self.names = [names[place] for place in self._places]
        self.tensors: list[Tensor] = [self._leaves[place] for place in self._places]
        for argument, tensor in zip(self.names, self.tensors, strict=True):
            if tensor.is_complex() or tensor.layout is not torch.strided:
                raise ArgumentError(
                    f"{argument} must be a dense real tensor to be checked, got {tensor.dtype} and "
                    f"layout {tensor.layout}"
                )
        self.arguments = len(self.tensors)
        told = any(tensor.requires_grad for tensor in self.tensors)
        self.variable = [
            tensor.is_floating_point() and (tensor.requires_grad or not told)
            for tensor in self.tensors
        ]
        self.chosen = not told and sum(self.variable) > 1
        self._state: list[str] = []
        if isinstance(function, nn.Module):
            its = [*function.named_parameters(), *function.named_buffers()]
            self._state = [key for key, _ in its]
            self.names += self._state
            self.tensors += [tensor for _, tensor in its]
            self.variable += [tensor.requires_grad for _, tensor in its]
        if not any(self.variable):
            raise ArgumentError(
                "inputs must have at least one floating tensor, because integers have no gradient, "
                "got none"
            )

    def at(self, dtype: torch.dtype | None, device: torch.device) -> list[Tensor]:
        """Contiguous copies without gradients; floating ones have this dtype, or the given one."""
        return [
            tensor.detach()
            .to(device, dtype if tensor.is_floating_point() else None)
            .clone(memory_format=torch.contiguous_format)
            for tensor in self.tensors
        ]

    def __call__(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The floating results for these tensors, which replace the given ones."""
        leaves = list(self._leaves)
        for place, tensor in zip(self._places, tensors, strict=False):
            leaves[place] = tensor
        arguments = pytree.tree_unflatten(leaves, self._spec)
        if isinstance(self.function, nn.Module):
            # Buffers are copied, because a module may update them.
            its = zip(self._state, tensors[len(self._places) :], strict=True)
            state = {key: t if t.requires_grad else t.clone() for key, t in its}
            returned = torch.func.functional_call(self.function, state, arguments)
        else:
            returned = self.function(*arguments)
        tensors = [leaf for leaf in pytree.tree_leaves(returned) if isinstance(leaf, Tensor)]
        if any(tensor.is_complex() for tensor in tensors):
            raise ArgumentTypeError(
                f"{self.name} must return real tensors to be checked, got a complex one "
                f"(convert it with torch.view_as_real)"
            )
        results = tuple(tensor for tensor in tensors if tensor.is_floating_point())
        if not results:
            raise ArgumentTypeError(
                f"{self.name} must return at least one floating tensor, "
                f"got {type(returned).__name__}"
            )
        return results

    def __str__(self) -> str:
        return ", ".join(
            f"{name} {list(tensor.shape)}"
            for name, tensor in zip(self.names, self.tensors, strict=True)
        )


def _parameters_of(function: Callable[..., Any], count: int) -> list[str]:
    """The names of the first ``count`` positional parameters."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some built-in functions have no signature
        parameters = []
    names = []
    for parameter in parameters:
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
        elif parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}[{place}]" for place in range(count - len(names))]
    return [*names, *(f"input[{place}]" for place in range(len(names), count))]
