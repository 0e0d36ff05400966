"""The values of an op by name and by place, and the schemas of its operators."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# An annotation of the definition, and the type in torch's schema language.
_TYPES = {"Tensor": "Tensor", "Tensor | None": "Tensor?"}
_TYPES |= {name: name for name in ("float", "int", "bool")}


class Signature:
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


def _tensors(count: int) -> str:
    return "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"
