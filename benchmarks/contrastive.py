"""The parts that the benches of contrastive losses share: time by size, and peak memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.common import child, exponents, in_turns, table

Losses = Callable[[str, str], dict[str, Callable[..., Tensor]]]
Inputs = Callable[[int, int, str], tuple[Tensor, ...]]


def speed(
    title: str, form: str, losses: Losses, inputs: Inputs, sizes: tuple[tuple[int, int], ...],
    device: str,
) -> list[dict]:  # fmt: skip
    """Milliseconds of forward + backward of each contender, and the exponent of the cost.

    Args:
        losses: makes the contenders of a form for a device; one is called ``ours``.
        inputs: makes the arguments of a loss from rows, columns and device.
    """
    figures = []
    for size in sizes:
        arguments = inputs(*size, device)
        wanted = [one for one in arguments if one.requires_grad]
        torch._dynamo.reset()

        def step(loss, arguments=arguments, wanted=wanted):
            return lambda: torch.autograd.grad(loss(*arguments), wanted)

        calls = {name: step(loss) for name, loss in losses(form, device).items()}
        seconds = in_turns(calls, {}, device)
        figures.append({"shape": size, "ms": {name: 1e3 * s for name, s in seconds.items()}})
    names = list(figures[0]["ms"])
    others = [name for name in names if name != "ours"]
    table(
        f"{title}, forward + backward, {device}: milliseconds",
        ["shape", *names, *(f"{name} / ours" for name in others)],
        [
            [
                row["shape"],
                *(f"{ms:.2f}" for ms in row["ms"].values()),
                *(f"**{row['ms'][name] / row['ms']['ours']:.2f}x**" for name in others),
            ]
            for row in figures
        ],
    )
    growth = sizes[-1][0] / sizes[0][0]
    exponent = exponents(figures[0]["ms"], figures[-1]["ms"], growth, "number of rows")
    return [*figures, {"exponent": exponent}]


# In a process of its own: the peak over what stands there before the loss is computed.
MEMORY = """
    from {module} import inputs, losses
    device = {device!r}
    loss = losses({form!r}, device)[{which!r}]
    def peak():
        return torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else peak_mb()
    def step(arguments):
        wanted = [one for one in arguments if one.requires_grad]
        return torch.autograd.grad(loss(*arguments), wanted)
    step(inputs(8, {size}[1], device))
    arguments = inputs(*{size}, device)
    gradients = [torch.zeros_like(one) for one in arguments if one.requires_grad]
    if device == "cpu":
        open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew from here
    before = torch.cuda.memory_allocated() / 1e6 if device == "cuda" else peak()
    del gradients
    step(arguments)
    print(json.dumps({{"mb": peak() - before}}))
"""


def memory(
    title: str, form: str, module: str, names: list[str], size: tuple[int, int], device: str
) -> list[dict]:
    """The peak memory of each contender of ``module``, beyond inputs and gradients."""
    figures = []
    for which in names:
        code = MEMORY.format(module=module, device=device, form=form, which=which, size=size)
        # Else the heap keeps freed blocks, more of them from step to step.
        figures.append({"which": which, **child(code, MALLOC_MMAP_THRESHOLD_=1 << 16)})
    table(
        f"{title}: peak memory of {size} beyond the inputs and gradients, {device}",
        ["", "MB"],
        [[one["which"], f"{one['mb']:.1f}"] for one in figures],
    )
    return figures
