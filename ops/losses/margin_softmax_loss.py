"""Cross entropy of cosines with a margin, ArcFace and CosFace, without the matrix of logits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ops._core import autograd, checks, linear_logits, pairs
from ops._errors import ArgumentError
from ops.losses.linear_cross_entropy import checked, checked_index

__all__ = ["MarginSoftmaxLoss", "margin_softmax_loss"]

Form = Literal["arcface", "cosface"]
MARGINS: dict[Form, float] = {"arcface": 0.5, "cosface": 0.35}  # the defaults of the papers


def margin_softmax_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    form: Form = "arcface",
    margin: float | None = None,
    scale: float | Tensor = 64.0,
    reduction: checks.Reduction = "mean",
    ignore_index: int | None = None,
) -> Tensor:
    """The cross entropy of scaled cosines, where the class of a row has a margin: ArcFace, CosFace.

    .. math::

        cos θᵢⱼ = xᵢ · wⱼ / (‖xᵢ‖ ‖wⱼ‖)

        tᵢ = s cos(θ_{iy} + m)      (arcface)
        tᵢ = s (cos θ_{iy} − m)     (cosface)

        ℓᵢ = log(1 + Σ_{j≠y} exp(s cos θᵢⱼ − tᵢ))

    x is ``input``, w ``linear_weight``, y the target of row i, m ``margin`` and s ``scale``. From
    J. Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", CVPR 2019,
    arXiv:1801.07698, and H. Wang et al., "CosFace: Large Margin Cosine Loss for Deep Face
    Recognition", CVPR 2018, arXiv:1801.09414. cos(θ + m) would rise again beyond θ = π − m. There
    it is cos θ − m sin m, as in the authors' code.

    Args:
        input: ``(*, D)``, floating point, any strides.
        linear_weight: ``(C, D)``, one row for each of at least two classes.
        target: ``(*)``, integers from 0 to C − 1, or ``ignore_index``.
        form: ``arcface`` or ``cosface``.
        margin: an angle in radians from 0 to π for ``arcface``, by default 0.5; a difference of
            cosines, at least 0, for ``cosface``, by default 0.35.
        scale: above 0: a number, or a tensor with one element, which may have a gradient. The value
            of a tensor is not checked.
        reduction: ``mean`` over the rows that count, ``sum``, or ``none``.
        ignore_index: the target of rows that do not count, by default −100.

    Returns:
        A scalar, or ``(*)`` with ``reduction="none"``. It is in the dtype of ``input``, but float32
        for half precisions. If no row counts, the mean is 0, and all gradients are 0.

    Raises:
        ArgumentTypeError: arguments that are not tensors of float64, float32, bfloat16 or float16,
            or differ in dtype; targets that are not integers; a parameter that is not a number.
        ArgumentError: a wrong shape, different devices, fewer than two classes, an unknown form, a
            parameter out of range; on a CPU, a target outside the vocabulary. On other devices that
            makes the loss NaN, because nothing waits for them.

    Gradients:
        For ``input``, ``linear_weight`` and ``scale``, of any order. Those of the second order,
        forward mode and :mod:`torch.func` store the matrix of logits. Where θ is 0 or π, the slope
        of sin θ is infinite, and 0 is taken for it.

    Numerics:
        Half precisions are multiplied and summed up in float32. The row's class is left out of the
        sum, so a small loss keeps its digits. Rows of zeros stay, as with
        :func:`torch.nn.functional.normalize`. Under autocast half precisions are cast to float32.

    Memory:
        Copies of ``input`` and ``linear_weight`` with rows of length 1, and a block of logits,
        16 MB in float32. Both passes take four matrix products, because the backward pass computes
        the logits again.
    """
    given = checked(input, linear_weight, target, None, ignore_index, None)
    _classes(given.linear_weight.shape[0])
    checks.one_of("form", form, MARGINS)
    width, factor = _margin(form, margin), pairs.scalar("scale", scale, given.input)
    number = checks.check_reduction(reduction)
    x = factor * pairs.unit(checks.widened(given.input))
    w = pairs.unit(checks.widened(given.linear_weight))
    log_sum, of_target, _, _ = linear_logits.of_rows(
        x, w, None, given.label, None, 0.0, False, False, True
    )
    cosine = of_target / factor
    if form == "arcface":
        cosine = _cosine_of_sum(cosine, width)
    else:
        cosine = cosine - width
    loss = autograd.softplus(log_sum - factor * cosine)
    counts = given.label != linear_logits.IGNORED
    loss = torch.where(counts, loss, torch.zeros_like(loss))
    if number == 0:
        return loss.reshape(target.shape)
    return loss.sum() / counts.sum().clamp(min=1) if number == 1 else loss.sum()


class MarginSoftmaxLoss(nn.Module):
    """The weight of the classes, and :func:`margin_softmax_loss`, as a module.

    ``weight`` is a parameter of shape ``(num_classes, in_features)``.

    Args:
        in_features: D.
        num_classes: C.
        device, dtype: of ``weight``.
        form, margin, scale, reduction, ignore_index: see :func:`margin_softmax_loss`.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        form: Form = "arcface",
        margin: float | None = None,
        scale: float = 64.0,
        reduction: checks.Reduction = "mean",
        ignore_index: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.form = checks.one_of("form", form, MARGINS)
        self.margin, self.scale = _margin(form, margin), checks.check_number("scale", scale)
        self.reduction = checks.one_of("reduction", reduction, checks.REDUCTIONS)
        self.ignore_index = checked_index(ignore_index)
        shape = _classes(num_classes), checks.check_count("in_features", in_features)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        pairs.scalar("scale", self.scale, self.weight)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw directions that are equally likely; lengths do not matter."""
        nn.init.normal_(self.weight, std=0.01)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of ``(*, D)`` inputs with ``(*)`` targets."""
        return margin_softmax_loss(
            input,
            self.weight,
            target,
            form=self.form,
            margin=self.margin,
            scale=self.scale,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
        )

    def extra_repr(self) -> str:
        """The parameters, for ``print(module)``."""
        names = ("form", "margin", "scale", "reduction", "ignore_index")
        shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, {shown}"


