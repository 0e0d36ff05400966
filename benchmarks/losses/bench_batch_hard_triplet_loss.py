"""The batch-hard triplet loss, forward + backward, against tensor code and its compile."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import ops
from benchmarks.common import Kernel
from benchmarks.losses import batches
from benchmarks.losses.peers import Loss, installed, pytorch_metric_learning

SIZES = ((256, 128), (512, 128), (1024, 128), (2048, 128), (4096, 128))
OF_A_CLASS = 4
MARGIN = 0.2


class Eager(nn.Module):
    """The loss as one writes it: the matrix of distances, and a mask for each kind of pair."""

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        distances = torch.cdist(embeddings, embeddings)
        same = labels[:, None] == labels[None]
        other = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        farthest = distances.masked_fill(~(same & other), -torch.inf).amax(1)
        nearest = distances.masked_fill(same, torch.inf).amin(1)
        return torch.relu(farthest - nearest + MARGIN).mean()


def ours() -> nn.Module:
    return ops.BatchHardTripletLoss(MARGIN)


def peers() -> dict[str, Loss]:
    return installed(
        pytorch_metric_learning=lambda: pytorch_metric_learning(
            "TripletMarginLoss", "BatchHardMiner", margin=MARGIN
        )
    )


def run() -> dict:
    return batches.run(sys.modules[__name__], "Batch-hard", SIZES, (OF_A_CLASS,), (2048, 128))


def kernels(device: str, dtype: torch.dtype) -> Iterator[Kernel]:
    """Both passes: the forward pass is bound by arithmetic, as a product of half the rate is."""
    for rows, cols in SIZES[2:]:
        x, labels = batches.inputs(rows, cols, OF_A_CLASS, device)
        x = x.detach().to(dtype)
        arguments = (x, labels, None, None, MARGIN, False, False, False, -1, 1)
        forward = torch.ops.jitops.batch_hard_triplet_loss_forward.default
        product = ((rows, cols, rows),) * 2
        yield Kernel("batch-hard, forward", (rows, cols), forward, arguments, x.nbytes, product)
        loss, *saved = forward(*arguments)
        backward = torch.ops.jitops.batch_hard_triplet_loss_backward.default
        call = (torch.ones_like(loss), *arguments[:4], *saved, *arguments[4:], True, False)
        yield Kernel("batch-hard, backward", (rows, cols), backward, call, 6 * x.nbytes)
