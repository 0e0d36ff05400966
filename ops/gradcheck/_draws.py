"""Random numbers that depend neither on memory layout nor on dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class SameDraws(TorchDispatchMode):
    """Draws in float64 and in logical order, so that a function can be compared with itself.

    torch draws in the order of memory, and draws other numbers in each dtype.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        dtype = kwargs.get("dtype") or torch.get_default_dtype()
        like = next((a for a in args if isinstance(a, Tensor) and a.is_floating_point()), None)
        if "dtype" not in kwargs and like is not None:
            dtype = like.dtype
        wide_args, wide_kwargs = pytree.tree_map(_wide, (args, kwargs))
        result = func(*wide_args, **wide_kwargs)
        for place, argument in enumerate(func._schema.arguments[: len(args)]):
            if argument.alias_info is not None and argument.alias_info.is_write:
                args[place].copy_(wide_args[place])
        if args and result is wide_args[0]:  # an in-place function
            return args[0]
        return pytree.tree_map(
            lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, result
        )


def _wide(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64 if value.is_floating_point else value
    if isinstance(value, Tensor):
        return value.to(torch.float64 if value.is_floating_point() else None).contiguous()
    return value
