"""Traits of a function: its dtype, its precision, and whether it draws random numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

# Returns results and gradients for inputs; it may take a context to run within.
Run = Callable[..., tuple[Sequence[Tensor], Sequence[Tensor | None]]]


@dataclass(frozen=True)
class Traits:
    """The traits of a function that checks depend on.

    Attributes:
        wide: the dtype to check the inputs in; ``None`` keeps the given dtypes.
        default: the default dtype that the function needs for that, or ``None``.
        narrow: the dtype that it computes in, if that is less precise than the inputs.
        draws: whether it draws random numbers.
        differentiates: whether it takes gradients of its inputs itself.
        notes: notes for the report about the dtype.
    """

    wide: torch.dtype | None = torch.float64
    default: torch.dtype | None = None
    narrow: torch.dtype | None = None
    draws: bool = False
    differentiates: bool = False
    notes: tuple[str, ...] = ()


def find(
    at: Callable[[torch.dtype | None], list[Tensor]], run: Run, call: Callable[[Any], Any]
) -> Traits:
    """Run a function a few times to find its traits; ``call`` only calls it."""
    wide, default, notes = _runs_in(at, run)
    traits = Traits(wide, default, notes=notes)
    with default_dtype(default), contextlib.suppress(Exception):  # each check reports its errors
        differentiates = _raises(lambda: call(at(wide)))
        narrow, draws = _watch(at(wide), run)
        draws = draws or _draws(lambda: run(at(wide)))
        traits = Traits(wide, default, narrow, draws, differentiates, notes)
    return traits


def short(dtype: torch.dtype) -> str:
    """The name of a dtype, without ``torch.``."""
    return str(dtype).removeprefix("torch.")


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """Set the default dtype within a ``with`` block; ``None`` leaves it as it is."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _runs_in(
    at: Callable[[torch.dtype | None], list[Tensor]], run: Run
) -> tuple[torch.dtype | None, torch.dtype | None, tuple[str, ...]]:
    """float64 if the function runs in it, if need be with the default dtype float64."""
    ways = (
        (torch.float64, None, ""),
        (torch.float64, torch.float64, "checked with the default dtype float64"),
        (None, None, "checked in the dtypes of the inputs, with larger steps"),
    )
    refused = ""
    for wide, default, note in ways:
        try:
            with default_dtype(default):
                run(at(wide))
        except Exception as error:
            refused = refused or (str(error).strip() or type(error).__name__).splitlines()[0]
        else:
            because = f"{note}, because float64 inputs raise an error: {refused}"
            return wide, default, (because,) if note else ()
    return torch.float64, None, ()


def _raises(run: Callable[[], Any]) -> bool:
    try:
        run()
    except RuntimeError:
        return True
    return False


class _Watch(TorchDispatchMode):
    """Watches for conversions to narrower floating dtypes, and for random numbers."""

    def __init__(self, of: torch.dtype) -> None:
        super().__init__()
        self.of = torch.finfo(of).eps
        self.found: set[torch.dtype] = set()
        self.draws = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.draws |= torch.Tag.nondeterministic_seeded in func.tags
        taken = _dtypes((args, kwargs))
        if any(torch.finfo(dtype).eps <= self.of for dtype in taken):
            self.found |= {d for d in _dtypes(result) if torch.finfo(d).eps > self.of}
        return result


def _dtypes(tree: Any) -> set[torch.dtype]:
    return {
        leaf.dtype
        for leaf in pytree.tree_leaves(tree)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    }


def _draws(run: Callable[[], Any]) -> bool:
    """Whether a run changes the state of torch's random numbers."""
    torch.manual_seed(0x5EED)
    before = torch.get_rng_state()
    run()
    return not torch.equal(before, torch.get_rng_state())


def narrowest(tensors: Sequence[Tensor], run: Run) -> torch.dtype | None:
    """The least precise dtype of the intermediate values, if it is narrower than the inputs."""
    return _watch(tensors, run)[0]


def _watch(tensors: Sequence[Tensor], run: Run) -> tuple[torch.dtype | None, bool]:
    """The narrowest dtype of the values, and whether torch draws random numbers."""
    floating = [t.dtype for t in tensors if t.is_floating_point()]
    wide = min(floating, key=lambda dtype: torch.finfo(dtype).eps)
    watch = _Watch(wide)
    results, _ = run(tensors, watch)
    found = watch.found | {y.dtype for y in results if y.is_floating_point()}
    narrower = [d for d in found if torch.finfo(d).eps > torch.finfo(wide).eps]
    if narrower:
        return max(narrower, key=lambda dtype: torch.finfo(dtype).eps), watch.draws
    return (None if watch.draws else _rounds_unseen(tensors, wide, run)), watch.draws


def _rounds_unseen(tensors: Sequence[Tensor], wide: torch.dtype, run: Run) -> torch.dtype | None:
    """The dtype to which code outside torch rounds: smaller changes of inputs have no effect."""
    for dtype in (torch.float32, torch.bfloat16):
        eps = torch.finfo(dtype).eps
        if eps > 100 * torch.finfo(wide).eps:
            rounded = [t.to(dtype).to(t.dtype) if t.is_floating_point() else t for t in tensors]
            here, near, far = (
                run([t * (1 + by * eps) if t.is_floating_point() else t for t in rounded])[0]
                for by in (0, 0.2, 4)
            )
            changed = [(a != b).double().mean() > 0.5 for a, b in zip(here, far, strict=True)]
            if all(map(torch.equal, here, near)) and all(changed):
                return dtype
    return None
