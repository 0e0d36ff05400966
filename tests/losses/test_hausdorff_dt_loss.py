"""The Hausdorff distance-transform loss in 2-D and 3-D, against brute-force distances."""

from __future__ import annotations

import itertools

import pytest
import torch

import ops
from tests.harness.battery import Battery
from tests.harness.op_under_test import OpUnderTest, close


def distances(field, spacing):
    """The distance of each pixel to the nearest one on the other side, by all pairs."""
    places = torch.tensor(list(itertools.product(*map(range, field.shape))), dtype=torch.float64)
    places = places * torch.tensor(spacing or [1.0] * field.dim(), dtype=torch.float64)
    inside = (field > 0.5).flatten().cpu()
    if inside.all() or not inside.any():
        return torch.zeros(field.shape, dtype=torch.float64)
    pairs = torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")
    other = inside[:, None] != inside[None, :]
    return pairs.where(other, torch.inf).min(1).values.reshape(field.shape)


def reference(
    input, target, alpha=2.0, include_background=True, batch=False, spacing=None, reduction="mean"
):
    weights = torch.zeros_like(input)
    for place in itertools.product(*map(range, input.shape[:2])):
        for field in (input, target):
            weights[place] += (distances(field[place].detach(), spacing) ** alpha).to(input.device)
    values = (input - target) ** 2 * weights.detach()
    if input.shape[1] > 1 and not include_background:
        values = values[:, 1:]
    pixels = tuple(range(2, input.dim()))
    values = values.mean((0, *pixels) if batch else pixels, keepdim=True)
    return {"mean": torch.mean, "sum": torch.sum, "none": lambda x: x}[reduction](values)


def inputs(shape, dtype, device):
    """Probabilities so far from 1/2 that finite differences and rounding move no border."""
    random = torch.rand(2, *shape, dtype=torch.float64)
    away = torch.where(random > 0.5, 0.55 + 0.4 * random, 0.05 + 0.8 * random)
    return [one.to(device, dtype) for one in away]


VARIANTS = (
    {"include_background": True},
    {"include_background": True, "alpha": 1.0, "reduction": "none", "spacing": (0.5, 2.0)},
    {"include_background": False, "batch": True, "reduction": "none"},
    {"include_background": False, "reduction": "sum", "alpha": 0.5},
)


class TestHausdorffDTLoss(Battery):
    backends = ("torch",)
    op = OpUnderTest(
        name="hausdorff_dt_loss",
        call=ops.hausdorff_dt_loss,
        reference=reference,
        names=("input", "target"),
        inputs=inputs,
        shapes=((2, 3, 8, 7), (1, 1, 6, 1), (2, 2, 4, 3)),
        variants=VARIANTS,
        edges=((1, 2, 3, 3), (0, 2, 3, 3), (1, 1, 1, 1)),
        large=(4, 3, 9, 9),
        module=lambda: ops.HausdorffDTLoss(alpha=1.5),
        compiles=False,
    )


class TestHausdorffDTLoss3D(Battery):
    backends = ("torch",)
    op = OpUnderTest(
        name="hausdorff_dt_loss in 3-D",
        variation=True,
        call=ops.hausdorff_dt_loss,
        reference=reference,
        names=("input", "target"),
        inputs=inputs,
        shapes=((2, 2, 4, 3, 5), (2, 1, 3, 2, 2)),
        variants=(
            {"include_background": True, "spacing": (1.0, 2.0, 0.5)},
            {"include_background": True, "batch": True},
        ),
        edges=((1, 2, 3, 3, 2), (0, 2, 3, 3, 2)),
        large=(2, 2, 5, 5, 5),
        compiles=False,
    )


