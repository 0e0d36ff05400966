"""The improved triplet loss, forward + backward, against the code of a tutorial and its compile."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

import ops
from benchmarks.common import COMPILED, Kernel, child, compiled, devices, in_turns, table

T1, T2, BETA = -1.0, 0.01, 0.002
SHAPES = ((32, 128), (256, 256), (4096, 512), (32768, 512))
DTYPES = (torch.float32, torch.bfloat16)
ALL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Of the kernels alone: few launches count most, then bandwidth; odd columns; few and wide rows.
KERNEL_SHAPES = ((256, 256), (4096, 512), (32768, 512), (32768, 511), (8, 1 << 20))


class Tutorial(nn.Module):
    """The loss as one writes it: torch's distance, squared again."""

    def forward(self, anchor, positive, negative):
        matched = torch.pow(F.pairwise_distance(anchor, positive), 2)
        mismatched = torch.pow(F.pairwise_distance(anchor, negative), 2)
        part_1 = torch.clamp(matched - mismatched, min=T1)
        part_2 = torch.clamp(matched, min=T2)
        return torch.mean(part_1 + BETA * part_2)


def run() -> dict:
    return {
        COMPILED[device]: {
            "speed": _speed(device),
            "pure_torch": _pure_torch(device),
            "memory": _memory(device),
        }
        for device in devices()
    }


def kernels(device: str, dtype: torch.dtype) -> Iterator[Kernel]:
    """Both passes, with the bytes that each must move."""
    for rows, cols in KERNEL_SHAPES:
        inputs = [torch.randn(rows, cols, device=device).to(dtype) for _ in range(3)]
        one = inputs[0].nbytes
        parameters = (T1, T2, BETA, 1e-6, 1)
        forward = torch.ops.jitops.improved_triplet_loss_forward.default
        yield Kernel("loss, forward", (rows, cols), forward, (*inputs, *parameters), 3 * one)
        loss, state = forward(*inputs, *parameters)
        backward = torch.ops.jitops.improved_triplet_loss_backward.default
        arguments = (torch.ones_like(loss), *inputs, state, *parameters[2:], True, True, True)
        yield Kernel("loss, backward", (rows, cols), backward, arguments, 6 * one)


def _inputs(shape: tuple[int, int], device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.randn(shape).to(device, dtype).requires_grad_() for _ in range(3)]


def _speed(device: str) -> list[dict]:
    backend = COMPILED[device]
    figures = []
    for dtype in DTYPES:
        for shape in SHAPES:
            inputs = _inputs(shape, device, dtype)
            torch._dynamo.reset()
            criteria = {
                "eager": Tutorial(),
                **compiled(Tutorial(), device),
                "torch": ops.ImprovedTripletLoss(T1, T2, BETA),
                backend: ops.ImprovedTripletLoss(T1, T2, BETA),
            }

            def step(criterion, inputs=inputs):
                return lambda: torch.autograd.grad(criterion(*inputs), inputs)

            calls = {name: step(criterion) for name, criterion in criteria.items()}
            seconds = in_turns(calls, {"torch": "torch", backend: backend}, device)
            figures.append(
                {
                    "shape": shape,
                    "dtype": str(dtype).removeprefix("torch."),
                    "us": {name: 1e6 * value for name, value in seconds.items()},
                }
            )
    table(
        f"Improved triplet loss, forward + backward, {backend}: microseconds",
        ["shape", "dtype", *figures[0]["us"], "eager / ours", "compile / ours"],
        [
            [
                row["shape"],
                row["dtype"],
                *(f"{us:.0f}" for us in row["us"].values()),
                f"**{row['us']['eager'] / row['us'][backend]:.2f}x**",
                f"**{row['us']['compile'] / row['us'][backend]:.2f}x**",
            ]
            for row in figures
        ],
    )
    return figures


def _pure_torch(device: str) -> list[dict]:
    """The pure-torch path against the tutorial's code, which is tensor code too."""
    figures = []
    for dtype in ALL_DTYPES:
        for shape in SHAPES:
            inputs = _inputs(shape, device, dtype)
            tutorial, ours = Tutorial(), ops.ImprovedTripletLoss(T1, T2, BETA)
            calls = {
                "eager": lambda: torch.autograd.grad(tutorial(*inputs), inputs),  # noqa: B023
                "torch": lambda: torch.autograd.grad(ours(*inputs), inputs),  # noqa: B023
            }
            seconds = in_turns(calls, {"torch": "torch"}, device)
            us = {name: 1e6 * value for name, value in seconds.items()}
            name = str(dtype).removeprefix("torch.")
            figures.append({"shape": shape, "dtype": name, "us": us})
    table(
        f"Improved triplet loss, forward + backward, pure torch on {device}: microseconds",
        ["shape", "dtype", "eager", "torch", "eager / torch"],
        [
            [
                row["shape"],
                row["dtype"],
                *(f"{us:.0f}" for us in row["us"].values()),
                f"**{row['us']['eager'] / row['us']['torch']:.2f}x**",
            ]
            for row in figures
        ],
    )
    return figures


# In a process of its own: the peak over what stands there before inputs and gradients exist.
MEMORY = """
    import ops
    from benchmarks.losses.bench_improved_triplet_loss import BETA, T1, T2, Tutorial
    device, dtype, which = {device!r}, {dtype}, {which!r}
    if which in ("eager", "compile"):
        criterion = Tutorial()
    else:
        criterion = ops.ImprovedTripletLoss(T1, T2, BETA)
    if which == "compile":
        criterion = torch.compile(criterion, dynamic=False)
    def step(rows, count=1):
        new = lambda: torch.ones(rows, 512, device=device, dtype=dtype, requires_grad=True)
        inputs = [new() for _ in range(3)]
        for _ in range(count):
            torch.autograd.grad(criterion(*inputs), inputs)
    def peak():
        return torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else peak_mb()
    step(8)
    if device == "cpu":
        open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew from here
    before = 0 if device == "cuda" else peak()
    step(32768, 3)
    inputs_and_gradients = 6 * 32768 * 512 * dtype.itemsize / 1e6
    print(json.dumps({{"mb": peak() - before, "floor_mb": inputs_and_gradients}}))
"""


def _memory(device: str) -> list[dict]:
    backend, figures = COMPILED[device], []
    for dtype in ALL_DTYPES:
        others = ("compile", backend) if dtype in DTYPES else ()
        for which in ("eager", "torch", *others):
            code = MEMORY.format(device=device, dtype=dtype, which=which)
            asked = which if which in ("torch", backend) else "auto"
            told = child(code, JITOPS_BACKEND=asked)
            figures.append({"dtype": str(dtype).removeprefix("torch."), "which": which, **told})
    table(
        f"Peak memory of (32768, 512), inputs and gradients included, {device}",
        ["dtype", "", "MB", "inputs + gradients, MB"],
        [[f["dtype"], f["which"], f"{f['mb']:.0f}", f"{f['floor_mb']:.0f}"] for f in figures],
    )
    return figures
