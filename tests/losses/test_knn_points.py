"""Nearest neighbours: the battery, and tests of ties, padding, trees and NaN."""

from __future__ import annotations

import itertools

import pytest
import torch

import ops
from tests.harness.battery import Battery
from tests.harness.op_under_test import Mutation, OpUnderTest, applies, close
from tests.losses.clouds import (
    BAD_INPUT,
    bad_lengths,
    check_bad_input,
    inputs,
    lengths_of,
    nearest,
    whole,
)


def call(x, y, ragged=False, **keywords):
    if ragged:
        keywords |= {"lengths1": lengths_of(x), "lengths2": lengths_of(y, 2)}
    found = ops.knn_points(x, y, **keywords)
    return found.dists, found.idx


def reference(x, y, ragged=False, norm=2, K=1):
    of_x, of_y = (lengths_of(x), lengths_of(y, 2)) if ragged else (whole(x), whole(y))
    return nearest(x, y, of_x, of_y, norm, K)


def operator_samples(device):
    for dtype, k, both in ((torch.float32, 1, True), (torch.float64, 3, False)):
        x, y = inputs((2, 7, 9, 5), dtype, device)
        lengths = (lengths_of(x), lengths_of(y, 2)) if both else (None, None)
        forward = torch.ops.jitops.knn_points_forward.default
        yield forward, (x, y, *lengths, k, 2, both)
        dists, idx, dists_back, idx_back = forward(x, y, *lengths, k, 2, both)
        grads = torch.ones_like(dists), torch.ones_like(dists_back) if both else None
        backward = torch.ops.jitops.knn_points_backward.default
        for needed in ((True, True), (False, True)):
            yield backward, (*grads, x, y, *lengths, idx, idx_back, 2, *needed)


# Parts of a tile, several tiles, several chunks of columns, more neighbours than points.
LAUNCHES = ((1, 3, 2, 3), (2, 65, 70, 3), (1, 64, 200, 17), (3, 10, 130, 1))

KNN = OpUnderTest(
    name="knn_points",
    source="knn_points",
    call=call,
    reference=reference,
    names=("p1", "p2"),
    inputs=inputs,
    shapes=((1, 1, 1, 1), (2, 20, 37, 3), (1, 9, 15, 20), (2, 3, 4, 1)),
    variants=({"K": 3}, {"norm": 1}, {"ragged": True, "K": 4}),
    edges=((0, 3, 4, 2), (2, 0, 4, 3), (2, 4, 0, 3), (2, 3, 4, 0), (1, 1, 1, 1)),
    large=(2, 300, 400, 3),
    operator_samples=operator_samples,
    launches=lambda dtype, device: (inputs(one, dtype, device) for one in LAUNCHES),
    busy=lambda dtype, device: inputs((4, 4096, 4096, 3), dtype, device),
    mutations=(
        Mutation(
            "knn_points.cu",
            "        __syncthreads();  // the chunk before has been read\n",
            "",
            "race in shared memory",
        ),
        Mutation(
            "knn_points.cu",
            "theirs[at][row] = j < end ?",
            "theirs[at][row] = true ?",
            "read out of bounds",
        ),
    ),
)


