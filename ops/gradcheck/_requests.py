"""Is the gradient the same in parts, in other modes, and for some inputs only?"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ops.gradcheck._mismatch import AGREEMENT, differ
from ops.gradcheck._probe import Outcome, Probe, gradients
from ops.gradcheck._traits import default_dtype, short


def linearity(probe: Probe) -> Outcome:
    """Gradients are linear in the arriving ones: zero for zero, scaled and added alike."""

    def run(by: Sequence[Tensor | float]) -> list[Tensor | None]:
        leaves = probe.leaves(probe.at())
        results = probe.call(leaves)
        seeds = [s * b for s, b in zip(probe.seeds(results), by, strict=True)]
        return list(gradients(results, probe.variables(leaves), seeds))

    results = probe.call(probe.leaves(probe.at()))
    whole = run([1.0] * len(results))
    labels = probe.labels(len(probe.names))
    # Powers of two change no digit. Half precisions overflow with larger ones.
    power = 40 if torch.finfo(probe.precision).max > 1e30 else 4
    for by in (0.0, -1.0, 2.0**power, 2.0**-power):
        scaled = run([by] * len(results))
        expected = [None if g is None else _finite(g) * by for g in whole]
        mine = [_where_finite(g, w) for g, w in zip(scaled, whole, strict=True)]
        here = f"where the arriving gradient is {by:g} times as large"
        problem = differ(labels, mine, expected, probe.same, here, "by linearity")
        if problem:
            return Outcome(problem)
    generator = torch.Generator().manual_seed(probe.settings.seed)
    some = [torch.randint(0, 2, y.shape, generator=generator).to(y) for y in results]
    parts = zip(run(some), run([1 - s for s in some]), strict=True)
    added = [
        _where_finite(_zero(one, w) + _zero(other, w), w)
        if w is not None
        else (other if one is None else one)
        for (one, other), w in zip(parts, whole, strict=True)
    ]
    expected = [None if g is None else _finite(g) for g in whole]
    here, there = "added up from two parts of the arriving gradient", "from all of it"
    return Outcome(differ(labels, added, expected, probe.same, here, there))


def _zero(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient


def _finite(gradient: Tensor) -> Tensor:
    return gradient.nan_to_num(0, 0, 0)


def _where_finite(gradient: Tensor | None, whole: Tensor | None) -> Tensor | None:
    """Replace elements by zero where the whole gradient is not finite."""
    if gradient is None or whole is None:
        return gradient
    return torch.where(whole.isfinite(), gradient, 0)


def subsets(probe: Probe) -> Outcome:
    """Request gradients for some inputs only; the others require none."""
    every = probe.forward_and_backward(probe.at())
    count = len(every) - len(probe.names)
    for needed in _subsets(len(probe.names)):
        wanted = iter(needed)
        tensors = [
            t.requires_grad_(var and next(wanted))
            for t, var in zip(probe.at(), probe.variable, strict=True)
        ]
        try:
            results = probe.call(tensors)
        except RuntimeError:
            if probe.traits.differentiates:
                continue  # the function itself takes a gradient of an input that requires none
            raise
        asked = [t for t in tensors if t.requires_grad]
        its = iter(gradients(results, asked, probe.seeds(results)))
        mine = [next(its) if need else None for need in needed]
        full = [g if need else None for g, need in zip(every[count:], needed, strict=True)]
        chosen = ", ".join(n for n, need in zip(probe.names, needed, strict=True) if need)
        problem = differ(
            probe.labels(len(every)),
            [*results, *mine],
            [*every[:count], *full],
            probe.same,
            f"with gradients for {chosen} only",
            "with gradients for all",
        )
        if problem:
            return Outcome(problem)
    return Outcome()


def _subsets(count: int) -> Iterator[tuple[bool, ...]]:
    """All subsets but the full one; of many inputs, each alone and all but each."""
    if count <= 5:
        every = itertools.product((True, False), repeat=count)
        return (needed for needed in every if 0 < sum(needed) < count)
    alone = (tuple(i == j for i in range(count)) for j in range(count))
    without = (tuple(i != j for i in range(count)) for j in range(count))
    return itertools.chain(alone, without)


def without_gradients(probe: Probe) -> Outcome:
    """Results are the same without gradients."""
    recorded = [y.detach() for y in probe.call(probe.leaves(probe.at()))]
    refused: Exception | None = None
    for how, mode, tensors in (
        ("with inputs that require no gradient", torch.enable_grad(), probe.at()),
        ("under no_grad", torch.no_grad(), probe.leaves(probe.at())),
        ("under inference_mode", torch.inference_mode(), probe.at()),
    ):
        try:
            with mode:
                plain = [y.detach().clone() for y in probe.call(tensors)]
        except Exception as error:
            refused = refused or error
            continue
        labels = probe.labels(len(plain) + len(probe.names))[: len(plain)]
        problem = differ(labels, plain, recorded, probe.same, how, "with gradients recorded")
        if problem:
            return Outcome(problem)
    if refused is not None:
        raise refused
    return Outcome()


def default_dtypes(probe: Probe) -> Outcome:
    """Results are the same for any :func:`torch.set_default_dtype`, to the precision of float32."""
    expected = probe.forward_and_backward(probe.at())
    before = torch.get_default_dtype()
    other = torch.float32 if before is torch.float64 else torch.float64
    with default_dtype(other):
        mine = probe.forward_and_backward(probe.at())
    here, there = (f"with the default dtype {short(dtype)}" for dtype in (other, before))
    exact = max(probe.same, AGREEMENT[torch.float32])
    return Outcome(differ(probe.labels(len(mine)), mine, expected, exact, here, there))
