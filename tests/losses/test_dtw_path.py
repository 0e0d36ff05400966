"""Dynamic time warping: its reference, the battery, and its own tests."""

from __future__ import annotations

import itertools

import pytest
import torch

import ops
from tests.harness.battery import Battery
from tests.harness.op_under_test import Mutation, OpUnderTest, close
from tests.losses.sequence_pairs import (
    BAD_COSTS,
    BAD_INPUT,
    LAUNCHES,
    band,
    costs,
    inputs,
    keywords_of,
    ragged_lengths,
    refused,
)


def best_path(cost, bandwidth):
    """The path of one pair, from the recursion cell by cell."""
    rows, cols = cost.shape
    values, sums, moves = cost.tolist(), {(-1, -1): 0.0}, {}
    for i, j in itertools.product(range(rows), range(cols)):
        if bandwidth is not None and abs(i - j) > bandwidth:
            continue
        best, move = sums.get((i - 1, j - 1), torch.inf), (i - 1, j - 1)
        for one in ((i - 1, j), (i, j - 1)):
            if sums.get(one, torch.inf) < best:
                best, move = sums[one], one
        sums[i, j] = values[i][j] + best
        moves[i, j] = (i, j - 1) if i == 0 else (i - 1, j) if j == 0 else move
    path = [(rows - 1, cols - 1)]
    while path[-1] != (0, 0):
        path.append(moves[path[-1]])
    return path[::-1]


def reference_from_cost(cost, slack=None, ragged=False):
    batch, rows, cols = cost.shape
    ends = (
        zip(*ragged_lengths(rows, cols, batch), strict=True) if ragged else [(rows, cols)] * batch
    )
    path = torch.full((batch, rows + cols - 1, 2), -1, device=cost.device)
    lengths = torch.zeros(batch, dtype=torch.int64, device=cost.device)
    along = [cost.sum((1, 2))[:0].sum()]
    for b, (n, m) in enumerate(ends):
        cells = best_path(cost[b, :n, :m].detach(), band(rows, cols, slack))
        path[b, : len(cells)] = torch.tensor(cells, device=cost.device)
        lengths[b] = len(cells)
        along.append(sum(cost[b, i, j] for i, j in cells))
    return path, lengths, torch.stack(along)[1:]


def reference(x, y, slack=None, ragged=False):
    cost = (x[:, :, None] - y[:, None]).square().sum(-1)
    return reference_from_cost(cost, slack, ragged)


def call(x, y, slack=None, ragged=False):
    keywords = {}
    if slack is not None or ragged:
        keywords = keywords_of(x.shape[1], y.shape[1], len(x), x.device, slack, ragged)
    return ops.dtw_path(x, y, **keywords)


def call_from_cost(cost, slack=None, ragged=False):
    keywords = {}
    if slack is not None or ragged:
        keywords = keywords_of(*cost.shape[1:], len(cost), cost.device, slack, ragged)
    return ops.dtw_path_from_cost(cost, **keywords)


def operator_samples(name):
    def samples(device):
        forward = getattr(torch.ops.jitops, f"{name}_forward").default
        ragged = torch.tensor([[3, 40], [5, 36]], device=device)
        for dtype, lengths, bandwidth in ((torch.float32, None, -1), (torch.float64, ragged, 4)):
            tensors = inputs((2, 40, 37, 3), dtype, device)
            if name == "dtw_path_from_cost":
                tensors = [torch.cdist(*tensors)]
            yield forward, (*tensors, lengths, bandwidth)

    return samples


def description(name, **more):
    return OpUnderTest(
        name=name,
        source="dtw_path",
        shapes=((3, 5, 6, 2), (2, 34, 3, 3), (2, 2, 35, 1), (2, 3, 3, 1)),
        variants=({}, {"slack": 1, "ragged": True}),
        edges=((0, 3, 4, 2), (1, 1, 1, 1), (2, 1, 5, 1), (1, 5, 1, 2)),
        large=(5, 70, 6, 3),
        operator_samples=operator_samples(name),
        **more,
    )


