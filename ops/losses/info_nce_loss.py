"""InfoNCE: contrastive losses of pairs, without the matrix of logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ops._core import autograd, checks, logits, pairs
from ops._core.groups import WeakGroup
from ops._core.modules import LossModule
from ops._errors import ArgumentError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from ops._core.distributed import Spread

__all__ = ["InfoNCELoss", "info_nce_loss"]

Form = Literal["one_way", "symmetric", "two_views", "sigmoid"]
FORMS: tuple[Form, ...] = get_args(Form)


def info_nce_loss(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None = None,
    *,
    form: Form = "one_way",
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    bias: float | Tensor | None = None,
    normalize: bool = True,
    labels: Tensor | None = None,
    reduction: checks.Reduction = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    """The contrastive loss of pairs: each query with its own key against all other keys.

    The logits are scaled cosines. The loss of pair i has one of four forms.

    .. math::

        zᵢⱼ = scale qᵢ·kⱼ / (‖qᵢ‖ ‖kⱼ‖) + bias

    ``"one_way"``, InfoNCE (A. van den Oord, Y. Li, O. Vinyals, "Representation Learning with
    Contrastive Predictive Coding", 2018, arXiv:1807.03748, equation 4):

    .. math::

        ℓᵢ = −log(exp(zᵢᵢ) / Σⱼ exp(zᵢⱼ))

    ``"symmetric"``, as in CLIP (A. Radford et al., 2021, arXiv:2103.00020):

    .. math::

        ℓᵢ = −½ log(exp(zᵢᵢ) / Σⱼ exp(zᵢⱼ)) − ½ log(exp(zᵢᵢ) / Σⱼ exp(zⱼᵢ))

    ``"two_views"``, NT-Xent (T. Chen et al., "A Simple Framework for Contrastive Learning of Visual
    Representations", 2020, arXiv:2002.05709, equation 1). Queries and keys together are 2N rows.
    Row p is the other view of row i:

    .. math::

        ℓᵢ = −log(exp(z_{ip}) / Σ_{j≠i} exp(zᵢⱼ))

    ``"sigmoid"``, as in SigLIP (X. Zhai et al., 2023, arXiv:2303.15343):

    .. math::

        ℓᵢ = log(1 + exp(−zᵢᵢ)) + Σ_{j≠i} log(1 + exp(zᵢⱼ))

    Args:
        query: ``(N, D)``, floating point, any strides.
        key: ``(N, D)``, like ``query``; row i is the positive of query i.
        negatives: ``(M, D)``, like ``query``, for ``form="one_way"``: the negatives of all queries,
            instead of the other keys.
        form: ``one_way``, ``symmetric``, ``two_views`` or ``sigmoid``.
        temperature: divides the cosines, by default 0.07. A number, or a tensor with one element,
            which may have a gradient.
        scale: 1 / temperature, instead of it. With ``form="sigmoid"`` it is 10 by default.
        bias: for ``form="sigmoid"``, by default −10; a number or a tensor with one element. From a
            softmax it cancels.
        normalize: whether to divide the rows by their lengths. Otherwise the logits are scaled dot
            products.
        labels: ``(N,)``, integers: a pair with the label of pair i is no negative of it. By
            default all other pairs are.
        reduction: ``mean`` over pairs, ``sum``, or ``none``. ``"two_views"`` has 2N losses.
        group: a process group of :mod:`torch.distributed`. Negatives then come from all of its
            processes, whose N may differ. All must call this alike. The result is that of one
            process with the whole batch, on each of them; with ``none`` only its own pairs.

    Returns:
        A scalar, or with ``reduction="none"`` the losses of the pairs; in the dtype of ``query``.
        A query without any negative has the loss 0, or its own term with ``"sigmoid"``. The mean of
        no pairs is NaN, their sum is 0, as with torch's own losses.

    Raises:
        ArgumentTypeError: embeddings that are not tensors of float64, float32, bfloat16 or float16,
            the same for all; labels that are not tensors of integers; a temperature, scale or bias
            that is neither a number nor a floating-point tensor.
        ArgumentError: shapes that do not fit together, different devices, an unknown form or
            reduction, both temperature and scale, a NaN; a temperature or scale that is a number
            and not positive, or beyond the range of float32; negatives, bias or labels with a form
            that does not take them; both negatives and group; processes whose queries differ in
            columns, dtype or ``requires_grad``.

    Gradients:
        For the embeddings, temperature, scale and bias, of any order. The first order computes the
        logits again. Higher orders, forward mode and :mod:`torch.func` store their whole matrix.
        With ``group`` there are first derivatives alone. Those of scale, temperature and bias are
        the part from the own pairs. ``DistributedDataParallel`` averages gradients over the
        processes, so multiply the loss by their number.

    Numerics:
        Half precisions are multiplied and summed up in float32. The loss is log(1 + exp(d)), where
        d is the log-sum-exp of the negatives minus the positive logit. So it is never negative, and
        small losses keep their digits. Large logits give finite losses, within the range of the
        dtype. NaN and infinities pass through. The value of a tensor ``temperature`` or ``scale``
        is not checked. Rows of zeros stay, as with :func:`torch.nn.functional.normalize`. Under
        autocast the embeddings are cast to float32, but :func:`torch.func.grad` then multiplies in
        the lower precision.

    Memory:
        The N × N logits are never stored, in graphs of :func:`torch.compile` neither. A call takes
        copies of the embeddings, O(ND), and on a CPU two tiles of 1 MB for each thread.
    """
    checks.one_of("form", form, FORMS)
    number = checks.check_reduction(reduction)
    tensors = {"query": query, "key": key}
    if negatives is not None:
        tensors["negatives"] = negatives
    query, key, *others = pairs.matrices(**tensors)
    if key.shape != query.shape:
        raise ArgumentError(
            f"key must have the shape of query, {list(query.shape)}, got {list(key.shape)}"
        )
    if others and form != "one_way":
        raise ArgumentError(f"negatives must be None with form={form!r}, got a tensor")
    if others and group is not None:
        raise ArgumentError("group must be None with negatives, got a process group")
    if labels is not None:
        if others:
            raise ArgumentError("labels must be None with negatives, got a tensor")
        pairs.check_labels("labels", labels, query)
        labels = pairs.whole(labels)
    factor = _scale(form, temperature, scale, query)
    offset = _bias(form, bias, query)
    dtype = query.dtype
    query, key, *others = (_rows(one, normalize) for one in (query, key, *others))
    positive = factor * (query * key).sum(1)
    if others:
        negative = logits.sums(query, others[0], factor).rows
        return autograd.reduce(autograd.softplus(negative - positive), number).to(dtype)
    batch, spread = _Batch(query, key, labels, query, key, labels), None
    if group is not None:
        spread, batch = _over_processes(group, batch, form in ("symmetric", "two_views"))
    if form == "two_views":
        loss = _two_views(batch, factor, positive)
    elif form == "sigmoid":
        loss = _sigmoid(batch, factor, offset, positive)
    else:
        loss = _softmax(batch, factor, positive, both=form == "symmetric")
    if spread is not None:
        count = spread.rows * (2 if form == "two_views" else 1)
        return spread.reduce(loss, count, number).to(dtype)
    return autograd.reduce(loss, number).to(dtype)


class InfoNCELoss(LossModule):
    """:func:`info_nce_loss` as a module, with its parameters set once.

    Args:
        form, temperature, scale, bias, normalize, reduction, group: see :func:`info_nce_loss`.
            Learned ones are passed to each call instead.
    """

    function = staticmethod(info_nce_loss)
    group = WeakGroup()

    def __init__(
        self,
        form: Form = "one_way",
        *,
        temperature: float | None = None,
        scale: float | None = None,
        bias: float | None = None,
        normalize: bool = True,
        reduction: checks.Reduction = "mean",
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            form=form,
            temperature=temperature,
            scale=scale,
            bias=bias,
            normalize=normalize,
            reduction=reduction,
        )
        self.group = group

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        negatives: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        temperature: Tensor | None = None,
        scale: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """The loss of ``(N, D)`` pairs.

        A temperature or scale given here replaces both of the module, a bias replaces its bias.
        """
        more: dict[str, Any] = {"negatives": negatives, "labels": labels, "group": self.group}
        if temperature is not None or scale is not None:
            more |= {"temperature": temperature, "scale": scale}
        if bias is not None:
            more["bias"] = bias
        return self.loss(query, key, **more)


# ---- arguments -----------------------------------------------------------------------------------


def _scale(form: Form, temperature: object, scale: object, like: Tensor) -> Tensor:
    if scale is None and temperature is None:
        return pairs.scalar("scale", 10.0 if form == "sigmoid" else 1 / 0.07, like)
    if temperature is None:
        return pairs.scalar("scale", scale, like)
    if scale is not None:
        raise ArgumentError("scale must be None with temperature, because it is its inverse")
    return 1 / pairs.scalar("temperature", temperature, like)


def _bias(form: Form, bias: object, like: Tensor) -> Tensor:
    if bias is None:
        return pairs.scalar("bias", -10.0, like, positive=False)
    if form != "sigmoid":
        raise ArgumentError(f"bias must be None with form={form!r}, where it cancels")
    return pairs.scalar("bias", bias, like, positive=False)


def _rows(x: Tensor, normalize: bool) -> Tensor:
    x = checks.widened(x)
    return pairs.unit(x) if normalize else x


# ---- forms ---------------------------------------------------------------------------------------


class _Batch(NamedTuple):
    """The pairs of this process, and those of all processes of the group.

    Attributes:
        first: the place of this process's first pair among all pairs.
    """

    query: Tensor
    key: Tensor
    labels: Tensor | None
    queries: Tensor
    keys: Tensor
    all_labels: Tensor | None
    first: int = 0

    @property
    def alone(self) -> bool:
        """Whether these are all pairs."""
        return self.key is self.keys

    def own(self) -> Tensor | None:
        """For each pair its place, ``(N, 1)``, to be left out; labels leave it out anyway."""
        if self.labels is not None:
            return None
        numbers = torch.arange(self.query.shape[0], device=self.query.device)
        return (numbers + self.first)[:, None]

    def sums(self, x: Tensor, y: Tensor, scale: Tensor, **more: Any) -> logits.Sums:
        """Sums over the negatives of each row of ``x`` in ``y``."""
        if self.labels is not None:
            more |= {"labels": self.labels, "ref_labels": self.all_labels}
        return logits.sums(x, y, scale, excluded=self.own(), **more)


def _over_processes(group: ProcessGroup, own: _Batch, both_sides: bool) -> tuple[Spread, _Batch]:
    from ops._core.distributed import Spread  # imports torch.distributed, which few need

    spread = Spread(group, query=own.query, key=own.key)
    labels = None if own.labels is None else spread.whole(own.labels)
    keys = spread.gather(own.key)
    queries = spread.gather(own.query) if both_sides else own.query
    return spread, own._replace(queries=queries, keys=keys, all_labels=labels, first=spread.first)


def _softmax(batch: _Batch, scale: Tensor, positive: Tensor, *, both: bool) -> Tensor:
    if both and not batch.alone:
        rows = batch.sums(batch.query, batch.keys, scale).rows
        columns = batch.sums(batch.key, batch.queries, scale).rows
    else:
        rows, columns, _ = batch.sums(batch.query, batch.keys, scale, columns=both)
    loss = autograd.softplus(rows - positive)
    return (loss + autograd.softplus(columns - positive)) / 2 if both else loss


def _two_views(batch: _Batch, scale: Tensor, positive: Tensor) -> Tensor:
    views, labels, excluded = torch.cat((batch.query, batch.key)), None, batch.own()
    if batch.labels is not None:
        labels = batch.labels.repeat(2)
    all_views = all_labels = None
    rows = batch.keys.shape[0]
    if not batch.alone:
        all_views = torch.cat((batch.queries, batch.keys))
        all_labels = None if batch.all_labels is None else batch.all_labels.repeat(2)
    if excluded is not None:  # the row itself and its other view
        excluded = torch.cat((excluded, excluded + rows), 1).repeat(2, 1)
    negative = logits.sums(
        views, all_views, scale, labels=labels, ref_labels=all_labels, excluded=excluded
    ).rows
    return autograd.softplus(negative - positive.repeat(2))


def _sigmoid(batch: _Batch, scale: Tensor, bias: Tensor, positive: Tensor) -> Tensor:
    of_columns = bias.expand(batch.keys.shape[0])
    negative = batch.sums(batch.query, batch.keys, scale, bias=of_columns, sigmoid=True).rows
    return autograd.softplus(-(positive + bias)) + negative


def samples() -> Iterator[checks.Sample]:
    """Where ``jitops check`` checks the gradients: each form, and a learned scale and bias."""
    for form in FORMS:
        loss = InfoNCELoss(form, scale=2.0)
        yield f"form={form!r}", loss, tuple(torch.randn(2, 5, 4))

        def learned(x: Tensor, y: Tensor, scale: Tensor, loss: InfoNCELoss = loss) -> Tensor:
            return loss(x, y, scale=scale)

        yield f"form={form!r}, scale", learned, (*torch.randn(2, 5, 4), torch.tensor(3.0))
    siglip = InfoNCELoss("sigmoid", scale=2.0)

    def with_bias(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
        return siglip(x, y, bias=bias)

    yield "bias", with_bias, (*torch.randn(2, 5, 4), torch.tensor(-1.0))
    yield "negatives", InfoNCELoss(scale=2.0), tuple(torch.randn(3, 5, 4))
