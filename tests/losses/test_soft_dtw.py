"""Soft-DTW: its reference, the battery, and its own tests."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import ops
from tests.harness.battery import Battery
from tests.harness.op_under_test import Mutation, OpUnderTest, close, leaves
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


def recursion(cost, gamma=1.0, bandwidth=None, lengths=None):
    """The recursion cell by cell, for a batch of costs."""
    batch, rows, cols = cost.shape
    r = {(-1, -1): cost.new_zeros(batch)}
    for i, j in itertools.product(range(rows), range(cols)):
        if bandwidth is not None and abs(i - j) > bandwidth:
            continue
        before = [r[one] for one in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if one in r]
        if before:
            r[i, j] = cost[:, i, j] - gamma * torch.logsumexp(-torch.stack(before) / gamma, 0)
    ends = [(rows, cols)] * batch if lengths is None else zip(*lengths, strict=True)
    last = [r[int(n) - 1, int(m) - 1][b] for b, (n, m) in enumerate(ends)]
    return torch.stack(last) if last else cost.sum((1, 2))


def reference(x, y, gamma=1.0, slack=None, normalize=False, ragged=False):
    bandwidth = band(x.shape[1], y.shape[1], slack)
    lengths = ragged_lengths(x.shape[1], y.shape[1], len(x)) if ragged else None

    def loss(a, b, first, second):
        its = None if lengths is None else (lengths[first], lengths[second])
        return recursion((a[:, :, None] - b[:, None]).square().sum(-1), gamma, bandwidth, its)

    value = loss(x, y, 0, 1)
    return value - (loss(x, x, 0, 0) + loss(y, y, 1, 1)) / 2 if normalize else value


def reference_from_cost(cost, gamma=1.0, slack=None, ragged=False):
    lengths = ragged_lengths(*cost.shape[1:], len(cost)) if ragged else None
    return recursion(cost, gamma, band(*cost.shape[1:], slack), lengths)


def call(x, y, slack=None, ragged=False, **keywords):
    if slack is not None or ragged:
        shape = x.shape[1], y.shape[1], len(x)
        keywords |= keywords_of(*shape, x.device, slack, ragged)
    return ops.soft_dtw(x, y, **keywords)


def call_from_cost(cost, slack=None, ragged=False, **keywords):
    if slack is not None or ragged:
        keywords |= keywords_of(*cost.shape[1:], len(cost), cost.device, slack, ragged)
    return ops.soft_dtw_from_cost(cost, **keywords)


def operator_samples(name):
    def samples(device):
        forward = getattr(torch.ops.jitops, f"{name}_forward").default
        backward = getattr(torch.ops.jitops, f"{name}_backward").default
        ragged = torch.tensor([[3, 40], [5, 36]], device=device)
        for dtype, lengths, bandwidth in ((torch.float32, None, -1), (torch.float64, ragged, 4)):
            tensors = inputs((2, 40, 37, 3), dtype, device)
            if name == "soft_dtw_from_cost":
                tensors = [torch.cdist(*tensors)]
            arguments = (*tensors, lengths, 0.5, bandwidth)
            yield forward, arguments
            saved = forward(*arguments)
            grad = torch.ones_like(saved[0])
            for needed in ((True, True), (False, True), (False, False)):
                kept = (*saved, 0.5, bandwidth, *needed[: len(tensors)])
                yield backward, (grad, *tensors, lengths, *kept)

    return samples


MUTATIONS = (
    Mutation(
        "soft_dtw.cu",
        "    shared.exponents[slot][tile.thread] = cell.exponent;\n    __syncthreads();\n  }\n}",
        "    shared.exponents[slot][tile.thread] = cell.exponent;\n  }\n}",
        "race in shared memory|shared memory read before it was written",
    ),
    Mutation(
        "soft_dtw.cu",
        "    diagonals[slot][tile.thread] = diagonal;\n    __syncthreads();",
        "    diagonals[slot][tile.thread] = diagonal;",
        "race in shared memory|shared memory read before it was written",
    ),
    Mutation(
        "common/warping.cuh",
        "return i < pair.rows && j >= pair.first(i) && j < pair.end(i);",
        "return i < pair.rows && j >= pair.first(i) && j <= pair.end(i);",
        "out of bounds|never written|read before it was written|race in global memory",
    ),
    Mutation(
        "soft_dtw.cu",
        "const bool keeps = !kWeighs && (tile.i + 1) % kStripRows == 0 && tile.i + 1 < pair.rows;",
        "const bool keeps = !kWeighs && tile.i % kStripRows == 0 && tile.i + 1 < pair.rows;",
        "read before it was written|out of bounds",
    ),
)


def description(name, **more):
    return OpUnderTest(
        name=name,
        source="soft_dtw",
        shapes=((3, 5, 6, 2), (2, 34, 3, 3), (2, 2, 35, 1), (2, 3, 3, 1)),
        edges=((0, 3, 4, 2), (1, 1, 1, 1), (2, 1, 5, 1), (1, 5, 1, 2)),
        large=(5, 70, 6, 3),
        operator_samples=operator_samples(name),
        **more,
    )


SEQUENCES = description(
    "soft_dtw",
    call=call,
    reference=reference,
    names=("x", "y"),
    inputs=inputs,
    variants=(
        {},
        {"gamma": 2.0, "ragged": True, "normalize": True},
        {"gamma": 0.3, "slack": 1},
    ),
    module=ops.SoftDTW,
    launches=lambda dtype, device: (inputs(one, dtype, device) for one in LAUNCHES),
    busy=lambda dtype, device: inputs((32, 512, 512, 8), dtype, device),
    mutations=MUTATIONS,
)
COSTS = description(
    "soft_dtw_from_cost",
    call=call_from_cost,
    reference=reference_from_cost,
    names=("cost",),
    inputs=costs,
    variants=({}, {"gamma": 0.3, "slack": 1, "ragged": True}),
    launches=lambda dtype, device: (
        costs(one, dtype, device) for one in ((1, 1, 1), (2, 33, 3), (1, 70, 2))
    ),
    busy=lambda dtype, device: costs((32, 512, 512, 8), dtype, device),
    mutations=(
        Mutation(
            "soft_dtw.cu",
            "if (k < params.cols) scratch.flow[k] = up + last_diagonal;",
            "scratch.flow[k] = up + last_diagonal;",
            "out of bounds",
        ),
    ),
    variation=True,
)


class TestSoftDTW(Battery):
    op = SEQUENCES

    def test_worked_by_hand(self, backend, device):
        """Costs 0 and 1, three paths that end in the last cell: −log(e⁻¹ + e⁻¹ + 1)."""
        x = torch.tensor([[0.0], [1.0]], device=device)
        value = ops.soft_dtw(x, x)
        assert value.item() == pytest.approx(-math.log(1 + 2 * math.exp(-1)), rel=1e-6)

    @pytest.mark.parametrize(
        ("steps", "features", "gamma", "factor"),
        [(40, 8, 0.01, 1), (70, 64, 0.1, 3)],
    )
    def test_float32_gradients(self, backend, device, steps, features, gamma, factor):
        """Where differences of the costs of paths would lose all digits."""
        narrow = [factor * x for x in inputs((1, steps, steps, features), torch.float32, device)]
        mine, theirs = leaves(narrow), leaves([x.double() for x in narrow])
        with ops.use_backend("torch"):
            expected = torch.autograd.grad(ops.soft_dtw(*theirs, gamma).sum(), theirs)
        found = torch.autograd.grad(ops.soft_dtw(*mine, gamma).sum(), mine)
        for one, other in zip(found, expected, strict=True):
            assert (one - other).abs().max() < 1e-5 * other.abs().max()

    @pytest.mark.parametrize("gamma", [1e-3, 1e-30, 1e-280])
    def test_small_gamma_is_dtw(self, backend, device, gamma):
        x, y = inputs((3, 6, 5, 2), torch.float64, device)
        cost = (x[:, :, None] - y[:, None]).square().sum(-1)
        best = cost.new_full((3, 7, 6), torch.inf)
        best[:, 0, 0] = 0
        for i, j in itertools.product(range(6), range(5)):
            before = torch.stack((best[:, i, j], best[:, i, j + 1], best[:, i + 1, j])).amin(0)
            best[:, i + 1, j + 1] = cost[:, i, j] + before
        close(ops.soft_dtw(x, y, gamma), best[:, -1, -1], torch.float64)

    def test_padding_has_no_influence(self, backend, device):
        """Not even NaN. Its gradient is 0."""
        x, y = inputs((3, 40, 37, 2), torch.float64, device)
        lengths = torch.tensor([[40, 1, 33], [37, 2, 36]], device=device)
        for one, its in zip((x, y), lengths, strict=True):
            for sequence, length in zip(one, its, strict=True):
                sequence[length:] = torch.nan
        x.requires_grad_(), y.requires_grad_()
        for keywords in ({}, {"bandwidth": 6}, {"normalize": True}):
            value = ops.soft_dtw(x, y, lengths_x=lengths[0], lengths_y=lengths[1], **keywords)
            grads = torch.autograd.grad(value.sum(), (x, y))
            for b, (n, m) in enumerate(lengths.T.tolist()):
                alone = ops.soft_dtw(x[b, :n], y[b, :m], **keywords)
                close(value[b], alone, torch.float64)
                its = torch.autograd.grad(alone, (x, y))
                for grad, other in zip(grads, its, strict=True):
                    close(grad[b], other[b], torch.float64)
            for grad, its in zip(grads, lengths, strict=True):
                for one, length in zip(grad, its, strict=True):
                    assert not one[length:].any()

    def test_padding_of_a_pair_with_nan(self, backend, device):
        """Its gradient is 0, because padding has no influence."""
        x, y = leaves(inputs((1, 9, 7, 2), torch.float32, device))
        with torch.no_grad():
            x[0, 0, 1] = torch.nan
        lengths = (torch.tensor([n], device=device) for n in (6, 5))
        for name, value in zip(("lengths_x", "lengths_y"), lengths, strict=True):
            grads = torch.autograd.grad(ops.soft_dtw(x, y, **{name: value}), (x, y))
            for grad, padded in zip(grads, (name == "lengths_x", name == "lengths_y"), strict=True):
                length = int(value) if padded else grad.shape[1]
                assert grad[:, :length].isnan().all()
                assert not grad[:, length:].any()

    @pytest.mark.parametrize(("rows", "cols"), [(3, 40), (40, 3), (1, 35), (35, 2)])
    @pytest.mark.parametrize("bandwidth", [0, 1, 2])
    def test_a_band_that_ends_before_the_padding(self, backend, device, rows, cols, bandwidth):
        """It fits all lengths, but not the last cell of the padded matrix."""
        x, y = leaves(inputs((2, rows, cols, 2), torch.float64, device))
        lengths = torch.tensor([min(rows, cols), 1], device=device)
        value = ops.soft_dtw(x, y, lengths_x=lengths, lengths_y=lengths, bandwidth=bandwidth)
        grads = torch.autograd.grad(value.sum(), (x, y))
        expected = [
            ops.soft_dtw(x[b, :n], y[b, :n], bandwidth=bandwidth)
            for b, n in enumerate(lengths.tolist())
        ]
        close(value, torch.stack(expected), torch.float64)
        for one, other in zip(grads, torch.autograd.grad(sum(expected), (x, y)), strict=True):
            close(one, other, torch.float64)

    def test_nan_in_a_sequence(self, backend, device):
        """It makes its own pair NaN, the value and all gradients, and no other pair."""
        x, y = leaves(inputs((2, 35, 5, 2), torch.float32, device))
        with torch.no_grad():
            x[0, 20, 1] = torch.nan
        value = ops.soft_dtw(x, y)
        value.sum().backward()
        assert value.isnan().tolist() == [True, False]
        for grad in (x.grad, y.grad):
            assert grad[0].isnan().all()
            assert grad[1].isfinite().all()

    def test_a_band_wider_than_any_sequence(self, backend, device):
        x, y = inputs((1, 4, 5, 3), torch.float64, device)
        assert torch.equal(ops.soft_dtw(x, y, bandwidth=10**30), ops.soft_dtw(x, y))

    def test_single_sequences(self, backend, device):
        x, y = inputs((1, 4, 5, 3), torch.float64, device)
        assert torch.equal(ops.soft_dtw(x[0], y[0]), ops.soft_dtw(x, y)[0])

    def test_divergence(self, backend, device):
        """It is 0 for equal sequences and positive for others, also of other lengths."""
        x, y = inputs((2, 6, 4, 3), torch.float32, device)
        assert (ops.soft_dtw(x, x, normalize=True).abs() < 1e-6).all()
        assert (ops.soft_dtw(x, y, normalize=True) > 0).all()

    def test_divergence_of_near_sequences_in_float32(self, backend, device):
        """Rounded values would lose all digits of their difference."""
        x = 100 * torch.randn(1, 40, 3, device=device)
        y = x + 0.01 * torch.randn_like(x)
        value = ops.soft_dtw(x, y, normalize=True)
        expected = ops.soft_dtw(x.double(), y.double(), normalize=True)
        assert abs(value.item() - expected.item()) < 1e-3 * expected.item()

    @pytest.mark.parametrize(("rows", "cols"), [(1, 200), (90, 90)])
    def test_small_costs_in_float32(self, backend, device, rows, cols):
        """Weights in float32 leave an error in the value that γ and the number of steps bound."""
        x, y = (1e-3 * one for one in inputs((2, rows, cols, 2), torch.float32, device))
        bandwidth = 0 if rows == cols else None
        value = ops.soft_dtw(x, y, bandwidth=bandwidth)
        exact = ops.soft_dtw(x.double(), y.double(), bandwidth=bandwidth)
        assert (value - exact).abs().max() < 1e-7 * (rows + cols)

    def test_far_from_the_origin(self, backend, device):
        """Costs are differences, so a common offset changes nothing."""
        x, y = (x.round(decimals=1) for x in inputs((2, 9, 8, 3), torch.float64, device))
        close(ops.soft_dtw(x + 2.0**20, y + 2.0**20), ops.soft_dtw(x, y), torch.float32)


class TestSoftDTWFromCost(Battery):
    op = COSTS

    def test_infinite_costs_forbid(self, backend, device):
        cost = torch.rand(2, 40, 40, dtype=torch.float64, device=device)
        cost[0, 5, :39] = torch.inf
        cost[1, 5] = torch.inf
        cost.requires_grad_()
        value = ops.soft_dtw_from_cost(cost)
        value.sum().backward()
        assert value.isfinite().tolist() == [True, False]
        assert value[1].item() == math.inf
        assert cost.grad[0, 5, 39].item() == pytest.approx(1)
        assert not cost.grad[0, 5, :39].any()
        assert cost.grad[1].isnan().all()

    @pytest.mark.parametrize("bandwidth", [None, 1])
    def test_derivatives_of_costs_that_are_not_finite(self, backend, device, bandwidth):
        """Gradients that can be differentiated are those of the kernels, also where NaN."""
        cost = torch.rand(5, 4, 4, dtype=torch.float64, device=device)
        cost[0, 1, 2] = torch.nan
        cost[1, 1, 1] = -torch.inf
        cost[2, 2] = torch.inf
        cost[3, 2, 1] = torch.inf  # has no influence
        cost[4, 0, 3] = torch.nan  # outside of the band, if there is one
        cost.requires_grad_()
        value = ops.soft_dtw_from_cost(cost, 0.5, bandwidth=bandwidth)
        (expected,) = torch.autograd.grad(value.sum(), cost, retain_graph=True)
        (found,) = torch.autograd.grad(value.sum(), cost, create_graph=True)
        assert torch.equal(found.isnan(), expected.isnan())
        assert found[:3].isnan().any(2).any(1).all()
        close(found[3], expected[3], torch.float64)
        (second,) = torch.autograd.grad(found[3].square().sum(), cost)
        assert second[3].isfinite().all()
        assert second[3].any()

    def test_the_gradient_is_the_alignment(self, backend, device):
        x, y = inputs((2, 7, 8, 3), torch.float64, device)
        lengths = {"lengths_x": torch.tensor([7, 4]), "lengths_y": torch.tensor([8, 5])}
        lengths = {name: one.to(device) for name, one in lengths.items()}
        cost = (x[:, :, None] - y[:, None]).square().sum(-1).requires_grad_()
        value = ops.soft_dtw_from_cost(cost, 0.7, bandwidth=3, **lengths)
        (expected,) = torch.autograd.grad(value.sum(), cost)
        found = ops.soft_dtw_alignment(x, y, 0.7, bandwidth=3, **lengths)
        close(found, expected, torch.float64)
        assert not found.requires_grad
        close(ops.soft_dtw_alignment(x[0], y[0], 0.7), ops.soft_dtw_alignment(x, y, 0.7)[0],
              torch.float64)  # fmt: skip
        assert found[1].sum(1).nonzero().numel() == 4

    def test_the_alignment_is_differentiable(self, backend, device):
        x, y = leaves(inputs((1, 3, 4, 2), torch.float64, device))
        assert torch.autograd.gradcheck(lambda *t: ops.soft_dtw_alignment(*t, 0.7), (x, y))

    def test_the_alignment_in_transforms(self, backend, device):
        x, y = inputs((2, 4, 3, 2), torch.float64, device)
        tangents = [torch.randn_like(one) for one in (x, y)]

        def alignment(x, y):
            return ops.soft_dtw_alignment(x, y, 0.7)

        expected = alignment(x, y)
        close(torch.vmap(alignment)(x, y), expected, torch.float64)
        value, tangent = torch.func.jvp(alignment, (x, y), tuple(tangents))
        close(value, expected, torch.float64)
        ahead = alignment(*(one + 1e-6 * t for one, t in zip((x, y), tangents, strict=True)))
        assert (tangent - (ahead - expected) / 1e-6).abs().max() < 1e-4
        with torch.autograd.forward_ad.dual_level():
            dual = [
                torch.autograd.forward_ad.make_dual(*both)
                for both in zip((x, y), tangents, strict=True)
            ]
            found = torch.autograd.forward_ad.unpack_dual(alignment(*dual)).tangent
        close(found, tangent, torch.float64)

    def test_the_alignment_in_inference_mode(self, backend, device):
        x, y = inputs((2, 4, 3, 2), torch.float64, device)
        lengths = torch.tensor([4, 3], device=device)
        expected = ops.soft_dtw_alignment(x, y, lengths_x=lengths)
        with torch.inference_mode():
            for its in ((x, y, lengths), (x.clone(), y.clone(), lengths.clone())):
                found = ops.soft_dtw_alignment(*its[:2], lengths_x=its[2])
                assert torch.equal(found, expected)

    def test_the_alignment_in_a_graph(self, backend, device):
        x, y = leaves(inputs((2, 4, 3, 2), torch.float64, device))
        torch.compiler.reset()
        compiled = torch.compile(ops.soft_dtw_alignment, fullgraph=True, backend="aot_eager")
        found, expected = compiled(x, y), ops.soft_dtw_alignment(x, y)
        close(found, expected, torch.float64)
        pairs = (torch.autograd.grad(one.square().sum(), (x, y)) for one in (found, expected))
        for one, other in zip(*pairs, strict=True):
            close(one, other, torch.float64)

    def test_the_padding_of_costs_with_nan(self, backend, device):
        cost = torch.rand(1, 9, 7, device=device).requires_grad_()
        with torch.no_grad():
            cost[0, 0, 1] = torch.nan
        lengths = {"lengths_x": torch.tensor([6]), "lengths_y": torch.tensor([5])}
        ops.soft_dtw_from_cost(cost, **lengths).backward()
        assert cost.grad[0, :6, :5].isnan().all()
        assert not cost.grad[0, 6:].any()
        assert not cost.grad[0, :, 5:].any()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        *BAD_INPUT,
        ({"gamma": 0}, ops.ArgumentError, "gamma must be a finite number greater than 0, got 0.0"),
        ({"gamma": math.inf}, ops.ArgumentError, "gamma must be a finite number greater than 0"),
        ({"gamma": "1"}, ops.ArgumentTypeError, "gamma must be a real number, got str"),
    ],
)
def test_bad_input(backend, device, change, error, text):
    refused(ops.soft_dtw, change, error, text, device)


@pytest.mark.parametrize(("cost", "error", "text"), BAD_COSTS)
def test_bad_costs(backend, device, cost, error, text):
    with pytest.raises(error, match=text):
        ops.soft_dtw_from_cost(cost.to(device) if isinstance(cost, torch.Tensor) else cost)


def test_module():
    loss = ops.SoftDTW(0.5, bandwidth=3, normalize=True)
    x, y = inputs((2, 4, 5, 3), torch.float32, "cpu")
    assert torch.equal(loss(x, y), ops.soft_dtw(x, y, 0.5, bandwidth=3, normalize=True))
    lengths = torch.tensor([4, 2]), torch.tensor([5, 3])
    expected = ops.soft_dtw(x, y, lengths_x=lengths[0], lengths_y=lengths[1])
    assert torch.equal(ops.SoftDTW()(x, y, *lengths), expected)
    assert repr(loss) == "SoftDTW(gamma=0.5, bandwidth=3, normalize=True)"
    with pytest.raises(ops.ArgumentError, match="gamma must be a finite number greater than 0"):
        ops.SoftDTW(0.0)


@pytest.mark.cpp
@pytest.mark.thorough
def test_more_elements_than_32_bits_count():
    """Of a band of width 0 in a matrix of which hardly any memory is touched."""
    steps = 46400
    cost = torch.empty(1, steps, steps, dtype=torch.bfloat16)
    cost[0].fill_diagonal_(1)
    assert cost.numel() > 2**31
    with ops.use_backend("cpp"), torch.no_grad():
        value = ops.soft_dtw_from_cost(cost, bandwidth=0)
    assert value.item() == torch.tensor(float(steps)).bfloat16().item()
