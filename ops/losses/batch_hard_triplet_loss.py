"""The batch-hard triplet loss, without the whole matrix of distances."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ops._core import autograd, checks, mining, pairs
from ops._core.fused import FusedOp
from ops._core.groups import WeakGroup
from ops._core.modules import LossModule
from ops._errors import ArgumentError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["BatchHardTripletLoss", "batch_hard_triplet_loss"]


def batch_hard_triplet_loss(
    embeddings: Tensor,
    labels: Tensor,
    margin: float | Literal["soft"] = 0.2,
    *,
    distance: pairs.Distance = "euclidean",
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    incomplete: pairs.Incomplete = "drop",
    reduction: checks.Reduction = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    """The triplet loss of each anchor with its hardest positive and its hardest negative.

    .. math::

        ℓᵢ = max(d⁺ᵢ − d⁻ᵢ + margin, 0)

    d⁺ᵢ is the largest distance from embedding i to another one with the same label. d⁻ᵢ is the
    smallest distance to one with another label. ``margin="soft"`` is the soft margin,
    ℓᵢ = log(1 + exp(d⁺ᵢ − d⁻ᵢ)). From A. Hermans, L. Beyer, B. Leibe, "In Defense of the Triplet
    Loss for Person Re-Identification", 2017, arXiv:1703.07737, equation 5.

    Args:
        embeddings: ``(N, D)``, floating point, any strides. Each row is an anchor.
        labels: ``(N,)``, integers.
        margin: the negative must be farther than the positive by this much; or ``"soft"``.
        distance: ``euclidean``, ``squared_euclidean``, or ``cosine``: 1 − cos of the angle.
        ref_emb: ``(M, D)``, like ``embeddings``: positives and negatives come from these instead,
            as from a memory bank. No row of it counts as the anchor itself.
        ref_labels: ``(M,)``, integers; required with ``ref_emb``.
        incomplete: an anchor without any positive, or without any negative, has the loss 0. With
            ``"drop"`` the mean leaves it out, with ``"zero"`` the mean counts it.
        reduction: ``mean``, ``sum``, or ``none``.
        group: a process group of :mod:`torch.distributed`. Positives and negatives then come from
            the embeddings of all its processes, whose N may differ. All must call this alike. The
            result is that of one process with the whole batch, on each of them; with ``none``
            only its own rows.

    Returns:
        A scalar, or ``(N,)`` with ``reduction="none"``; in the dtype of ``embeddings``. If no
        anchor counts, the mean is 0, and all gradients are 0.

    Raises:
        ArgumentTypeError: embeddings that are not tensors of float64, float32, bfloat16 or float16;
            labels that are not tensors of integers; a margin that is not a number.
        ArgumentError: a wrong shape, different devices, ``ref_emb`` without ``ref_labels``, a NaN
            margin, an unknown distance, reduction or ``incomplete``, both ``ref_emb`` and
            ``group``, or processes whose embeddings differ in columns, dtype or ``requires_grad``.
        BackendUnavailableError: the requested back end cannot run.

    Gradients:
        For ``embeddings`` and ``ref_emb``, of any order, with the mined triplets held fixed. The
        gradient of a distance of 0 is 0. At the edge of the hinge it is 0, like that of
        :func:`torch.relu`. Forward mode and :mod:`torch.func` run on the pure-torch path. With
        ``group`` there are first derivatives alone. Those of the own embeddings are those of one
        process with the whole batch. ``DistributedDataParallel`` averages gradients over the
        processes, so multiply the loss by their number.

    Numerics:
        Distances are sums of squared differences, so close points far from the origin keep
        their precision. Half precisions accumulate in float32. The hardest candidate is exact up to
        the rounding of its distance: a few units in the last place. The first of equal distances
        is taken, so all back ends choose the same one of several duplicates. A NaN distance counts
        as the hardest.
        Compiled kernels are bitwise deterministic for any number of threads. Under autocast the
        embeddings are cast to float32.

    Memory:
        The N × M distances are never stored as a whole. Compiled back ends take O(N) beyond the
        gradients. Cosine distances take scaled copies of the embeddings, and half precisions sum
        their gradients in float32.
    """
    tensors = {"embeddings": embeddings}
    if ref_emb is not None:
        tensors["ref_emb"] = ref_emb
    embeddings, *rest = pairs.embeddings(labels=labels, ref_labels=ref_labels, **tensors)
    reference = rest[0] if rest else None
    width, soft = pairs.margin(margin)
    checks.one_of("distance", distance, pairs.DISTANCES)
    checks.one_of("incomplete", incomplete, pairs.INCOMPLETE)
    number = checks.check_reduction(reduction)
    dtype, own, spread = embeddings.dtype, -1, None
    if group is not None:
        if reference is not None:
            raise ArgumentError("ref_emb must be None with group, got a tensor")
        spread, embeddings, reference, ref_labels = pairs.spread(group, embeddings, labels)
        own = spread.first
    if distance == "cosine":
        embeddings = pairs.scaled_to_cosine(embeddings)
        reference = None if reference is None else pairs.scaled_to_cosine(reference)
    loss: Tensor = _fused(
        embeddings,
        pairs.whole(labels),
        reference,
        None if ref_labels is None else pairs.whole(ref_labels),
        width,
        soft,
        distance != "euclidean",
        incomplete == "zero",
        own,
        number if spread is None else checks.REDUCTIONS["none"],
    )
    if spread is not None and ref_labels is not None:
        count = spread.rows if incomplete == "zero" else _complete(ref_labels)
        loss = spread.reduce(loss, max(1, count), number)
    return loss.to(dtype)


def _complete(labels: Tensor) -> int:
    """The number of anchors that have a positive and a negative, if all are candidates."""
    _, count = labels.unique(return_counts=True)
    return int(count[(count > 1) & (count < count.sum())].sum())


class BatchHardTripletLoss(LossModule):
    """:func:`batch_hard_triplet_loss` as a module, with its parameters set once.

    Args:
        margin, distance, incomplete, reduction, group: see :func:`batch_hard_triplet_loss`.
    """

    function = staticmethod(batch_hard_triplet_loss)
    group = WeakGroup()

    def __init__(
        self,
        margin: float | Literal["soft"] = 0.2,
        *,
        distance: pairs.Distance = "euclidean",
        incomplete: pairs.Incomplete = "drop",
        reduction: checks.Reduction = "mean",
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            margin=margin, distance=distance, incomplete=incomplete, reduction=reduction
        )
        self.group = group

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss of ``(N, D)`` embeddings with ``(N,)`` labels."""
        return self.loss(
            embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels, group=self.group
        )


