"""Do other calls leave the gradient unchanged, and does the function have no side effects?"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ops.gradcheck._mismatch import differ, identical
from ops.gradcheck._probe import Outcome, Probe, gradients
from ops.gradcheck._traits import short


def interleaved_calls(probe: Probe) -> Outcome:
    """Call the function between a forward and its backward pass; run a second backward pass.

    Also write to inputs and results before the backward pass.
    """
    expected = probe.forward_and_backward(probe.at())
    away = probe.others(-1e-3)
    try:
        others = probe.forward_and_backward(away)
    except Exception:
        away = probe.others(1e-3)
        others = probe.forward_and_backward(away)
    labels = probe.labels(len(expected))
    alone = "alone"
    for first_in in (True, False):
        leaves, other = probe.leaves(probe.at()), probe.leaves(away)
        results, later = probe.call(leaves), probe.call(other)
        # without_gradients() reports an error here.
        with torch.no_grad(), contextlib.suppress(Exception):
            probe.call(probe.others(-2e-3))
        mine: list[Tensor | None] = []
        theirs: list[Tensor | None] = []
        for is_mine in (first_in, not first_in):
            if is_mine:
                mine = [*gradients(results, probe.variables(leaves), probe.seeds(results))]
            else:
                theirs = [*gradients(later, probe.variables(other), probe.seeds(later))]
        again = gradients(results, probe.variables(leaves), probe.seeds(results))
        for found, should, how in (
            ([*results, *mine], expected, "with another call before its backward pass"),
            ([*later, *theirs], others, "with another call before it"),
            ([*results, *again], expected, "in a second backward pass"),
        ):
            problem = differ(labels, found, should, probe.same, how, alone)
            if problem:
                return Outcome(problem)
    return Outcome(_overwritten(probe, expected))


def _overwritten(probe: Probe, expected: list[Tensor | None]) -> str:
    """Write to inputs or results before the backward pass: it must raise, or be right."""
    labels = probe.labels(len(expected))[-len(probe.names) :]
    for of_inputs in (True, False):
        leaves = probe.leaves(probe.at())
        results = probe.call(leaves)
        seeds = probe.seeds(results)
        for tensor in probe.variables(leaves) if of_inputs else results:
            with contextlib.suppress(RuntimeError):  # expanded tensors refuse
                tensor.detach().mul_(2)  # detach() shares the version, which save_for_backward uses
        try:
            found = gradients(results, probe.variables(leaves), seeds)
        except Exception:
            continue  # it notices, as it must
        which = "its inputs" if of_inputs else "its results"
        here = f"after an in-place change of {which}, which save_for_backward would notice"
        problem = differ(labels, found, expected[-len(labels) :], probe.same, here, "without one")
        if problem:
            return problem
    return ""


def non_leaf_inputs(probe: Probe) -> Outcome:
    """Take inputs that other functions computed, as a hidden layer does."""
    expected = probe.forward_and_backward(probe.at())
    labels = probe.labels(len(expected))
    leaves = probe.leaves(probe.at())
    inner = [t.clone() if var else t for t, var in zip(leaves, probe.variable, strict=True)]
    results = probe.call(inner)
    seeds = probe.seeds(results)
    outside = gradients(results, probe.variables(leaves), seeds)
    inside = gradients(results, probe.variables(inner), seeds)
    here, there = "of inputs that are results themselves", "of leaves"
    values = [y.detach() for y in results]
    problem = differ(labels, [*values, *outside], expected, probe.same, here, there)
    problem = problem or differ(labels, [*values, *inside], expected, probe.same, here, there)
    changed = [
        name
        for name, one, other in zip(probe.subject.names, inner, leaves, strict=True)
        if not identical(one, other)
    ]
    return Outcome(problem or (f"{here}, it writes to {', '.join(changed)}" if changed else ""))


def one_tensor_twice(probe: Probe) -> Outcome:
    """A tensor given in two places gets the sum of both gradients."""
    if probe.traits.differentiates:
        raise NotImplementedError(
            "it takes gradients of its inputs itself, and those of one tensor in two places differ"
        )
    places = [i for i, var in enumerate(probe.variable) if var]
    tensors = probe.at()
    alike = [
        (i, j)
        for i, j in itertools.combinations(places, 2)
        if tensors[i].shape == tensors[j].shape and tensors[i].dtype == tensors[j].dtype
    ]
    for i, j in alike[:6]:
        apart = [t.clone() if place != j else tensors[i].clone() for place, t in enumerate(tensors)]
        try:
            expected = probe.forward_and_backward(apart)
        except Exception:
            continue  # the function refuses equal tensors
        leaves = probe.leaves(apart)
        leaves[j] = leaves[i]
        results = probe.call(leaves)
        mine = [*gradients(results, probe.variables(leaves), probe.seeds(results))]
        count = len(results)
        first, second = count + places.index(i), count + places.index(j)
        one, other = expected[first], expected[second]
        total = other if one is None else one if other is None else one + other
        expected[first] = expected[second] = total
        names = f"{probe.subject.names[i]} and {probe.subject.names[j]}"
        problem = differ(
            probe.labels(len(expected)),
            [*(y.detach() for y in results), *mine],
            expected,
            probe.same,
            f"with one tensor as {names}",
            "as the sum for two equal tensors",
        )
        if problem:
            return Outcome(problem)
    return Outcome()


def determinism(probe: Probe) -> Outcome:
    """Compare five runs in the given dtypes bit for bit."""
    wide = probe.traits.default or probe.mixed

    def run() -> list[Tensor | None]:
        leaves = probe.leaves(probe.at() if wide else probe.as_given())
        results = probe.call(leaves, seeded=False)
        its = gradients(results, probe.variables(leaves), probe.seeds(results))
        return [*(y.detach() for y in results), *its]

    first = run()
    for _ in range(4):
        problem = differ(
            probe.labels(len(first)), run(), first, 0.0, "in another run", "in the first one"
        )
        if problem:
            hint = "\nthe function draws random numbers; the other checks seed each call"
            return Outcome(problem + (hint if probe.traits.draws else ""))
    return Outcome()


def inputs_untouched(probe: Probe) -> Outcome:
    """The function writes neither to its inputs nor to arriving gradients, in any dtype or mode."""
    for dtype in (None, *probe.settings.dtypes):
        for recorded in (True, False):
            try:
                changed = _written_to(probe, dtype, recorded)
            except Exception:
                if dtype is None and recorded:
                    raise
                continue  # agreement() and without_gradients() report the error
            if changed:
                where = f" in {short(dtype)}" if dtype else ""
                where += "" if recorded else " where no gradient is recorded"
                return Outcome(f"written to: {', '.join(changed)}{where}")
    return Outcome()


def _written_to(probe: Probe, dtype: torch.dtype | None, recorded: bool) -> list[str]:
    leaves = probe.leaves(probe.at(dtype)) if recorded else probe.at(dtype)
    versions = [t._version for t in leaves]
    seeds: list[Tensor] = []
    results: Sequence[Tensor] = ()
    with torch.set_grad_enabled(recorded):
        results = probe.call(leaves)
    if recorded:
        seeds = probe.seeds(results)
        gradients(results, probe.variables(leaves), seeds)
    names = [*probe.subject.names, *(f"the gradient of result {i}" for i in range(len(seeds)))]
    versions += [0] * len(seeds)
    grads = [
        f"the .grad of {name}"
        for name, leaf in zip(probe.subject.names, leaves, strict=True)
        if leaf.grad is not None
    ]
    now, then = [*leaves, *seeds], [*probe.at(dtype), *(probe.seeds(results) if recorded else ())]
    return grads + [
        name
        for name, one, other, version in zip(names, now, then, versions, strict=True)
        if one._version != version or not identical(one, other)
    ]
