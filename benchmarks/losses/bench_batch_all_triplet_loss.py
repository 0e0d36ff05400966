"""The batch-all triplet loss, forward + backward, against tensor code and its compile."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import ops
from benchmarks.common import Kernel
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
        losses = distances[anchor, positive][:, None] - distances[anchor] + MARGIN
        losses = torch.relu(losses.masked_fill(same[anchor], -torch.inf))
        return losses.sum() / losses.count_nonzero().clamp(min=1)


def ours() -> nn.Module:
    return ops.BatchAllTripletLoss(MARGIN)


def peers() -> dict[str, Loss]:
    return installed(
        sentence_transformers=lambda: sentence_transformers("BatchAllTripletLoss", margin=MARGIN)
    )


def run() -> dict:
    return batches.run(sys.modules[__name__], "Batch-all", SIZES, OF_A_CLASS, (512, 128))


def kernels(device: str, dtype: torch.dtype) -> Iterator[Kernel]:
    """The forward pass: all distances, and with gradients twice as many differences to sum up."""
    for rows, cols in SIZES[3:]:
        x, labels = batches.inputs(rows, cols, OF_A_CLASS[0], device)
        x = x.detach().to(dtype)
        forward = torch.ops.jitops.batch_all_triplet_loss_forward.default
        for title, forms, products in (("value", False, 2), ("value and gradient", True, 6)):
            arguments = (x, labels, None, None, MARGIN, False, False, 0, False, 1, forms, False)
            product = ((rows, cols, rows),) * products
            yield Kernel(f"batch-all, {title}", (rows, cols), forward, arguments, x.nbytes, product)
