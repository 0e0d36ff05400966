"""Conversion of tensors to NumPy arrays and back, for ops that compute with arrays."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ops._core import checks, dtensors
from ops._errors import ArgumentError, ArgumentTypeError, DependencyError, GradientError

if TYPE_CHECKING:
    import numpy as np

_HALF = (torch.bfloat16, torch.float16)  # NumPy has no bfloat16, and is slow in float16


def require(module: str, what: str, extra: str = "scipy") -> ModuleType:
    """Import a module of an optional package when it is first needed.

    Raises:
        DependencyError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name not in (package, module):
            raise
        raise DependencyError(
            f"{what} needs {package}, which is not installed: pip install {package}, "
            f"or jitops with its extra [{extra}]",
            name=package,
        ) from None


def check(name: str, tensors: Sequence[Any], keywords: dict[str, Any]) -> None:
    """Check the arguments of an op on arrays: tensors by position, anything else by keyword.

    Raises:
        ArgumentTypeError, ArgumentError, GradientError: see :class:`ops.NumpyOp`.
    """
    require("numpy", name)
    if not tensors:
        raise ArgumentError(f"{name} must be called with at least one tensor, got none")
    for place, value in enumerate(tensors):
        if not isinstance(value, Tensor):
            raise ArgumentTypeError(
                f"argument {place} of {name} must be a torch.Tensor, got {type(value).__name__} "
                f"(give other arguments by keyword)"
            )
        if value.device != tensors[0].device:
            raise ArgumentError(
                f"argument {place} of {name} must be on the device of the first, "
                f"{tensors[0].device}, got {value.device}"
            )
        dtensors.refuse(f"argument {place} of {name}", value)
        checks.dense(f"argument {place} of {name}", value)
        if value.is_meta:
            raise ArgumentError(f"argument {place} of {name} must have values, got a meta tensor")
        if torch._C._functorch.is_legacy_batchedtensor(value):
            raise GradientError(
                f"{name} cannot take batched gradients (is_grads_batched): use torch.func.vmap"
            )
    for keyword, value in keywords.items():
        if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
            raise ArgumentTypeError(
                f"{keyword} of {name} must not hold a tensor, because its gradient would be "
                f"dropped (give tensors by position)"
            )


def to_array(tensor: Tensor) -> np.ndarray[Any, Any]:
    """A read-only view if possible, else a copy, so that nothing writes to the caller's tensors."""
    wide = tensor.detach().float() if tensor.dtype in _HALF else tensor.detach()
    array = wide.resolve_conj().resolve_neg().cpu().numpy().view()
    array.flags.writeable = False
    return array


def to_tensor(name: str, value: Any, dtype: torch.dtype | None) -> Tensor:
    """A copy, because a function may return its argument or a buffer that it keeps."""
    import numpy as np

    array = np.array(value, order="C")
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype.kind not in "fiub":
        raise ArgumentTypeError(
            f"{name} must return real arrays, got {type(value).__name__} of {array.dtype}"
        )
    if array.dtype.kind != "f":
        return torch.from_numpy(array)
    if array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    return torch.from_numpy(array).to(dtype)
