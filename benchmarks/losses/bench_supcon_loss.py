"""The supervised contrastive loss, forward + backward, against tensor code and its compile."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ops
from benchmarks import contrastive
from benchmarks.common import compiled, devices

SIZES = tuple((512 << doubled, 256) for doubled in range(5))
OF_A_CLASS = 4
TEMPERATURE = 0.1
TITLE = "Supervised contrastive loss"


class Eager(nn.Module):
    """The loss as one writes it: the matrix of logits, and a mask of the positives."""

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        x = F.normalize(embeddings)
        z = x @ x.mT / TEMPERATURE
        other = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
        log_p = z - z.masked_fill(~other, -torch.inf).logsumexp(1, keepdim=True)
        positive = (labels[:, None] == labels) & other
        count = positive.sum(1)
        losses = -(log_p * positive).sum(1) / count.clamp(min=1)
        return losses.sum() / (count > 0).sum()


def inputs(rows: int, cols: int, device: str) -> tuple[Tensor, Tensor]:
    labels = torch.arange(rows, device=device) // OF_A_CLASS
    return torch.randn(rows, cols, device=device).requires_grad_(), labels


def losses(form: str, device: str) -> dict[str, Callable[..., Tensor]]:
    """The contenders; the loss has one form."""
    ours = ops.SupConLoss(TEMPERATURE)
    return {"eager": Eager(), **compiled(Eager(), device), "ours": ours}


def run() -> dict:
    return {
        device: {
            "speed": contrastive.speed(TITLE, "", losses, inputs, SIZES, device),
            "memory": contrastive.memory(
                TITLE, "", __name__, list(losses("", device)), SIZES[-2], device
            ),
        }
        for device in devices()
    }
