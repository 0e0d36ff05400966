"""linear, forward and backward, against ``F.linear``: the cost of a Function in Python."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

import ops
from benchmarks.common import devices, in_turns, table

SIZES = ((8, 16, 8), (64, 256, 256), (512, 1024, 1024), (2048, 1024, 1024), (8192, 1024, 1024))


class Tutorial(torch.autograd.Function):
    """The Function of the tutorial: it saves all inputs and transposes by hand."""

    @staticmethod
    def forward(ctx, input, weight, bias):
        ctx.save_for_backward(input, weight, bias)
        output = input.mm(weight.t())
        output += bias.unsqueeze(0).expand_as(output)
        return output

    @staticmethod
    def backward(ctx, grad: Tensor):
        input, weight, _ = ctx.saved_tensors
        return grad.mm(weight), grad.t().mm(input), grad.sum(0)


def run() -> list[dict]:
    figures = []
    for device in devices():
        for size in SIZES:
            figures += _race(device, size)
    table(
        "Linear, float32: rows, in_features, out_features",
        ["size", "", "F.linear, us", "compile", "tutorial's Function", "ops", "F.linear / ops"],
        [
            [
                row["size"],
                row["part"],
                *(f"{us:.0f}" for us in row["us"].values()),
                f"**{row['us']['F.linear'] / row['us']['ops']:.2f}x**",
            ]
            for row in figures
        ],
    )
    return figures


def _race(device: str, size: tuple[int, int, int]) -> list[dict]:
    rows, ins, outs = size
    shapes = ((rows, ins), (outs, ins), (outs,))
    inputs = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
    grad = torch.randn(rows, outs, device=device)
    torch._dynamo.reset()
    contenders = {
        "F.linear": F.linear,
        "compile": torch.compile(F.linear, dynamic=False),
        "tutorial": Tutorial.apply,
        "ops": ops.linear,
    }

    def backward(out: Tensor):
        return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)

    parts = {
        "forward": {name: functools.partial(f, *inputs) for name, f in contenders.items()},
        "backward": {name: backward(f(*inputs)) for name, f in contenders.items()},
    }
    figures = []
    for part, calls in parts.items():
        seconds = in_turns(calls, {}, device)
        us = {name: 1e6 * value for name, value in seconds.items()}
        figures.append({"device": device, "size": size, "part": part, "us": us})
    return figures
