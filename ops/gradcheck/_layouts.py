"""Is the gradient the same for every memory layout?"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ops.gradcheck._agreement import shaken
from ops.gradcheck._mismatch import AGREEMENT, differ, identical, largest
from ops.gradcheck._probe import Outcome, Probe, gradients
from ops.gradcheck._traits import short

Lay = Callable[[Tensor], Tensor]


def _expanded(*dims: int) -> Lay:
    """A layout with stride zero along these dimensions, whose elements are equal along them."""

    def lay(t: Tensor) -> Tensor:
        if any(not -t.dim() <= dim < t.dim() for dim in dims) or not t.numel():
            return t
        one = t
        for dim in dims:
            one = one.narrow(dim, 0, 1)
        return one.expand(t.shape)

    return lay


def _in_wider_rows(t: Tensor) -> Tensor:
    """The layout of a slice of a larger tensor."""
    if t.dim() < 2:
        return t
    return torch.cat([t, t[..., :1]], -1)[..., : t.shape[-1]]


_SAME_VALUES: dict[str, Lay] = {
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "with dimensions reversed": lambda t: (
        t.permute(*range(t.dim() - 1, -1, -1)).contiguous().permute(*range(t.dim() - 1, -1, -1))
        if t.dim() > 2
        else t
    ),
    "with channels last": lambda t: (
        t.movedim(1, -1).contiguous().movedim(-1, 1) if t.dim() > 2 else t
    ),
    "every other element": lambda t: torch.stack([t, t], -1)[..., 0],
    "at an odd offset": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    "in wider rows": _in_wider_rows,
}
# Broadcasting makes such inputs. The backward passes of sum(), sum(0) and sum(-1) make such
# gradients.
_EQUAL_VALUES: dict[str, Lay] = {
    "expanded from one element": lambda t: _expanded(*range(t.dim()))(t) if t.dim() else t,
    "expanded": _expanded(0),
    "expanded along the last dimension": _expanded(-1),
    "expanded along the second dimension": _expanded(1),
    "expanded along the last two dimensions": _expanded(-1, -2),
}
_ALL = {**_SAME_VALUES, **_EQUAL_VALUES}


def layouts(probe: Probe) -> Outcome:
    """Compare transposed, strided, offset and expanded inputs and arriving gradients."""
    with probe.same_draws():
        for dtype in _dtypes(probe):
            problem = _of_inputs(probe, dtype) or _of_arriving(probe, dtype)
            if problem:
                return Outcome(problem)
    return Outcome()


def _dtypes(probe: Probe) -> Iterator[torch.dtype | None]:
    """The widest dtype, and those that the function takes, because kernels differ by dtype."""
    yield None
    for dtype in probe.settings.dtypes:
        if dtype is not probe.traits.wide:
            try:
                probe.forward_and_backward(probe.at(dtype))
            except Exception:
                continue  # agreement() reports the error
            yield dtype


def _of_inputs(probe: Probe, dtype: torch.dtype | None) -> str:
    as_they_are = probe.forward_and_backward(probe.at(dtype))
    # Also each argument alone. Parameters of a module are contiguous in practice.
    alone = range(probe.subject.arguments if probe.subject.arguments > 1 and not dtype else 0)
    seen = {_strides(probe.at(dtype))}
    for (layout, lay), place in itertools.product(_ALL.items(), (None, *alone)):
        given = probe.at(dtype)
        tensors = [lay(t) if place in (None, i) else t for i, t in enumerate(given)]
        if _strides(tensors) in seen:
            continue
        seen.add(_strides(tensors))
        dense = [t.clone(memory_format=torch.contiguous_format) for t in tensors]
        plain = as_they_are
        if layout in _EQUAL_VALUES:
            try:
                plain = probe.forward_and_backward(dense)
            except Exception:
                continue  # equal elements may be invalid input, such as a singular matrix
        laid = probe.forward_and_backward(tensors)
        which = "all inputs" if place is None else probe.subject.names[place]
        if not all(map(identical, tensors, dense)):
            return f"with {which} {layout}, it writes to its inputs"
        ours, theirs = f"with {which} {layout}", "with contiguous ones"
        # The equal elements of expanded tensors may lie at a kink: see agreement().
        if _differ(probe, dtype, laid, plain, ours, theirs):
            run = probe.forward_and_backward
            spread = shaken(probe, run, dense, dtype or probe.precision, plain)
            problem = _differ(probe, dtype, laid, plain, ours, theirs, spread)
            if problem:
                return problem
    return ""


def _of_arriving(probe: Probe, dtype: torch.dtype | None) -> str:
    leaves = probe.leaves(probe.at(dtype))
    results, variables = probe.call(leaves), probe.variables(leaves)
    seeds = probe.seeds(results)
    # Equal arriving gradients may cancel, as in a normalisation.
    usual = gradients(results, variables, seeds)
    scale = max((largest(g) for g in usual if g is not None), default=0.0)
    seen = {_strides(seeds)}
    alone = range(len(seeds) if len(seeds) > 1 and not dtype else 0)
    for (layout, lay), place in itertools.product(_ALL.items(), (None, *alone)):
        ours = [lay(s) if place in (None, i) else s for i, s in enumerate(seeds)]
        if _strides(ours) in seen:
            continue
        seen.add(_strides(ours))
        laid = list(gradients(results, variables, ours))
        plain = list(gradients(results, variables, [s.contiguous() for s in ours]))
        which = "" if place is None else f" of result {place}"
        how = f"with the arriving gradient{which} {layout}"
        problem = _differ(probe, dtype, laid, plain, how, "with a contiguous one", least=scale)
        if problem:
            return problem
    return ""


def _strides(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    return tuple((*t.stride(), t.storage_offset()) for t in tensors)


def _differ(
    probe: Probe,
    dtype: torch.dtype | None,
    laid: list[Tensor | None],
    plain: list[Tensor | None],
    ours: str,
    theirs: str,
    spread: list[Tensor | None] | None = None,
    least: float = 0.0,
) -> str:
    scale = max([least, *(largest(v) for v in plain if v is not None)])
    if dtype:
        ours += f" in {short(dtype)}"
    else:
        scale *= 1e-3  # in half precisions, gradients that cancel are only as exact as the others
    exact = AGREEMENT[dtype] if dtype else probe.same
    return differ(probe.labels(len(laid)), laid, plain, exact, ours, theirs, spread, scale)
