"""Batches that are spread over the processes of a group of :mod:`torch.distributed`.

Each process computes the losses of its own rows, against the rows of all. The result is that of one
process with the whole batch, on each of them. So are the gradients of its own rows.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ops._core import autograd
from ops._core.groups import WeakGroup, is_group
from ops._errors import ArgumentError, ArgumentTypeError, GradientError

_ALIKE = ("columns", "dtype", "requires_grad")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Spread:
    """The rows of all processes of a group.

    Attributes:
        first: the place of this process's first row among all rows.
        rows: the number of all rows.
    """

    group = WeakGroup()

    def __init__(self, group: Any, **own: Tensor) -> None:
        """Tell all processes the shapes of this one's tensors.

        Args:
            group: a process group. All of its processes must call this.
            own: tensors ``(rows, D)`` by the names of the arguments. All have the same rows; the
                number may differ among processes.

        Raises:
            ArgumentTypeError: not a process group.
            ArgumentError: this process is not in the group, or the tensors of its processes differ
                in columns, dtype, or whether they require gradients. All processes raise it.
        """
        if not is_group(group):
            raise ArgumentTypeError(
                f"group must be a torch.distributed.ProcessGroup, got {type(group).__name__}"
            )
        if autograd.needs_torch_path():
            raise ArgumentError("group must be None in torch.func and in forward mode")
        self.group = group
        rank = dist.get_rank(group)
        rows, device = next((x.shape[0], x.device) for x in own.values())
        facts = [rows]
        for x in own.values():
            differentiable = x.requires_grad and torch.is_grad_enabled()
            facts += [x.shape[1], _DTYPES.index(x.dtype), int(differentiable)]
        mine = torch.tensor(facts, device=device)
        all_facts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(all_facts, mine, group=group)
        table = torch.stack(all_facts).tolist()
        for column, (name, words) in enumerate(itertools.product(own, _ALIKE), 1):
            told = [row[column] for row in table]
            if len(set(told)) > 1:
                if words == "dtype":
                    told = [str(_DTYPES[number]).removeprefix("torch.") for number in told]
                raise ArgumentError(
                    f"{name} must have the same {words} on all processes of the group, got "
                    f"{', '.join(map(str, told))}"
                )
        self.sizes = [row[0] for row in table]
        self.first, self.rows = sum(self.sizes[:rank]), sum(self.sizes)
        self._rank = rank

    def gather(self, own: Tensor) -> Tensor:
        """The rows of all processes, in the order of their ranks. Gradients are summed up."""
        gathered: Tensor = _Gather.apply(own, self)
        return gathered

    def sum(self, own: Tensor) -> Tensor:
        """The sum over all processes. Its gradient is that of this process's own part."""
        total: Tensor = _Sum.apply(own, self.group)
        return total

    def reduce(self, losses: Tensor, count: int | Tensor, reduction: int) -> Tensor:
        """The losses of this process's rows, or the sum over all rows, or that over ``count``."""
        if reduction == 0:
            return losses
        total = self.sum(losses.sum())
        return total / count if reduction == 1 else total

    def whole(self, own: Tensor) -> Tensor:
        most = max(self.sizes)
        padded = own.new_zeros(most, *own.shape[1:])  # gloo gathers tensors of one shape
        padded[: own.shape[0]] = own
        parts = [torch.empty_like(padded) for _ in self.sizes]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:size] for part, size in zip(parts, self.sizes, strict=True)])

    def part(self, whole: Tensor) -> Tensor:
        return whole[self.first : self.first + self.sizes[self._rank]]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, spread: Spread) -> Tensor:
        ctx.spread = spread
        return spread.whole(own.detach())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        _refuse_second_order()
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=ctx.spread.group)
        return ctx.spread.part(total), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, group: Any) -> Tensor:
        total = own.detach().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        _refuse_second_order()
        return grad, None


def _refuse_second_order() -> None:
    if torch.is_grad_enabled():
        raise GradientError("a loss with group= has no second derivative")
