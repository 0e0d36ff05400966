"""Is the gradient the derivative? Against difference quotients, and in autograd's other modes."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ops.gradcheck._differ import SAME, differ
from ops.gradcheck._differences import Comparison, Element, compare
from ops.gradcheck._probe import Outcome, Probe, gradients

Call = Callable[[Sequence[Tensor]], tuple[Tensor, ...]]

# ---- against difference quotients ----------------------------------------------------------------


def reverse_mode(probe: Probe) -> Outcome:
    """Every gradient, of all results together and of each alone."""
    tensors = probe.at()
    seeds = probe.seeds(probe.call(tensors))
    sets: list[list[Tensor | None]] = [list(seeds)]
    if len(seeds) > 1:
        sets += [[s if i == j else None for j, s in enumerate(seeds)] for i in range(len(seeds))]
    return _quotients(probe, probe.call, probe.names, probe.variable, tensors, sets)


def second_order(probe: Probe) -> Outcome:
    """The gradient's own gradients: of the inputs, and of the gradients that arrive."""
    tensors = probe.at()
    count = len(tensors)
    leaves = probe.leaves(tensors)
    results, seeds = probe.call(leaves), probe.seeds(probe.call(tensors))
    plain, recorded = (
        gradients(results, probe.variables(leaves), seeds, create_graph=create)
        for create in (False, True)
    )
    labels = probe.labels(len(plain))
    problem = differ(labels, recorded, plain, SAME, "with create_graph=True", "without")
    if problem:
        return Outcome(problem)

    def gradient(values: Sequence[Tensor]) -> tuple[Tensor, ...]:
        recorded = torch.is_grad_enabled()
        with torch.enable_grad():
            points = list(values[:count]) if recorded else probe.leaves(values[:count])
            variables = probe.variables(points)
            its = gradients(probe.call(points), variables, values[count:], create_graph=recorded)
        return tuple(
            torch.zeros_like(v) if g is None else g for v, g in zip(variables, its, strict=True)
        )

    names = [f"the gradient of {name}" for name in probe.labels(len(seeds) + len(probe.names))]
    everything = [*tensors, *seeds]
    weights: list[Tensor | None] = [*probe.seeds(probe.variables(tensors))]
    return _quotients(
        probe,
        gradient,
        [*probe.names, *names[: len(seeds)]],
        [*probe.variable, *(True for _ in seeds)],
        everything,
        [weights],
    )


def _quotients(
    probe: Probe,
    call: Call,
    names: Sequence[str],
    variable: Sequence[bool],
    tensors: Sequence[Tensor],
    sets: Sequence[Sequence[Tensor | None]],
) -> Outcome:
    leaves = [t.detach().requires_grad_(v) for t, v in zip(tensors, variable, strict=True)]
    variables = [leaf for leaf, var in zip(leaves, variable, strict=True) if var]
    with torch.enable_grad():
        results = call(leaves)
        its = [gradients(results, variables, seeds) for seeds in sets]
        if any(g is None for g in its[0]):
            _whole_backward(results, sets[0])
    analytic = [
        torch.stack([torch.zeros_like(v) if g is None else g.detach() for g in found])
        for v, found in zip(variables, zip(*its, strict=True), strict=True)
    ]

    def sums(points: list[Tensor]) -> tuple[Tensor, Tensor]:
        point = iter(points)
        with torch.no_grad():
            values = call([next(point) if v else t for t, v in zip(leaves, variable, strict=True)])
            terms = [
                torch.cat(
                    [(y * s).flatten() for y, s in zip(values, seeds, strict=True) if s is not None]
                )
                for seeds in sets
            ]
            return torch.stack([t.sum() for t in terms]), torch.stack(
                [t.abs().sum() for t in terms]
            )

    found = compare(names, variables, analytic, sums, probe.tolerance, probe.at_most)
    return Outcome(_problem(found), found)


def _whole_backward(results: Sequence[Tensor], seeds: Sequence[Tensor | None]) -> None:
    """Run every node, also those that lead to no input: an error in one is what is missing.

    ``once_differentiable`` hangs such a node on gradients, off the way to the inputs.
    """
    pairs = [
        (y, s) for y, s in zip(results, seeds, strict=True) if s is not None and y.requires_grad
    ]
    if pairs:
        outputs, weights = zip(*pairs, strict=True)
        torch.autograd.backward(outputs, weights, retain_graph=True)


def _problem(found: Comparison) -> str:
    """What is wrong, in words."""
    if not found.wrong or found.worst is None:
        return ""
    inputs = list(dict.fromkeys(element.input for element in found.wrong))
    lines = [
        f"{len(found.wrong)} of {len(found.elements)} elements are wrong, in {', '.join(inputs)}",
        f"worst: {found.worst}",
    ]
    if any(not math.isfinite(element.numeric) for element in found.wrong):
        lines.append("the function itself is not finite there: check it where it is")
    for name in inputs:
        guess = _guess([e for e in found.elements if e.input == name and e not in found.kinks])
        if guess:
            lines.append(f"{name}: {guess}")
    return "\n".join(lines)