SEQUENCES = description(
    "dtw_path",
    call=call,
    reference=reference,
    names=("x", "y"),
    inputs=inputs,
    launches=lambda dtype, device: (inputs(one, dtype, device) for one in LAUNCHES),
    busy=lambda dtype, device: inputs((32, 512, 512, 8), dtype, device),
    mutations=(
        Mutation(
            "dtw_path.cu",
            "    shared.sums[slot][tile.thread] = sum;\n    __syncthreads();",
            "    shared.sums[slot][tile.thread] = sum;",
            "race in shared memory|read before it was written",
        ),
        Mutation(
            "dtw_path.cu",
            "const int64_t one = n < 2 * count ? path[n + shift] : -1;\n      __syncthreads();",
            "const int64_t one = n < 2 * count ? path[n + shift] : -1;",
            "race in global memory",
        ),
        Mutation(
            "common/warping.cuh",
            "return i < pair.rows && j >= pair.first(i) && j < pair.end(i);",
            "return i < pair.rows && j >= pair.first(i) && j <= pair.end(i);",
            "out of bounds|never written|read before it was written|race in global memory",
        ),
    ),
)
COSTS = description(
    "dtw_path_from_cost",
    call=call_from_cost,
    reference=reference_from_cost,
    names=("cost",),
    inputs=costs,
    launches=lambda dtype, device: (
        costs(one, dtype, device) for one in ((1, 1, 1), (2, 33, 3), (1, 32, 3))
    ),
    busy=lambda dtype, device: costs((32, 512, 512, 8), dtype, device),
    mutations=(
        Mutation(
            "dtw_path.cu",
            "if (tile.thread == tile.threads - 1) kept[j] = sum;",
            "if (tile.thread == tile.threads - 1) kept[j + 1] = sum;",
            "out of bounds|read before it was written",
        ),
    ),
    variation=True,
)


class TestDTWPath(Battery):
    op = SEQUENCES

    def test_worked_by_hand(self, backend, device):
        x = torch.tensor([[0.0], [1.0], [3.0]], device=device)
        y = torch.tensor([[0.0], [0.0], [1.0], [2.0]], device=device)
        found = ops.dtw_path(x, y)
        assert found.path.tolist() == [[0, 0], [0, 1], [1, 2], [2, 3], [-1, -1], [-1, -1]]
        assert found.path_lengths.item() == 4
        assert found.cost.item() == 1

    def test_cost_is_the_limit_of_soft_dtw(self, backend, device):
        x, y = inputs((3, 9, 7, 2), torch.float64, device)
        for bandwidth in (None, 3):
            found = ops.dtw_path(x, y, bandwidth=bandwidth)
            close(found.cost, ops.soft_dtw(x, y, 1e-12, bandwidth=bandwidth), torch.float64)

    @pytest.mark.parametrize("bandwidth", [None, 34, 0])
    def test_paths_of_all_sizes(self, backend, device, bandwidth):
        """They are those of the reference, in float32 too."""
        shapes = ((2, 70, 66, 3), (1, 33, 1, 2), (1, 32, 64, 1))
        for shape in shapes[:1] if backend == "cuda-emulated" else shapes:
            batch, rows, cols, features = shape
            cols = rows if bandwidth == 0 else cols
            x, y = inputs((batch, rows, cols, features), torch.float32, device)
            found = ops.dtw_path(x, y, bandwidth=bandwidth)
            cost = (x.double()[:, :, None] - y.double()[:, None]).square().sum(-1)
            for b, its in enumerate(cost):
                cells = best_path(its, bandwidth)
                assert found.path[b, : len(cells)].tolist() == [list(one) for one in cells]
                assert found.path_lengths[b] == len(cells)
                assert (found.path[b, len(cells) :] == -1).all()

    def test_padding_has_no_influence(self, backend, device):
        """Not even NaN. Its gradient is 0."""
        x, y = inputs((3, 40, 37, 2), torch.float64, device)
        lengths = torch.tensor([[40, 1, 33], [37, 2, 36]], device=device)
        for one, its in zip((x, y), lengths, strict=True):
            for sequence, length in zip(one, its, strict=True):
                sequence[length:] = torch.nan
        x.requires_grad_(), y.requires_grad_()
        for bandwidth in (None, 6):
            keywords = {"bandwidth": bandwidth}
            found = ops.dtw_path(x, y, lengths_x=lengths[0], lengths_y=lengths[1], **keywords)
            grads = torch.autograd.grad(found.cost.sum(), (x, y))
            for b, (n, m) in enumerate(lengths.T.tolist()):
                alone = ops.dtw_path(x[b, :n], y[b, :m], **keywords)
                count = alone.path_lengths
                assert found.path_lengths[b] == count
                assert torch.equal(found.path[b, :count], alone.path[:count])
                close(found.cost[b], alone.cost, torch.float64)
                its = torch.autograd.grad(alone.cost, (x, y))
                for grad, other in zip(grads, its, strict=True):
                    close(grad[b], other[b], torch.float64)

    def test_lengths_that_a_gpu_does_not_wait_for(self, backend, device):
        """A pair whose lengths are wrong has no path, and no other pair is like it."""
        x, y = inputs((3, 4, 6, 2), torch.float32, device)
        lengths = torch.tensor([[4, 0, 2], [6, 0, 3]], device=device)
        ops.dtw_path(x, y)  # loads the library
        name = "dtw_path_definition" if backend == "torch" else "dtw_path_forward"
        path, path_lengths = getattr(torch.ops.jitops, name)(x, y, lengths, -1)
        assert (path_lengths > 0).tolist() == [True, False, True]
        assert (path[1] == -1).all()


