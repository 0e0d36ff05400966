"""Does the gradient equal difference quotients, in any order?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ops.gradcheck._comparison import Comparison
from ops.gradcheck._mismatch import differ
from ops.gradcheck._probe import Outcome, Probe, gradients
from ops.gradcheck._quotients import Compared, compare
from ops.gradcheck._second_opinion import second_opinion
from ops.gradcheck._traits import short

# A function of tensors, and of a flag: whether autograd records the call.
Call = Callable[[Sequence[Tensor], bool], tuple[Tensor, ...]]

# ---- the checks ----------------------------------------------------------------------------------


def reverse_mode(probe: Probe) -> Outcome:
    """Compare every gradient, of all results together and of each alone."""
    return second_opinion(probe, _in_its_precision(probe, _first(probe)), 1)


def order(probe: Probe, which: int) -> Outcome:
    """Compare derivatives of a higher order, by the inputs and by the arriving gradients."""
    question = _first(probe)
    for _ in range(which - 1):
        problem = _recorded(probe, question)
        if problem:
            return Outcome(problem)
        question = _derived(probe, question)
        if not all(bool(g.isfinite().all()) for g in question.call(question.tensors, False)):
            raise NotImplementedError("the gradient is not finite, so it has no derivative")
    return second_opinion(probe, _in_its_precision(probe, question), which)


def exact_zeros(probe: Probe) -> Outcome:
    """Compare gradients where elements of an input are zero, as in masks and padding."""
    question = _first(probe)
    found = Comparison()
    for place, tensor in enumerate(question.tensors):
        zeros = list(range(tensor.numel() // 2 % 3, tensor.numel(), 3))[:6]
        if not question.variable[place] or not zeros:
            continue
        tensors = [t.clone() for t in question.tensors]
        if not all(_is_inside(question, tensors, place, zeros, by) for by in (-1e-6, 1e-6, 0.0)):
            continue  # zero is outside the domain of the function, or at its edge
        only = [zeros if i == place else [] for i, var in enumerate(question.variable) if var]
        its = _compared(probe, dataclasses.replace(question, tensors=tensors), only)
        if its.wrong:
            # Errors that also occur without zeros belong to reverse_mode().
            elsewhere = {e.index for e in _compared(probe, question, only).wrong}
            its.wrong = [e for e in its.wrong if e.index not in elsewhere]
        its.unclear = []  # reverse_mode() reports rounding errors
        found.add(its)
    problem = found.problem
    return Outcome(f"with exact zeros in the inputs: {problem}" if problem else "", found)


def _compared(probe: Probe, question: _Question, only: Sequence[Sequence[int]]) -> Comparison:
    return _in_its_precision(probe, question, only).comparison or Comparison()


def _is_inside(
    question: _Question, tensors: list[Tensor], place: int, where: list[int], value: float
) -> bool:
    """Whether results are finite, and as many as elsewhere, where these elements have a value."""
    tensors[place].view(-1)[where] = value
    try:
        results = question.call(tensors, False)
        weights = zip(results, question.sets[0], strict=True)
        alike = all(weight is None or y.shape == weight.shape for y, weight in weights)
        return alike and all(bool(y.isfinite().all()) for y in results)
    except Exception:
        return False


# ---- the question --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Question:
    """Are the gradients of this function right?

    Attributes:
        call: the function.
        names: the names of the inputs that have gradients.
        variable: for each input, whether it has a gradient.
        tensors: the inputs.
        sets: several weightings of the results; the weight ``None`` leaves a result out.
    """

    call: Call
    names: list[str]
    variable: list[bool]
    tensors: list[Tensor]
    sets: list[list[Tensor | None]]


def _leaves(tensors: Sequence[Tensor], variable: Sequence[bool]) -> list[Tensor]:
    return [t.detach().requires_grad_(v) for t, v in zip(tensors, variable, strict=True)]


def _first(probe: Probe) -> _Question:
    def call(tensors: Sequence[Tensor], recorded: bool) -> tuple[Tensor, ...]:
        # Differences are taken with gradients recorded, because a function may compute something
        # else without, and because it may take gradients itself.
        results = probe.call(tensors if recorded else probe.leaves(tensors))
        return results if recorded else tuple(y.detach() for y in results)

    tensors = probe.at()
    seeds = probe.seeds(call(tensors, False))
    sets: list[list[Tensor | None]] = [list(seeds)]
    if len(seeds) > 1:
        sets += [[s if i == j else None for j, s in enumerate(seeds)] for i in range(len(seeds))]
    return _Question(call, probe.names, probe.variable, tensors, sets)


def _recorded(probe: Probe, question: _Question) -> str:
    """A description of how gradients with ``create_graph`` differ from those without."""
    found = []
    for create in (False, True):
        leaves = _leaves(question.tensors, question.variable)
        variables = [t for t, var in zip(leaves, question.variable, strict=True) if var]
        results = question.call(leaves, True)
        found.append(gradients(results, variables, question.sets[0], create_graph=create))
    labels = [f"the gradient of {name}" for name in question.names]
    plain, recorded = found
    return differ(
        labels, recorded, plain, probe.same, "with create_graph=True", "without create_graph"
    )


def _derived(probe: Probe, question: _Question) -> _Question:
    """The gradient as a function of the inputs and of the arriving gradients."""
    count, variable = len(question.tensors), question.variable
    arriving = [s for s in question.sets[0] if s is not None]

    def gradient(values: Sequence[Tensor], recorded: bool) -> tuple[Tensor, ...]:
        points = list(values[:count]) if recorded else _leaves(values[:count], variable)
        variables = [p for p, var in zip(points, variable, strict=True) if var]
        results = question.call(points, True)
        its = gradients(results, variables, values[count:], create_graph=recorded)
        return tuple(
            torch.zeros_like(v) if g is None else g for v, g in zip(variables, its, strict=True)
        )

    first = len(question.tensors) == len(probe.variable)
    last = "the result" if len(arriving) == 1 else "result {}"
    names = [
        f"the gradient of {last.format(i) if first else f'gradient {i}'}"
        for i in range(len(arriving))
    ]
    variables = [t for t, var in zip(question.tensors, variable, strict=True) if var]
    return _Question(
        gradient,
        [*question.names, *names],
        [*variable, *(True for _ in arriving)],
        [*question.tensors, *arriving],
        [[*probe.seeds(variables)]],
    )


# ---- the answer ----------------------------------------------------------------------------------


def _in_its_precision(
    probe: Probe, question: _Question, only: Sequence[Sequence[int]] | None = None
) -> Outcome:
    """Compare, and allow for the precision of a function that computes in a narrower dtype."""
    found = _quotients(probe, question, only)
    narrow = probe.traits.narrow
    if narrow is None or not (found.wrong or found.unclear):
        return Outcome(found.problem, found)
    found = _quotients(probe, question, only, torch.finfo(narrow).eps)
    # Some elements are always lost then. Only inputs whose elements are all lost matter.
    told = {element.input for element in found.elements if element not in found.unclear}
    found.unclear = [element for element in found.unclear if element.input not in told]
    note = f"it computes in {short(narrow)}, so it was checked to that precision"
    return Outcome(f"{found.problem}\n{note}" if found.problem else "", found, note)


def _quotients(
    probe: Probe,
    question: _Question,
    only: Sequence[Sequence[int]] | None = None,
    narrow: float | None = None,
) -> Comparison:
    leaves = _leaves(question.tensors, question.variable)
    variables = [leaf for leaf, var in zip(leaves, question.variable, strict=True) if var]
    results = question.call(leaves, True)
    its = [gradients(results, variables, seeds) for seeds in question.sets]
    if any(g is None for g in its[0]):
        _whole_backward(results, question.sets[0])
    analytic = [
        torch.stack([torch.zeros_like(v) if g is None else g.detach() for g in found])
        for v, found in zip(variables, zip(*its, strict=True), strict=True)
    ]
    weights = torch.stack(
        [
            torch.cat(
                [
                    (torch.zeros_like(y) if s is None else s).detach().flatten().double()
                    for y, s in zip(results, seeds, strict=True)
                ]
            )
            for seeds in question.sets
        ]
    )

    def values(points: list[Tensor]) -> Tensor:
        point = iter(points)
        tensors = [next(point) if v else t for t, v in zip(leaves, question.variable, strict=True)]
        found = question.call(tensors, False)
        return torch.cat([y.detach().flatten().double() for y in found])

    given = Compared(
        question.names,
        variables,
        analytic,
        values,
        weights,
        probe.settings.tolerance,
        probe.settings.at_most,
        narrow,
    )
    return compare(given, only)


def _whole_backward(results: Sequence[Tensor], seeds: Sequence[Tensor | None]) -> None:
    """Run every node, including those that lead to no input, because an error may hide there.

    ``once_differentiable`` attaches such a node to gradients, apart from the path to the inputs.
    """
    pairs = [
        (y, s) for y, s in zip(results, seeds, strict=True) if s is not None and y.requires_grad
    ]
    if pairs:
        outputs, weights = zip(*pairs, strict=True)
        torch.autograd.backward(outputs, weights, retain_graph=True)
