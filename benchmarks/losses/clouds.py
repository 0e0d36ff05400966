"""Speed and memory of ops on point clouds, against tensor code and SciPy's tree."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import COMPILED, child, compiled, exponents, in_turns, table

Shape = tuple[int, int, int, int]  # batch, points, points, columns
# The most pairs for tensor code that keeps all distances, and for the pure-torch path.
MOST_KEPT, MOST = 1 << 28, 1 << 30


def inputs(shape: Shape, device: str) -> list[Tensor]:
    batch, n, m, columns = shape
    torch.manual_seed(0)
    return [torch.randn(batch, count, columns, device=device).requires_grad_() for count in (n, m)]


def speed(module: ModuleType, title: str, shapes: tuple[Shape, ...], device: str) -> list[dict]:
    """Forward and backward pass of ``module.Eager()``, ``module.ours()`` and ``module.peers()``."""
    backend, figures = COMPILED[device], []
    for shape in shapes:
        x, y = inputs(shape, device)
        torch._dynamo.reset()
        losses: dict[str, Callable[..., Any]] = {backend: module.ours()}
        pairs = shape[0] * shape[1] * shape[2]
        if pairs <= MOST:
            losses["torch"] = module.ours()
        if pairs <= MOST_KEPT:
            losses |= {"eager": module.Eager(), **compiled(module.Eager(), device)}
            losses |= module.products()
        if device == "cpu":
            losses |= module.peers(shape)

        def step(loss, x=x, y=y):
            return lambda: torch.autograd.grad(loss(x, y), (x, y))

        calls = {name: step(loss) for name, loss in losses.items()}
        seconds = in_turns(calls, {"torch": "torch", backend: backend}, device)
        figures.append({"shape": shape, "ms": {one: 1e3 * s for one, s in seconds.items()}})
    names = list(dict.fromkeys(name for one in figures for name in one["ms"]))
    table(
        f"{title}, forward + backward, {device}: milliseconds",
        ["clouds, points, points, columns", *names],
        [
            [
                " × ".join(map(str, one["shape"])),
                *(f"{one['ms'][name]:.1f}" if name in one["ms"] else "" for name in names),
            ]
            for one in figures
        ],
    )
    return figures


def exponent(figures: list[dict], title: str) -> dict[str, float]:
    """Of the cost in the number of points, from the first to the last shape."""
    first, last = figures[0], figures[-1]
    growth = last["shape"][1] / first["shape"][1]
    return exponents(first["ms"], last["ms"], growth, f"number of points, {title}")


# In a process of its own: the peak over what stands there before the loss is computed.
MEMORY = """
    import importlib
    import ops
    from benchmarks.losses.clouds import inputs
    module = importlib.import_module({module!r})
    device, which, shape = {device!r}, {which!r}, {shape!r}
    loss = {{"eager": module.Eager, **module.peers(shape)}}.get(which, module.ours)
    loss = loss() if which in ("eager", "torch", "cpp", "cuda") else loss
    def peak():
        return torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else peak_mb()
    def step(x, y):
        return torch.autograd.grad(loss(x, y), (x, y))
    step(*inputs((1, 8, 8, shape[3]), device))
    x, y = inputs(shape, device)
    gradients = torch.zeros_like(x), torch.zeros_like(y)
    if device == "cpu":
        open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew from here
    before = torch.cuda.memory_allocated() / 1e6 if device == "cuda" else peak()
    del gradients
    step(x, y)
    print(json.dumps({{"mb": peak() - before}}))
"""


def memory(module: ModuleType, title: str, shape: Shape, device: str) -> dict[str, float]:
    """Peak memory of a step of each contender, beyond inputs and gradients."""
    backend, figures = COMPILED[device], {}
    peers = module.peers(shape) if device == "cpu" else {}
    for which in ("eager", "torch", backend, *peers):
        asked = which if which in ("torch", backend) else "auto"
        code = MEMORY.format(module=module.__name__, device=device, which=which, shape=shape)
        figures[which] = child(code, JITOPS_BACKEND=asked)["mb"]
    table(
        f"{title}: peak memory of {' × '.join(map(str, shape))}, beyond inputs and gradients, "
        f"{device}",
        ["", "MB"],
        [[name, f"{mb:.1f}"] for name, mb in figures.items()],
    )
    return figures


def tree_neighbours(x: Tensor, y: Tensor, k: int) -> Tensor:
    """The indices of the k nearest by SciPy's tree."""
    from scipy.spatial import cKDTree

    return torch.stack(
        [
            torch.from_numpy(cKDTree(other.numpy()).query(one.numpy(), k=range(1, k + 1))[1])
            for one, other in zip(x.detach(), y.detach(), strict=True)
        ]
    ).long()


def gathered(y: Tensor, idx: Tensor) -> Tensor:
    return torch.gather(
        y[:, :, None].expand(-1, -1, idx.shape[2], -1),
        1,
        idx[..., None].expand(*idx.shape, y.shape[2]),
    )
