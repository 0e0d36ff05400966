"""Soft-DTW, forward + backward: speed, memory, and the errors of float32 gradients.

``python -m benchmarks.losses.bench_soft_dtw`` prints the table of errors alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import ops
from benchmarks.common import COMPILED, Kernel, child, devices, exponents, in_turns, table
from benchmarks.losses import peers

SIZES = ((32, 512, 8), (1, 1024, 8), (1, 1024, 64))  # pairs, steps, features
GROWING = ((8, 128, 8), (8, 256, 8), (8, 512, 8))
# Steps, features, gamma, and the factor of the standard normal data.
ERRORS = (
    (128, 2, 1.0, 1),
    (512, 8, 0.1, 1),
    (512, 8, 0.01, 1),
    (1024, 64, 1.0, 1),
    (1024, 64, 0.1, 1),
    (1024, 64, 0.01, 1),
    (1024, 64, 1.0, 3),
)


class Usual(torch.autograd.Function):
    """The backward pass as it is usually written: from differences of the stored r."""

    @staticmethod
    def forward(ctx, cost: Tensor, gamma: float) -> Tensor:
        batch, rows, cols = cost.shape
        r = cost.new_full((batch, rows + 2, cols + 2), torch.inf)
        r[:, 0, 0] = 0
        for i, j in _diagonals(rows, cols):
            before = torch.stack((r[:, i - 1, j - 1], r[:, i - 1, j], r[:, i, j - 1]))
            r[:, i, j] = cost[:, i - 1, j - 1] - gamma * (-before / gamma).logsumexp(0)
        ctx.gamma = gamma
        ctx.save_for_backward(cost, r)
        return r[:, rows, cols].clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        cost, r = ctx.saved_tensors
        _, rows, cols = cost.shape
        d = torch.nn.functional.pad(cost, (1, 1, 1, 1))
        r = r.clone()
        r[:, :, -1] = r[:, -1] = -torch.inf
        r[:, -1, -1] = r[:, -2, -2]
        flow = torch.zeros_like(r)
        flow[:, -1, -1] = 1
        for i, j in reversed(list(_diagonals(rows, cols))):
            flow[:, i, j] = sum(
                flow[:, a, b] * ((r[:, a, b] - r[:, i, j] - d[:, a, b]) / ctx.gamma).exp()
                for a, b in ((i + 1, j), (i, j + 1), (i + 1, j + 1))
            )
        return grad[:, None, None] * flow[:, 1:-1, 1:-1], None


def _diagonals(rows: int, cols: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The cells of each anti-diagonal, counted from 1."""
    for k in range(2, rows + cols + 1):
        i = torch.arange(max(1, k - cols), min(rows, k - 1) + 1)
        yield i, k - i


def usual(gamma: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: Usual.apply((x[:, :, None] - y[:, None]).square().sum(-1), gamma)


def ours(gamma: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: ops.soft_dtw(x, y, gamma)


def packages(gamma: float) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    return peers.installed(tslearn=lambda: peers.tslearn(gamma), pysdtw=lambda: peers.pysdtw(gamma))


def run() -> dict:
    return {
        "errors": errors(),
        **{COMPILED[one]: _figures(one) for one in devices()},
    }


def _figures(device: str) -> dict:
    growing = _speed(device, GROWING)
    first, last = growing[0]["ms"], growing[-1]["ms"]
    growth = GROWING[-1][1] / GROWING[0][1]
    return {
        "speed": _speed(device, SIZES),
        "growing": growing,
        "exponent": exponents(first, last, growth, "number of steps of both sequences"),
        "memory": _memory(device),
    }


def kernels(device: str, dtype: torch.dtype) -> Iterator[Kernel]:
    """Both passes, which are bound by the latency of their steps, not by bytes."""
    for shape in SIZES:
        x, y = (t.detach().to(dtype) for t in inputs(shape, device))
        forward = torch.ops.jitops.soft_dtw_forward.default
        yield Kernel("soft_dtw, forward", shape, forward, (x, y, None, 1.0, -1), 2 * x.nbytes)
        saved = forward(x, y, None, 1.0, -1)
        backward = torch.ops.jitops.soft_dtw_backward.default
        arguments = (torch.ones_like(saved[0]), x, y, None, *saved, 1.0, -1, True, True)
        yield Kernel("soft_dtw, backward", shape, backward, arguments, 4 * x.nbytes)


def inputs(shape: tuple[int, int, int], device: str = "cpu") -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, device=device).requires_grad_() for _ in range(2)]


