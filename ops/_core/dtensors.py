"""Tensors whose parts lie on several processes: :class:`torch.distributed.tensor.DTensor`.

torch shards its own operators, so tensor code takes these tensors. Compiled kernels and NumPy do
not, and neither do losses that compare all rows of a batch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ops._errors import ArgumentError

REMEDY = "call .full_tensor(), or .to_local() for the part of this process"
NO_KERNEL = f"its kernels take no DTensor: {REMEDY}, or use JITOPS_BACKEND=torch"


def among(values: Iterable[Any]) -> bool:
    """Whether one of the values is a ``DTensor``. Without that module there is none."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None:
        return False
    return any(isinstance(value, module.DTensor) for value in values)


def refuse(name: str, value: Any) -> None:
    """An op, or one of its arguments, that takes no ``DTensor``.

    Raises:
        ArgumentError: the value is one.
    """
    if among((value,)):
        raise ArgumentError(f"{name} must be a plain tensor, got a DTensor: {REMEDY}")


def all_or_none(tensors: dict[str, Any]) -> None:
    """Either all of these tensors are ``DTensor``, or none is.

    Raises:
        ArgumentError: some are, and others are not.
    """
    if among(tensors.values()):
        for name, value in tensors.items():
            if not among((value,)):
                raise ArgumentError(
                    f"{name} must be a DTensor, as another argument is one, got a plain tensor: "
                    f"call torch.distributed.tensor.distribute_tensor"
                )


def run(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """The results of tensor code.

    Raises:
        ArgumentError: torch cannot run it with these placements.
    """
    try:
        return function(*arguments)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArgumentError(
            f"{name} cannot run on DTensors with these placements: {reason} Redistribute them to "
            f"Replicate(), or {REMEDY}"
        ) from error
