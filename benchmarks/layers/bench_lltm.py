"""The LLTM, forward and backward, against the cell that its tutorial writes in Python."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

import ops
from benchmarks.common import COMPILED, Kernel, compiled, devices, in_turns, table

# Batch, input features, state. The first is that of the tutorial.
SIZES = ((16, 32, 128), (64, 256, 512), (256, 512, 1024))
KERNEL_SIZES = {
    "cpu": ((16, 32, 128), (256, 512, 1024)),
    "cuda": ((16, 32, 128), (256, 512, 1024), (8192, 1024, 1024)),
}


class Tutorial(nn.Module):
    """The unit of the tutorial; a sequence is a loop over it."""

    def __init__(self, input_features, state_size):
        super().__init__()
        self.weights = nn.Parameter(torch.empty(3 * state_size, input_features + state_size))
        self.bias = nn.Parameter(torch.empty(1, 3 * state_size))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -1 / math.sqrt(state_size), 1 / math.sqrt(state_size))

    def forward(self, input, state):
        if input.dim() == 2:
            return self.step(input, *state)
        outputs = []
        for step in input:
            state = self.step(step, *state)
            outputs.append(state[0])
        return torch.stack(outputs), state[1]

    def step(self, input, old_h, old_cell):
        gate_weights = F.linear(torch.cat([old_h, input], dim=1), self.weights, self.bias)
        gates = gate_weights.chunk(3, dim=1)
        input_gate, output_gate = torch.sigmoid(gates[0]), torch.sigmoid(gates[1])
        new_cell = old_cell + F.elu(gates[2]) * input_gate
        return torch.tanh(new_cell) * output_gate, new_cell


def run() -> list[dict]:
    return race(SIZES, None)


def race(sizes: tuple[tuple[int, int, int], ...], steps: int | None) -> list[dict]:
    """Measure a step, or a sequence of ``steps``; print a table for each device."""
    figures = []
    for device in devices():
        mine = [row for size in sizes for row in _race(device, size, steps)]
        figures += mine
        names = list(mine[0]["us"])
        table(
            f"LLTM, float32, {COMPILED[device]}, microseconds: batch, input features, state",
            ["size", "", *names, "Python / ops"],
            [
                [
                    row["size"],
                    row["part"],
                    *(f"{row['us'][name]:.0f}" if name in row["us"] else "" for name in names),
                    f"**{row['us']['Python'] / row['us'][COMPILED[device]]:.2f}x**",
                ]
                for row in mine
            ],
        )
    return figures


def _race(device: str, size: tuple[int, int, int], steps: int | None) -> list[dict]:
    """Measure with gradients of the parameters, as the tutorial does, and of all inputs."""
    batch, features, state_size = size
    backend = COMPILED[device]
    torch._dynamo.reset()
    modules = {
        "Python": Tutorial(features, state_size).to(device),
        **compiled(Tutorial(features, state_size).to(device), device),
        "torch": ops.LLTM(features, state_size).to(device),
        backend: ops.LLTM(features, state_size).to(device),
    }
    backends = {"torch": "torch", backend: backend}
    shape = (batch, features) if steps is None else (steps, batch, features)
    input = torch.randn(shape, device=device)
    h, cell, grad_cell = (torch.randn(batch, state_size, device=device) for _ in range(3))
    grad = torch.randn(*shape[:-1], state_size, device=device)
    figures = []

    def note(part, calls):
        us = {n: 1e6 * s for n, s in in_turns(calls, backends, device).items()}
        where = size if steps is None else f"{size}, {steps} steps"
        figures.append({"device": device, "size": where, "part": part, "us": us})

    def forward(module):
        return lambda: module(input, (h, cell))

    def gradients(name, results, wanted, **keep):
        if isinstance(results[1], ops.LLTMState):  # the result of a sequence
            results = results[0], results[1].cell
        leaves = [*modules[name].parameters(), *wanted]
        return torch.autograd.grad(results, leaves, (grad, grad_cell), **keep)

    def backward(name, wanted):
        with ops.use_backend(backends.get(name, "auto")):
            results = modules[name](input, (h, cell))
        return lambda: gradients(name, results, wanted, retain_graph=True)

    # A replayed graph overwrites its results, so its passes cannot be timed apart.
    apart = [name for name in modules if name != "reduce-overhead"]
    note(
        "forward + backward",
        {
            name: lambda name=name, module=module: gradients(name, module(input, (h, cell)), [])
            for name, module in modules.items()
        },
    )
    note("forward", {name: forward(modules[name]) for name in apart})
    note("backward", {name: backward(name, []) for name in apart})
    for tensor in (input, h, cell):
        tensor.requires_grad_()
    note("backward, inputs too", {name: backward(name, [input, h, cell]) for name in apart})
    return figures


def kernels(device: str, dtype: torch.dtype) -> Iterator[Kernel]:
    """A step: its matrix product alone, as torch computes it, and each pass."""
    for size in KERNEL_SIZES[device]:
        batch, features, state = size
        module = ops.LLTM(features, state).to(device, dtype)
        x = torch.randn(batch, features, device=device).to(dtype)
        h, cell = (torch.randn(batch, state, device=device).to(dtype) for _ in range(2))
        weights, bias = module.weights.detach(), module.bias.detach()
        both, gates = torch.cat((h, x), 1), torch.empty(batch, 3 * state, device=device).to(dtype)
        one = h.nbytes
        product = both.nbytes + weights.nbytes + gates.nbytes
        yield Kernel("its product alone", size, _product, (both, weights, gates), product)
        forward = torch.ops.jitops.lltm_forward.default
        arguments = (x, weights, bias, h, cell)
        yield Kernel("LLTM step, forward", size, forward, arguments, product + 6 * one)
        grads, gates = (torch.ones_like(h), torch.ones_like(h)), forward(*arguments)[2]
        backward = torch.ops.jitops.lltm_backward.default
        for name, needed, moves in (
            ("backward, no product", (False, False, False, False, True), 10 * one),
            ("backward", (True,) * 5, 2 * product + 10 * one),
        ):
            yield Kernel(name, size, backward, (*grads, *arguments, gates, *needed), moves)


def _product(both, weights, gates):
    return torch.mm(both, weights.T, out=gates)