class TestKnnPoints(Battery):
    op = KNN

    def test_worked_by_hand(self, backend, device):
        p1 = torch.tensor([[[0.0, 0.0], [3.0, 1.0]]], device=device, requires_grad=True)
        p2 = torch.tensor([[[3.0, 0.0], [1.0, 0.0], [0.0, 5.0]]], device=device, requires_grad=True)
        found = ops.knn_points(p1, p2, K=2, return_nn=True)
        assert found.dists.tolist() == [[[1.0, 9.0], [1.0, 5.0]]]
        assert found.idx.tolist() == [[[1, 0], [0, 1]]]
        assert torch.equal(found.knn[0], p2[0][found.idx[0]])
        found.dists.sum().backward()
        assert p1.grad.tolist() == [[[-8.0, 0.0], [4.0, 4.0]]]
        assert p2.grad.tolist() == [[[6.0, -2.0], [-2.0, -2.0], [0.0, 0.0]]]

    def test_of_equal_distances_the_lowest_index_comes_first(self, backend, device):
        """Also in trees and sweeps over several blocks, and for many duplicates."""
        count = 1100 if backend == "cpp" else 50
        for columns in (1, 2):
            x = torch.randint(3, (1, count, columns), device=device).float()
            y = torch.randint(4, (1, count, columns), device=device).float()
            for k in (1, 4):
                expected = nearest(x, y, whole(x), whole(y), 2, k)
                for one, other in zip(call(x, y, K=k), expected, strict=True):
                    assert torch.equal(one, other)

    def test_fewer_points_than_neighbours(self, backend, device):
        """The rest is 0, as the neighbours of padding are."""
        x, y = (torch.randn(2, count, 3, device=device) for count in (4, 2))
        lengths = torch.tensor([4, 1], device=device)
        found = ops.knn_points(x, y, lengths1=lengths, lengths2=lengths.clamp(max=2), K=3,
                               return_nn=True)  # fmt: skip
        real = torch.tensor([4, 1], device=device)[:, None] > torch.arange(4, device=device)
        neighbours = torch.tensor([2, 1], device=device)[:, None] > torch.arange(3, device=device)
        within = real[:, :, None] & neighbours[:, None]
        assert torch.equal(found.dists != 0, within)
        assert not found.idx[~within].any()
        assert torch.equal((found.knn != 0).all(-1), within)

    def test_gradient_of_the_neighbours_themselves(self, backend, device):
        x, y = (torch.randn(2, count, 3, device=device, requires_grad=True) for count in (4, 5))
        found = ops.knn_points(x, y, K=2, return_nn=True)
        found.knn.sum().backward()
        counts = torch.stack([one.flatten().bincount(minlength=5) for one in found.idx])
        assert torch.equal(y.grad, counts[..., None].expand(2, 5, 3).float())

    def test_nan_and_infinity_are_far(self, backend, device):
        """Such points are last, the lowest index first; a point with NaN has NaN distances."""
        count = 600 if backend == "cpp" else 50  # a tree there
        y = torch.randn(1, count, 3, device=device)
        y[0, 1, 2], y[0, 3, 0] = torch.nan, torch.inf
        x = torch.randn(1, count, 3, device=device)
        x[0, 1, 1], x[0, 2, 0] = torch.nan, torch.inf
        dists, idx = call(x, y, K=2)
        expected, order = nearest(x, y, whole(x), whole(y), 2, 2)
        assert torch.equal(idx, order)
        torch.testing.assert_close(dists, expected, equal_nan=True)
        assert idx[0, 1].tolist() == [0, 1]
        dists, idx = call(x[:, :1], y[:, :4], K=4)
        assert idx[0, 0, 2:].tolist() == [1, 3]
        assert dists[0, 0, 2].isnan()
        assert dists[0, 0, 3] == torch.inf

    def test_near_points_far_from_the_origin(self, backend, device):
        """A matrix product would choose other neighbours, in two groups even without the mean."""
        sides = 1 - 2 * (torch.arange(60, device=device) % 2)[:, None]
        for columns, centre in itertools.product((3, 24, 120), (1000, 1000 * sides)):
            x, y = (centre + 0.01 * torch.randn(1, 60, columns, device=device) for _ in range(2))
            dists, idx = call(x, y, K=2)
            expected, order = nearest(x.double(), y.double(), whole(x), whole(y), 2, 2)
            assert torch.equal(idx, order)
            close(dists, expected.float(), torch.float32)

    def test_candidates_of_products(self, backend, device):
        """Duplicates, products that overflow, NaN and infinity: compared as elsewhere."""
        for columns in (20, 120):
            y = torch.randn(1, 7, columns, device=device).repeat(1, 6, 1)
            x = y[:, :7] + 0.01 * torch.randn(1, 7, columns, device=device)
            for change in (0.0, 1e30, torch.inf, torch.nan):
                y[0, 3] += change
                x[0, 5, 1] += change
                dists, idx = call(x, y, K=3)
                expected, order = nearest(x, y, whole(x), whole(y), 2, 3)
                assert torch.equal(idx, order)
                torch.testing.assert_close(dists, expected, equal_nan=True)
                y[0, 3], x[0, 5] = y[0, 10], y[0, 5]

    # The other back ends have one algorithm for all sizes.
    @applies(lambda op, backend: backend == "cpp")
    @pytest.mark.parametrize(
        ("shape", "norm", "k"),
        [
            ((1, 1030, 1100, 1), 2, 1),
            ((2, 520, 530, 3), 1, 2),
            ((1, 600, 700, 2), 2, 32),
            ((1, 150, 400, 40), 1, 3),
            ((2, 100, 300, 97), 2, 3),
            ((2, 193, 400, 9), 2, 2),
        ],
    )
    def test_trees_and_sweeps(self, backend, device, shape, norm, k):
        """Of clusters, with parts of blocks and of leaves, in float32 and float64."""
        for dtype in (torch.float32, torch.float64):
            x, y = inputs(shape, dtype, device)
            y[:, ::3] = 0.01 * y[:, ::3] + 2
            lengths = [torch.tensor([t.shape[1] - b for b in range(len(t))], device=device)
                       for t in (x, y)]  # fmt: skip
            dists, idx = ops.knn_points(x, y, *lengths, norm=norm, K=k)[:2]
            expected, order = nearest(x.double(), y.double(), *lengths, norm, k)
            close(dists, expected.to(dtype), dtype)
            assert (idx != order).float().mean() < 1e-3  # distances that are equal when rounded

    @pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
    def test_lengths_of_any_integer_dtype(self, backend, device, dtype):
        x, y = inputs((3, 5, 6, 2), torch.float32, device)
        expected = ops.knn_points(x, y, lengths2=lengths_of(y), K=2)
        found = ops.knn_points(x, y, lengths2=lengths_of(y).to(dtype), K=2)
        assert torch.equal(found.idx, expected.idx)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        *BAD_INPUT,
        *bad_lengths("lengths1"),
        *bad_lengths("lengths2"),
        ({"K": 0}, ops.ArgumentError, "K must be at least 1, got 0"),
        ({"K": 33}, ops.ArgumentError, "K must be at most 32, got 33"),
        ({"K": True}, ops.ArgumentTypeError, "K must be an int, got bool"),
    ],
)
def test_bad_input(backend, device, change, error, text):
    check_bad_input(ops.knn_points, ("p1", "p2"), device, change, error, text)


@pytest.mark.cpp
@pytest.mark.thorough
def test_more_elements_than_32_bits_count():
    """Two clouds of which hardly any memory is touched: the last points of the last cloud."""
    stride = 2**31 // 64
    memory = torch.empty(66 * stride, dtype=torch.bfloat16)
    y = memory.as_strided((1, 66, 3), (0, stride, 1))
    y.copy_(torch.arange(66.0)[None, :, None].expand(1, 66, 3))
    x = torch.tensor([[[64.9, 65.0, 65.0], [0.0, 1.0, 0.0]]]).bfloat16()
    with ops.use_backend("cpp"):
        found = ops.knn_points(x, y, K=2)
    assert (found.idx == torch.tensor([[[65, 64], [0, 1]]])).all()
