"""ArcFace, forward + backward, against tensor code and its compile."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ops
from benchmarks import contrastive
from benchmarks.common import compiled, devices

CLASSES, MARGIN, SCALE = 10_000, 0.5, 64.0
SIZES = tuple((128 << doubled, 512) for doubled in range(5))
TITLE = f"ArcFace, {CLASSES} classes"


class Eager(nn.Module):
    """The loss as one writes it: the matrix of cosines, and that with a margin in some places."""

    def forward(self, x: Tensor, w: Tensor, target: Tensor) -> Tensor:
        cosines = F.linear(F.normalize(x), F.normalize(w))
        sines = (1 - cosines.square()).clamp(min=0).sqrt()
        moved = cosines * math.cos(MARGIN) - sines * math.sin(MARGIN)
        line = cosines - MARGIN * math.sin(MARGIN)
        moved = torch.where(cosines > -math.cos(MARGIN), moved, line)
        of_target = F.one_hot(target, CLASSES).bool()
        return F.cross_entropy(SCALE * torch.where(of_target, moved, cosines), target)


def inputs(rows: int, cols: int, device: str) -> tuple[Tensor, ...]:
    x, w = torch.randn(rows, cols, device=device), torch.randn(CLASSES, cols, device=device)
    target = torch.randint(CLASSES, (rows,), device=device)
    return x.requires_grad_(), w.requires_grad_(), target


def losses(form: str, device: str) -> dict[str, Callable[..., Tensor]]:
    """The contenders; the loss has one form."""
    return {"eager": Eager(), **compiled(Eager(), device), "ours": ops.margin_softmax_loss}


def run() -> dict:
    return {
        device: {
            "speed": contrastive.speed(TITLE, "", losses, inputs, SIZES, device),
            "memory": contrastive.memory(
                TITLE, "", __name__, list(losses("", device)), SIZES[-1], device
            ),
        }
        for device in devices()
    }
