"""Contenders and timing for losses of two images, for three benches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.common import COMPILED, compiled, exponents, in_turns, table

Loss = Callable[[Tensor, Tensor], Tensor]


def speed(
    title: str,
    shapes: Sequence[tuple[int, ...]],
    ours: Loss,
    eager: nn.Module,
    fused: nn.Module,
    peers: dict[str, Loss],
    device: str,
) -> list[dict]:
    """Forward + backward for the first image, and the exponent of the cost in the pixels.

    Args:
        eager: the loss in tensor code.
        fused: the form of it that ``torch.compile`` makes fast.
        peers: the losses of other packages.
    """
    backend, figures = COMPILED[device], []
    for shape in shapes:
        x = torch.rand(shape, device=device)
        y = x + 0.1 * torch.randn_like(x)
        x.requires_grad_()
        torch._dynamo.reset()
        losses = {
            "eager": eager.to(device),
            **compiled(fused.to(device), device),
            **peers,
            "torch": ours,
            backend: ours,
        }
        calls = {
            name: lambda loss=loss, x=x, y=y: torch.autograd.grad(loss(x, y), x)
            for name, loss in losses.items()
        }
        seconds = in_turns(calls, {"torch": "torch", backend: backend}, device)
        figures.append({"shape": shape, "us": {name: 1e6 * s for name, s in seconds.items()}})
    others = ("eager", "compile", *peers)
    table(
        f"{title}, forward + backward, {backend}: microseconds",
        ["shape", *figures[0]["us"], *(f"{name} / ours" for name in others)],
        [
            [
                row["shape"],
                *(f"{us:.0f}" for us in row["us"].values()),
                *(f"**{row['us'][name] / row['us'][backend]:.1f}x**" for name in others),
            ]
            for row in figures
        ],
    )
    growth = math.prod(shapes[-1]) / math.prod(shapes[0])
    exponent = exponents(figures[0]["us"], figures[-1]["us"], growth, "number of pixels")
    return [*figures, {"exponent": exponent}]
