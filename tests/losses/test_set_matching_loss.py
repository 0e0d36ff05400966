"""Set matching: the least cost, against all assignments in turn; ragged batches."""

from __future__ import annotations

import itertools

import pytest
import torch

import ops
from tests.harness.battery import Battery
from tests.harness.op_under_test import OpUnderTest, close


def best(matrix):
    """The pairs of the best assignment, by trying all."""
    rows, columns = matrix.shape
    if rows < columns:
        return sorted((i, j) for j, i in best(matrix.mT))
    tried = [
        sorted(zip(chosen, range(columns), strict=True))
        for chosen in itertools.permutations(range(rows), columns)
    ]
    return min(tried, key=lambda pairs: sum(matrix[i, j].item() for i, j in pairs))


def reference(cost, sizes=None, reduction="mean"):
    costs, places = [], []
    for image, matrix in enumerate(cost):
        kept = matrix if sizes is None else matrix[:, : sizes[image]]
        for i, j in best(kept.detach()):
            places.append((image, i, j))
            costs.append(matrix[i, j])
    values = torch.stack(costs) if costs else cost.flatten()[:0]
    total = {"mean": values.sum() / max(1, len(costs)), "sum": values.sum(), "none": values}
    indices = torch.tensor(places, dtype=torch.int64, device=cost.device).reshape(-1, 3)
    return (total[reduction], *indices.unbind(1))


def inputs(shape, dtype, device):
    return [torch.randn(shape, dtype=torch.float64).to(device, dtype)]


class TestSetMatchingLoss(Battery):
    backends = ("torch",)
    op = OpUnderTest(
        name="set_matching_loss",
        call=ops.set_matching_loss,
        reference=reference,
        names=("cost",),
        inputs=inputs,
        shapes=((2, 5, 3), (3, 2, 4), (1, 1, 1), (2, 4, 3)),
        variants=({}, {"reduction": "sum"}, {"reduction": "none"}),
        edges=((0, 3, 2), (2, 0, 3), (2, 3, 0), (1, 1, 1)),
        large=(16, 30, 20),
        compiles=False,
    )

    @pytest.mark.parametrize("value", [float("nan"), -float("inf")])
    def test_non_finite_inputs(self, backend, device, value):
        """They raise an error, because there is no best assignment."""
        (cost,) = self.inputs(device)
        cost[1, 2, 0] = value
        with pytest.raises(ops.ArgumentError, match="cost of image 1 must be free of nan and -inf"):
            ops.set_matching_loss(cost)

    def test_infinite_costs_forbid_a_pair(self, backend, device):
        cost = torch.tensor([[[torch.inf, 1.0], [5.0, 0.0]]], device=device, requires_grad=True)
        loss, *_ = ops.set_matching_loss(cost, reduction="sum")
        loss.backward()
        assert loss.item() == 6
        assert cost.grad.tolist() == [[[0.0, 1.0], [1.0, 0.0]]]


def test_ragged_batches():
    """A padded batch with sizes and a list of matrices give the same results and gradients."""
    sizes = [3, 0, 2, 5]
    cost = torch.randn(4, 4, 5, dtype=torch.float64)
    for image, size in enumerate(sizes):
        cost[image, :, size:] = float("nan")  # padding may hold anything
    for reduction in ("mean", "sum", "none"):
        padded = cost.clone().requires_grad_()
        mine = ops.set_matching_loss(padded, sizes, reduction)
        for told in (torch.tensor(sizes), tuple(sizes)):
            again = ops.set_matching_loss(padded, told, reduction)
            assert all(map(torch.equal, mine, again))
        matrices = [cost[b, :, :size].clone().requires_grad_() for b, size in enumerate(sizes)]
        lists = ops.set_matching_loss(matrices, reduction=reduction)
        assert all(map(torch.equal, mine, lists))
        for one, other in zip(mine, reference(cost, sizes, reduction), strict=True):
            close(one, other, torch.float64)
        mine.loss.sum().backward()
        lists.loss.sum().backward()
        assert padded.grad.count_nonzero() == 3 + 0 + 2 + 4
        for image, (matrix, size) in enumerate(zip(matrices, sizes, strict=True)):
            assert torch.equal(padded.grad[image, :, :size], matrix.grad)
            assert padded.grad[image, :, size:].count_nonzero() == 0