def test_worked_by_hand():
    """One pixel of a row of four is predicted, its neighbour is the target."""
    p = torch.tensor([1.0, 0.0, 0.0, 0.0]).reshape(1, 1, 1, 4)
    q = torch.tensor([0.0, 1.0, 0.0, 0.0]).reshape(1, 1, 1, 4)
    # Distances to the border of p: 1 1 2 3, of q: 1 1 1 2. The first two pixels are wrong.
    assert ops.hausdorff_dt_loss(p, q).item() == (2 + 2) / 4


def test_class_numbers_and_activations():
    logits = torch.randn(2, 3, 6, 5, requires_grad=True)
    numbers = torch.randint(0, 3, (2, 1, 6, 5))
    hot = torch.nn.functional.one_hot(numbers[:, 0], 3).movedim(-1, 1).float()
    for activation, function in (("sigmoid", torch.sigmoid), ("softmax", lambda x: x.softmax(1))):
        mine = ops.hausdorff_dt_loss(logits, numbers, to_onehot_y=True, **{activation: True})
        close(mine, ops.hausdorff_dt_loss(function(logits), hot), torch.float32)
        (grad,) = torch.autograd.grad(mine, logits)
        assert grad.abs().sum() > 0


def test_no_border_no_distance():
    """If all or no pixels are predicted, only the border of the target counts."""
    target = torch.zeros(1, 1, 4, 4)
    target[..., :2] = 1
    for fill in (0.0, 1.0):
        mine = ops.hausdorff_dt_loss(torch.full((1, 1, 4, 4), fill), target)
        wrong = target == 1 - fill
        by_hand = torch.tensor([2.0, 1.0, 1.0, 2.0]).expand(1, 1, 4, 4)[wrong] ** 2
        assert mine.item() == by_hand.sum().item() / 16
    same = torch.ones(1, 1, 4, 4)
    assert ops.hausdorff_dt_loss(same, 0 * same).item() == 0


SINGLE = {"input": torch.ones(2, 1, 4, 4), "target": torch.ones(2, 1, 4, 4)}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"input": 3}, ops.ArgumentTypeError, "input must be a torch.Tensor, got int"),
        ({"input": torch.ones(2, 3, 4)}, ops.ArgumentError, r"input must have shape \(B, C, H, W"),
        ({"target": torch.ones(2, 3, 4, 5)}, ops.ArgumentError, "target must have input's shape"),
        ({"target": torch.ones(2, 3, 4, 4).double()}, ops.ArgumentTypeError, "input's dtype"),
        ({"alpha": -1.0}, ops.ArgumentError, "alpha must be at least 0, got -1.0"),
        ({"alpha": "2"}, ops.ArgumentTypeError, "alpha must be a real number, got str"),
        ({"sigmoid": True, "softmax": True}, ops.ArgumentError, "softmax must be false where"),
        ({"reduction": "max"}, ops.ArgumentError, "reduction must be one of none, mean, sum"),
        ({"spacing": (1.0,)}, ops.ArgumentError, "spacing must be 2 positive sizes"),
        (
            {"spacing": 2.0},
            ops.ArgumentTypeError,
            "spacing must be a list .* got float",
        ),
        ({"softmax": True, **SINGLE}, ops.ArgumentError, "softmax must be false for a single"),
        ({"to_onehot_y": True, **SINGLE}, ops.ArgumentError, "to_onehot_y must be false for a"),
        ({"spacing": (1.0, 0.0)}, ops.ArgumentError, "spacing must be 2 positive sizes"),
        ({"to_onehot_y": True}, ops.ArgumentError, r"class numbers in shape \[2, 1, 4, 4\]"),
        (
            {"to_onehot_y": True, "target": torch.full((2, 1, 4, 4), 3)},
            ops.ArgumentError,
            "target must hold the class numbers 0 to 2",
        ),
    ],
)
def test_bad_arguments(change, error, text):
    good = {"input": torch.ones(2, 3, 4, 4), "target": torch.ones(2, 3, 4, 4)}
    with pytest.raises(error, match=text):
        ops.hausdorff_dt_loss(**{**good, **change})