def samples() -> Iterator[checks.Sample]:
    """Where ``jitops check`` checks the gradients."""
    target = torch.tensor([0, 4, -100, 2])
    for form in MARGINS:

        def call(x: Tensor, w: Tensor, form: Form = form) -> Tensor:
            return margin_softmax_loss(x, w, target, form=form, scale=4.0)

        yield f"form={form!r}", call, (torch.randn(4, 3), torch.randn(5, 3))


def _margin(form: Form, margin: float | None) -> float:
    if margin is None:
        return MARGINS[form]
    number = checks.check_number("margin", margin)
    most = math.pi if form == "arcface" else math.inf
    if not 0.0 <= number <= most or number == math.inf:
        limit = "from 0 to pi" if form == "arcface" else "finite and at least 0"
        raise ArgumentError(f"margin must be {limit}, got {margin}")
    return number


def _classes(number: int) -> int:
    if checks.check_count("num_classes", number) < 2:
        raise ArgumentError(f"num_classes must be at least 2, got {number}")
    return number


def _cosine_of_sum(cosine: Tensor, margin: float) -> Tensor:
    """cos(θ + m) from cos θ; beyond θ = π − m a line that goes on falling."""
    square = (1 - cosine) * (1 + cosine)  # rounding may make it negative
    inside = square > 0
    sine = torch.where(inside, torch.where(inside, square, 1.0).sqrt(), 0.0)
    added = cosine * math.cos(margin) - sine * math.sin(margin)
    return torch.where(cosine > -math.cos(margin), added, cosine - margin * math.sin(margin))
