"""Losses of pairs of embeddings: arguments, means, lengths and distances."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from ops._core import autograd, checks, dtensors
from ops._errors import ArgumentError, ArgumentTypeError

if TYPE_CHECKING:
    from ops._core.distributed import Spread

Incomplete = Literal["drop", "zero"]  # anchors, in a mean
INCOMPLETE = get_args(Incomplete)
Distance = Literal["euclidean", "squared_euclidean", "cosine"]
DISTANCES: tuple[Distance, ...] = get_args(Distance)

# ---- arguments -----------------------------------------------------------------------------------


def matrices(**tensors: Any) -> list[Tensor]:
    """Matrices with the same number of columns; under autocast the half precisions in float32.

    Raises:
        ArgumentTypeError: not a tensor, or a wrong dtype.
        ArgumentError: a wrong shape or device.
    """
    tensors = checks.widened_under_autocast(tensors)
    checks.same_kind(**tensors)
    first = next(iter(tensors))
    for name, value in tensors.items():
        if value.dim() != 2:
            raise ArgumentError(f"{name} must have shape (rows, D), got {list(value.shape)}")
        if value.shape[1] != tensors[first].shape[1]:
            raise ArgumentError(
                f"{name} must have as many columns as {first}, {tensors[first].shape[1]}, got "
                f"{value.shape[1]}"
            )
    return list(tensors.values())


def embeddings(*, labels: Any, ref_labels: Any, **tensors: Any) -> list[Tensor]:
    """The embeddings and references, checked together with their labels.

    Under autocast the half precisions are cast to float32.

    Raises:
        ArgumentTypeError: not a tensor, or a wrong dtype.
        ArgumentError: a wrong shape or device, or references without labels or labels without
            references.
    """
    first, *rest = matrices(**tensors)
    if (len(rest) > 0) != (ref_labels is not None):  # torch 2.11 traces no bool() of a tuple
        have, lack = ("ref_emb", "ref_labels") if rest else ("ref_labels", "ref_emb")
        raise ArgumentError(f"{lack} must be given with {have}, got None")
    check_labels("labels", labels, first)
    if rest:
        check_labels("ref_labels", ref_labels, rest[0])
    return [first, *rest]


def check_labels(name: str, labels: Any, of: Tensor) -> None:
    checks.integers(name, labels)
    if labels.shape != of.shape[:1]:
        raise ArgumentError(
            f"{name} must have shape [{of.shape[0]}], one label for each row, got "
            f"{list(labels.shape)}"
        )
    if labels.device != of.device:
        raise ArgumentError(f"{name} must be on device {of.device}, got {labels.device}")


def spread(group: Any, own: Tensor, labels: Tensor) -> tuple[Spread, Tensor, Tensor, Tensor]:
    """The rows of all processes: the embeddings of this one widened, then those of all, labelled.

    The sums over the processes are in float32 for half precisions.
    """
    from ops._core.distributed import Spread  # imports torch.distributed, which few need

    told = Spread(group, embeddings=own)
    own = checks.widened(own)
    return told, own, told.gather(own), told.whole(whole(labels))


def scalar(name: str, value: Any, like: Tensor, *, positive: bool = True) -> Tensor:
    """A number, or a tensor with one element, as a tensor without dimensions; at least float32.

    The value of a tensor is not checked, because that would wait for a GPU.

    Raises:
        ArgumentTypeError: neither a number nor a floating-point tensor.
        ArgumentError: several elements, another device, or a number that is NaN, or not positive
            and finite although it must be, or then beyond the range of the dtype, or a DTensor.
    """
    dtype = checks.widened(like).dtype
    if not isinstance(value, Tensor):
        value = checks.check_number(name, value)
        if positive and not 0 < value < float("inf"):
            raise ArgumentError(f"{name} must be positive and finite, got {value}")
        limits = torch.finfo(dtype)
        if positive and not limits.tiny <= value <= limits.max:  # 1 / value is finite too
            raise ArgumentError(
                f"{name} must be in the range of {str(dtype).removeprefix('torch.')}, got {value}"
            )
        value = checks.rounded(value, dtype)
        return torch.full((), value, dtype=dtype, device=like.device)
    dtensors.refuse(name, value)
    checks.dense(name, value)
    if not value.is_floating_point():
        raise ArgumentTypeError(
            f"{name} must be a number or a floating-point tensor, got "
            f"{str(value.dtype).removeprefix('torch.')}"
        )
    if value.dim() > 1 or value.numel() != 1:
        raise ArgumentError(f"{name} must have one element, got shape {list(value.shape)}")
    if value.device != like.device:
        raise ArgumentError(f"{name} must be on device {like.device}, got {value.device}")
    return value.reshape(()).to(dtype)


def whole(labels: Tensor) -> Tensor:
    """The labels as int64."""
    return labels if labels.dtype is torch.int64 else labels.long()


def margin(value: Any) -> tuple[float, bool]:
    """The width of the hinge, and whether the margin is soft instead.

    Raises:
        ArgumentTypeError: not a number and not a word.
        ArgumentError: another word than ``"soft"``, or NaN.
    """
    if not isinstance(value, str):
        return checks.check_number("margin", value), False
    if value != "soft":
        raise ArgumentError(f"margin must be a number or 'soft', got {value!r}")
    return 0.0, True


# ---- means ---------------------------------------------------------------------------------------


def reduce(loss: Tensor, complete: Tensor, counts_all: bool, reduction: int) -> Tensor:
    """The losses of all anchors, those of incomplete anchors being 0, or their mean or sum."""
    loss = torch.where(complete, loss, torch.zeros_like(loss))
    if reduction != 1:
        return autograd.reduce(loss, reduction)
    count = complete.shape[0] if counts_all else complete.sum()
    return loss.sum() / torch.as_tensor(count, device=loss.device).clamp(min=1)


# ---- lengths -------------------------------------------------------------------------------------


def unit(rows: Tensor) -> Tensor:
    """The rows with length 1, as :func:`torch.nn.functional.normalize` makes them.

    A product with the inverse takes half of the time and memory that a quotient takes in the
    backward pass. A row whose length overflows is first scaled by a power of two, which leaves it
    longer than 1e-12.
    """
    overflows = torch.linalg.vector_norm(rows.detach(), dim=1, keepdim=True) == torch.inf
    power = 2.0**-530 if rows.dtype is torch.float64 else 2.0**-80
    rows = rows * torch.ones_like(overflows, dtype=rows.dtype).masked_fill(overflows, power)
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows * length.clamp_min(1e-12).reciprocal()


# ---- distances -----------------------------------------------------------------------------------


def scaled_to_cosine(rows: Tensor) -> Tensor:
    """The rows with length √½: then the squared distance of two rows is 1 − cos of their angle.

    Rows of zeros stay, as with :func:`torch.nn.functional.normalize`. Half precisions become
    float32.
    """
    return unit(checks.widened(rows)) * 0.5**0.5


def distances(x: Tensor, y: Tensor, squared: bool) -> Tensor:
    """All distances, from the tensor of all differences. The gradient of a distance of 0 is 0."""
    return _distance((x.unsqueeze(1) - y.unsqueeze(0)).square().sum(-1), squared)


def _distance(total: Tensor, squared: bool) -> Tensor:
    if squared:
        return total
    apart = total != 0
    return torch.where(apart, torch.where(apart, total, torch.ones_like(total)).sqrt(), total)


def selected_distance(
    anchors: Tensor, candidates: Tensor, index: Tensor, real: Tensor, squared: bool
) -> Tensor:
    """The distance of each anchor to one candidate, or 0 where ``real`` is false.

    The gradient of a distance of 0 is 0.
    """
    if candidates.shape[0] == 0:
        candidates = anchors  # then no index is real
    # Not by indexing, whose gradient is summed in no fixed order.
    difference = anchors - candidates.index_select(0, index.clamp(min=0))
    difference = torch.where(real.unsqueeze(-1), difference, torch.zeros_like(difference))
    return _distance(difference.square().sum(-1), squared)


# ---- gradient checks -----------------------------------------------------------------------------


def samples(losses: dict[str, Callable[..., Tensor]]) -> Iterator[checks.Sample]:
    """Where ``jitops check`` checks losses of embeddings and labels, by their titles.

    The last one is checked with references too.
    """
    labels = torch.arange(6) % 3
    for title, loss in losses.items():

        def alone(x: Tensor, loss: Callable[..., Tensor] = loss) -> Tensor:
            return loss(x, labels)

        yield title, alone, (torch.randn(6, 4),)

    def with_references(x: Tensor, y: Tensor) -> Tensor:
        return loss(x, labels, y, labels)

    yield f"{title}, references", with_references, tuple(torch.randn(2, 6, 4))
