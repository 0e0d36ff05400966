"""Is the gradient the same in forward mode, batched, and under vmap?"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ops.gradcheck._mismatch import differ, largest
from ops.gradcheck._probe import Outcome, Probe, gradients

# ---- the checks ----------------------------------------------------------------------------------


def forward_mode(probe: Probe) -> Outcome:
    """Compare the derivative in a random direction, of each input and of all, with reverse mode."""
    tensors = probe.at()
    count = len(probe.call(tensors))
    backward = probe.forward_and_backward(tensors)[count:]
    directions = probe.seeds(probe.variables(tensors))
    products = [
        torch.zeros(1) if gradient is None else (gradient * direction).flatten()
        for gradient, direction in zip(backward, directions, strict=True)
    ]
    largest = max(terms.abs().sum().item() for terms in products)
    problems: list[str] = []
    every = range(len(products))
    moves = [(name, {i}) for i, name in enumerate(probe.names)]
    moves += [("all inputs", {*every})] if len(products) > 1 else []
    for name, places in moves:
        if len(places) > 1 and problems:
            break  # the error is that of one input
        terms = torch.cat([products[i].to(products[0].device) for i in sorted(places)])
        with forward_ad.dual_level(), warnings.catch_warnings():
            # torch loads some formulas for forward mode by torch.jit on first use.
            warnings.filterwarnings("ignore", message=".*torch.jit.* is deprecated")
            dual = iter(
                forward_ad.make_dual(v, directions[i]) if i in places else v
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
        allowed = probe.same * max(terms.abs().sum().item(), 1e-3 * largest)
        if not (ours == theirs or abs(ours - theirs) <= allowed):
            lost = " (there is no tangent)" if all(t is None for t in tangents) else ""
            problems.append(
                f"the derivative in a direction of {name} is {ours:.6g} in forward mode{lost} and "
                f"{theirs:.6g} in reverse mode"
            )
    return Outcome("\n".join(problems) or _second_derivative(probe))


def _second_derivative(probe: Probe) -> str:
    """Compare the derivative of the gradient in forward mode, as in Hessians, with reverse mode."""
    directions = probe.seeds(probe.variables(probe.at()))

    def gradient(tensors: list[Tensor], leaves: list[Tensor]) -> tuple[Tensor | None, ...]:
        results, variables = probe.call(tensors), probe.variables(leaves)
        return gradients(results, variables, probe.seeds(results), create_graph=True)

    leaves = probe.leaves(probe.at())
    try:
        first = gradient(leaves, leaves)
        pairs = zip(first, directions, strict=True)
        total = torch.stack([(g * d).sum() for g, d in pairs if g is not None]).sum()
        expected = gradients([total], probe.variables(leaves), [torch.ones_like(total)])
        if not all(bool(g.isfinite().all()) for g in expected if g is not None):
            return ""  # order() reports it
        with forward_ad.dual_level(), _quiet():
            moving = iter(directions)
            duals = [
                forward_ad.make_dual(t, next(moving)) if v else t
                for t, v in zip(leaves, probe.variable, strict=True)
            ]
            found = [
                None if g is None else forward_ad.unpack_dual(g).tangent
                for g in gradient(duals, duals)
            ]
    except Exception:
        return ""  # order() reports an error in reverse mode, and many refuse forward mode here
    labels = [f"the second derivative by {name}" for name in probe.names]
    here, there = "in forward over reverse mode", "in reverse mode alone"
    # Second derivatives that cancel are only as exact as the first ones.
    scale = max(largest(g) for g in (*first, *expected) if g is not None)
    return differ(labels, found, expected, probe.same, here, there, scale=scale)


def batched_gradients(probe: Probe) -> Outcome:
    """Compare three backward passes at once, as vectorised Jacobians do, with single ones."""
    leaves = probe.leaves(probe.at())
    results, variables = probe.call(leaves), probe.variables(leaves)
    differentiable = [y for y in results if y.requires_grad]
    if not differentiable:
        return Outcome()
    seeds = [torch.stack([s, -2 * s, s * s]) for s in probe.seeds(differentiable)]
    with _no_data_of_batches(), _quiet():
        batched = gradients(differentiable, variables, seeds, is_grads_batched=True)
    singles = [gradients(differentiable, variables, one) for one in zip(*seeds, strict=True)]
    labels = probe.labels(len(probe.names))
    together = _stacked(singles)
    return Outcome(differ(labels, batched, together, probe.same, "in a batch", "one by one"))


def vmap(probe: Probe) -> Outcome:
    """Compare ``torch.vmap`` over all inputs, over each alone, and of gradients, with a loop."""
    points = [probe.at(), probe.others(-1e-3), probe.others(-2e-3)]
    everything = tuple(range(len(probe.names)))
    # One input alone, and all but one, find rules that forget which inputs have a batch.
    parts = {k for k in (1, len(everything) - 1) if 0 < k < len(everything)}
    some = itertools.chain(*(itertools.combinations(everything, k) for k in sorted(parts)))
    for batched in (everything, *some):
        for dim in (0, -1):
            problem = _over(probe, points, batched, dim)
            if problem and not problem.startswith("the result"):
                # Equal elements may have several right gradients, so compare unequal ones.
                problem = _over(probe, _unequal(probe, points), batched, dim)
            if problem:
                return Outcome(problem)
    return Outcome()


# ---- their parts ---------------------------------------------------------------------------------


def _unequal(probe: Probe, points: list[list[Tensor]]) -> list[list[Tensor]]:
    """Points nearby without equal elements."""
    generator = torch.Generator().manual_seed(probe.settings.seed)
    return [
        [
            t * (1 - 1e-3 * torch.rand(t.shape, generator=generator).to(t))
            + 1e-6 * torch.rand(t.shape, generator=generator).to(t)
            if v
            else t
            for t, v in zip(point, probe.variable, strict=True)
        ]
        for point in points
    ]


def _over(probe: Probe, points: list[list[Tensor]], batched: Sequence[int], dim: int) -> str:
    """Compare a batch of some of the variables, along a dimension, with a loop."""
    first = probe.variables(points[0])
    rows = [
        [v if i in batched else f for i, (v, f) in enumerate(zip(row, first, strict=True))]
        for row in map(probe.variables, points)
    ]

    def function(*variables: Tensor) -> tuple[Tensor, ...]:
        variable = iter(variables)
        return probe.call(
            [next(variable) if v else t for t, v in zip(points[0], probe.variable, strict=True)]
        )

    def gradient(*variables: Tensor) -> tuple[Tensor, ...]:
        results, pull = torch.func.vjp(function, *variables)[:2]
        return tuple(pull(tuple(probe.seeds(results))))

    loop = [_run(probe, function, row) for row in rows]
    dims = tuple(dim if i in batched else None for i in range(len(first)))
    leaves = [
        torch.stack([row[i] for row in rows], dim if i in batched else 0)
        if i in batched
        else first[i]
        for i in range(len(first))
    ]
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    with _quiet():
        results = torch.vmap(function, dims, randomness="same")(*leaves)
        seeds = [torch.stack([s] * len(rows)) for s in probe.seeds(loop[0][0])]
        its = gradients(results, leaves, seeds)
        inner = torch.vmap(gradient, dims, randomness="same")(*leaves)
    expected = _stacked([row[0] for row in loop])
    grads = _stacked([row[1] for row in loop])
    over = f"under vmap over {', '.join(probe.names[i] for i in batched)} (in_dims={dims})"
    count = len(expected)
    labels = probe.labels(count + len(grads))
    problem = differ(labels[:count], results, expected, probe.same, over, "in a loop")
    outer = [
        None if g is None or e is None else g.movedim(dim, 0) if i in batched else g
        for i, (g, e) in enumerate(zip(its, grads, strict=True))
    ]
    sums = [e if e is None or i in batched else e.sum(0) for i, e in enumerate(grads)]
    return (
        problem
        or differ(labels[count:], outer, sums, probe.same, over, "in a loop")
        or differ(labels[count:], inner, grads, probe.same, f"{over} of vjp", "in a loop")
    )


def _run(
    probe: Probe, function: Any, row: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor | None]]:
    leaves = [t.detach().clone().requires_grad_() for t in row]
    results = function(*leaves)
    return [y.detach() for y in results], list(gradients(results, leaves, probe.seeds(results)))


def _stacked(rows: Sequence[Sequence[Tensor | None]]) -> list[Tensor | None]:
    """Each column as one tensor; ``None`` if no row has a tensor there."""
    found: list[Tensor | None] = []
    for column in zip(*rows, strict=True):
        like = next((t for t in column if t is not None), None)
        found.append(
            None
            if like is None
            else torch.stack([torch.zeros_like(like) if t is None else t for t in column])
        )
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide torch's warnings about batches that it runs as a loop and about resized outputs."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        warnings.filterwarnings("ignore", message="An output with one or more elements was resized")
        yield


@contextlib.contextmanager
def _no_data_of_batches() -> Iterator[None]:
    """Let ``grad.data`` raise an error, because it crashes a process in a batched backward pass."""
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
        delattr(torch.Tensor, "data")  # uncovers that of the base class
