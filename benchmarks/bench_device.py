"""How near the ops come to what the device can do: its copy bandwidth, and its matrix products."""

from __future__ import annotations

import torch

import ops
from benchmarks.common import in_turns, table

LOSSES = {"cpu": ((4096, 512), (32768, 512)), "cuda": ((4096, 512), (32768, 512), (262144, 512))}
STEPS = ((256, 512, 1024), (1024, 1024, 1024), (8192, 1024, 1024))  # batch, features, state
DTYPES = (torch.float32, torch.bfloat16)
COMPILED = {"cpu": "cpp", "cuda": "cuda"}


def run() -> list[dict]:
    return [
        {"device": device, "losses": _losses(device), "steps": _steps(device)}
        for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else []))
    ]


def _losses(device: str) -> list[dict]:
    """Bytes that must be moved, in the time taken, against a copy of as many, half read."""
    figures = []
    for dtype in DTYPES:
        for rows, cols in LOSSES[device]:
            inputs = [torch.randn(rows, cols, device=device, dtype=dtype) for _ in range(3)]
            for tensor in inputs:
                tensor.requires_grad_()
            criterion = ops.ImprovedTripletLoss(-1.0, 0.01, 0.002)
            with ops.use_backend(COMPILED[device]):
                loss = criterion(*inputs)
            row = inputs[0].nbytes
            source, target = torch.empty(2, 3 * row, dtype=torch.uint8, device=device).fill_(1)
            calls = {
                "copy": lambda: target.copy_(source),  # noqa: B023
                "forward": lambda: criterion(*inputs),  # noqa: B023
                "backward": lambda: torch.autograd.grad(
                    loss,  # noqa: B023
                    inputs,  # noqa: B023
                    retain_graph=True,
                ),
            }
            seconds = in_turns(calls, {"forward": COMPILED[device]}, device)
            moved = {"copy": 6 * row, "forward": 3 * row, "backward": 6 * row}
            rates = {name: moved[name] / seconds[name] / 1e9 for name in calls}
            name = str(dtype).removeprefix("torch.")
            figures.append({"shape": (rows, cols), "dtype": name, "gb_per_s": rates})
    table(
        f"Improved triplet loss against the memory, {device}",
        ["shape", "dtype", "copy, GB/s", "forward", "of copy", "backward", "of copy"],
        [
            [
                row["shape"],
                row["dtype"],
                f"{rates['copy']:.0f}",
                f"{rates['forward']:.0f}",
                f"**{rates['forward'] / rates['copy']:.0%}**",
                f"{rates['backward']:.0f}",
                f"**{rates['backward'] / rates['copy']:.0%}**",
            ]
            for row in figures
            for rates in [row["gb_per_s"]]
        ],
    )
    return figures


def _steps(device: str) -> list[dict]:
    """The matrix products alone, as torch does them, in the time of the whole step."""
    figures = []
    for dtype in DTYPES:
        for batch, features, size in STEPS[: None if device == "cuda" else 1]:
            module = ops.LLTM(features, size).to(device, dtype)
            x = torch.randn(batch, features, device=device, dtype=dtype)
            state = torch.randn(2, batch, size, device=device, dtype=dtype)
            both = torch.randn(batch, size + features, device=device, dtype=dtype)
            weights = module.weights.detach()
            with ops.use_backend(COMPILED[device]):
                calls = {
                    "product": lambda: both @ weights.T,  # noqa: B023
                    "step": lambda: module(x, state.unbind()),  # noqa: B023
                }
                seconds = in_turns(calls, {"step": COMPILED[device]}, device)
            work = 2 * batch * (size + features) * 3 * size
            figures.append(
                {
                    "size": (batch, features, size),
                    "dtype": str(dtype).removeprefix("torch."),
                    "tflops": work / seconds["product"] / 1e12,
                    "share": seconds["product"] / seconds["step"],
                }
            )
    table(
        f"LLTM step, forward, against its matrix product alone, {device}",
        ["size", "dtype", "product, TFLOP/s", "product / step"],
        [
            [row["size"], row["dtype"], f"{row['tflops']:.2f}", f"**{row['share']:.0%}**"]
            for row in figures
        ],
    )
    return figures
