"""The conditional random field, forward + backward and decoding, against pytorch-crf."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import ops
from benchmarks.common import COMPILED, Kernel, devices, in_turns, ratios
from benchmarks.losses import peers

SIZES = ((256, 32, 32), (64, 32, 9))  # steps, sequences, tags


class Eager(torch.nn.Module):
    """The forward algorithm and that of Viterbi, as one writes them."""

    def __init__(self, model: ops.CRF) -> None:
        super().__init__()
        self.model = model

    def forward(self, emissions: Tensor, tags: Tensor) -> Tensor:
        model = self.model
        given = emissions.gather(2, tags[..., None]).sum((0, 2))
        given = given + model.transitions[tags[:-1], tags[1:]].sum(0)
        given = given + model.start_transitions[tags[0]] + model.end_transitions[tags[-1]]
        scores = model.start_transitions + emissions[0]
        for one in emissions[1:]:
            scores = (scores[:, :, None] + model.transitions).logsumexp(1) + one
        return (given - (scores + model.end_transitions).logsumexp(1)).sum()

    def decode(self, emissions: Tensor) -> list[list[int]]:
        scores, before = self.model.start_transitions + emissions[0], []
        for one in emissions[1:]:
            best = (scores[:, :, None] + self.model.transitions).max(1)
            scores = best.values + one
            before.append(best.indices)
        path = [(scores + self.model.end_transitions).argmax(1)]
        for one in reversed(before):
            path.append(one.gather(1, path[-1][:, None])[:, 0])
        return torch.stack(path[::-1], 1).tolist()


def inputs(shape: tuple[int, int, int], device: str) -> tuple[ops.CRF, Tensor, Tensor]:
    torch.manual_seed(0)
    emissions = torch.randn(shape, device=device, requires_grad=True)
    return (
        ops.CRF(shape[2]).to(device),
        emissions,
        torch.randint(shape[2], shape[:2], device=device),
    )


def contenders(model: ops.CRF) -> dict[str, torch.nn.Module]:
    """All with the same parameters."""
    others = peers.installed(torchcrf=lambda: peers.pytorch_crf(model))
    return {**others, "eager": Eager(model), "torch": model}


def run() -> dict:
    return {COMPILED[one]: {kind: _speed(one, kind) for kind in CALLS} for one in devices()}


def kernels(device: str, dtype: torch.dtype) -> Iterator[Kernel]:
    """Both passes and decoding. The least work of a step is labels² terms for each sequence."""
    for shape in SIZES:
        model, emissions, tags = inputs(shape, device)
        emissions = emissions.detach().to(dtype).transpose(0, 1)
        parameters = [
            one.detach().to(dtype)
            for one in (model.transitions, model.start_transitions, model.end_transitions)
        ]
        names = (
            "crf_log_likelihood_forward",
            "crf_log_likelihood_backward",
            "crf_log_likelihood_decode_forward",
        )
        forward, backward, decode = (getattr(torch.ops.jitops, name).default for name in names)
        arguments = (emissions, tags.T.contiguous(), None, *parameters)
        moves = emissions.nbytes + 8 * emissions.numel()
        yield Kernel("crf, forward", shape, forward, arguments, moves)
        value, sums = forward(*arguments)
        given = (torch.ones_like(value), *arguments, value, sums, *[True] * 4)
        yield Kernel("crf, backward", shape, backward, given, moves + emissions.nbytes)
        given = (emissions, None, *parameters)
        yield Kernel("crf, decoding", shape, decode, given, emissions.nbytes)


def train(model: torch.nn.Module, emissions: Tensor, tags: Tensor) -> object:
    loss = -model(emissions, tags)
    return torch.autograd.grad(loss, [emissions, *model.parameters()])


def decode(model: torch.nn.Module, emissions: Tensor, tags: Tensor) -> object:
    return model.decode(emissions.detach())


CALLS: dict[str, Callable[..., object]] = {"forward + backward": train, "decoding": decode}


def _speed(device: str, kind: str) -> list[dict]:
    backend, figures = COMPILED[device], []
    for shape in SIZES:
        model, *tensors = inputs(shape, device)
        models = {**contenders(model), backend: model}
        calls = {
            name: lambda one=one, tensors=tensors: CALLS[kind](one, *tensors)
            for name, one in models.items()
        }
        seconds = in_turns(calls, {"torch": "torch", backend: backend}, device)
        figures.append({"shape": shape, "ms": {name: 1e3 * s for name, s in seconds.items()}})
    ratios(
        f"Conditional random field, {kind}, {backend}: milliseconds",
        "steps, sequences, tags",
        figures,
        backend,
    )
    return figures
