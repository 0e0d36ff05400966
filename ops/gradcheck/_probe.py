"""A subject on one back end: results, gradients, and the random weights both are seen with."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ops._core.selection import use_backend
from ops.gradcheck._comparison import Comparison, Tolerance
from ops.gradcheck._differ import AGREEMENT
from ops.gradcheck._draws import SameDraws
from ops.gradcheck._subject import Subject
from ops.gradcheck._traits import Traits

NOTHING = contextlib.nullcontext()


@dataclass(frozen=True)
class Outcome:
    """What a check returns: nothing is wrong unless ``problem`` says so."""

    problem: str = ""
    comparison: Comparison | None = None
    note: str = ""


@dataclass(frozen=True)
class Settings:
    """How closely to look.

    Attributes:
        tolerance: of derivatives.
        dtypes: in which to compare with float64.
        at_most: how many elements of an input to look at.
        seed: of the random weights and directions.
    """

    tolerance: Tolerance
    dtypes: tuple[torch.dtype, ...]
    at_most: int
    seed: int


@dataclass(frozen=True)
class Probe:
    """One subject on one back end, and what is known of it."""

    subject: Subject
    backend: str
    device: torch.device
    settings: Settings
    traits: Traits = field(default_factory=Traits)

    @property
    def variable(self) -> list[bool]:
        """Which of the tensors have gradients."""
        return self.subject.variable

    @property
    def names(self) -> list[str]:
        """The names of those."""
        return [n for n, var in zip(self.subject.names, self.variable, strict=True) if var]

    @property
    def same(self) -> float:
        """How far two ways to one result may differ, relative to the largest element."""
        return AGREEMENT.get(self.precision, torch.finfo(self.precision).eps)

    @property
    def precision(self) -> torch.dtype:
        """What the function computes in, in the checks that leave the dtype to the checker."""
        if self.traits.narrow is not None:
            return self.traits.narrow
        if self.traits.wide is not None:
            return self.traits.wide
        given = [t.dtype for t in self.subject.tensors if t.is_floating_point()]
        return max(given, key=lambda dtype: torch.finfo(dtype).eps)

    def call(self, tensors: Sequence[Tensor], seeded: bool = True) -> tuple[Tensor, ...]:
        """The subject's results, with the same random numbers every time if ``seeded``."""
        if self.traits.draws and seeded:
            torch.manual_seed(self.settings.seed)
        with use_backend(self.backend):
            return self.subject(tensors)

    def same_draws(self) -> contextlib.AbstractContextManager[Any]:
        """The same random numbers in each layout and dtype, within a ``with`` block."""
        return SameDraws() if self.traits.draws else NOTHING

    def at(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Fresh inputs, in that dtype; by default in the widest that the function takes."""
        return self.subject.at(dtype or self.traits.wide, self.device)

    def as_given(self) -> list[Tensor]:
        """Fresh inputs, of the dtypes given."""
        return self.subject.at(None, self.device)

    def variables(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Those of the tensors that have gradients."""
        return [t for t, var in zip(tensors, self.variable, strict=True) if var]

    def leaves(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The same tensors, the variable ones requiring gradients."""
        return [
            t.detach().requires_grad_(var) for t, var in zip(tensors, self.variable, strict=True)
        ]

    def others(self, by: float) -> list[Tensor]:
        """Inputs a little way off, as near to zero, or as far from it."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        return [
            t * (1 + by * torch.rand(t.shape, generator=generator).to(t)) if var else t
            for t, var in zip(self.at(), self.variable, strict=True)
        ]

    def seeds(self, results: Sequence[Tensor]) -> list[Tensor]:
        """Random weights of the results: the gradients that arrive at them."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        return [
            torch.randn(y.shape, dtype=torch.float64, generator=generator).to(y.device, y.dtype)
            for y in results
        ]

    def results_and_gradients(
        self, tensors: Sequence[Tensor], within: contextlib.AbstractContextManager[Any] = NOTHING
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Results, and the gradients of the variables, both computed ``within`` a context."""
        leaves = self.leaves(tensors)
        with within:
            results = self.call(leaves)
        seeds = self.seeds(results)
        with within:
            its = gradients(results, self.variables(leaves), seeds)
        return [y.detach() for y in results], list(its)

    def forward_and_backward(self, tensors: Sequence[Tensor]) -> list[Tensor | None]:
        """Both in one list."""
        results, its = self.results_and_gradients(tensors)
        return [*results, *its]

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
    its = torch.autograd.grad(
        outputs, variables, weights, retain_graph=True, allow_unused=True, **keywords
    )
    # Those of embeddings may be sparse.
    return tuple(g if g is None or g.layout is torch.strided else g.to_dense() for g in its)
