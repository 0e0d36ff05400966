"""Does the gradient in each dtype and back end agree with the pure-torch path in float64?"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ops.gradcheck._mismatch import AGREEMENT, differ, largest
from ops.gradcheck._probe import Outcome, Probe, gradients
from ops.gradcheck._traits import narrowest, short

Run = Callable[[Sequence[Tensor]], list[Tensor | None]]


def agreement(probe: Probe, reference: Probe, dtype: torch.dtype | None) -> Outcome:
    """Compare a dtype with the pure-torch path in float64 from the same rounded inputs.

    ``None`` stands for the given dtypes, if they differ. The least precise sets the precision.

    Results may also differ by the effect of rounding the inputs once more. No implementation can
    do better near a kink, or if large numbers cancel.
    """
    with probe.same_draws():
        return _agreement(probe, reference, dtype)


def _agreement(probe: Probe, reference: Probe, given: torch.dtype | None) -> Outcome:
    inputs = probe.at(given) if given else probe.as_given()
    floating = [t.dtype for t in inputs if t.is_floating_point()]
    dtype = max(floating, key=lambda its: torch.finfo(its).eps)
    wide = [t.to(w.device, w.dtype) for t, w in zip(inputs, reference.at(), strict=True)]
    mine = probe.forward_and_backward(inputs)
    count = len(mine) - len(probe.names)
    seeds = probe.seeds([y for y in mine[:count] if y is not None])

    def expected(tensors: Sequence[Tensor]) -> list[Tensor | None]:
        leaves = reference.leaves(tensors)
        results = reference.call(leaves)
        arriving = [s.to(y.device, y.dtype) for s, y in zip(seeds, results, strict=True)]
        its = gradients(results, reference.variables(leaves), arriving)
        return [*(y.detach() for y in results), *its]

    theirs = [_in_range(value, dtype) for value in expected(wide)]
    spread = shaken(reference, expected, wide, dtype, theirs)
    here = f"in {short(given)}" if given else "in the given dtypes"
    there = "on the pure-torch path in float64"
    labels, tolerance = probe.labels(len(mine)), max(AGREEMENT[dtype], reference.same)
    # One scale for all gradients, because those that cancel are only as exact as the others.
    most = max((largest(t) for t in theirs[count:] if t is not None), default=0.0)
    problem = differ(labels, mine, theirs, tolerance, here, there, spread, most)
    if not problem and dtype is not torch.float64:
        # That scale must not hide errors of small gradients that rounding does not explain.
        gradients_alone = (mine[count:], theirs[count:], spread[count:])
        bounds = _explained(expected, wide, dtype, *gradients_alone, most)
        problem = differ(labels[count:], mine[count:], theirs[count:], 0.0, here, there, bounds)
    if problem:
        narrow = narrowest(inputs, probe.results_and_gradients)
        problem += f"\nintermediate values are {short(narrow)}" if narrow else ""
        lost = [
            None if one is None or other is None else one + 8 * other
            for one, other in zip(spread, _noise(expected, wide, dtype, theirs), strict=True)
        ]
        if not differ(labels, mine, theirs, tolerance, here, there, lost, most):
            problem += (
                f"\nrounding intermediate values to {short(dtype)} explains it, because the "
                f"formula loses digits"
            )
    return Outcome(problem)


def shaken(
    probe: Probe,
    run: Run,
    tensors: Sequence[Tensor],
    dtype: torch.dtype,
    values: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The largest change of the values under four other roundings of the inputs."""
    least = torch.finfo(dtype).tiny  # smaller numbers have fewer digits
    spread = [None if value is None else torch.full_like(value, least) for value in values]
    generator = torch.Generator().manual_seed(probe.settings.seed)
    signs = [[_signs(t, generator) for t in tensors] for _ in range(2)]
    step = 2 * torch.finfo(dtype).eps
    for its, by in itertools.product(signs, (step, -step)):
        places = zip(tensors, its, probe.variable, strict=True)
        try:
            moved = run([t * (1 + by * sign) if var else t for t, sign, var in places])
        except Exception:
            continue  # outside the domain of the function
        for place, (one, other) in enumerate(zip(values, moved, strict=True)):
            before = spread[place]
            if before is not None and one is not None and other is not None:
                # fmax ignores the NaN of points outside the domain.
                spread[place] = torch.fmax(before, 2 * (other - one).abs())
    return spread


def _explained(
    run: Run,
    tensors: Sequence[Tensor],
    dtype: torch.dtype,
    mine: Sequence[Tensor | None],
    theirs: Sequence[Tensor | None],
    spread: Sequence[Tensor | None],
    most: float,
) -> list[Tensor | None]:
    """The allowed errors: half of each gradient, or the effect of rounding all values to ``dtype``.

    A gradient that is exactly zero is allowed only the latter. Any other is also allowed some
    roundings of the largest gradient, ``most``, because sums that cancel leave as much. An example
    is the gradient of a bias before a normalisation.
    """
    cancelled = 32 * torch.finfo(torch.float32).eps * most
    noise = _noise(run, tensors, dtype, theirs)
    bounds: list[Tensor | None] = []
    for place, its in enumerate(theirs):
        lost, extra, ours = noise[place], spread[place], mine[place]
        if its is None or lost is None or extra is None or ours is None:
            bounds.append(None)
            continue
        typical = lost.square().mean().sqrt() if lost.numel() else lost
        # Sums are taken in float32 or float64.
        extra = extra + AGREEMENT[torch.float32] * largest(its)
        rounding = 8 * torch.maximum(lost, typical) + extra + cancelled
        some = torch.maximum(its.abs() / 2, rounding)
        bounds.append(torch.where(ours.to(its.device) == 0, 16 * lost + extra, some))
    return bounds


def _noise(
    run: Run, tensors: Sequence[Tensor], dtype: torch.dtype, like: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The error of gradients if all values are rounded to ``dtype``; infinite if it is unknown."""
    noise = [None if g is None else torch.zeros_like(g) for g in like]
    eps = torch.finfo(dtype).eps
    try:
        for by in (0.0, 4 * eps, -4 * eps):  # nearby inputs round differently
            moved = [t * (1 + by) if t.is_floating_point() else t for t in tensors]
            exact = run(moved)[-len(like) :]
            with _Rounding(dtype):
                rounded = run(moved)[-len(like) :]
            for place, (one, other) in enumerate(zip(exact, rounded, strict=True)):
                before = noise[place]
                if before is not None and one is not None and other is not None:
                    noise[place] = torch.maximum(before, (one - other).abs().nan_to_num(torch.inf))
    except Exception:  # the function may refuse rounded values
        return [None if g is None else torch.full_like(g, torch.inf) for g in like]
    return noise


class _Rounding(TorchDispatchMode):
    """Round every result of torch's functions to a dtype, as if they computed in it."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        aliases = [r.alias_info for r in func._schema.returns]
        if any(alias is not None and not alias.is_write for alias in aliases):
            return result  # a view
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and not leaf._is_view():
                leaf.copy_(leaf.to(self.dtype).to(leaf.dtype))
        return result


def _in_range(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Replace values that overflow in ``dtype`` by infinity."""
    if value is None:
        return None
    too_large = value.abs() > torch.finfo(dtype).max
    return torch.where(too_large, value.sign() * torch.inf, value)


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    random = torch.randint(0, 2, like.shape, generator=generator)
    return (2 * random - 1).to(like.device, like.dtype)
