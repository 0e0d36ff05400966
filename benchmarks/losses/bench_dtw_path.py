"""The path of dynamic time warping and its cost, against tensor code and tslearn."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import ops
from benchmarks.common import COMPILED, Kernel, devices, in_turns, ratios
from benchmarks.losses import peers

SIZES = ((32, 512, 8), (1, 1024, 8), (1, 1024, 64))  # pairs, steps, features


def inputs(shape: tuple[int, int, int], device: str) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, device=device) for _ in range(2)]


def packages() -> dict[str, Callable[[Tensor, Tensor], object]]:
    return peers.installed(tslearn=peers.tslearn_path)


def run() -> dict:
    return {COMPILED[one]: _speed(one) for one in devices()}


def kernels(device: str, dtype: torch.dtype) -> Iterator[Kernel]:
    """The search, which is bound by the latency of its steps, not by bytes."""
    for shape in SIZES:
        x, y = (one.to(dtype) for one in inputs(shape, device))
        operator = torch.ops.jitops.dtw_path_forward.default
        yield Kernel("dtw_path", shape, operator, (x, y, None, -1), 2 * x.nbytes)


def _speed(device: str) -> list[dict]:
    backend, figures = COMPILED[device], []
    for shape in SIZES:
        x = inputs(shape, device)
        paths = {**(packages() if device == "cpu" else {}), "torch": ops.dtw_path}
        calls = {name: lambda path=path, x=x: path(*x) for name, path in paths.items()}
        calls[backend] = lambda x=x: ops.dtw_path(*x)
        seconds = in_turns(calls, {"torch": "torch", backend: backend}, device)
        figures.append({"shape": shape, "ms": {name: 1e3 * s for name, s in seconds.items()}})
    ratios(
        f"The path of dynamic time warping, {backend}: milliseconds",
        "pairs, steps, features",
        figures,
        backend,
    )
    return figures