def test_the_pairs_index_predictions_and_targets():
    torch.manual_seed(0)
    targets = torch.randn(2, 3, 4)
    order = torch.stack([torch.randperm(6)[:3] for _ in range(2)])
    predictions = torch.randn(2, 6, 4) + 10
    predictions.scatter_(1, order[..., None].expand(-1, -1, 4), targets)
    loss, image, prediction, target = ops.set_matching_loss(torch.cdist(predictions, targets))
    assert loss.item() < 1e-2  # cdist takes the root of a rounding error
    assert torch.equal(predictions[image, prediction], targets[image, target])


@pytest.mark.parametrize("cost", [[], torch.zeros(0, 3, 2), torch.zeros(2, 3, 0)], ids=str)
def test_no_pair_costs_nothing(cost):
    for reduction in ("mean", "sum"):
        loss, *pairs = ops.set_matching_loss(cost, reduction=reduction)
        assert loss.item() == 0
        assert all(pair.shape == (0,) and pair.dtype == torch.int64 for pair in pairs)


def test_half_precision_adds_up_in_float32():
    """The sum of 4096 ones: in bfloat16 it would stop at 256."""
    cost = torch.full((4096, 1, 1), 1.0, dtype=torch.bfloat16)
    assert ops.set_matching_loss(cost, reduction="sum").loss.item() == 4096


def test_module():
    module = ops.SetMatchingLoss("sum")
    cost = torch.randn(2, 4, 3)
    assert torch.equal(module(cost, [1, 2]).loss, ops.set_matching_loss(cost, [1, 2], "sum").loss)
    assert repr(module) == "SetMatchingLoss(reduction='sum')"


GOOD = torch.ones(2, 3, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((3.0,), ops.ArgumentTypeError, "cost must be a torch.Tensor or a list of them, got float"),
        ((torch.ones(3, 4),), ops.ArgumentError, r"cost must have shape \(B, N, M\), got \[3, 4\]"),
        (([torch.ones(3)],), ops.ArgumentError, r"cost\[0\] must have shape \(N, M\), got \[3\]"),
        (([GOOD[0], 3],), ops.ArgumentTypeError, r"cost\[1\] must be a torch.Tensor, got int"),
        (
            ([GOOD[0], GOOD[0].double()],),
            ops.ArgumentTypeError,
            r"cost\[1\] must have cost\[0\]'s dtype float32, got float64",
        ),
        (
            (GOOD, [1]),
            ops.ArgumentError,
            "sizes must have an entry for each of the 2 images, got 1",
        ),
        ((GOOD, [1, 5]), ops.ArgumentError, r"sizes\[1\] must be between 0 and the 4 columns"),
        ((GOOD, [1, -1]), ops.ArgumentError, r"sizes\[1\] must be between 0"),
        ((GOOD, [1, 2.0]), ops.ArgumentTypeError, r"sizes\[1\] must be an int, got float"),
        ((GOOD, 5), ops.ArgumentTypeError, "sizes must be a list of ints or a tensor of them, got"),
        ((GOOD, torch.ones(2).bool()), ops.ArgumentTypeError, "got torch.bool of shape"),
        ((GOOD, torch.ones(2)), ops.ArgumentTypeError, "sizes must be integers in one dimension"),
        ((GOOD, None, "max"), ops.ArgumentError, "reduction must be one of"),
        ((GOOD * float("nan"),), ops.ArgumentError, "cost of image 0 must be free of nan and -inf"),
        ((GOOD * float("inf"),), ops.ArgumentError, "cost of image 0 must leave an assignment"),
    ],
)
def test_bad_arguments(arguments, error, text):
    with pytest.raises(error, match=text):
        ops.set_matching_loss(*arguments)
