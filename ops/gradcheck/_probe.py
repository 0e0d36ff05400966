"""A subject on one back end: results, gradients, and the random weights both are seen with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ops._core.selection import use_backend
from ops.gradcheck._differences import Comparison, Tolerance
from ops.gradcheck._subject import Subject


@dataclass(frozen=True)
class Outcome:
    """What a check returns: nothing is wrong unless ``problem`` says so."""

    problem: str = ""
    comparison: Comparison | None = None


@dataclass(frozen=True)
class Probe:
    """One subject on one back end, and how closely to look at it."""

    subject: Subject
    backend: str
    device: torch.device
    tolerance: Tolerance
    at_most: int
    seed: int

    @property
    def variable(self) -> list[bool]:
        """Which of the tensors have gradients."""
        return self.subject.variable

    @property
    def names(self) -> list[str]:
        """The names of those."""
        return [n for n, var in zip(self.subject.names, self.variable, strict=True) if var]

    def call(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The subject's results."""
        with use_backend(self.backend):
            return self.subject(tensors)

    def at(self, dtype: torch.dtype | None = torch.float64) -> list[Tensor]:
        """Fresh inputs; ``None``: of the dtypes given."""
        return self.subject.at(dtype, self.device)

    def variables(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Those of the tensors that have gradients."""
        return [t for t, var in zip(tensors, self.variable, strict=True) if var]

    def leaves(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The same tensors, the variable ones requiring gradients."""
        return [
            t.detach().requires_grad_(var) for t, var in zip(tensors, self.variable, strict=True)
        ]

    def seeds(self, results: Sequence[Tensor]) -> list[Tensor]:
        """Random weights of the results: the gradients that arrive at them."""
        generator = torch.Generator().manual_seed(self.seed)
        return [
            torch.randn(y.shape, dtype=torch.float64, generator=generator).to(y.device, y.dtype)
            for y in results
        ]

    def forward_and_backward(self, tensors: Sequence[Tensor]) -> list[Tensor | None]:
        """Results, and the gradients of the variables."""
        leaves = self.leaves(tensors)
        results = self.call(leaves)
        its = gradients(results, self.variables(leaves), self.seeds(results))
        return [*(y.detach() for y in results), *its]

    def labels(self, count: int) -> list[str]:
        """``count`` values of :meth:`forward_and_backward`, or its last ones, in words."""
        results = count - len(self.names)
        first = ["the result"] if results == 1 else [f"result {i}" for i in range(results)]
        return [*first, *(f"the gradient of {name}" for name in self.names)]


def gradients(
    results: Sequence[Tensor],
    variables: Sequence[Tensor],
    seeds: Sequence[Tensor | None],
    **keywords: Any,
) -> tuple[Tensor | None, ...]:
    """Of the results weighted by ``seeds``; a result whose seed is ``None`` takes no part."""
    pairs = [
        (result, seed)
        for result, seed in zip(results, seeds, strict=True)
        if seed is not None and result.requires_grad
    ]
    if not pairs:
        return (None,) * len(variables)
    outputs, weights = zip(*pairs, strict=True)
    return torch.autograd.grad(
        outputs, variables, weights, retain_graph=True, allow_unused=True, **keywords
    )
