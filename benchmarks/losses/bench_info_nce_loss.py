"""InfoNCE, forward + backward, against tensor code, its compile, and torch's chunked loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ops
from benchmarks import contrastive
from benchmarks.common import compiled, devices

SCALE = 1 / 0.07
SIZES = {
    "symmetric": tuple((512 << doubled, 256) for doubled in range(5)),
    "two_views": tuple((256 << doubled, 256) for doubled in range(5)),
}
TITLES = {"symmetric": "CLIP's loss", "two_views": "NT-Xent"}


class Eager(nn.Module):
    """The loss as one writes it: the matrix of logits, and cross entropies."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        query, key = F.normalize(query), F.normalize(key)
        place = torch.arange(len(query), device=query.device)
        if self.form == "symmetric":
            z = SCALE * query @ key.mT
            return (F.cross_entropy(z, place) + F.cross_entropy(z.mT, place)) / 2
        views = torch.cat((query, key))
        z = SCALE * views @ views.mT
        z = z.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf)
        return F.cross_entropy(z, torch.cat((place + len(query), place)))


def chunked(query: Tensor, key: Tensor) -> Tensor:
    """CLIP's loss by the chunked cross entropy of torch 2.13, once for each direction."""
    query, key = F.normalize(query), F.normalize(key)
    place = torch.arange(len(query), device=query.device)
    options = nn.LinearCrossEntropyOptions()
    both = (SCALE * query, key), (SCALE * key, query)
    return sum(F.linear_cross_entropy(x, y, place, options=options) for x, y in both) / 2


def inputs(rows: int, cols: int, device: str) -> tuple[Tensor, Tensor]:
    query, key = torch.randn(2, rows, cols, device=device)
    return query.requires_grad_(), key.requires_grad_()


def losses(form: str, device: str) -> dict[str, Callable[..., Tensor]]:
    found: dict[str, Callable[..., Tensor]] = {
        "eager": Eager(form),
        **compiled(Eager(form), device),
    }
    if form == "symmetric" and hasattr(F, "linear_cross_entropy"):
        found["torch's chunks"] = chunked
    return {**found, "ours": ops.InfoNCELoss(form, scale=SCALE)}


def run() -> dict:
    figures: dict = {}
    for device in devices():
        for form, sizes in SIZES.items():
            names = list(losses(form, device))
            figures.setdefault(device, {})[form] = {
                "speed": contrastive.speed(TITLES[form], form, losses, inputs, sizes, device),
                "memory": contrastive.memory(
                    TITLES[form], form, __name__, names, sizes[-1], device
                ),
            }
    return figures
