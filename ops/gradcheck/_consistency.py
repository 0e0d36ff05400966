"""Is the gradient the same, however one asks? Layouts, subsets, repeats, dtypes, back ends."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ops.gradcheck._differ import SAME, differ, largest
from ops.gradcheck._probe import Outcome, Probe, gradients

# Relative to the largest element, against float64 from the same rounded inputs: float32 may differ
# by a few hundred roundings, the half precisions by four, the last of which is that of the result.
AGREEMENT = {
    torch.float64: SAME,
    torch.float32: 2e-5,
    torch.bfloat16: 2**-6,
    torch.float16: 2**-9,
}

_EQUAL_VALUES = "expanded"
_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "every other element": lambda t: torch.stack([t, t], -1)[..., 0],
    "at an odd offset": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    _EQUAL_VALUES: lambda t: t[:1].expand(t.shape) if t.dim() else t,
}
# Also what .sum() sends back.
_ARRIVING = {
    **_LAYOUTS,
    "expanded from one element": lambda t: (
        t.flatten()[:1].view([1] * t.dim()).expand(t.shape) if t.numel() else t
    ),
}

# ---- the checks ----------------------------------------------------------------------------------


def layouts(probe: Probe) -> Outcome:
    """Inputs, and gradients that arrive, transposed, strided, offset and expanded."""
    for layout, lay in _LAYOUTS.items():
        for place in (None, *range(len(probe.variable))):
            tensors = [lay(t) if place in (None, i) else t for i, t in enumerate(probe.at())]
            dense = [t.contiguous() for t in tensors]
            try:
                plain = probe.forward_and_backward(dense)
            except Exception:
                if layout != _EQUAL_VALUES:
                    raise
                continue  # not for the layout: equal rows are a singular matrix, and no order
            laid = probe.forward_and_backward(tensors)
            which = "all inputs" if place is None else probe.subject.names[place]
            ways = probe.labels(len(laid)), laid, plain, SAME, f"{which} {layout}", "contiguous"
            # Equal values, as expanded ones are, may lie at a kink: see agreement().
            if differ(*ways):
                run = probe.forward_and_backward
                problem = differ(*ways, _shaken(probe, run, dense, torch.float64, plain))
                if problem:
                    return Outcome(problem)
    leaves = probe.leaves(probe.at())
    results, variables = probe.call(leaves), probe.variables(leaves)
    for layout, lay in _ARRIVING.items():
        seeds = [lay(seed) for seed in probe.seeds(results)]
        laid = list(gradients(results, variables, seeds))
        plain = list(gradients(results, variables, [seed.contiguous() for seed in seeds]))
        labels = probe.labels(len(laid))
        problem = differ(labels, laid, plain, SAME, f"arriving gradient {layout}", "contiguous")
        if problem:
            return Outcome(problem)
    return Outcome()


def subsets(probe: Probe) -> Outcome:
    """Gradients asked for some inputs only, the others requiring none."""
    every = probe.forward_and_backward(probe.at())[-len(probe.names) :]
    for needed in _subsets(len(probe.names)):
        wanted = iter(needed)
        tensors = [
            t.requires_grad_(var and next(wanted))
            for t, var in zip(probe.at(), probe.variable, strict=True)
        ]
        results = probe.call(tensors)
        asked = [t for t in tensors if t.requires_grad]
        its = iter(gradients(results, asked, probe.seeds(results)))
        mine = [next(its) if need else None for need in needed]
        full = [g if need else None for g, need in zip(every, needed, strict=True)]
        chosen = ", ".join(n for n, need in zip(probe.names, needed, strict=True) if need)
        labels = probe.labels(len(mine))
        problem = differ(labels, mine, full, SAME, f"asked for {chosen} only", "for all")
        if problem:
            return Outcome(problem)
    return Outcome()


def _subsets(count: int) -> Iterator[tuple[bool, ...]]:
    """All but the full one; of many inputs, each alone and all but each."""
    if count <= 5:
        every = itertools.product((True, False), repeat=count)
        return (needed for needed in every if 0 < sum(needed) < count)
    alone = (tuple(i == j for i in range(count)) for j in range(count))
    without = (tuple(i != j for i in range(count)) for j in range(count))
    return itertools.chain(alone, without)


def determinism(probe: Probe) -> Outcome:
    """Five runs in the dtypes given, bit for bit."""
    tensors = probe.at(None)
    first = probe.forward_and_backward(tensors)
    for _ in range(4):
        again = probe.forward_and_backward(tensors)
        problem = differ(probe.labels(len(first)), again, first, 0.0, "again", "the first time")
        if problem:
            return Outcome(problem)
    return Outcome()


def inputs_untouched(probe: Probe) -> Outcome:
    """Neither the inputs nor the gradients that arrive are written to."""
    leaves = probe.leaves(probe.at())
    results = probe.call(leaves)
    seeds = probe.seeds(results)
    gradients(results, probe.variables(leaves), seeds)
    names = [*probe.subject.names, *(f"the gradient of result {i}" for i in range(len(seeds)))]
    now, then = [*leaves, *seeds], [*probe.at(), *probe.seeds(results)]
    changed = [
        name
        for name, one, other in zip(names, now, then, strict=True)
        if one._version or not torch.equal(one.detach().nan_to_num(), other.nan_to_num())
    ]
    return Outcome(f"written to: {', '.join(changed)}" if changed else "")


def agreement(probe: Probe, reference: Probe, dtype: torch.dtype) -> Outcome:
    """In a dtype, against the pure-torch path in float64 from the same rounded inputs.

    What rounding the inputs once more would change is allowed on top: near a kink, or where large
    numbers cancel, no implementation can know better.
    """
    inputs = probe.at(dtype)
    mine = probe.forward_and_backward(inputs)
    wide = [
        t.to(reference.device, torch.float64 if t.is_floating_point() else None) for t in inputs
    ]
    seeds = probe.seeds([y for y in mine[: len(mine) - len(probe.names)] if y is not None])

    def expected(tensors: Sequence[Tensor]) -> list[Tensor | None]:
        leaves = reference.leaves(tensors)
        results = reference.call(leaves)
        arriving = [s.to(y.device, y.dtype) for s, y in zip(seeds, results, strict=True)]
        its = gradients(results, reference.variables(leaves), arriving)
        return [*(y.detach() for y in results), *its]

    theirs = [_in_range(value, dtype) for value in expected(wide)]
    spread = _shaken(reference, expected, wide, dtype, theirs)
    short = str(dtype).removeprefix("torch.")
    labels = probe.labels(len(mine))
    # Gradients that cancel to nothing are as exact as the others are: one scale for all of them.
    scale = max((largest(t) for t in theirs[-len(probe.names) :] if t is not None), default=0.0)
    return Outcome(
        differ(
            labels, mine, theirs, AGREEMENT[dtype], short, "torch path in float64", spread, scale
        )
    )


def _shaken(
    probe: Probe,
    run: Callable[[Sequence[Tensor]], list[Tensor | None]],
    tensors: Sequence[Tensor],
    dtype: torch.dtype,
    values: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """How far the values move when the inputs are rounded in another way: two, and the reverse."""
    least = torch.finfo(dtype).tiny  # below, numbers have fewer digits
    spread = [None if value is None else torch.full_like(value, least) for value in values]
    generator = torch.Generator().manual_seed(probe.seed)
    signs = [[_signs(t, generator) for t in tensors] for _ in range(2)]
    step = 2 * torch.finfo(dtype).eps
    for its, by in itertools.product(signs, (step, -step)):
        places = zip(tensors, its, probe.variable, strict=True)
        moved = run([t * (1 + by * sign) if var else t for t, sign, var in places])
        for place, (one, other) in enumerate(zip(values, moved, strict=True)):
            before = spread[place]
            if before is not None and one is not None and other is not None:
                # Not where it leaves the function's domain.
                spread[place] = torch.fmax(before, 2 * (other - one).abs())
    return spread


def _in_range(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Infinite where ``dtype`` has no number as large."""
    if value is None:
        return None
    too_large = value.abs() > torch.finfo(dtype).max
    return torch.where(too_large, value.sign() * torch.inf, value)


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    random = torch.randint(0, 2, like.shape, generator=generator)
    return (2 * random - 1).to(like.device, like.dtype)
