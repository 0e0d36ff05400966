"""linear, forward and backward, against torch's own: what a Function written in Python costs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import ops
from benchmarks.common import in_turns, table

SIZES = ((8, 16, 8), (64, 256, 256), (512, 1024, 1024), (2048, 1024, 1024), (8192, 1024, 1024))


class Tutorial(torch.autograd.Function):
    """The function as one writes it: all inputs saved, the transposes taken by hand."""

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
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
        for rows, ins, outs in SIZES:
            x, w, b = (torch.randn(s, device=device) for s in ((rows, ins), (outs, ins), (outs,)))
            inputs = [t.requires_grad_() for t in (x, w, b)]
            grad = torch.randn(rows, outs, device=device)
            torch._dynamo.reset()
            contenders = {
                "F.linear": F.linear,
                "compile": torch.compile(F.linear, dynamic=False),
                "tutorial": Tutorial.apply,
                "ops": ops.linear,
            }
            for part in ("forward", "backward"):
                calls = {}
                for name, call in contenders.items():
                    out = call(*inputs)
                    calls[name] = (
                        (lambda call=call: call(*inputs))
                        if part == "forward"
                        else lambda out=out: torch.autograd.grad(
                            out, inputs, grad, retain_graph=True
                        )
                    )
                seconds = in_turns(calls, {}, synchronize)
                figures.append(
                    {
                        "device": device,
                        "size": (rows, ins, outs),
                        "part": part,
                        "us": {name: 1e6 * value for name, value in seconds.items()},
                        "to_torch": seconds["F.linear"] / seconds["ops"],
                    }
                )
    table(
        "Linear, float32: rows, in_features, out_features",
        ["size", "", "F.linear, us", "compile", "tutorial's Function", "ops", "F.linear / ops"],
        [
            [
                f["size"],
                f["part"],
                *(f"{us:.0f}" for us in f["us"].values()),
                f"**{f['to_torch']:.2f}x**",
            ]
            for f in figures
        ],
    )
    return figures
