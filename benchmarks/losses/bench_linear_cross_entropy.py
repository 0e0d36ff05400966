"""Linear cross entropy, forward + backward, against eager code, its compile and torch's own."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import ops
from benchmarks.common import child, devices, in_turns, table

COLUMNS, CLASSES = 512, 32_000
ROWS = (128, 256, 512, 1024, 2048)
SMOOTHING, Z_LOSS = 0.1, 1e-4


def eager(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w), target)


def eager_smoothing(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w), target, label_smoothing=SMOOTHING)


def eager_terms(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    logits = F.linear(x, w)
    loss = F.cross_entropy(logits, target, label_smoothing=SMOOTHING)
    return loss + Z_LOSS * logits.logsumexp(1).square().mean()


def torchs(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    """In chunks, since torch 2.13."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(x, w, target, options=options)


def ours(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    return ops.linear_cross_entropy(x, w, target)


def ours_terms(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    return ops.linear_cross_entropy(x, w, target, label_smoothing=SMOOTHING, z_loss=Z_LOSS)


def ours_log_prob(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    log_prob, entropy = ops.linear_log_prob(x, w, target)
    return log_prob.mean() + entropy.mean()


def contenders() -> dict[str, Callable[..., Tensor]]:
    """Without and with label smoothing and z-loss; ``ops`` stands behind those of its task."""
    found = {"eager": eager}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found["torch's chunks"] = torchs
    return found | {
        "ops": ours,
        "eager, smoothing": eager_smoothing,
        "eager, smoothing and z-loss": eager_terms,
        "compile, smoothing and z-loss": torch.compile(eager_terms, dynamic=False),
        "ops, smoothing and z-loss": ours_terms,
        "ops, log_prob and entropy": ours_log_prob,
    }


def inputs(rows: int, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    x = torch.randn(rows, COLUMNS)
    w = torch.randn(CLASSES, COLUMNS) / math.sqrt(COLUMNS)
    target = torch.randint(CLASSES, (rows,))
    return (*(t.to(device, dtype).requires_grad_() for t in (x, w)), target.to(device))


def run() -> dict:
    return {
        device: {
            "speed": [_speed(device, dtype) for dtype in (torch.float32, torch.bfloat16)],
            "memory": _memory(device),
        }
        for device in devices()
    }


def _speed(device: str, dtype: torch.dtype) -> dict:
    """Seconds by number of rows, the exponent of the cost in it, and the error of the loss."""
    name = str(dtype).removeprefix("torch.")
    figures: dict[str, list[float]] = {}
    for rows in ROWS:
        x, w, target = inputs(rows, device, dtype)
        torch._dynamo.reset()

        def step(loss, x=x, w=w, target=target):
            return lambda: torch.autograd.grad(loss(x, w, target), (x, w))

        calls = {one: step(loss) for one, loss in contenders().items()}
        for one, seconds in in_turns(calls, {}, device).items():
            figures.setdefault(one, []).append(seconds)
    x, w, target = inputs(ROWS[0], device, dtype)
    exact = [loss(x.double(), w.double(), target).item() for loss in (eager, eager_terms)]
    errors = {}
    for one, loss in contenders().items():
        if "log_prob" in one or one == "eager, smoothing":
            continue
        value = exact["z-loss" in one]
        errors[one] = abs(loss(x, w, target).item() / value - 1)
    doublings = math.log(ROWS[-1] / ROWS[0])
    table(
        f"Linear cross entropy, {name}, {device}: milliseconds for rows × {COLUMNS}, "
        f"{CLASSES} classes, forward + backward",
        ["", *map(str, ROWS), "exponent", f"error of the loss at {ROWS[0]}"],
        [
            [
                one,
                *(f"{1e3 * value:.0f}" for value in seconds),
                f"{math.log(seconds[-1] / seconds[0]) / doublings:.2f}",
                f"{errors[one]:.0e}" if one in errors else "",
            ]
            for one, seconds in figures.items()
        ],
    )
    return {"dtype": name, "rows": ROWS, "seconds": figures, "errors": errors}


# In a process of its own: the peak over what stands there before the loss is computed.
MEMORY = """
    from benchmarks.losses.bench_linear_cross_entropy import contenders, inputs
    device, loss = {device!r}, contenders()[{which!r}]
    def peak():
        return torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else peak_mb()
    def step(x, w, target):
        return torch.autograd.grad(loss(x, w, target), (x, w))
    step(*inputs(8, device))
    x, w, target = inputs({rows}, device)
    if device == "cpu":
        open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew from here
    before = torch.cuda.memory_allocated() / 1e6 if device == "cuda" else peak()
    gradients = step(x, w, target)
    print(json.dumps({{"mb": peak() - before - sum(g.nbytes for g in gradients) / 1e6}}))
"""


def _memory(device: str) -> list[dict]:
    figures = []
    for which in contenders():
        code = MEMORY.format(device=device, which=which, rows=ROWS[-1])
        figures.append({"which": which, **child(code, MALLOC_MMAP_THRESHOLD_=65536)})
    table(
        f"Linear cross entropy: peak memory of {ROWS[-1]} × {COLUMNS}, {CLASSES} classes, float32, "
        f"beyond inputs and gradients, {device}",
        ["", "MB"],
        [[one["which"], f"{one['mb']:.0f}"] for one in figures],
    )
    return figures
