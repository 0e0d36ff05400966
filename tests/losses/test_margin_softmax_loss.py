"""ArcFace and CosFace: their reference on all logits, the battery, and their own tests."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import ops
from ops._core import blocks, linear_logits
from tests.harness.battery import Battery
from tests.harness.op_under_test import OpUnderTest, close
from tests.losses.test_linear_cross_entropy import CLASSES, targets_of


@pytest.fixture
def many_blocks(monkeypatch):
    """A few rows fill a block."""
    monkeypatch.setattr(linear_logits, "ELEMENTS", 3 * CLASSES)
    monkeypatch.setattr(linear_logits, "FEWEST_ROWS", 3)
    monkeypatch.setattr(blocks, "elements_for", lambda tensor: 2 * CLASSES)


def reference(x, w, form="arcface", margin=None, scale=8.0, reduction="mean"):
    """By the cross entropy of torch, with the angle itself."""
    shape, target = x.shape[:-1], targets_of(x).reshape(-1)
    x = x.reshape(len(target), x.shape[-1])
    cosines = F.normalize(x, dim=-1, eps=1e-12) @ F.normalize(w, dim=-1, eps=1e-12).mT
    of_target = F.one_hot(target.clamp(min=0), CLASSES).bool()
    if form == "arcface":
        margin = 0.5 if margin is None else margin
        sure = cosines.clamp(-1 + 1e-12, 1 - 1e-12)
        moved = (sure.acos() + margin).cos()
        moved = torch.where(
            sure.acos() < math.pi - margin, moved, cosines - margin * math.sin(margin)
        )
    else:
        moved = cosines - (0.35 if margin is None else margin)
    z = scale * torch.where(of_target, moved, cosines)
    losses = F.cross_entropy(z, target, reduction="none")
    if reduction == "mean":
        return losses.sum() / max(1, int((target != -100).sum()))
    return losses.sum() if reduction == "sum" else losses.reshape(shape)


def call(x, w, scale=8.0, **keywords):
    return ops.margin_softmax_loss(x, w, targets_of(x), scale=scale, **keywords)


def inputs(shape, dtype, device):
    shapes = (shape, (CLASSES, shape[-1]))
    return [torch.randn(one, dtype=torch.float64).to(device, dtype) for one in shapes]


class TestMarginSoftmaxLoss(Battery):
    backends = ("torch",)
    op = OpUnderTest(
        name="margin_softmax_loss",
        call=call,
        reference=reference,
        names=("input", "linear_weight"),
        inputs=inputs,
        # Of one column all cosines are 1 or -1, where sin has no slope.
        shapes=((9,), (16, 33), (2, 7, 17), (6, 4)),
        edges=((0, 4), (1, 4), (0, 0), (4, 0), (2, 0, 3)),
        variants=(
            {},
            {"form": "cosface"},
            {"margin": 2.0, "reduction": "sum"},  # many angles are beyond pi - margin
            {"form": "cosface", "margin": 0.1, "reduction": "none"},
        ),
        large=(333, 77),
        widens=True,
    )

    def test_many_blocks(self, backend, device, many_blocks):
        for keywords in self.op.variants:
            self.agree(self.inputs(device, shape=(33, 5)), keywords)

    @pytest.mark.parametrize("form", ["arcface", "cosface"])
    def test_without_a_margin_it_is_a_cross_entropy(self, backend, device, form):
        x, w = self.inputs(device)
        z = 8.0 * F.normalize(x) @ F.normalize(w).mT
        loss = call(x, w, form=form, margin=0.0)
        close(loss, F.cross_entropy(z, targets_of(x)), torch.float64)

    def test_worked_by_hand(self, backend, device):
        """An angle of 60 degrees to its class, and 150 to the other one."""
        x = torch.tensor([[2.0, 0.0]], dtype=torch.float64, device=device)
        w = torch.tensor(
            [[0.5, 0.75**0.5], [-(0.75**0.5), 0.5]], dtype=torch.float64, device=device
        )
        target = torch.tensor([0], device=device)
        arcface = ops.margin_softmax_loss(x, w, target, margin=math.pi / 6, scale=2.0)
        assert arcface.item() == pytest.approx(math.log1p(math.exp(2 * -(0.75**0.5))))
        cosface = ops.margin_softmax_loss(x, w, target, form="cosface", margin=0.25, scale=2.0)
        assert cosface.item() == pytest.approx(math.log1p(math.exp(2 * -(0.75**0.5) - 0.5)))

    @pytest.mark.parametrize("sign", [1, -1])
    def test_rows_along_their_class(self, backend, device, sign):
        """There the sine has no slope, so 0 is taken."""
        w = torch.eye(3, dtype=torch.float64, device=device)
        x = (sign * w).requires_grad_()
        loss = ops.margin_softmax_loss(x, w, torch.arange(3, device=device), scale=4.0)
        loss.backward()
        assert loss.isfinite()
        assert x.grad.isfinite().all()

    def test_small_losses_keep_their_digits(self, backend, device):
        """A log-sum-exp that includes the row's class would round this one to 0."""
        x = torch.eye(3, device=device)
        target = torch.arange(3, device=device)
        loss = ops.margin_softmax_loss(x, x, target, form="cosface", margin=0.0, scale=30.0)
        assert loss.item() == pytest.approx(2 * math.exp(-30.0), rel=1e-5)

    def test_no_row_counts(self, backend, device):
        x = torch.randn(3, 4, device=device, requires_grad=True)
        target = torch.full((3,), 9, device=device)
        loss = ops.margin_softmax_loss(x, torch.randn(5, 4, device=device), target, ignore_index=9)
        loss.backward()
        assert loss.item() == 0
        assert not x.grad.any()


