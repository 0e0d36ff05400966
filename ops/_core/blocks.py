"""Tensor code over blocks of rows, whose intermediate tensors stay in a CPU's cache."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

# Elements of a block, for each thread of a CPU: 256 kB in float32, a part of a level-2 cache. Other
# devices take long blocks, since each costs them several launches.
_OF_A_THREAD = 1 << 16
_ELSEWHERE = 1 << 24


def rows_of(*tensors: Tensor) -> list[Tensor]:
    """Tensors of one shape as matrices with the same last dimension."""
    shape = tensors[0].shape
    if len(shape) == 2:
        return list(tensors)
    rows = math.prod(shape[:-1])
    return [tensor.reshape(rows, shape[-1]) for tensor in tensors]


def blocks(*matrices: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """The same rows of all matrices, block by block; the first matrix decides how many rows."""
    rows, cols = matrices[0].shape
    elements = torch.get_num_threads() * _OF_A_THREAD if matrices[0].is_cpu else _ELSEWHERE
    step = max(1, elements // max(1, cols))
    if rows <= step:
        return [matrices]
    return zip(*(matrix.split(step) for matrix in matrices), strict=True)