def _guess(elements: Sequence[Element]) -> str:
    """What mistakes of one input have in common."""
    large = max(abs(element.numeric) for element in elements)
    if all(element.analytic == 0 for element in elements):
        return "no gradient at all arrives, though the results depend on it"
    ratios = torch.tensor(
        [e.analytic / e.numeric for e in elements if abs(e.numeric) > 1e-3 * large],
        dtype=torch.float64,
    )
    ratio = ratios.median().item() if len(ratios) > 1 else float("nan")
    if not ((ratios - ratio).abs() <= 1e-4 * abs(ratio)).all() or ratio != ratio:
        return ""
    if abs(ratio + 1) < 1e-4:
        return "all signs are flipped"
    return f"a factor is missing: analytic = {ratio:.4g} numeric, everywhere"


# ---- against reverse mode ------------------------------------------------------------------------


def forward_mode(probe: Probe) -> Outcome:
    """The derivative in a random direction of each input, weighted as in reverse mode."""
    tensors = probe.at()
    count = len(probe.call(tensors))
    backward = probe.forward_and_backward(tensors)[count:]
    directions = probe.seeds(probe.variables(tensors))
    products = [
        torch.zeros(1) if gradient is None else gradient * direction
        for gradient, direction in zip(backward, directions, strict=True)
    ]
    largest = max(terms.abs().sum().item() for terms in products)
    problems = []
    for place, (name, terms) in enumerate(zip(probe.names, products, strict=True)):
        direction = directions[place]
        with forward_ad.dual_level(), warnings.catch_warnings():
            # torch loads its formulas for forward mode when they are first needed, by torch.jit.
            warnings.filterwarnings("ignore", message=".*torch.jit.* is deprecated")
            dual = iter(
                forward_ad.make_dual(v, direction) if i == place else v
                for i, v in enumerate(probe.variables(tensors))
            )
            results = probe.call(
                [next(dual) if v else t for t, v in zip(tensors, probe.variable, strict=True)]
            )
            tangents = [forward_ad.unpack_dual(y).tangent for y in results]
            ours = sum(
                0.0 if t is None else (t * s).sum().item()
                for t, s in zip(tangents, probe.seeds(results), strict=True)
            )
        theirs = terms.sum().item()
        if not abs(ours - theirs) <= SAME * max(terms.abs().sum().item(), 1e-3 * largest):
            lost = " (there is no tangent)" if all(t is None for t in tangents) else ""
            problems.append(
                f"the derivative in a direction of {name} is {ours:.6g} in forward mode{lost} and "
                f"{theirs:.6g} in reverse mode"
            )
    return Outcome("\n".join(problems))


def batched_gradients(probe: Probe) -> Outcome:
    """Three backward passes at once, as vectorised Jacobians do, against one after the other."""
    leaves = probe.leaves(probe.at())
    results, variables = probe.call(leaves), probe.variables(leaves)
    differentiable = [y for y in results if y.requires_grad]
    if not differentiable:
        return Outcome()
    seeds = [torch.stack([s, -2 * s, s * s]) for s in probe.seeds(differentiable)]
    with _no_data_of_batches(), warnings.catch_warnings():  # torch says where a batch is a loop
        warnings.filterwarnings("ignore", message="There is a performance drop")
        batched = gradients(differentiable, variables, seeds, is_grads_batched=True)
    singles = [gradients(differentiable, variables, one) for one in zip(*seeds, strict=True)]
    expected = [
        None
        if its[0] is None
        else torch.stack([torch.zeros_like(its[0]) if g is None else g for g in its])
        for its in zip(*singles, strict=True)
    ]
    labels = probe.labels(len(probe.names))
    return Outcome(differ(labels, batched, expected, SAME, "batched", "one by one"))


@contextlib.contextmanager
def _no_data_of_batches() -> Iterator[None]:
    """``grad.data``, of which the process dies in a batched backward pass, raises instead."""
    base: Any = torch._C.TensorBase.data

    def get(tensor: Tensor) -> Tensor:
        if torch._C._functorch.is_legacy_batchedtensor(tensor):
            raise NotImplementedError("the backward pass takes .data of a batch of gradients")
        data: Tensor = base.__get__(tensor)
        return data

    setattr(torch.Tensor, "data", property(get, base.__set__))  # noqa: B010
    try:
        yield
    finally:
        delattr(torch.Tensor, "data")  # that of the base class is there again
