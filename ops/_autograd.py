"""What every op's autograd Function shares.

Functions here use the combined ``forward(ctx, ...)`` rather than ``setup_context``: torch binds the
arguments of the latter by :mod:`inspect` at every call, nine microseconds where a small loss takes
forty. What ``setup_context`` would bring, :mod:`torch.func`, runs on the pure-torch path instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Lives as long as the process: operators vanish with the Library that defined them.
_library = torch.library.Library("jitops", "FRAGMENT")
_defined: set[str] = set()


def define(schema: str, shapes: Callable[..., Any]) -> None:
    """Declare the operator ``jitops::<schema>``.

    Args:
        schema: torch's schema language; the kernels register themselves when their library loads.
        shapes: takes the same arguments and returns results of the right shape, strides and dtype,
            with no content: what :func:`torch.compile` traces with.
    """

    def meta(*args: Any) -> Any:
        # The dispatcher comes here too where one tensor alone is meta, and results of the others'
        # device would hold what nobody has computed.
        if any(isinstance(arg, Tensor) and not arg.is_meta for arg in args):
            raise RuntimeError(f"the tensors of jitops::{schema.partition('(')[0]} must be alike")
        return shapes(*args)

    _define(schema, meta, "Meta")


def define_in_graphs(schema: str, apply: Callable[..., Any]) -> None:
    """Declare an operator that stands for a Function in the graphs of :func:`torch.compile`.

    A Function that torch.compile traces loses its second derivative without a word: the graph of
    its backward pass is never recorded. So it traces this operator instead, which calls ``apply``
    when the graph is run, or when autograd is traced in its turn.
    """
    _define(schema, apply, "CompositeImplicitAutograd")


def _define(schema: str, kernel: Callable[..., Any], key: str) -> None:
    name = schema.partition("(")[0]
    if name not in _defined:  # else by an import that failed later on, and is tried again
        _library.define(schema)
        _library.impl(name, kernel, key)
        _defined.add(name)


# ---- before the call -----------------------------------------------------------------------------


def needs_torch_path() -> bool:
    """Whether this call must be plain tensor code: inside torch.func, or in forward mode."""
    return _in_transform() or forward_ad._current_level >= 0


def _in_transform() -> bool:
    return bool(torch._C._are_functorch_transforms_active())


# torch.compile asks while tracing, when the transforms of the traced code are really active.
_in_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]


# ---- the call ------------------------------------------------------------------------------------

_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_batched = torch._C._functorch.is_legacy_batchedtensor


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)``, for who has asked :func:`needs_torch_path` before.

    torch's own looks for transforms and for what is left of them: two microseconds, where a small
    op takes thirty. Here only the second is left to do, for tensors that outlived their transform.
    """
    for arg in args:
        if isinstance(arg, Tensor) and _wrapped(arg):
            return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


# ---- in the pure-torch path ----------------------------------------------------------------------


def reduce(loss: Tensor, reduction: int) -> Tensor:
    """``none``, ``mean`` or ``sum``, by the numbers of :data:`ops._checks.REDUCTIONS`."""
    if reduction == 0:
        return loss
    return loss.mean() if reduction == 1 else loss.sum()


# ---- in the backward pass ------------------------------------------------------------------------


def needs_torch_backward(*grads: Tensor | None) -> bool:
    """Whether the backward pass is recorded (``create_graph=True``), batched or in forward mode."""
    if torch.is_grad_enabled() or needs_torch_path():
        return True
    for grad in grads:  # noqa: SIM110 - any() takes twice as long
        if grad is not None and _batched(grad):
            return True
    return False


def differentiable(
    torch_path: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    parameters: Sequence[Any],
    needed: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor]:
    """The gradients of ``torch_path(*inputs, *parameters)``, themselves differentiable.

    ``grads`` holds one for each of its results, ``None`` for those that take no part.
    """
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that an input given twice has a gradient for each of its places.
        places = [tensor.view_as(tensor) for tensor in inputs]
        wanted = [place for place, need in zip(places, needed, strict=True) if need]
        results = torch_path(*places, *parameters)
    results = (results,) if isinstance(results, Tensor) else results
    pairs = [pair for pair in zip(results, grads, strict=True) if pair[1] is not None]
    outputs, arrived = zip(*pairs, strict=True)
    return list(
        torch.autograd.grad(
            outputs,
            wanted,
            arrived,
            create_graph=recorded,
            allow_unused=True,
            materialize_grads=True,
        )
    )


def place(gradients: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    """The gradients asked for, each at the place of its input."""
    if len(gradients) == len(needed):
        return list(gradients)
    rest = iter(gradients)
    return [next(rest) if need else None for need in needed]
