"""The LLTM, forward and backward apart, against the cell that its tutorial writes in Python."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

import ops
from benchmarks.common import in_turns, table

# batch, input features, state; the first is the tutorial's.
SIZES = ((16, 32, 128), (64, 256, 512), (256, 512, 1024))
STEPS = 64  # of the sequence
DEVICES = {"cpp": "cpu", "cuda": "cuda"}


class Tutorial(nn.Module):
    """The unit as the tutorial has it; a loop makes a sequence of it."""

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
    figures = []
    for backend in ("cpp", *(["cuda"] if torch.cuda.is_available() else [])):
        for size in SIZES:
            figures += _race(backend, size, None)
        figures += _race(backend, SIZES[0], STEPS)
        table(
            f"LLTM, float32, {backend}: batch, input features, state",
            [
                "size",
                "",
                "Python cell, us",
                "compile",
                "ops, torch",
                f"ops, {backend}",
                "Python / ops",
            ],
            [
                [
                    row["size"],
                    row["part"],
                    *(f"{us:.0f}" for us in row["us"].values()),
                    f"**{row['us']['Python'] / row['us'][backend]:.2f}x**",
                ]
                for row in figures
                if row["backend"] == backend
            ],
        )
    return figures


def _race(backend: str, size: tuple[int, int, int], steps: int | None) -> list[dict]:
    """As the tutorial measures: gradients of the parameters; and of all else, as in a network."""
    batch, features, state_size = size
    device = DEVICES[backend]
    torch._dynamo.reset()
    modules = {
        "Python": Tutorial(features, state_size).to(device),
        "compile": Tutorial(features, state_size).to(device),
        "torch": ops.LLTM(features, state_size).to(device),
        backend: ops.LLTM(features, state_size).to(device),
    }
    modules["compile"] = torch.compile(modules["compile"], dynamic=False)
    backends = {"torch": "torch", backend: backend}
    shape = (batch, features) if steps is None else (steps, batch, features)
    input = torch.randn(shape, device=device)
    h, cell, grad_cell = (torch.randn(batch, state_size, device=device) for _ in range(3))
    grad = torch.randn(*shape[:-1], state_size, device=device)
    figures = []

    def note(part, calls):
        us = {n: 1e6 * s for n, s in in_turns(calls, backends, device).items()}
        where = size if steps is None else f"{size}, {steps} steps"
        figures.append({"backend": backend, "size": where, "part": part, "us": us})

    def forward(module):
        return lambda: module(input, (h, cell))

    def backward(name, wanted):
        with ops.use_backend(backends.get(name, "auto")):
            results = modules[name](input, (h, cell))
        if isinstance(results[1], ops.LLTMState):  # of a sequence
            results = results[0], results[1].cell
        leaves = [*modules[name].parameters(), *wanted]
        return lambda: torch.autograd.grad(results, leaves, (grad, grad_cell), retain_graph=True)

    note("forward", {name: forward(module) for name, module in modules.items()})
    note("backward", {name: backward(name, []) for name in modules})
    for tensor in (input, h, cell):
        tensor.requires_grad_()
    calls = {name: backward(name, [input, h, cell]) for name in modules}
    note("backward, inputs too", calls)
    return figures
