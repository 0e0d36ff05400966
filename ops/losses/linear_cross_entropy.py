"""The cross entropy of a linear layer over a large vocabulary, without the matrix of logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ops._core import checks, linear_logits
from ops._core.linear_loss import combined, factors_of, linear_loss
from ops._errors import ArgumentError

__all__ = [
    "LinearCrossEntropyLoss",
    "LinearLogProb",
    "linear_cross_entropy",
    "linear_log_prob",
]

IGNORE_INDEX = -100  # torch's default


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: checks.Reduction = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """The cross entropy of ``F.linear(input, linear_weight, linear_bias)`` with the targets.

    .. math::

        zᵢⱼ = xᵢ · wⱼ + bⱼ
        Lᵢ = log Σ_j exp(zᵢⱼ)
        ℓᵢ = (1 − ε) ω_t (Lᵢ − z_t) + ε/C Σ_j ωⱼ (Lᵢ − zᵢⱼ) + λ Lᵢ²

    x is ``input``, w ``linear_weight``, b ``linear_bias``, and t the target of row i. ω is
    ``weight``, ε ``label_smoothing``, λ ``z_loss``, and C the number of classes. With a softcap c,
    each logit z becomes c tanh(z/c). Names are those of
    ``torch.nn.functional.linear_cross_entropy``. The z-loss is from A. Chowdhery et al., "PaLM",
    2022, arXiv:2204.02311, section 5. The softcap is from "Gemma 2", 2024, arXiv:2408.00118.

    Args:
        input: ``(*, D)``, floating point, any strides.
        linear_weight: ``(C, D)``.
        target: ``(*)``, integers from 0 to C − 1, or ``ignore_index``.
        linear_bias: ``(C,)``, or ``None``.
        weight: ``(C,)``, floating point: a factor for each class. It takes no gradient.
        reduction: ``mean``, ``sum``, or ``none``. The mean of the cross entropy is weighted by the
            weights of the targets, as in torch. The mean of the z-loss is over rows.
        ignore_index: the target of rows that do not count, by default −100.
        label_smoothing: from 0 to 1.
        z_loss: at least 0.
        softcap: above 0, or ``None``.

    Returns:
        A scalar, or ``(*)`` with ``reduction="none"``. It is in the dtype of ``input``, but float32
        for half precisions: near 10, bfloat16 has steps of 1/16. If no row counts, the mean is NaN,
        as in torch, and all gradients are 0.

    Raises:
        ArgumentTypeError: arguments that are not tensors of float64, float32, bfloat16 or float16,
            or differ in dtype; targets that are not integers; a parameter that is not a number.
        ArgumentError: a wrong shape, different devices, a parameter out of range, a ``weight`` that
            requires a gradient; on a CPU, a target outside the vocabulary. On other devices that
            makes the loss NaN, because nothing waits for them.

    Gradients:
        For ``input``, ``linear_weight`` and ``linear_bias``, of any order. Those of the second
        order, forward mode and :mod:`torch.func` store the matrix of logits.

    Numerics:
        Half precisions are multiplied and summed up in float32. Under autocast half precisions are
        cast to float32.

    Memory:
        The forward pass of a mean or a sum forms the gradients, because they are known up to a
        factor. So it takes three matrix products in all, and a block of logits, 16 MB in float32.
        A backward pass with ``retain_graph=True`` takes the size of the gradients once more.
        Without gradients none is formed. ``reduction="none"`` takes four products. On a CPU rows
        that do not count cost nothing. Half precisions take the weight and its gradient in float32.
    """
    given = checked(input, linear_weight, target, linear_bias, ignore_index, softcap)
    number = checks.check_reduction(reduction)
    smoothing = _in_range("label_smoothing", label_smoothing, 1.0)
    z_factor = _in_range("z_loss", z_loss, float("inf"))
    wide = torch.float64 if given.input.dtype is torch.float64 else torch.float32
    class_weight = None
    if weight is not None:
        _check_class_weight(weight, given.linear_weight)
        class_weight = weight.detach().to(wide)
    counts = given.label != linear_logits.IGNORED
    factors, total = factors_of(
        given.label,
        given.linear_weight.shape[0],
        class_weight,
        smoothing,
        z_factor,
        number == 1,
        wide,
    )
    if number:
        recorded = torch.is_grad_enabled()
        needed = [t is not None and recorded and t.requires_grad for t in given[:3]]
        loss: Tensor = linear_loss(
            *given[:4], factors, class_weight, given.softcap, smoothing > 0, *needed
        )
        if number == 1:
            loss = loss + torch.where(total == 0, torch.nan, 0.0).to(wide)
        return loss
    log_sum, of_target, of_all, _ = linear_logits.of_rows(
        *given[:4], class_weight, given.softcap, smoothing > 0, False, False
    )
    loss = combined(factors, log_sum, of_target, of_all if smoothing else None)
    return torch.where(counts, loss, torch.zeros_like(loss)).reshape(target.shape)


class LinearLogProb(NamedTuple):
    """The result of :func:`linear_log_prob`: two values of each row."""

    log_prob: Tensor
    entropy: Tensor


def linear_log_prob(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = None,
    softcap: float | None = None,
) -> LinearLogProb:
    """The log-probability of each target, and the entropy of each row, as in policy gradients.

    .. math::

        pᵢⱼ = exp(zᵢⱼ − Lᵢ)
        log_prob = log pᵢₜ
        entropy = − Σ_j pᵢⱼ log pᵢⱼ

    z and L are those of :func:`linear_cross_entropy`, and t is the target of row i. For a
    temperature T, pass ``input / T``, and ``linear_bias / T`` if there is one.

    Args:
        input, linear_weight, target, linear_bias, ignore_index, softcap: see
            :func:`linear_cross_entropy`.

    Returns:
        A :class:`LinearLogProb`: ``log_prob`` and ``entropy``, each ``(*)``, in the dtype of
        ``input``, but float32 for half precisions. Both are 0 for rows that do not count.

    Raises:
        ArgumentTypeError, ArgumentError: as :func:`linear_cross_entropy`.

    Gradients:
        As for :func:`linear_cross_entropy`. Of ``log_prob`` and ``entropy``, one that takes no part
        in the loss costs nothing in the backward pass.

    Memory:
        A block of logits, 16 MB in float32. The backward pass computes the logits again, so both
        passes take four matrix products.
    """
    given = checked(input, linear_weight, target, linear_bias, ignore_index, softcap)
    log_sum, of_target, _, entropy = linear_logits.of_rows(
        *given[:4], None, given.softcap, False, True, False
    )
    shape = target.shape
    return LinearLogProb((of_target - log_sum).reshape(shape), entropy.reshape(shape))


class LinearCrossEntropyLoss(nn.Module):
    """A linear layer and :func:`linear_cross_entropy` as a module, with torch's arguments.

    The layer is ``linear``, a :class:`torch.nn.Linear`. ``linear.weight`` may be tied to an
    embedding.

    Args:
        in_features: D.
        num_classes: C.
        bias: whether the layer has a bias.
        device, dtype: of the layer.
        weight, reduction, ignore_index, label_smoothing, z_loss, softcap: see
            :func:`linear_cross_entropy`. ``weight`` is a buffer of the module.
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        weight: Tensor | None = None,
        reduction: checks.Reduction = "mean",
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        if weight is not None:
            _check_class_weight(weight.to(self.linear.weight.device), self.linear.weight)
        self.register_buffer("weight", weight)
        self.reduction = checks.one_of("reduction", reduction, checks.REDUCTIONS)
        self.ignore_index = checked_index(ignore_index)
        self.label_smoothing = _in_range("label_smoothing", label_smoothing, 1.0)
        self.z_loss = _in_range("z_loss", z_loss, float("inf"))
        self.softcap = _checked_softcap(softcap) or None

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of ``(*, D)`` inputs with ``(*)`` targets."""
        return linear_cross_entropy(
            input,
            self.linear.weight,
            target,
            linear_bias=self.linear.bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
        )

    def extra_repr(self) -> str:
        """The parameters, for ``print(module)``."""
        names = ("reduction", "ignore_index", "label_smoothing", "z_loss", "softcap")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def samples() -> Iterator[checks.Sample]:
    """Where ``jitops check`` checks the gradients: all terms, and the values of rows."""
    target = torch.tensor([0, 4, -100, 2])
    for reduction in checks.REDUCTIONS:
        for softcap in (None, 2.0):

            def call(
                x: Tensor,
                w: Tensor,
                b: Tensor,
                reduction: checks.Reduction = reduction,
                softcap: float | None = softcap,
            ) -> Tensor:
                return linear_cross_entropy(
                    x,
                    w,
                    target,
                    linear_bias=b,
                    reduction=reduction,
                    label_smoothing=0.1,
                    z_loss=0.01,
                    softcap=softcap,
                )

            title = f"reduction={reduction!r}, softcap={softcap!r}"
            yield title, call, (torch.randn(4, 3), torch.randn(5, 3), torch.randn(5))

    def log_prob(x: Tensor, w: Tensor) -> LinearLogProb:
        return linear_log_prob(x, w, target)

    yield "linear_log_prob", log_prob, (torch.randn(4, 3), torch.randn(5, 3))


# ---- arguments -----------------------------------------------------------------------------------


class Given(NamedTuple):
    """The checked arguments, with rows in one dimension."""

    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    label: Tensor
    softcap: float


def checked(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    ignore_index: int | None,
    softcap: float | None,
) -> Given:
    tensors = {"input": input, "linear_weight": linear_weight}
    if linear_bias is not None:
        tensors["linear_bias"] = linear_bias
    tensors = checks.widened_under_autocast(tensors)
    checks.same_kind(**tensors)
    input, linear_weight = tensors["input"], tensors["linear_weight"]
    linear_bias = tensors.get("linear_bias")
    if linear_weight.dim() != 2 or linear_weight.shape[0] == 0:
        raise ArgumentError(
            "linear_weight must have shape (classes, D) with at least one class, got "
            f"{list(linear_weight.shape)}"
        )
    classes, features = linear_weight.shape
    if input.dim() == 0 or input.shape[-1] != features:
        raise ArgumentError(
            f"input must have shape (*, {features}), as linear_weight has {features} columns, got "
            f"{list(input.shape)}"
        )
    if linear_bias is not None and linear_bias.shape != (classes,):
        raise ArgumentError(
            f"linear_bias must have shape [{classes}], one number for each class, got "
            f"{list(linear_bias.shape)}"
        )
    checks.integers("target", target)
    if target.shape != input.shape[:-1]:
        raise ArgumentError(
            f"target must have shape {list(input.shape[:-1])}, one class for each row of input, "
            f"got {list(target.shape)}"
        )
    if target.device != input.device:
        raise ArgumentError(f"target must be on device {input.device}, got {target.device}")
    label = linear_logits.labels(target.reshape(-1).long(), checked_index(ignore_index), classes)
    rows = input.reshape(label.shape[0], features)
    return Given(rows, linear_weight, linear_bias, label, _checked_softcap(softcap))


def checked_index(ignore_index: int | None) -> int:
    if ignore_index is None:
        return IGNORE_INDEX
    return checks.check_int("ignore_index", ignore_index, "an int or None")


def _checked_softcap(softcap: float | None) -> float:
    """The softcap, or 0 for none."""
    if softcap is None:
        return 0.0
    value = checks.check_number("softcap", softcap)
    if not 0.0 < value < float("inf"):
        raise ArgumentError(f"softcap must be a finite number above 0, or None, got {softcap}")
    return value


def _in_range(name: str, value: float, most: float) -> float:
    number = checks.check_number(name, value)
    if not 0.0 <= number <= most or number == float("inf"):
        limit = f"from 0 to {most:g}" if most < float("inf") else "finite and at least 0"
        raise ArgumentError(f"{name} must be {limit}, got {value}")
    return number


def _check_class_weight(weight: Any, linear_weight: Tensor) -> None:
    checks.same_kind(weight=weight)
    if weight.shape != linear_weight.shape[:1]:
        raise ArgumentError(
            f"weight must have shape [{linear_weight.shape[0]}], one number for each class, got "
            f"{list(weight.shape)}"
        )
    if weight.device != linear_weight.device:
        raise ArgumentError(f"weight must be on device {linear_weight.device}, got {weight.device}")
    if weight.requires_grad:
        raise ArgumentError("weight must not require a gradient, because none is computed, got one")
