"""The smoothed distance of rows, forward + backward, against tensor code and its compile."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

import ops
from benchmarks.common import COMPILED, Kernel, compiled, devices, in_turns, table

STEM = "soft_dtw"
WIDTH = 1.0
SHAPES = ((256, 256), (4096, 512), (32768, 512))


class Eager(nn.Module):
    """The loss as one writes it."""

    def forward(self, input, target):
        return ((input - target).square().sum(-1) + WIDTH**2).sqrt().mean()


def run() -> dict:
    return {COMPILED[device]: _speed(device) for device in devices()}


def kernels(device: str, dtype: torch.dtype) -> Iterator[Kernel]:
    """Both passes, with the bytes that each must move."""
    for shape in SHAPES:
        x, y = torch.randn(2, *shape, device=device).to(dtype)
        forward = getattr(torch.ops.jitops, f"{STEM}_forward").default
        yield Kernel(f"{STEM}, forward", shape, forward, (x, y, WIDTH, 1), 2 * x.nbytes)
        loss, roots = forward(x, y, WIDTH, 1)
        backward = getattr(torch.ops.jitops, f"{STEM}_backward").default
        arguments = (torch.ones_like(loss), x, y, roots, 1, True, True)
        yield Kernel(f"{STEM}, backward", shape, backward, arguments, 4 * x.nbytes)


def _speed(device: str) -> list[dict]:
    backend, figures = COMPILED[device], []
    for shape in SHAPES:
        inputs = [torch.randn(shape, device=device).requires_grad_() for _ in range(2)]
        torch._dynamo.reset()
        ours = ops.SoftDtw(WIDTH)
        losses = {"eager": Eager(), **compiled(Eager(), device), "torch": ours, backend: ours}
        calls = {
            name: lambda loss=loss, inputs=inputs: torch.autograd.grad(loss(*inputs), inputs)
            for name, loss in losses.items()
        }
        seconds = in_turns(calls, {"torch": "torch", backend: backend}, device)
        us = {name: 1e6 * value for name, value in seconds.items()}
        figures.append({"shape": shape, "us": us})
    table(
        f"{STEM}, forward + backward, {backend}: microseconds",
        ["shape", *figures[0]["us"], "eager / ours", "compile / ours"],
        [
            [
                row["shape"],
                *(f"{us:.0f}" for us in row["us"].values()),
                f"**{row['us']['eager'] / row['us'][backend]:.2f}x**",
                f"**{row['us']['compile'] / row['us'][backend]:.2f}x**",
            ]
            for row in figures
        ],
    )
    return figures
