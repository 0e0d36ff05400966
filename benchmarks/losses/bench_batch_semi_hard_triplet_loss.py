"""The batch semi-hard triplet loss, forward + backward, against tensor code and its compile."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

import ops
from benchmarks.losses import batches
from benchmarks.losses.peers import Loss, installed, sentence_transformers

SIZES = ((64, 128), (128, 128), (256, 128), (512, 128), (1024, 128))
OF_A_CLASS = (4, 32)
MARGIN = 0.2


class Eager(nn.Module):
    """The loss as one writes it with care: a row of negatives for each pair with a positive."""

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        distances = torch.cdist(embeddings, embeddings)
        same = labels[:, None] == labels
        others = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        anchor, positive = (same & others).nonzero(as_tuple=True)
        to_positive = distances[anchor, positive]
        to_negatives = distances[anchor].masked_fill(same[anchor], torch.inf)
        beyond = to_negatives.masked_fill(to_negatives <= to_positive[:, None], torch.inf).amin(1)
        farthest = distances.masked_fill(same, -torch.inf).amax(1)[anchor]
        to_negative = torch.where(beyond < torch.inf, beyond, farthest)
        return torch.relu(to_positive - to_negative + MARGIN).mean()


def ours() -> nn.Module:
    return ops.BatchSemiHardTripletLoss(MARGIN)


def peers() -> dict[str, Loss]:
    return installed(
        sentence_transformers=lambda: sentence_transformers(
            "BatchSemiHardTripletLoss", margin=MARGIN
        )
    )


def run() -> dict:
    return batches.run(sys.modules[__name__], "Batch semi-hard", SIZES, OF_A_CLASS, (512, 128))
