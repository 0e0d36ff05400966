"""The batch semi-hard triplet loss: its reference, the battery, and its own tests.

The description stands in the tests of the batch-all loss, because both have the same kernels.
"""

from __future__ import annotations

import pytest
import torch

import ops
from tests.harness.battery import Battery
from tests.losses.test_batch_all_triplet_loss import SEMI_HARD, SEMI_HARD_WITH_REFERENCES, semi_hard
from tests.losses.triplets import BAD_INPUT, check_bad_input, labels_of


class TestBatchSemiHardTripletLoss(Battery):
    op = SEMI_HARD

    @pytest.mark.parametrize(
        ("negatives", "losses"),
        [
            # Anchor 0: the positive is 2 away, negatives 1, 3 and 4. Anchor 1: 2; 1, 1 and 2.
            ("nearest", [0.5, 2 - 2 + 1.5, 0.0, 0.0, 0.0]),
            ("all", [0.5, 0.0, 0.0, 0.0, 0.0]),
        ],
    )
    def test_worked_by_hand(self, backend, device, negatives, losses):
        x = torch.tensor([[0.0], [2.0], [1.0], [3.0], [4.0]], device=device)
        labels = torch.tensor([0, 0, 1, 2, 3], device=device)
        result = ops.batch_semi_hard_triplet_loss(
            x, labels, 1.5, negatives=negatives, reduction="none"
        )
        assert result.tolist() == losses

    @pytest.mark.parametrize("negatives", ["nearest", "all"])
    @pytest.mark.parametrize("labels", [[0, 0, 0, 0], [0, 1, 2, 3], [0], []])
    def test_no_triplet(self, backend, device, negatives, labels):
        """A single class, no class twice, a single embedding, none."""
        x = torch.randn(len(labels), 3, device=device, requires_grad=True)
        labels = torch.tensor(labels, dtype=torch.int64, device=device)
        loss = ops.batch_semi_hard_triplet_loss(x, labels, negatives=negatives)
        loss.backward()
        assert loss.item() == 0
        assert not x.grad.any()

    def test_of_equal_distances_the_first_counts(self, backend, device):
        """The nearest beyond the positive; and the farthest, where none is beyond."""
        labels = torch.tensor([0, 0, 1, 1, 1], device=device)
        for others, first in (([4.0, -4.0, 4.0], 2), ([0.5, 1.0, -1.0], 3)):
            x = torch.tensor([[0.0], [2.0], *([z] for z in others)], device=device)
            x.requires_grad_()
            losses = ops.batch_semi_hard_triplet_loss(x, labels, 5.0, reduction="none")
            (gradient,) = torch.autograd.grad(losses[0], x)
            assert gradient[2:].nonzero()[:, 0].tolist() == [first - 2]

    @pytest.mark.parametrize("negatives", ["nearest", "all"])
    def test_nan_stays(self, backend, device, negatives):
        x = torch.randn(9, 3, device=device)
        x[4, 1] = torch.nan
        losses = semi_hard(x, negatives=negatives, margin=50.0, reduction="none")
        assert losses.isnan().all()

    def test_all_negatives_infinitely_far(self, backend, device):
        x = torch.tensor([[0.0], [1.0], [1e30]], device=device)
        labels = torch.tensor([0, 0, 1], device=device)
        for negatives in ("nearest", "all"):
            loss = ops.batch_semi_hard_triplet_loss(
                x, labels, 5.0, negatives=negatives, distance="squared_euclidean"
            )
            assert loss.item() == 0


class TestWithReferences(Battery):
    op = SEMI_HARD_WITH_REFERENCES


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        *BAD_INPUT,
        ({"margin": "soft"}, ops.ArgumentTypeError, "margin must be a real number, got str"),
        ({"negatives": "hard"}, ops.ArgumentError, "negatives must be one of nearest, all, got"),
        ({"reduction": "mean_all"}, ops.ArgumentError, "reduction must be one of none, mean, sum"),
    ],
)
def test_bad_input(backend, device, change, error, text):
    check_bad_input(ops.batch_semi_hard_triplet_loss, device, change, error, text)


def test_module():
    loss = ops.BatchSemiHardTripletLoss(0.7, negatives="all")
    x = torch.randn(9, 4)
    assert torch.equal(loss(x, labels_of(x)), semi_hard(x, margin=0.7, negatives="all"))
    assert repr(loss) == (
        "BatchSemiHardTripletLoss(margin=0.7, negatives='all', distance='euclidean', "
        "reduction='mean')"
    )
