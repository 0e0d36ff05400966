"""LNCC of volumes, forward + backward, against tensor code, its compile, and MONAI."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ops
from benchmarks.common import COMPILED, Kernel, devices, exponents
from benchmarks.losses import images, peers

SHAPES = ((1, 1, 32, 32, 32), (1, 1, 64, 64, 64), (1, 1, 96, 96, 96))
SIZES = (9, 21)


class Separable(nn.Module):
    """The loss with three convolutions in a row for each sum, as MONAI writes it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def sums(self, x: Tensor) -> Tensor:
        for dim in range(3):
            shape = [1, 1, 1, 1, 1]
            shape[2 + dim] = self.size
            padding = [self.size // 2 if place == dim else 0 for place in range(3)]
            x = F.conv3d(x, x.new_ones(shape), padding=padding)
        return x

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        volume = self.size**3
        sum_x, sum_y = self.sums(x), self.sums(y)
        cross = self.sums(x * y) - sum_x * sum_y / volume
        var_x = (self.sums(x * x) - sum_x * sum_x / volume).clamp(min=1e-5)
        var_y = (self.sums(y * y) - sum_y * sum_y / volume).clamp(min=1e-5)
        return -(cross * cross / (var_x * var_y)).mean()


def run() -> dict:
    return {COMPILED[device]: _speed(device) for device in devices()}


def kernels(device: str, dtype: torch.dtype) -> Iterator[Kernel]:
    """The value alone, and with the gradient of the first image."""
    for shape in SHAPES:
        x, y = torch.rand(2, *shape, device=device).to(dtype)
        for size in SIZES:
            parameters = (1, size, 1.0, float(size**3), 0.0, 1e-5, False, True)
            forward = torch.ops.jitops.lncc_loss_forward.default
            for title, needs, moved in (("value", False, 2), ("value and gradient", True, 4)):
                arguments = (x, y, *parameters, needs, False)
                yield Kernel(f"LNCC {size}, {title}", shape, forward, arguments, moved * x.nbytes)


def _speed(device: str) -> dict:
    """By window, and the exponent of our cost in its size, at the largest volume."""
    figures = {}
    for size in SIZES:
        figures[size] = images.speed(
            f"LNCC, window {size}",
            SHAPES,
            ops.LNCCLoss(kernel_size=size),
            Separable(size),
            Separable(size),
            peers.installed(monai=lambda size=size: peers.monai_lncc(size)),
            device,
        )
    first, last = (figures[size][len(SHAPES) - 1]["us"] for size in (SIZES[0], SIZES[-1]))
    exponent = exponents(first, last, SIZES[-1] / SIZES[0], "window's size")
    return {**figures, "exponent": exponent}
