"""The batch semi-hard triplet loss, without the tensor of all triplets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from torch import Tensor

from ops._core import checks, pairs, triplets
from ops._core.modules import LossModule
from ops.losses.batch_all_triplet_loss import loss_of_triplets

__all__ = ["BatchSemiHardTripletLoss", "batch_semi_hard_triplet_loss"]

Negatives = Literal["nearest", "all"]
NEGATIVES: dict[Negatives, int] = {"nearest": triplets.NEAREST, "all": triplets.SEMI_HARD}


def batch_semi_hard_triplet_loss(
    embeddings: Tensor,
    labels: Tensor,
    margin: float = 0.2,
    *,
    negatives: Negatives = "nearest",
    distance: pairs.Distance = "euclidean",
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    reduction: checks.Reduction = "mean",
) -> Tensor:
    """The triplet loss with negatives that are farther than the positive, but within the margin.

    .. math::

        ℓᵢₚₙ = max(dᵢₚ − dᵢₙ + margin, 0)

    Embedding p has the label of the anchor i and is not i. Embedding n has another label. dᵢₚ and
    dᵢₙ are their distances from i. A triplet is semi-hard if dᵢₚ < dᵢₙ < dᵢₚ + margin. From
    F. Schroff, D. Kalenichenko, J. Philbin, "FaceNet: A Unified Embedding for Face Recognition and
    Clustering", CVPR 2015, arXiv:1503.03832, section 3.2.

    Args:
        embeddings: ``(N, D)``, floating point, any strides. Each row is an anchor.
        labels: ``(N,)``, integers.
        margin: the negative must be farther than the positive by this much.
        negatives: packages define the loss in two ways. ``nearest``: each pair of an anchor and a
            positive has one negative. It is the nearest one that is farther than the positive, or
            the farthest negative if none is. ``all``: all semi-hard triplets.
        distance: ``euclidean``, ``squared_euclidean``, or ``cosine``: 1 − cos of the angle.
        ref_emb: ``(M, D)``, like ``embeddings``: positives and negatives come from these instead,
            as from a memory bank. No row of it counts as the anchor itself.
        ref_labels: ``(M,)``, integers; required with ``ref_emb``.
        reduction: ``mean``, ``sum``, or ``none``: the sum for each anchor. The mean is over the
            pairs of an anchor and a positive, if the anchor has a negative; or, with
            ``negatives="all"``, over the semi-hard triplets.

    Returns:
        A scalar, or ``(N,)`` with ``reduction="none"``; in the dtype of ``embeddings``. An anchor
        without a positive, or without a negative, has no triplet. Without any triplet the loss and
        all gradients are 0.

    Raises:
        ArgumentTypeError: embeddings that are not tensors of float64, float32, bfloat16 or float16;
            labels that are not tensors of integers; a margin that is not a number.
        ArgumentError: a wrong shape, different devices, ``ref_emb`` without ``ref_labels``, a NaN
            margin, unknown negatives, an unknown distance or reduction.
        BackendUnavailableError: the requested back end cannot run.

    Gradients:
        For ``embeddings`` and ``ref_emb``, of any order, with the selected triplets held fixed. The
        gradient of a distance of 0 is 0. At the edge of the hinge it is 0, like that of
        :func:`torch.relu`. Forward mode, :mod:`torch.func` and second derivatives run tensor code,
        whose memory is N M².

    Numerics:
        Distances are sums of squared differences, so close points far from the origin keep
        their precision. Half precisions accumulate in float32. The first of equal distances is
        taken, so all back ends choose the same one of several duplicates. A NaN distance is taken
        before all others, and makes the loss NaN. Compiled kernels are bitwise deterministic for
        any number of threads. Under autocast the embeddings are cast to float32.

    Memory:
        O(N + M) beyond the gradients: distances and triplets of some anchors at a time, in a
        scratch memory of fixed size. The forward pass of a mean or a sum forms the gradients,
        because it has the distances. Half precisions sum them in float32. A backward pass with
        ``retain_graph=True`` takes their size once more. ``reduction="none"`` computes the
        distances again in its backward pass. The pure-torch path also takes some copies of the
        embeddings in float64.
    """
    rule = NEGATIVES[checks.one_of("negatives", negatives, NEGATIVES)]
    margin = checks.check_number("margin", margin)
    checks.check_reduction(reduction)
    return loss_of_triplets(
        rule, embeddings, labels, margin, distance, ref_emb, ref_labels, reduction
    )[0]


class BatchSemiHardTripletLoss(LossModule):
    """:func:`batch_semi_hard_triplet_loss` as a module, with its parameters set once.

    Args:
        margin, negatives, distance, reduction: see :func:`batch_semi_hard_triplet_loss`.
    """

    function = staticmethod(batch_semi_hard_triplet_loss)

    def __init__(
        self,
        margin: float = 0.2,
        *,
        negatives: Negatives = "nearest",
        distance: pairs.Distance = "euclidean",
        reduction: checks.Reduction = "mean",
    ) -> None:
        super().__init__(margin=margin, negatives=negatives, distance=distance, reduction=reduction)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss of ``(N, D)`` embeddings with ``(N,)`` labels."""
        return self.loss(embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels)


def samples() -> Iterator[checks.Sample]:
    """Where ``jitops check`` checks the gradients."""
    yield from pairs.samples(
        {
            f"negatives={negatives!r}, distance={distance!r}": BatchSemiHardTripletLoss(
                0.8, negatives=negatives, distance=distance
            )
            for negatives in NEGATIVES
            for distance in pairs.DISTANCES
        }
    )
