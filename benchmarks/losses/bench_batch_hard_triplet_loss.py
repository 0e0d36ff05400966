"""The batch-hard triplet loss, forward + backward, against tensor code and its compile."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import ops
from benchmarks.common import COMPILED, Kernel, child, compiled, devices, in_turns, table

SIZES = ((256, 128), (512, 128), (1024, 128), (2048, 128), (4096, 128))
OF_A_CLASS = 4
MARGIN = 0.2


class Eager(nn.Module):
    """The loss as one writes it: the matrix of distances, and a mask for each kind of pair."""

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        distances = torch.cdist(embeddings, embeddings)
        same = labels[:, None] == labels[None]
        other = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        farthest = distances.masked_fill(~(same & other), -torch.inf).amax(1)
        nearest = distances.masked_fill(same, torch.inf).amin(1)
        return torch.relu(farthest - nearest + MARGIN).mean()


def inputs(rows: int, cols: int, device: str) -> tuple[Tensor, Tensor]:
    labels = torch.arange(rows, device=device) // OF_A_CLASS
    return torch.randn(rows, cols, device=device).requires_grad_(), labels


def run() -> dict:
    return {
        COMPILED[device]: {"speed": _speed(device), "memory": _memory(device)}
        for device in devices()
    }


def kernels(device: str, dtype: torch.dtype) -> Iterator[Kernel]:
    """Both passes: the forward pass is bound by arithmetic, as a product of half the rate is."""
    for rows, cols in SIZES[2:]:
        x, labels = inputs(rows, cols, device)
        x = x.detach().to(dtype)
        arguments = (x, labels, None, None, MARGIN, False, False, False, 1)
        forward = torch.ops.jitops.batch_hard_triplet_loss_forward.default
        product = ((rows, cols, rows),) * 2
        yield Kernel("batch-hard, forward", (rows, cols), forward, arguments, x.nbytes, product)
        loss, *saved = forward(*arguments)
        backward = torch.ops.jitops.batch_hard_triplet_loss_backward.default
        call = (torch.ones_like(loss), *arguments[:4], *saved, *arguments[4:], True, False)
        yield Kernel("batch-hard, backward", (rows, cols), backward, call, 6 * x.nbytes)


def _speed(device: str) -> list[dict]:
    backend, figures = COMPILED[device], []
    for size in SIZES:
        x, labels = inputs(*size, device)
        torch._dynamo.reset()
        losses = {
            "eager": Eager(),
            **compiled(Eager(), device),
            "torch": ops.BatchHardTripletLoss(MARGIN),
            backend: ops.BatchHardTripletLoss(MARGIN),
        }

        def step(loss, x=x, labels=labels):
            return lambda: torch.autograd.grad(loss(x, labels), x)

        calls = {name: step(loss) for name, loss in losses.items()}
        seconds = in_turns(calls, {"torch": "torch", backend: backend}, device)
        us = {name: 1e6 * value for name, value in seconds.items()}
        figures.append({"shape": size, "us": us})
    table(
        f"Batch-hard triplet loss, forward + backward, {backend}: microseconds",
        ["shape", *figures[0]["us"], "eager / ours", "compile / ours", "eager / torch"],
        [
            [
                row["shape"],
                *(f"{us:.0f}" for us in row["us"].values()),
                f"**{row['us']['eager'] / row['us'][backend]:.2f}x**",
                f"**{row['us']['compile'] / row['us'][backend]:.2f}x**",
                f"{row['us']['eager'] / row['us']['torch']:.2f}x",
            ]
            for row in figures
        ],
    )
    first, last = figures[0], figures[-1]
    exponent = {
        name: math.log(last["us"][name] / first["us"][name]) / math.log(SIZES[-1][0] / SIZES[0][0])
        for name in first["us"]
    }
    shown = ", ".join(f"{name} {value:.2f}" for name, value in exponent.items())
    print(f"\nExponent of the cost in the number of embeddings: {shown}\n")
    return [*figures, {"exponent": exponent}]


# In a process of its own: the peak over what stands there before the loss is computed.
MEMORY = """
    import ops
    from benchmarks.losses.bench_batch_hard_triplet_loss import MARGIN, Eager, inputs
    device, which = {device!r}, {which!r}
    loss = ops.BatchHardTripletLoss(MARGIN) if which not in ("eager", "compile") else Eager()
    if which == "compile":
        loss = torch.compile(loss, dynamic=False)
    def peak():
        return torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else peak_mb()
    def step(x, labels):
        return torch.autograd.grad(loss(x, labels), x)
    step(*inputs(8, 128, device))
    x, labels = inputs(2048, 128, device)
    gradient = torch.zeros_like(x)
    if device == "cpu":
        open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew from here
    before = torch.cuda.memory_allocated() / 1e6 if device == "cuda" else peak()
    del gradient
    step(x, labels)
    print(json.dumps({{"mb": peak() - before}}))
"""


def _memory(device: str) -> list[dict]:
    backend, figures = COMPILED[device], []
    for which in ("eager", "compile", "torch", backend):
        asked = which if which in ("torch", backend) else "auto"
        told = child(MEMORY.format(device=device, which=which), JITOPS_BACKEND=asked)
        figures.append({"which": which, **told})
    table(
        f"Peak memory of (2048, 128) beyond the inputs and the gradient, {device}",
        ["", "MB"],
        [[one["which"], f"{one['mb']:.1f}"] for one in figures],
    )
    return figures
