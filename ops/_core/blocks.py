"""Tensor code over blocks of rows, whose intermediate tensors stay in a CPU's cache."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# Elements of a block for each thread of a CPU. In float32 they take 256 kB, a part of a level-2
# cache. Other devices take long blocks, because every block launches the same kernels again.
ELEMENTS_OF_A_THREAD = 1 << 16
ELEMENTS_ELSEWHERE = 1 << 24


def elements_for(tensor: Tensor) -> int:
    """The elements of a block on the device of ``tensor``."""
    return ELEMENTS_OF_A_THREAD * torch.get_num_threads() if tensor.is_cpu else ELEMENTS_ELSEWHERE


def rows_of(*tensors: Tensor) -> list[Tensor]:
    """Tensors of one shape as matrices with the same last dimension."""
    shape = tensors[0].shape
    if len(shape) == 2:
        return list(tensors)
    rows = math.prod(shape[:-1])
    return [tensor.reshape(rows, shape[-1]) for tensor in tensors]


def blocks(first: Tensor, *others: Tensor | None) -> Iterable[tuple[Any, ...]]:
    """The same rows of all matrices, block by block; ``None`` stays ``None``.

    The columns of the first matrix decide how many rows a block has.
    """
    rows, cols = first.shape
    step = max(1, elements_for(first) // max(1, cols))
    if rows <= step:
        return [(first, *others)]
    parts = (itertools.repeat(None) if x is None else x.split(step) for x in others)
    return zip(first.split(step), *parts)  # noqa: B905 - repeat(None) has no end
