"""Speed and memory of losses on a batch of embeddings with labels, against tensor code."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.common import COMPILED, child, compiled, devices, exponents, in_turns, table


def inputs(rows: int, cols: int, of_a_class: int, device: str) -> tuple[Tensor, Tensor]:
    labels = torch.arange(rows, device=device) // of_a_class
    return torch.randn(rows, cols, device=device).requires_grad_(), labels


def run(
    module: ModuleType,
    title: str,
    sizes: Sequence[tuple[int, int]],
    of_a_class: Sequence[int],
    memory_size: tuple[int, int],
) -> dict:
    """Speed and memory of ``module.ours()`` against ``module.Eager()`` and ``module.peers()``."""
    return {
        COMPILED[device]: {
            "speed": [speed(title, sizes, count, module, device) for count in of_a_class],
            "memory": [memory(module, memory_size, count, device) for count in of_a_class],
        }
        for device in devices()
    }


def speed(
    title: str,
    sizes: Sequence[tuple[int, int]],
    of_a_class: int,
    module: ModuleType,
    device: str,
) -> list[dict]:
    """Forward and backward pass, for sizes that double, and the exponent of the cost in them."""
    backend, figures = COMPILED[device], []
    eager, ours, peers = module.Eager(), module.ours(), module.peers()
    for size in sizes:
        x, labels = inputs(*size, of_a_class, device)
        torch._dynamo.reset()
        losses = {
            "eager": eager,
            **compiled(eager, device),
            **peers,
            "torch": ours,
            backend: ours,
        }

        def step(loss, x=x, labels=labels):
            return lambda: torch.autograd.grad(loss(x, labels), x)

        calls = {name: step(loss) for name, loss in losses.items()}
        seconds = in_turns(calls, {"torch": "torch", backend: backend}, device)
        us = {name: 1e6 * value for name, value in seconds.items()}
        figures.append({"shape": size, "of_a_class": of_a_class, "us": us})
    table(
        f"{title}, {of_a_class} of a class, forward + backward, {backend}: microseconds",
        [
            "shape",
            *figures[0]["us"],
            *(f"{name} / ours" for name in ("eager", "compile", *peers)),
            "eager / torch",
        ],
        [
            [
                row["shape"],
                *(f"{us:.0f}" for us in row["us"].values()),
                *(
                    f"**{row['us'][name] / row['us'][backend]:.2f}x**"
                    for name in ("eager", "compile", *peers)
                ),
                f"{row['us']['eager'] / row['us']['torch']:.2f}x",
            ]
            for row in figures
        ],
    )
    growth = sizes[-1][0] / sizes[0][0]
    exponent = exponents(figures[0]["us"], figures[-1]["us"], growth, "number of embeddings")
    return [*figures, {"exponent": exponent}]


# In a process of its own: the peak over what stands there before the loss is computed.
MEMORY = """
    import ops
    from benchmarks.losses.batches import inputs
    from {module} import Eager, ours, peers
    device, which = {device!r}, {which!r}
    loss = Eager() if which in ("eager", "compile") else peers().get(which) or ours()
    if which == "compile":
        loss = torch.compile(loss, dynamic=False)
    def peak():
        return torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else peak_mb()
    def step(x, labels):
        return torch.autograd.grad(loss(x, labels), x)
    step(*inputs(8, {cols}, 4, device))
    x, labels = inputs({rows}, {cols}, {of_a_class}, device)
    gradient = torch.zeros_like(x)
    if device == "cpu":
        open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew from here
    before = torch.cuda.memory_allocated() / 1e6 if device == "cuda" else peak()
    del gradient
    step(x, labels)
    print(json.dumps({{"mb": peak() - before}}))
"""


def memory(module: ModuleType, size: tuple[int, int], of_a_class: int, device: str) -> list[dict]:
    """Peak memory of a step of each contender."""
    (rows, cols), backend, figures = size, COMPILED[device], []
    for which in ("eager", "compile", *module.peers(), "torch", backend):
        asked = which if which in ("torch", backend) else "auto"
        code = MEMORY.format(
            module=module.__name__,
            device=device,
            which=which,
            rows=rows,
            cols=cols,
            of_a_class=of_a_class,
        )
        figures.append({"which": which, **child(code, JITOPS_BACKEND=asked)})
    table(
        f"Peak memory of {size}, {of_a_class} of a class, beyond the inputs and the gradient, "
        f"{device}",
        ["", "MB"],
        [[one["which"], f"{one['mb']:.1f}"] for one in figures],
    )
    return figures
