"""A subject on one back end: its results, its gradients, and random weights for them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ops._config import Backend
from ops._core.selection import use_backend
from ops.gradcheck._comparison import Comparison, Tolerance
from ops.gradcheck._draws import SameDraws
from ops.gradcheck._mismatch import AGREEMENT
from ops.gradcheck._subject import Subject
from ops.gradcheck._traits import Traits, short

NOTHING = contextlib.nullcontext()


@dataclass(frozen=True)
class Outcome:
    """The result of a check. It passed if ``problem`` is empty."""

    problem: str = ""
    comparison: Comparison | None = None
    note: str = ""


@dataclass(frozen=True)
class Settings:
    """The precision of the checks.

    Attributes:
        tolerance: the allowed error of derivatives.
        dtypes: the dtypes to compare with float64.
        at_most: the largest number of elements of an input to compare one by one.
        seed: the seed of the random weights and directions.
    """

    tolerance: Tolerance
    dtypes: tuple[torch.dtype, ...]
    at_most: int
    seed: int


@dataclass(frozen=True)
class Probe:
    """One subject on one back end, with its traits."""

    subject: Subject
    backend: Backend
    device: torch.device
    settings: Settings
    traits: Traits = field(default_factory=Traits)

    @property
    def variable(self) -> list[bool]:
        """For each tensor, whether it has a gradient."""
        return self.subject.variable

    @property
    def names(self) -> list[str]:
        """The names of the tensors that have gradients."""
        return [n for n, var in zip(self.subject.names, self.variable, strict=True) if var]

    @property
    def same(self) -> float:
        """The allowed difference of two ways to one result, relative to the largest element."""
        return AGREEMENT.get(self.precision, torch.finfo(self.precision).eps)

    @property
    def precision(self) -> torch.dtype:
        """The dtype that the function computes in, in checks without a given dtype."""
        if self.traits.narrow is not None:
            return self.traits.narrow
        if self.traits.wide is not None:
            return self.traits.wide
        given = [t.dtype for t in self.subject.tensors if t.is_floating_point()]
        return max(given, key=lambda dtype: torch.finfo(dtype).eps)

    def call(self, tensors: Sequence[Tensor], seeded: bool = True) -> tuple[Tensor, ...]:
        """The results of the subject, with the same random numbers in each call if ``seeded``."""
        if self.traits.draws and seeded:
            torch.manual_seed(self.settings.seed)
        with use_backend(self.backend):
            return self.subject(tensors)

    def same_draws(self) -> contextlib.AbstractContextManager[Any]:
        """A context with the same random numbers in each layout and dtype."""
        return SameDraws() if self.traits.draws else NOTHING

    def at(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """New copies of the inputs in a dtype; by default the widest that the function takes."""
        return self.subject.at(dtype or self.traits.wide, self.device)

    def as_given(self) -> list[Tensor]:
        """New copies of the inputs, in their given dtypes."""
        return self.subject.at(None, self.device)

    @property
    def mixed(self) -> list[torch.dtype]:
        """The floating dtypes of the given inputs, if they differ. The function may refuse them."""
        given = {t.dtype for t in self.subject.tensors if t.is_floating_point()}
        return sorted(given, key=short) if len(given) > 1 else []

    def variables(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors that have gradients."""
        return [t for t, var in zip(tensors, self.variable, strict=True) if var]

    def leaves(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The same tensors, detached. Those that have gradients require them."""
        return [
            t.detach().requires_grad_(var) for t, var in zip(tensors, self.variable, strict=True)
        ]

    def others(self, by: float) -> list[Tensor]:
        """Inputs near the given ones, all nearer to zero or all farther from it."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        return [
            t * (1 + by * torch.rand(t.shape, generator=generator).to(t)) if var else t
            for t, var in zip(self.at(), self.variable, strict=True)
        ]

    def seeds(self, results: Sequence[Tensor]) -> list[Tensor]:
        """Random gradients that arrive at the results."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        return [
            torch.randn(y.shape, dtype=torch.float64, generator=generator).to(y.device, y.dtype)
            for y in results
        ]

    def results_and_gradients(
        self, tensors: Sequence[Tensor], within: contextlib.AbstractContextManager[Any] = NOTHING
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """The results and the gradients of the variables, both computed ``within`` a context."""
        leaves = self.leaves(tensors)
        with within:
            results = self.call(leaves)
        seeds = self.seeds(results)
        with within:
            its = gradients(results, self.variables(leaves), seeds)
        # Copies, because a function may write its next results to the memory of these.
        copies = [None if g is None else g.clone() for g in its]
        return [y.detach().clone() for y in results], copies

    def forward_and_backward(self, tensors: Sequence[Tensor]) -> list[Tensor | None]:
        """The results and the gradients, in one list."""
        results, its = self.results_and_gradients(tensors)
        return [*results, *its]

    def labels(self, count: int) -> list[str]:
        """Names for the last ``count`` values of :meth:`forward_and_backward`."""
        results = count - len(self.names)
        first = ["the result"] if results == 1 else [f"result {i}" for i in range(results)]
        return [*first, *(f"the gradient of {name}" for name in self.names)]


def gradients(
    results: Sequence[Tensor],
    variables: Sequence[Tensor],
    seeds: Sequence[Tensor | None],
    **keywords: Any,
) -> tuple[Tensor | None, ...]:
    """The gradients of the results weighted by ``seeds``; ``None`` leaves a result out."""
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
    # Gradients of embeddings may be sparse.
    return tuple(g if g is None or g.layout is torch.strided else g.to_dense() for g in its)


def leaves_of(results: Sequence[Tensor], besides: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that the results' gradients would be written to, ``besides`` these."""
    found: list[Tensor] = []
    nodes: list[Any] = [y.grad_fn for y in results]
    seen: set[Any] = {None}
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor) and all(leaf is not tensor for tensor in besides):
            found.append(leaf)
        nodes += [parent for parent, _ in reversed(node.next_functions)]
    return found
