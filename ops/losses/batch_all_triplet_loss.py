"""The batch-all triplet loss, without the tensor of all triplets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from ops._core import checks, pairs, triplets
from ops._core.fused import FusedOp
from ops._core.modules import LossModule

__all__ = ["BatchAllTripletLoss", "batch_all_triplet_loss"]

Reduction = Literal["none", "mean", "mean_all", "sum"]
REDUCTIONS = get_args(Reduction)


def batch_all_triplet_loss(
    embeddings: Tensor,
    labels: Tensor,
    margin: float | Literal["soft"] = 0.2,
    *,
    distance: pairs.Distance = "euclidean",
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    reduction: Reduction = "mean",
    return_fraction: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The mean loss of all triplets of an anchor, a positive and a negative.

    .. math::

        ℓᵢₚₙ = max(dᵢₚ − dᵢₙ + margin, 0)

    Embedding p has the label of the anchor i and is not i. Embedding n has another label. dᵢₚ and
    dᵢₙ are their distances from i. ``margin="soft"`` is the soft margin,
    ℓᵢₚₙ = log(1 + exp(dᵢₚ − dᵢₙ)). From A. Hermans, L. Beyer, B. Leibe, "In Defense of the Triplet
    Loss for Person Re-Identification", 2017, arXiv:1703.07737, equation 6 and section 2.

    Args:
        embeddings: ``(N, D)``, floating point, any strides. Each row is an anchor.
        labels: ``(N,)``, integers.
        margin: the negative must be farther than the positive by this much; or ``"soft"``.
        distance: ``euclidean``, ``squared_euclidean``, or ``cosine``: 1 − cos of the angle.
        ref_emb: ``(M, D)``, like ``embeddings``: positives and negatives come from these instead,
            as from a memory bank. No row of it counts as the anchor itself.
        ref_labels: ``(M,)``, integers; required with ``ref_emb``.
        reduction: ``mean`` over the triplets with a loss above 0, which the paper recommends;
            ``mean_all`` over all triplets; ``sum``; or ``none``: the sum for each anchor. With the
            soft margin every triplet counts as one with a loss above 0.
        return_fraction: return the fraction of triplets with a loss above 0 too.

    Returns:
        A scalar, or ``(N,)`` with ``reduction="none"``; in the dtype of ``embeddings``. With
        ``return_fraction`` also a scalar without gradient, in float64 or float32. An anchor without
        a positive, or without a negative, has no triplet. Without any triplet the loss, the
        fraction and all gradients are 0.

    Raises:
        ArgumentTypeError: embeddings that are not tensors of float64, float32, bfloat16 or float16;
            labels that are not tensors of integers; a margin that is not a number.
        ArgumentError: a wrong shape, different devices, ``ref_emb`` without ``ref_labels``, a NaN
            margin, an unknown distance or reduction.
        BackendUnavailableError: the requested back end cannot run.

    Gradients:
        For ``embeddings`` and ``ref_emb``, of any order. The gradient of a distance of 0 is 0. At
        the edge of the hinge it is 0, like that of :func:`torch.relu`. Forward mode,
        :mod:`torch.func` and second derivatives run tensor code, whose memory is N M².

    Numerics:
        Distances are sums of squared differences, so close points far from the origin keep
        their precision. Half precisions accumulate in float32. A NaN distance makes the loss NaN.
        Compiled kernels are bitwise deterministic for any number of threads. Under autocast the
        embeddings are cast to float32.

    Memory:
        O(N + M) beyond the gradients: distances and triplets of some anchors at a time, in a
        scratch memory of fixed size. The forward pass of a mean or a sum forms the gradients,
        because it has the distances. Half precisions sum them in float32. A backward pass with
        ``retain_graph=True`` takes their size once more. ``reduction="none"`` computes the
        distances again in its backward pass. The pure-torch path also takes some copies of the
        embeddings in float64.
    """
    checks.one_of("reduction", reduction, REDUCTIONS)
    loss, fraction = loss_of_triplets(
        triplets.ALL, embeddings, labels, margin, distance, ref_emb, ref_labels, reduction
    )
    return (loss, fraction) if return_fraction else loss


class BatchAllTripletLoss(LossModule):
    """:func:`batch_all_triplet_loss` as a module, with its parameters set once.

    Args:
        margin, distance, reduction, return_fraction: see :func:`batch_all_triplet_loss`.
    """

    function = staticmethod(batch_all_triplet_loss)
    reductions = REDUCTIONS

    def __init__(
        self,
        margin: float | Literal["soft"] = 0.2,
        *,
        distance: pairs.Distance = "euclidean",
        reduction: Reduction = "mean",
        return_fraction: bool = False,
    ) -> None:
        super().__init__(
            margin=margin, distance=distance, reduction=reduction, return_fraction=return_fraction
        )

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The loss of ``(N, D)`` embeddings with ``(N,)`` labels."""
        return self.loss(embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels)


# ---- for the semi-hard loss too ------------------------------------------------------------------


def loss_of_triplets(
    rule: int,
    embeddings: Tensor,
    labels: Tensor,
    margin: float | str,
    distance: pairs.Distance,
    ref_emb: Tensor | None,
    ref_labels: Tensor | None,
    reduction: Reduction,
) -> tuple[Tensor, Tensor]:
    """The reduced loss of the triplets that the rule selects, and the fraction that counts."""
    tensors = {"embeddings": embeddings}
    if ref_emb is not None:
        tensors["ref_emb"] = ref_emb
    embeddings, *rest = pairs.embeddings(labels=labels, ref_labels=ref_labels, **tensors)
    reference = rest[0] if rest else None
    width, soft = pairs.margin(margin)
    checks.one_of("distance", distance, pairs.DISTANCES)
    dtype = embeddings.dtype
    if distance == "cosine":
        embeddings = pairs.scaled_to_cosine(embeddings)
        reference = None if reference is None else pairs.scaled_to_cosine(reference)
    recorded = torch.is_grad_enabled()
    loss, fraction = _fused(
        embeddings,
        pairs.whole(labels),
        reference,
        None if ref_labels is None else pairs.whole(ref_labels),
        width,
        soft,
        distance != "euclidean",
        rule,
        reduction == "mean_all",
        checks.REDUCTIONS["mean" if reduction == "mean_all" else reduction],
        recorded and embeddings.requires_grad,
        recorded and reference is not None and reference.requires_grad,
    )
    return loss.to(dtype), fraction


_fused = FusedOp(
    "batch_all_triplet_loss",
    triplets.definition,
    results=["loss", "fraction"],
    saved=["scale", "to_embeddings", "to_ref_emb"],
    backward=["embeddings", "labels", "ref_emb", "ref_labels", "scale", "margin", "soft", "squared",
              "rule", "counts_all", "reduction"],
    constants=["labels", "ref_labels", "fraction"],
    formed=["to_embeddings", "to_ref_emb"],
    factor="scale",
    shapes=triplets.shapes,
    tensor_code=(triplets.forward, triplets.backward),
    opaque_shapes=triplets.shapes,
)  # fmt: skip


def samples() -> Iterator[checks.Sample]:
    """Where ``jitops check`` checks the gradients."""
    margins: tuple[float | Literal["soft"], ...] = (0.2, "soft")
    yield from pairs.samples(
        {
            f"margin={margin!r}, distance={distance!r}": BatchAllTripletLoss(
                margin, distance=distance
            )
            for margin in margins
            for distance in pairs.DISTANCES
        }
    )
