"""The smoothed distance of rows: its reference, the battery, and its own tests."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import ops
from tests.harness.op_under_test import Far, Mutation, OpUnderTest, blank
from tests.harness.row_battery import RowBattery

STEM = "smooth_distance"


def reference(input, target, width=1.0, reduction="mean"):
    """The norm of a difference that has the width as one more coordinate."""
    loss = F.pad(input - target, (0, 1), value=width).norm(dim=-1)
    return {"mean": torch.mean, "sum": torch.sum, "none": lambda x: x}[reduction](loss)


def inputs(shape, dtype, device):
    x = torch.randn((2, *shape), dtype=torch.float64, device=device).to(dtype)
    return [x[0].clone(), x[1].clone()]


def operator_samples(device):
    for reduction in (0, 1, 2):
        tensors = inputs((3, 5), torch.float32, device)
        forward = getattr(torch.ops.jitops, f"{STEM}_forward").default
        yield forward, (*tensors, 0.5, reduction)
        loss, roots = forward(*tensors, 0.5, reduction)
        backward = getattr(torch.ops.jitops, f"{STEM}_backward").default
        for needed in ((True, True), (False, True), (False, False)):
            yield backward, (torch.ones_like(loss), *tensors, roots, reduction, *needed)


# Parts of a warp to a row; a block to a row; more rows than the grid has places for.
LAUNCHES = (*((37, cols) for cols in (1, 3, 20, 70)), (3, 4099), (8200, 33), (1025, 1030))


def far(device):
    input = blank(2**31 // 512 + 2**14, 512, device=device)
    target = torch.randn(1, 512, device=device).bfloat16()
    return Far([input, target], 0, {"reduction": "none"})


MUTATIONS = (
    Mutation(
        f"{STEM}.cu",
        "row < params.rows; row += step) {\n    const A factor",
        "row <= params.rows; row += step) {\n    const A factor",
        "read out of bounds",
    ),
    Mutation(
        f"{STEM}.cu",
        "turn = 1 - turn;",
        "",
        "race in shared memory",
    ),
    Mutation(
        f"{STEM}.cu",
        "params.partials[blockIdx.x] = total;",
        "params.partials[0] = total;",
        "race in global memory|read before it was written",
    ),
    Mutation(
        f"{STEM}.cu",
        "const int64_t at = row * params.cols + j;",
        "const int64_t at = static_cast<int>(row) * static_cast<int>(params.cols) + j;",
        "a number beyond its type",
        by="far",
    ),
)


OP = OpUnderTest(
    name=STEM,
    source=STEM,
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
    operator_samples=operator_samples,
    launches=lambda dtype, device: (inputs(shape, dtype, device) for shape in LAUNCHES),
    busy=lambda dtype, device: inputs((4096, 512), dtype, device),
    far=far,
    mutations=MUTATIONS,
)


class TestSmoothDistance(RowBattery):
    op = OP

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
def test_bad_arguments(backend, wrong, error, text):
    with pytest.raises(error) as raised:
        ops.smooth_distance(**{"input": X, "target": X, **wrong})
    assert str(raised.value) == text


@pytest.mark.parametrize("wrong", ["shape", "dtype", "rows"])
def test_operators_check_for_themselves(compiled, device, wrong):
    """Called past the Python checks, an operator refuses rather than read out of bounds."""
    x, y = inputs((4, 3), torch.float32, device)
    ops.smooth_distance(x, y)  # loads it
    operators = [getattr(torch.ops.jitops, f"{STEM}_{one}") for one in ("forward", "backward")]
    with pytest.raises(RuntimeError, match="must have|must hold"):
        if wrong == "shape":
            operators[0](x, y[:2], 1.0, 1)
        elif wrong == "dtype":
            operators[0](x, y.double(), 1.0, 1)
        else:
            roots = torch.ones(3, dtype=torch.float64, device=device)
            operators[1](x.new_ones(()), x, y, roots, 1, True, True)