def test_module():
    torch.manual_seed(0)
    loss = ops.MarginSoftmaxLoss(4, 5, form="cosface", scale=16.0, dtype=torch.float64)
    assert repr(loss) == (
        "MarginSoftmaxLoss(4, 5, form='cosface', margin=0.35, scale=16.0, reduction='mean', "
        "ignore_index=-100)"
    )
    x, target = torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 4, 2])
    expected = ops.margin_softmax_loss(x, loss.weight, target, form="cosface", scale=16.0)
    assert torch.equal(loss(x, target), expected)
    loss(x, target).backward()
    assert loss.weight.grad.any()


X, TARGET = torch.randn(3, 4), torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        ({"input": [1.0]}, ops.ArgumentTypeError, "input must be a torch.Tensor, got list"),
        (
            {"linear_weight": torch.randn(1, 4), "target": torch.zeros(3, dtype=torch.int64)},
            ops.ArgumentError,
            "num_classes must be at least 2, got 1",
        ),
        (
            {"target": TARGET + 3},
            ops.ArgumentError,
            "target must hold classes from 0 to 4, or ignore_index -100, got 5",
        ),
        ({"form": "l"}, ops.ArgumentError, "form must be one of arcface, cosface, got 'l'"),
        ({"margin": 3.2}, ops.ArgumentError, "margin must be from 0 to pi, got 3.2"),
        (
            {"margin": -0.1, "form": "cosface"},
            ops.ArgumentError,
            "margin must be finite and at least 0, got -0.1",
        ),
        ({"scale": 0}, ops.ArgumentError, "scale must be positive and finite, got 0"),
        ({"scale": 1e39}, ops.ArgumentError, "scale must be in the range of float32, got 1e+39"),
        ({"reduction": "avg"}, ops.ArgumentError, "reduction must be one of none, mean, sum"),
    ],
)
def test_bad_arguments(wrong, error, text):
    with pytest.raises(error) as raised:
        ops.margin_softmax_loss(
            **{"input": X, "linear_weight": torch.randn(5, 4), "target": TARGET, **wrong}
        )
    assert str(raised.value).startswith(text)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"form": "l"}, "form must be one of arcface, cosface, got 'l'"),
        ({"margin": -1.0}, "margin must be from 0 to pi, got -1.0"),
        ({"scale": -2}, "scale must be positive and finite, got -2"),
        ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
        ({"in_features": 0}, "in_features must be at least 1, got 0"),
    ],
)
def test_bad_arguments_of_the_module(wrong, text):
    with pytest.raises(ops.ArgumentError, match=text):
        ops.MarginSoftmaxLoss(**{"in_features": 4, "num_classes": 5, **wrong})


def test_learned_scale():
    x, w, scale = (torch.randn(size, dtype=torch.float64) for size in ((6, 4), (CLASSES, 4), ()))
    scale = scale.abs() + 3
    tensors = [one.requires_grad_() for one in (x, w, scale)]
    for form in ("arcface", "cosface"):

        def loss(x, w, scale, form=form):
            return ops.margin_softmax_loss(x, w, targets_of(x), form=form, scale=scale)

        assert torch.autograd.gradcheck(loss, tensors)
        assert torch.autograd.gradgradcheck(loss, tensors)
