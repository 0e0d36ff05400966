"""The smoothed distance of rows: its reference, the battery, and its own tests."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import ops
from tests.harness.op_under_test import OpUnderTest
from tests.harness.row_battery import RowBattery


def reference(input, target, width=1.0, reduction="mean"):
    """The norm of a difference that has the width as one more coordinate."""
    loss = F.pad(input - target, (0, 1), value=width).norm(dim=-1)
    return {"mean": torch.mean, "sum": torch.sum, "none": lambda x: x}[reduction](loss)


def inputs(shape, dtype, device):
    x = torch.randn((2, *shape), dtype=torch.float64, device=device).to(dtype)
    return [x[0].clone(), x[1].clone()]


OP = OpUnderTest(
    name="smooth_distance",
    call=ops.smooth_distance,
    reference=reference,
    names=("input", "target"),
    shards=True,
    inputs=inputs,
    shapes=((1, 1), (32, 128), (5, 1023), (2, 3, 17), (4, 5)),
    variants=(
        {},
        {"width": 0.5, "reduction": "sum"},
        {"width": 2.0, "reduction": "none"},
    ),
    module=ops.SmoothDistance,
)


class TestSmoothDistance(RowBattery):
    op = OP
    backends = ("torch",)

    def test_worked_by_hand(self, backend, device):
        """The distance is 5, and with a width of 12 the loss is 13."""
        x = torch.tensor([[3.0, -4.0]], dtype=torch.float64, device=device, requires_grad=True)
        loss = ops.smooth_distance(x, torch.zeros_like(x), width=12.0)
        loss.backward()
        assert loss.item() == 13.0
        torch.testing.assert_close(x.grad, x.detach() / 13.0)


X = torch.randn(2, 3)


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        ({"input": [1.0]}, ops.ArgumentTypeError, "input must be a torch.Tensor, got list"),
        (
            {"target": X[:, :2]},
            ops.ArgumentError,
            "input and target must have shapes that broadcast together, "
            "got input [2, 3], target [2, 2]",
        ),
        ({"width": 0.0}, ops.ArgumentError, "width must be greater than 0, got 0.0"),
        ({"width": float("nan")}, ops.ArgumentError, "width must be a number, got nan"),
        (
            {"reduction": "avg"},
            ops.ArgumentError,
            "reduction must be one of none, mean, sum, got 'avg'; did you mean 'mean'?",
        ),
    ],
)
def test_bad_arguments(wrong, error, text):
    with pytest.raises(error) as raised:
        ops.smooth_distance(**{"input": X, "target": X, **wrong})
    assert str(raised.value) == text
