"""Argument checks shared by all ops: written once, so that every back end says the same.

Messages read "<argument> must be <what>, got <what it was>". Each check tests everything in one
cheap condition first and looks for words only when that fails: a loss on a small batch takes some
forty microseconds, and its checks must not be a tenth of it.
"""

from __future__ import annotations

import contextlib
import math
import numbers
from collections.abc import Callable, Collection
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from ops._core import dtensors
from ops._errors import ArgumentError, ArgumentTypeError, did_you_mean

_WIDE = (torch.float32, torch.float64)
_HALF = (torch.bfloat16, torch.float16)
FLOAT_DTYPES = (*_WIDE, *_HALF)

# What `jitops check` checks an op at: a title, a function or module, and its arguments.
Sample = tuple[str, Callable[..., Any], tuple[Any, ...]]

Reduction = Literal["none", "mean", "sum"]
REDUCTIONS: dict[Reduction, int] = {"none": 0, "mean": 1, "sum": 2}

_Word = TypeVar("_Word", bound=str)


def floating_rows(**tensors: Any) -> tuple[Tensor, ...]:
    """The tensors, checked and broadcast together: dense, floating, one dtype, one device.

    Under autocast the half precisions are taken to float32 first, as torch does for its distances.

    Raises:
        ArgumentTypeError: not a tensor, or a dtype outside float64, float32, bfloat16 and float16,
            or different from the first tensor's.
        ArgumentError: a layout other than strided, a device other than the first tensor's, a
            scalar tensor, shapes that do not broadcast together, or a DTensor beside a plain
            tensor.
    """
    values = tuple(tensors.values())
    first = values[0]
    if isinstance(first, Tensor) and not first.is_nested and not dtensors.among(values):
        dtype, device, shape = first.dtype, first.device, first.shape
        if shape and (dtype in _WIDE or (dtype in _HALF and not _autocasts(first))):
            for value in values:
                if (
                    not isinstance(value, Tensor)
                    or value.dtype is not dtype
                    or value.is_nested  # it has no shape
                    or value.shape != shape
                    or value.device != device
                    or value.layout is not torch.strided
                ):
                    break
            else:
                return values
    return _floating_rows(widened_under_autocast(tensors))


def widened(value: Any) -> Any:
    """A half-precision tensor in float32; anything else as it is."""
    if isinstance(value, Tensor) and value.dtype in _HALF:
        return value.float()
    return value


def widened_under_autocast(tensors: dict[str, Any]) -> dict[str, Any]:
    """Under autocast the half precisions in float32, as torch does for its losses and distances."""
    if _autocast_device(tensors) is None:
        return tensors
    return {name: widened(value) for name, value in tensors.items()}


def autocast(tensors: dict[str, Any]) -> dict[str, Any]:
    """The tensors as torch's matrix products take them: under autocast, in its dtype."""
    device = _autocast_device(tensors)
    if device is None:
        return tensors
    dtype = torch.get_autocast_dtype(device)
    eligible = (torch.float32, torch.bfloat16, torch.float16)  # float64 stays, as it does in torch
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.dtype in eligible else value
        for name, value in tensors.items()
    }


