"""The supervised contrastive loss, without the matrix of logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ops._core import checks, logits, pairs
from ops._core.groups import WeakGroup
from ops._core.modules import LossModule
from ops._errors import ArgumentError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["SupConLoss", "supcon_loss"]


def supcon_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    normalize: bool = True,
    incomplete: pairs.Incomplete = "drop",
    reduction: checks.Reduction = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    """The supervised contrastive loss: each embedding with all others of its class.

    .. math::

        zᵢⱼ = xᵢ·xⱼ / (‖xᵢ‖ ‖xⱼ‖ temperature)

        ℓᵢ = log(Σ_{j≠i} exp(zᵢⱼ)) − mean_p z_{ip}

    The mean is over the positives p of i: the other embeddings with the same label. From P. Khosla
    et al., "Supervised Contrastive Learning", NeurIPS 2020, arXiv:2004.11362, equation 2: the mean
    is outside of the logarithm.

    Args:
        embeddings: ``(N, D)``, floating point, any strides. Each row is an anchor.
        labels: ``(N,)``, integers.
        temperature: a number, or a tensor with one element, which may have a gradient.
        ref_emb: ``(M, D)``, like ``embeddings``: anchors are compared with these instead, as with a
            memory bank. No row of it counts as the anchor itself.
        ref_labels: ``(M,)``, integers; required with ``ref_emb``.
        normalize: whether to divide the rows by their lengths. Otherwise the logits are dot
            products over the temperature.
        incomplete: an anchor without any positive has the loss 0. With ``"drop"`` the mean leaves
            it out, with ``"zero"`` the mean counts it.
        reduction: ``mean``, ``sum``, or ``none``.
        group: a process group of :mod:`torch.distributed`. Anchors are then compared with the
            embeddings of all its processes, whose N may differ. All must call this alike. The
            result is that of one process with the whole batch, on each of them; with ``none``
            only its own rows.

    Returns:
        A scalar, or ``(N,)`` with ``reduction="none"``; in the dtype of ``embeddings``. If no
        anchor counts, the mean is 0, and all gradients are 0.

    Raises:
        ArgumentTypeError: embeddings that are not tensors of float64, float32, bfloat16 or float16;
            labels that are not tensors of integers; a temperature that is neither a number nor a
            floating-point tensor.
        ArgumentError: a wrong shape, different devices, ``ref_emb`` without ``ref_labels``, an
            unknown reduction or ``incomplete``; a temperature that is a number and not positive,
            or beyond the range of float32; both ``ref_emb`` and ``group``; processes whose
            embeddings differ in columns, dtype or ``requires_grad``.

    Gradients:
        For ``embeddings``, ``ref_emb`` and ``temperature``, of any order. The first order computes
        the logits again. Higher orders, forward mode and :mod:`torch.func` store their whole
        matrix. With ``group`` there are first derivatives alone. That of ``temperature`` is the
        part from the own rows. ``DistributedDataParallel`` averages gradients over the processes,
        so multiply the loss by their number.

    Numerics:
        Half precisions are multiplied and summed up in float32. Large logits give finite
        losses, within the range of the dtype. NaN and infinities pass through. The value of a
        tensor ``temperature`` is not checked. Rows of zeros stay, as with
        :func:`torch.nn.functional.normalize`. Under autocast the embeddings are cast to float32,
        but :func:`torch.func.grad` then multiplies in the lower precision.

    Memory:
        The N × N logits are never stored, in graphs of :func:`torch.compile` neither. A call takes
        copies of the embeddings, O(ND), and on a CPU two tiles of 1 MB for each thread.
    """
    tensors = {"embeddings": embeddings}
    if ref_emb is not None:
        tensors["ref_emb"] = ref_emb
    embeddings, *rest = pairs.embeddings(labels=labels, ref_labels=ref_labels, **tensors)
    scale = 1 / pairs.scalar("temperature", temperature, embeddings)
    checks.one_of("incomplete", incomplete, pairs.INCOMPLETE)
    number = checks.check_reduction(reduction)
    dtype, labels = embeddings.dtype, pairs.whole(labels)
    anchors, *rest = (
        pairs.unit(one) if normalize else one for one in map(checks.widened, (embeddings, *rest))
    )
    reference = rest[0] if rest else None
    of_reference = None if ref_labels is None else pairs.whole(ref_labels)
    first, spread = None if rest else 0, None  # the place of the first anchor among the candidates
    if group is not None:
        if rest:
            raise ArgumentError("ref_emb must be None with group, got a tensor")
        spread, anchors, reference, of_reference = pairs.spread(group, anchors, labels)
        first = spread.first
    excluded = None
    if first is not None:
        excluded = first + torch.arange(anchors.shape[0], device=anchors.device)[:, None]
    sums = logits.sums(anchors, reference, scale, excluded=excluded).rows
    mean, count = _positives(anchors, labels, reference, of_reference, first is not None)
    loss = sums - scale * (anchors * mean).sum(1)
    if spread is None or number == 0:
        return pairs.reduce(loss, count > 0, incomplete == "zero", number).to(dtype)
    complete = spread.sum((count > 0).sum())
    loss = torch.where(count > 0, loss, torch.zeros_like(loss))
    every = spread.rows if incomplete == "zero" else int(complete)
    return spread.reduce(loss, max(1, every), number).to(dtype)


class SupConLoss(LossModule):
    """:func:`supcon_loss` as a module, with its parameters set once.

    Args:
        temperature, normalize, incomplete, reduction, group: see :func:`supcon_loss`. A learned
            temperature is passed to each call instead.
    """

    function = staticmethod(supcon_loss)
    group = WeakGroup()

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        normalize: bool = True,
        incomplete: pairs.Incomplete = "drop",
        reduction: checks.Reduction = "mean",
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            temperature=temperature,
            normalize=normalize,
            incomplete=incomplete,
            reduction=reduction,
        )
        self.group = group

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        *,
        temperature: Tensor | None = None,
    ) -> Tensor:
        """The loss; a temperature given here replaces that of the module."""
        more: dict[str, Any] = {
            "ref_emb": ref_emb,
            "ref_labels": ref_labels,
            "group": self.group,
        }
        if temperature is not None:
            more["temperature"] = temperature
        return self.loss(embeddings, labels, **more)


def _positives(
    anchors: Tensor,
    labels: Tensor,
    reference: Tensor | None,
    ref_labels: Tensor | None,
    among: bool,
) -> tuple[Tensor, Tensor]:
    """The mean of the positives of each anchor, and their number.

    ``among`` tells that the anchors are among the candidates. None is its own positive.

    Sums are in float64, because subtracting the anchor from the sum of its class cancels digits.
    """
    rows = labels.shape[0]
    if reference is None or ref_labels is None:
        classes = of_anchors = _numbered(labels)
        candidates = anchors
    else:
        numbers = _numbered(torch.cat((labels, ref_labels)))
        of_anchors, classes = numbers[:rows], numbers[rows:]
        candidates = reference
    size = rows + (0 if reference is None else candidates.shape[0])
    wide = candidates.double()
    sums = wide.new_zeros(size, wide.shape[1]).index_add(0, classes, wide)
    counts = labels.new_zeros(size).index_add(0, classes, torch.ones_like(classes))
    total, count = sums.index_select(0, of_anchors), counts.index_select(0, of_anchors)
    if among:
        total, count = total - anchors.double(), count - 1
    return (total / count.clamp(min=1)[:, None]).to(anchors.dtype), count


def _numbered(labels: Tensor) -> Tensor:
    """The classes numbered from 0, by sorting: no shape depends on how many there are."""
    labels, order = labels.sort()
    ends = (labels != labels.roll(-1)).long()  # a slice of N - 1 would specialize graphs to N > 2
    return torch.empty_like(order).scatter(0, order, ends.cumsum(0) - ends)


def samples() -> Iterator[checks.Sample]:
    """Where ``jitops check`` checks the gradients: with and without references."""
    labels = torch.arange(6) % 3
    loss = SupConLoss(0.5)

    def alone(x: Tensor, temperature: Tensor) -> Tensor:
        return loss(x, labels, temperature=temperature)

    def with_references(x: Tensor, y: Tensor) -> Tensor:
        return loss(x, labels, y, labels)

    yield "", alone, (torch.randn(6, 4), torch.tensor(0.5))
    yield "references", with_references, tuple(torch.randn(2, 6, 4))