def errors() -> list[dict]:
    """The largest error of a float32 gradient, relative to the largest element in float64."""
    figures = []
    for steps, features, gamma, factor in ERRORS:
        x = [factor * t.detach() for t in inputs((1, steps, features))]
        contenders = {
            **packages(gamma),
            "usual backward pass": usual(gamma),
            "torch": ours(gamma),
            "cpp": ours(gamma),
        }
        with ops.use_backend("torch"):
            expected = _gradients(ours(gamma), [t.double() for t in x])
        found = {}
        for name, loss in contenders.items():
            with ops.use_backend(name if name in ("torch", "cpp") else "auto"):
                pairs = zip(_gradients(loss, x), expected, strict=True)
                wrong = [((one - other).abs().max() / other.abs().max()) for one, other in pairs]
            found[name] = max(wrong).item()
        case = {"steps": steps, "features": features, "gamma": gamma, "factor": factor}
        figures.append({**case, "errors": found})
    names = list(figures[0]["errors"])
    table(
        "Soft-DTW: the largest error of a float32 gradient, relative to float64",
        ["N = M", "D", "γ", "data", *names],
        [
            [row["steps"], row["features"], row["gamma"], f"× {row['factor']}",
             *(f"{row['errors'][name]:.0e}" for name in names)]
            for row in figures
        ],
    )  # fmt: skip
    return figures


def _gradients(loss: Callable[..., Tensor], x: list[Tensor]) -> list[Tensor]:
    x = [t.clone().requires_grad_() for t in x]
    return [one.double() for one in torch.autograd.grad(loss(*x).sum(), x)]


def _speed(device: str, sizes: tuple[tuple[int, int, int], ...]) -> list[dict]:
    backend, figures = COMPILED[device], []
    for shape in sizes:
        x = inputs(shape, device)
        others = packages(1.0) if device == "cpu" else {}
        losses = {**others, "torch": ours(1.0), backend: ours(1.0)}
        calls = {
            name: lambda loss=loss, x=x: torch.autograd.grad(loss(*x).sum(), x)
            for name, loss in losses.items()
        }
        seconds = in_turns(calls, {"torch": "torch", backend: backend}, device)
        figures.append({"shape": shape, "ms": {name: 1e3 * s for name, s in seconds.items()}})
    names = list(figures[0]["ms"])
    table(
        f"Soft-DTW, forward + backward, {backend}: milliseconds",
        ["pairs, steps, features", *names, *(f"{n} / ours" for n in names if n != backend)],
        [
            [row["shape"], *(f"{ms:.1f}" for ms in row["ms"].values()),
             *(f"**{row['ms'][n] / row['ms'][backend]:.1f}x**" for n in names if n != backend)]
            for row in figures
        ],
    )  # fmt: skip
    return figures


_MEMORY = """
    from benchmarks.losses.bench_soft_dtw import inputs, ours, packages
    device, which = {device!r}, {which!r}
    loss = packages(1.0).get(which) or ours(1.0)
    def peak():
        return torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else peak_mb()
    def step(x):
        return torch.autograd.grad(loss(*x).sum(), x)
    step(inputs((1, 8, 8), device))
    x = inputs({shape}, device)
    if device == "cpu":
        open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew from here
    before = torch.cuda.memory_allocated() / 1e6 if device == "cuda" else peak()
    step(x)
    print(json.dumps({{"mb": peak() - before}}))
"""


def _memory(device: str) -> list[dict]:
    """Peak memory of a step of each contender, with the gradients."""
    backend, figures = COMPILED[device], []
    for shape in SIZES[:2]:
        for which in (*(packages(1.0) if device == "cpu" else {}), "torch", backend):
            asked = which if which in ("torch", backend) else "auto"
            code = _MEMORY.format(device=device, which=which, shape=shape)
            figures.append({"shape": shape, "which": which, **child(code, JITOPS_BACKEND=asked)})
    table(
        f"Soft-DTW: peak memory of forward + backward, {device}",
        ["pairs, steps, features", "", "MB"],
        [[one["shape"], one["which"], f"{one['mb']:.1f}"] for one in figures],
    )
    return figures


if __name__ == "__main__":
    errors()
