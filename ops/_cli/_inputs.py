"""Random arguments described on the command line: ``3,4``, ``4:long:10``, ``3,4:fixed``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

HELP = (
    "the shape of an argument, as in 3,4. Repeat it for each argument of your function. Random "
    "numbers fill them. 3,4:float:0:1 draws numbers from 0 to 1, 4:long:10 whole numbers below 10, "
    "4:long 0 or 1, 4:bool truth values. The gradient of 3,4:fixed or 3,4:fixed:0:1 is not checked"
)
_KINDS = ("float", "fixed", "long", "bool")


@dataclass(frozen=True)
class Input:
    """One argument: its shape, its kind, and the range of its numbers."""

    shape: tuple[int, ...]
    kind: str = "float"
    range: tuple[float, float] | None = None

    def draw(self, positive: bool) -> Tensor:
        """Draw random numbers. ``positive`` holds for floats without a range of their own."""
        if self.kind == "bool":
            return torch.rand(self.shape) < 0.5
        if self.kind == "long":
            low, high = self.range or (0, 2)
            return torch.randint(int(low), int(high), self.shape)
        if self.range:
            low, high = self.range
            return low + (high - low) * torch.rand(self.shape)
        numbers = torch.randn(self.shape)
        return numbers.exp() if positive else numbers


def draw(inputs: Sequence[Input], positive: bool) -> tuple[Tensor, ...]:
    """Draw all arguments. If some are fixed, the other floating ones require gradients."""
    tensors = tuple(given.draw(positive) for given in inputs)
    if any(given.kind == "fixed" for given in inputs):
        for given, tensor in zip(inputs, tensors, strict=True):
            tensor.requires_grad_(given.kind == "float")
    return tensors


def parse(text: str) -> Input:
    """Parse ``SHAPE[:KIND[:[LOW:]HIGH]]``."""
    shape, *rest = text.split(":")
    try:
        sizes = tuple(int(size) for size in shape.split(",") if size)
    except ValueError:
        sizes = (-1,)
    if min(sizes, default=0) < 0:
        raise argparse.ArgumentTypeError(
            f"must be sizes separated by commas, as in 3,4, got {text!r}"
        )
    kind, *limits = rest or ["float"]
    if kind not in _KINDS:
        raise argparse.ArgumentTypeError(
            f"must name one of {', '.join(_KINDS)} after the shape, got {text!r}"
        )
    if not limits:
        return Input(sizes, kind)
    number = int if kind == "long" else float
    try:
        low, high = map(number, limits if len(limits) > 1 else ["0", *limits])
    except ValueError:
        low, high = 0, 0
    if kind == "bool" or not low < high < float("inf"):
        raise argparse.ArgumentTypeError(
            f"must have a range of numbers, as in 4:long:0:10 or 3,4:float:0:1, got {text!r}"
        )
    return Input(sizes, kind, (low, high))