def _definition(
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None,
    ref_labels: Tensor | None,
    margin: float,
    soft: bool,
    squared: bool,
    counts_all: bool,
    own: int,
    reduction: int,
) -> Tensor:
    """The pure-torch path."""
    positive, negative = mining.hardest(embeddings, labels, ref_emb, ref_labels, own)
    both = (positive >= 0) & (negative >= 0)
    anchors = checks.widened(embeddings)
    candidates = anchors if ref_emb is None else checks.widened(ref_emb)
    d_pos = pairs.selected_distance(anchors, candidates, positive, both, squared)
    d_neg = pairs.selected_distance(anchors, candidates, negative, both, squared)
    difference = d_pos - d_neg
    loss = autograd.softplus(difference) if soft else torch.relu(difference + margin)
    return pairs.reduce(loss, both, counts_all, reduction).to(embeddings.dtype)


def _shapes(
    embeddings: Tensor, labels: Tensor, ref_emb: Tensor | None, ref_labels: Tensor | None,
    margin: float, soft: bool, squared: bool, counts_all: bool, own: int,
    reduction: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    rows = embeddings.shape[0]
    wide = torch.float64 if embeddings.dtype is torch.float64 else torch.float32
    return (
        embeddings.new_empty((rows,) if reduction == 0 else ()),
        *(labels.new_empty(rows) for _ in range(2)),
        embeddings.new_empty((2, rows), dtype=wide),
        labels.new_empty(()),
    )


_fused = FusedOp(
    "batch_hard_triplet_loss",
    _definition,
    results=["loss"],
    saved=["positive", "negative", "distances", "count"],
    backward=["embeddings", "labels", "ref_emb", "ref_labels", "positive", "negative", "distances",
              "count", "margin", "soft", "squared", "counts_all", "own", "reduction"],
    constants=["labels", "ref_labels"],
    shapes=_shapes,
)  # fmt: skip


def samples() -> Iterator[checks.Sample]:
    """Where ``jitops check`` checks the gradients."""
    margins: tuple[float | Literal["soft"], ...] = (0.2, "soft")
    yield from pairs.samples(
        {
            f"margin={margin!r}, distance={distance!r}": BatchHardTripletLoss(
                margin, distance=distance
            )
            for margin in margins
            for distance in pairs.DISTANCES
        }
    )