class TestDTWPathFromCost(Battery):
    op = COSTS

    def test_equal_sums(self, backend, device):
        """The diagonal comes first, then a step in x, then one in y, from the end."""
        cost = torch.zeros(2, 3, 5, device=device)
        path = ops.dtw_path_from_cost(cost).path
        assert path[0].tolist() == [[0, 0], [0, 1], [0, 2], [1, 3], [2, 4], [-1, -1], [-1, -1]]
        ahead = torch.tensor([[0.0, -1.0], [-1.0, 0.0]], device=device)
        assert ops.dtw_path_from_cost(ahead).path.tolist() == [[0, 0], [0, 1], [1, 1]]

    def test_ties_of_integers(self, backend, device):
        cost = torch.randint(-1, 2, (4, 9, 11), device=device).float()
        for mine, other in zip(
            ops.dtw_path_from_cost(cost), reference_from_cost(cost), strict=True
        ):
            assert torch.equal(mine, other)

    def test_not_a_number_and_infinity(self, backend, device):
        """The path is that of the rule on every back end, and the cost is that of the path."""
        cost = torch.randn(6, 40, 9, dtype=torch.float64, device=device)
        at = torch.arange(6, device=device)
        cost[at, 5 * at, at] = torch.nan
        cost[at, 3 + 4 * at, 8 - at] = torch.inf
        cost[at, 2 + 3 * at, 4] = -torch.inf
        for mine, other in zip(
            ops.dtw_path_from_cost(cost), reference_from_cost(cost), strict=True
        ):
            torch.testing.assert_close(mine, other, equal_nan=True)

    def test_a_path_keeps_to_a_nan_on_the_diagonal_alone(self, backend, device):
        cost = torch.zeros(2, 3, 3, device=device)
        cost[0, 1, 1] = cost[1, 1, 2] = cost[1, 2, 1] = torch.nan
        found = ops.dtw_path_from_cost(cost)
        assert found.path[:, :3].tolist() == [[[0, 0], [1, 1], [2, 2]]] * 2
        assert found.cost.isnan().tolist() == [True, False]

    def test_infinite_costs_forbid(self, backend, device):
        cost = torch.rand(2, 40, 40, dtype=torch.float64, device=device)
        cost[0, 5, :39] = torch.inf
        cost[1, 5] = torch.inf
        found = ops.dtw_path_from_cost(cost)
        assert found.cost.isfinite().tolist() == [True, False]
        assert [5, 39] in found.path[0].tolist()

    def test_the_gradient_is_the_path(self, backend, device):
        cost = torch.randn(2, 7, 8, device=device, requires_grad=True)
        found = ops.dtw_path_from_cost(cost)
        (gradient,) = torch.autograd.grad(found.cost.sum(), cost)
        for b, count in enumerate(found.path_lengths.tolist()):
            assert gradient[b].nonzero().tolist() == found.path[b, :count].tolist()
            assert gradient[b].sum() == count


@pytest.mark.parametrize(("change", "error", "text"), BAD_INPUT)
def test_bad_input(backend, device, change, error, text):
    refused(ops.dtw_path, change, error, text, device)


@pytest.mark.parametrize(("cost", "error", "text"), BAD_COSTS)
def test_bad_costs(backend, device, cost, error, text):
    with pytest.raises(error, match=text):
        ops.dtw_path_from_cost(cost.to(device) if isinstance(cost, torch.Tensor) else cost)


@pytest.mark.cpp
@pytest.mark.thorough
def test_more_elements_than_32_bits_count():
    """Of a band of width 0 in a matrix of which hardly any memory is touched."""
    steps = 46400
    cost = torch.empty(1, steps, steps, dtype=torch.bfloat16)
    cost[0].fill_diagonal_(1)
    with ops.use_backend("cpp"):
        found = ops.dtw_path_from_cost(cost, bandwidth=0)
    assert found.path_lengths.item() == steps
    assert torch.equal(found.path[0, :steps], torch.arange(steps)[:, None].expand(-1, 2))