def without_autocast(value: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context in which matrix products of ``value`` keep its dtype."""
    if _autocasts(value):
        return torch.autocast(value.device.type, enabled=False)
    return contextlib.nullcontext()


def _autocast_device(tensors: dict[str, Any]) -> str | None:
    """The type of the tensors' device, if autocast is on for it."""
    first = next((t for t in tensors.values() if isinstance(t, Tensor)), None)
    return first.device.type if first is not None and _autocasts(first) else None


def _autocasts(value: Tensor) -> bool:
    """Whether autocast is on for the tensor's device."""
    return not value.is_meta and torch.is_autocast_enabled(
        "cpu" if value.is_cpu else value.device.type
    )


def ready(first: Any, *others: Any) -> bool:
    """Whether :func:`same_kind` holds and autocast is off: one cheap look, without words."""
    if not isinstance(first, Tensor) or dtensors.among((first, *others)):
        return False
    dtype, on_cpu = first.dtype, first.is_cpu
    for value in others:
        if (
            not isinstance(value, Tensor)
            or value.dtype is not dtype
            or value.layout is not torch.strided
            or value.is_nested
            # Comparing devices costs as much as all the rest.
            or (not value.is_cpu if on_cpu else value.device != first.device)
        ):
            return False
    return (
        dtype in FLOAT_DTYPES
        and first.layout is torch.strided
        and not first.is_nested
        and not first.is_meta
        and not torch.is_autocast_enabled("cpu" if on_cpu else first.device.type)
    )


def dense(name: str, value: Tensor) -> None:
    """A tensor with strides: neither sparse nor nested.

    Raises:
        ArgumentError: it is one of those.
    """
    if value.layout is not torch.strided or value.is_nested:
        layout = "a nested one" if value.is_nested else f"layout {_short(value.layout)}"
        raise ArgumentError(f"{name} must be a dense tensor, got {layout}")


def integers(name: str, value: Any) -> None:
    """A dense tensor of integers.

    Raises:
        ArgumentTypeError: not a tensor, or another dtype.
        ArgumentError: a layout other than strided, a DTensor.
    """
    if not isinstance(value, Tensor):
        raise ArgumentTypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    dtensors.refuse(name, value)
    if value.is_floating_point() or value.is_complex() or value.dtype is torch.bool:
        raise ArgumentTypeError(f"{name} must have an integer dtype, got {_short(value.dtype)}")
    dense(name, value)


def same_kind(**tensors: Any) -> None:
    """The tensors are plain, dense and floating, of one dtype and on one device.

    Raises:
        ArgumentTypeError: not a tensor, or a dtype outside float64, float32, bfloat16 and float16,
            or different from the first tensor's.
        ArgumentError: a layout other than strided, a device other than the first tensor's, a
            DTensor.
    """
    for name, value in tensors.items():
        dtensors.refuse(name, value)
    same_kind_of_parts(**tensors)


def same_kind_of_parts(**tensors: Any) -> None:
    """As :func:`same_kind`, but all tensors may be DTensors.

    Raises the same, and :class:`ArgumentError` if some are DTensors and others are not.
    """
    first_name, first = next(iter(tensors.items()))
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise ArgumentTypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        if value.dtype not in FLOAT_DTYPES:
            raise ArgumentTypeError(
                f"{name} must have dtype float64, float32, bfloat16 or float16, "
                f"got {_short(value.dtype)}"
            )
        dense(name, value)
        if value.dtype is not first.dtype:
            raise ArgumentTypeError(
                f"{name} must have {first_name}'s dtype {_short(first.dtype)}, "
                f"got {_short(value.dtype)}"
            )
        if value.device != first.device:
            raise ArgumentError(
                f"{name} must be on {first_name}'s device {first.device}, got {value.device}"
            )
    dtensors.all_or_none(tensors)


def _floating_rows(tensors: dict[str, Any]) -> tuple[Tensor, ...]:
    same_kind_of_parts(**tensors)
    for name, value in tensors.items():
        if value.dim() == 0:
            raise ArgumentError(f"{name} must have at least one dimension, got shape []")
    values = tuple(tensors.values())
    if all(value.shape == values[0].shape for value in values):
        return values
    try:
        return tuple(torch.broadcast_tensors(*values))
    except RuntimeError:
        *names, last = tensors
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in tensors.items())
        raise ArgumentError(
            f"{', '.join(names)} and {last} must have shapes that broadcast together, got {shapes}"
        ) from None


def check_number(name: str, value: Any) -> float:
    """``value`` as a float that is not NaN (infinities are numbers).

    Raises:
        ArgumentTypeError: not a real number (a tensor is none: its gradient would be dropped).
        ArgumentError: NaN.
    """
    if type(value) is not float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise ArgumentTypeError(f"{name} must be a real number, got {type(value).__name__}")
        try:
            value = float(value)
        except OverflowError:
            raise ArgumentError(
                f"{name} must be a number, got one beyond the range of floats"
            ) from None
    if value != value:  # not math.isnan, which torch.compile cannot trace for a changing number
        raise ArgumentError(f"{name} must be a number, got nan")
    return value


def rounded(value: float, dtype: torch.dtype) -> float:
    """``value``, or infinity beyond the range of ``dtype``, where torch.clamp would raise."""
    if abs(value) <= 65504.0 or abs(value) <= torch.finfo(dtype).max:  # the first is faster
        return value
    return math.copysign(math.inf, value)


def check_reduction(reduction: Reduction) -> int:
    """The reduction as the number that the compiled operators take.

    Raises:
        ArgumentError: not one of ``none``, ``mean``, ``sum``.
    """
    return REDUCTIONS[one_of("reduction", reduction, REDUCTIONS)]


def one_of(name: str, value: _Word, allowed: Collection[str], also: str = "") -> _Word:
    """``value``, which is one of the words ``allowed``; an error names ``also``, too.

    Raises:
        ArgumentError: it is not.
    """
    if isinstance(value, str) and value in allowed:
        return value
    meant = did_you_mean(str(value), allowed)
    raise ArgumentError(f"{name} must be one of {', '.join(allowed)}{also}, got {value!r}{meant}")


def check_int(name: str, value: Any, must: str = "an int") -> int:
    """``value`` as an int; NumPy's integers are integers.

    Raises:
        ArgumentTypeError: no integer, or a boolean.
    """
    if type(value) is int:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ArgumentTypeError(f"{name} must be {must}, got {type(value).__name__}")
    return int(value)


def check_count(name: str, value: Any) -> int:
    """``value``, a whole number of at least 1.

    Raises:
        ArgumentTypeError: no integer.
        ArgumentError: less than 1.
    """
    value = check_int(name, value)
    if value < 1:
        raise ArgumentError(f"{name} must be at least 1, got {value}")
    return value


def _short(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
