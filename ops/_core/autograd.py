"""The parts of autograd that the Functions of all ops share, and the declaration of operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ops._operators import declared

# Lives as long as the process: operators vanish with the Library that defined them.
_library = torch.library.Library("jitops", "FRAGMENT")


def define(schema: str, kernel: Callable[..., Any], shapes: Callable[..., Any]) -> None:
    """Declare the operator ``jitops::<schema>``, opaque to :func:`torch.compile`; no gradient.

    Args:
        schema: torch's schema language.
        kernel: computes the results. A library that is loaded may register kernels for a device,
            which come first.
        shapes: takes the same arguments and returns results of the right shape, strides and dtype,
            with no content: what :func:`torch.compile` traces with.
    """

    def meta(*args: Any) -> Any:
        # The dispatcher comes here too where one tensor alone is meta, and results of the others'
        # device would hold what nobody has computed.
        if any(isinstance(arg, Tensor) and not arg.is_meta for arg in args):
            raise RuntimeError(f"the tensors of jitops::{schema.partition('(')[0]} must be alike")
        return shapes(*args)

    # Arguments may require a gradient, which none of the tensor code in a kernel may record.
    _define(schema, Meta=meta, CompositeExplicitAutograd=torch.no_grad()(kernel))


def define_in_torch(schema: str, kernel: Callable[..., Any], shapes: Callable[..., Any]) -> None:
    """Declare an opaque operator of one tensor or several, for :func:`torch.vmap` too.

    There it runs once for each element of the batch.
    """
    name = schema.partition("(")[0]
    if name in declared:
        return

    def in_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        def one(number: int) -> list[Any]:
            return [
                arg if dim is None else arg.select(dim, number)
                for arg, dim in zip(args, in_dims, strict=True)
            ]

        operator = getattr(torch.ops.jitops, name)
        results = [operator(*one(number)) for number in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = tuple(torch.stack(column) for column in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    define(schema, kernel, shapes)
    torch.library.register_vmap(f"jitops::{name}", in_vmap, lib=_library)


def define_in_graphs(schema: str, apply: Callable[..., Any]) -> None:
    """Declare an operator that stands for a Function in the graphs of :func:`torch.compile`.

    A Function that torch.compile traces loses its second derivative without a word: the graph of
    its backward pass is never recorded. So it traces this operator instead, which calls ``apply``
    when the graph is run, or when autograd is traced in its turn.
    """
    _define(schema, CompositeImplicitAutograd=apply)


def _define(schema: str, **kernels: Callable[..., Any]) -> None:
    name = schema.partition("(")[0]
    if name not in declared:  # else by an import that failed later on, and is tried again
        declared.add(name)  # first, because torch looks the name up before it defines it
        _library.define(schema)
        for key, kernel in kernels.items():
            _library.impl(name, kernel, key)


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
    """``none``, ``mean`` or ``sum``, by the numbers of :data:`ops._core.checks.REDUCTIONS`."""
    if reduction == 0:
        return loss
    return loss.mean() if reduction == 1 else loss.sum()


# Above, softplus(x) is x: exp(-40) is less than a rounding of 40 in float64.
LINEAR = 40.0


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), to the last bits of float64, and 0 at -inf with all of its derivatives."""
    return torch.nn.functional.softplus(x, threshold=LINEAR)


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
    definition: Callable[..., Tensor | tuple[Tensor, ...]],
    arguments: Sequence[Any],
    places: Sequence[int],
    needed: Sequence[bool],
    grads: Sequence[Tensor | None],
    constant_results: Sequence[int] = (),
) -> list[Tensor]:
    """The gradients of ``definition(*arguments)`` that are needed, themselves differentiable.

    Args:
        definition: the pure-torch path of an op.
        arguments: its arguments.
        places: which of them are tensors with a gradient.
        needed: for each of those, whether its gradient is needed.
        grads: one for each differentiable result, ``None`` for a result that takes no part.
        constant_results: which results have no gradient.
    """
    recorded = torch.is_grad_enabled()
    arguments = list(arguments)
    with torch.enable_grad():
        wanted = []
        for place, need in zip(places, needed, strict=True):
            if arguments[place] is not None:
                # A view, so that a tensor given twice has a gradient for each of its places.
                arguments[place] = arguments[place].view_as(arguments[place])
                if need:
                    wanted.append(arguments[place])
        results = definition(*arguments)
    results = (results,) if isinstance(results, Tensor) else results
    results = tuple(x for place, x in enumerate(results) if place not in constant_results)
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
