"""The compiled operators without autograd and checks, compared with a copy of as many bytes.

On a GPU, a graph of many calls is replayed, so the time of Python and of launches is left out. The
calls use many sets of inputs in turn, so that none of them is still in the L2 cache.
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable, Iterator

import torch

import ops
from benchmarks.common import COMPILED, Kernel, benches, devices, in_turns, table
from ops._core.dispatch import built_in

DTYPES = (torch.float32, torch.bfloat16)
COLD = 256 << 20  # bytes: several times the largest L2 cache


def run() -> list[dict]:
    figures = []
    for device in devices():
        mine = [
            _figure(device, dtype, kernel) for dtype in DTYPES for kernel in _kernels(device, dtype)
        ]
        figures += mine
        peak = max(row["copy"] for row in mine)
        table(
            f"Operators alone, {_name(device)}: copies move up to {peak:.0f} GB/s",
            ["operator", "shape", "dtype", "us", "must move, MB", "GB/s", "of a copy"],
            [
                [
                    row["name"],
                    row["shape"],
                    row["dtype"],
                    f"{row['us']:.1f}",
                    f"{row['bytes'] / 1e6:.1f}",
                    f"{row['rate']:.0f}",
                    f"**{row['rate'] / row['copy']:.0%}**",
                ]
                for row in mine
            ],
        )
    return figures


def _name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else device


def _kernels(device: str, dtype: torch.dtype) -> Iterator[Kernel]:
    """The kernels that the benches list."""
    for name, path in benches().items():
        module = importlib.import_module(path)
        if hasattr(module, "kernels"):
            getattr(ops, name)  # declares the operators
            built_in(name).load(COMPILED[device])
            yield from module.kernels(device, dtype)


def _figure(device: str, dtype: torch.dtype, kernel: Kernel) -> dict:
    source, target = torch.empty(2, kernel.moves // 2, dtype=torch.uint8, device=device).fill_(1)
    copy = Kernel("copy", (), torch.Tensor.copy_, (target, source), kernel.moves)
    time = _replayed if device == "cuda" else _called
    seconds, of_copy = time(kernel, copy)
    return {
        "device": device,
        "name": kernel.name,
        "shape": kernel.shape,
        "dtype": str(dtype).removeprefix("torch."),
        "us": 1e6 * seconds,
        "bytes": kernel.moves,
        "rate": kernel.moves / seconds / 1e9,
        "copy": kernel.moves / of_copy / 1e9,
    }


def _called(*kernels: Kernel) -> list[float]:
    """The seconds of one call of each kernel."""
    calls = {one.name: lambda one=one: one.operator(*one.arguments) for one in kernels}
    return list(in_turns(calls, {}).values())


def _replayed(*kernels: Kernel) -> list[float]:
    """The seconds of one call of each kernel, from graphs that are replayed in turns."""
    graphs = [_captured(_rotation(kernel)) for kernel in kernels]
    times: list[list[float]] = [[] for _ in kernels]
    for _ in range(20):
        for (graph, count), mine in zip(graphs, times, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            mine.append(1e-3 * begin.elapsed_time(end) / count)
    return [statistics.median(mine) for mine in times]


def _rotation(kernel: Kernel) -> list[Callable[[], object]]:
    """The call with many copies of its tensors, more than the cache holds."""
    count = max(1, min(64, -(-COLD // max(1, kernel.moves))))
    sets = [kernel.arguments]
    for _ in range(count - 1):
        sets.append(tuple(one.clone() if isinstance(one, torch.Tensor) else one for one in sets[0]))
    return [lambda one=one: kernel.operator(*one) for one in sets]


def _captured(calls: list[Callable[[], object]]) -> tuple[torch.cuda.CUDAGraph, int]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return graph, len(calls)
