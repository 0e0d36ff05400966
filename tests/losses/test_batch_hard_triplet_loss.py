"""The batch-hard triplet loss: its reference, the battery, and its own tests."""

from __future__ import annotations

import math

import pytest
import torch

import ops
from tests.harness.battery import Battery
from tests.harness.op_under_test import Mutation, OpUnderTest, close
from tests.losses.triplets import BAD_INPUT, check_bad_input, distances, inputs, labels_of


def reference(x, y=None, margin=0.2, distance="euclidean", incomplete="drop", reduction="mean"):
    """As one writes it, with the whole matrix of distances."""
    d, same, different = distances(x, y, distance)
    both = same.any(1) & different.any(1)
    z = 0 * x.sum(1) + (0 if y is None else 0 * y.sum())
    if d.numel():
        hardest = (
            d.masked_fill(~same, -1).argmax(1, True),
            d.masked_fill(~different, torch.inf).argmin(1, True),
        )
        d_pos, d_neg = (torch.gather(d, 1, index)[:, 0] for index in hardest)
        z = z + d_pos - d_neg
    soft = torch.log1p(torch.exp(-z.abs())) + z.clamp(min=0)
    loss = soft if margin == "soft" else torch.relu(z + margin)
    loss = torch.where(both, loss, 0.0)
    if reduction == "mean":
        return loss.sum() / max(1, len(x) if incomplete == "zero" else int(both.sum()))
    return loss.sum() if reduction == "sum" else loss


def call(x, y=None, **keywords):
    if y is not None:
        keywords |= {"ref_emb": y, "ref_labels": labels_of(y)}
    return ops.batch_hard_triplet_loss(x, labels_of(x), **keywords)


def operator_samples(device):
    for dtype, reductions in ((torch.float32, (0, 1, 2)), (torch.float64, (1,))):
        x, y = inputs(2)((7, 5), dtype, device)
        for references in ((None, None), (y, labels_of(y))):
            tensors = (x, labels_of(x), *references)
            for reduction in reductions:
                parameters = (0.2, False, False, False, -1, reduction)
                forward = torch.ops.jitops.batch_hard_triplet_loss_forward.default
                yield forward, (*tensors, *parameters)
                loss, *saved = forward(*tensors, *parameters)
                backward = torch.ops.jitops.batch_hard_triplet_loss_backward.default
                for needed in ((True, True), (False, True), (True, False), (False, False)):
                    if references[0] is None and needed[1]:
                        continue
                    grad = torch.ones_like(loss)
                    yield backward, (grad, *tensors, *saved, *parameters, *needed)


# Parts of a tile, of a chunk of columns, several tiles, several shares of the candidates.
LAUNCHES = ((1, 3), (63, 16), (64, 17), (65, 2), (130, 40), (200, 1))

VARIANTS = (
    {},
    {"margin": 1.5, "distance": "squared_euclidean", "reduction": "sum"},
    {"margin": "soft", "distance": "cosine", "incomplete": "zero"},
    {"margin": 0.7, "reduction": "none"},
)
MUTATIONS = (
    Mutation(
        "common/pairs.cuh",
        "    __syncthreads();  // the chunk before has been read\n",
        "",
        "race in shared memory",
    ),
    Mutation(
        "batch_hard_triplet_loss.cu",
        "      mined[threadIdx.x] = static_cast<unsigned char>(found);\n      __syncthreads();",
        "      mined[threadIdx.x] = static_cast<unsigned char>(found);",
        "shared memory read before it was written",
    ),
)


def description(count, name, **more):
    return OpUnderTest(
        name=name,
        source="batch_hard_triplet_loss",
        call=call,
        reference=reference,
        names=("embeddings", "ref_emb")[:count],
        inputs=inputs(count),
        shapes=((2, 1), (33, 20), (70, 33), (7, 5)),
        variants=VARIANTS,
        edges=((0, 4), (4, 0), (0, 0), (1, 4), (1, 1)),
        large=(300, 130),
        launches=lambda dtype, device: (inputs(count)(one, dtype, device) for one in LAUNCHES),
        busy=lambda dtype, device: inputs(count)((2048, 128), dtype, device),
        **more,
    )


# Its samples have references too.
ALONE = description(
    1, "batch_hard_triplet_loss", operator_samples=operator_samples, mutations=MUTATIONS
)
WITH_REFERENCES = description(
    2,
    "batch_hard_triplet_loss, references",
    variation=True,
    mutations=(
        Mutation(
            "batch_hard_triplet_loss.cu",
            "const bool inside = i < params.rows;",
            "const bool inside = true;",
            "read out of bounds",
        ),
    ),
)


class TestBatchHardTripletLoss(Battery):
    op = ALONE

    def test_worked_by_hand(self, backend, device):
        """At 0 and 3 of class 0, 1 of class 1: (3 - 1) + (3 - 2) + ..., with a margin of 0.5."""
        x = torch.tensor([[0.0], [3.0], [1.0]], device=device, requires_grad=True)
        labels = torch.tensor([0, 0, 1], device=device)
        loss = ops.batch_hard_triplet_loss(x, labels, 0.5, reduction="none")
        assert loss.tolist() == [2.5, 1.5, 0.0]  # the last one has no positive
        loss.sum().backward()
        assert x.grad.tolist() == [[-1.0], [1.0], [0.0]]  # each pair pulls once on either side

    def test_near_points_far_from_the_origin(self, backend, device):
        """A matrix product would lose all digits of these distances."""
        x = torch.randn(90, 24, dtype=torch.float64, device=device)
        x = (0.01 * x + 300 * (torch.arange(90, device=device) % 2)[:, None]).float().double()
        expected = reference(x.clone().requires_grad_())
        mine = x.float().requires_grad_()
        close(call(mine), expected.float(), torch.float32)
        (gradient,) = torch.autograd.grad(call(mine, margin=5.0), mine)
        other = x.clone().requires_grad_()
        (theirs,) = torch.autograd.grad(reference(other, margin=5.0), other)
        close(gradient, theirs, torch.float32)

    def test_of_equal_distances_the_first_counts(self, backend, device):
        x = torch.tensor([[0.0], [2.0], [-2.0], [1.0], [-1.0], [1.0]], device=device)
        x.requires_grad_()
        labels = torch.tensor([0, 0, 0, 1, 1, 1], device=device)
        loss = ops.batch_hard_triplet_loss(x, labels, reduction="none")
        (gradient,) = torch.autograd.grad(loss[0], x)
        assert gradient[:, 0].tolist() == [0.0, 1.0, 0.0, -1.0, 0.0, 0.0]

    def test_the_soft_margin_of_far_triplets(self, backend, device):
        """Beyond 20, where torch's softplus returns its argument."""
        x = torch.tensor([[0.0], [22.0], [1.0]], dtype=torch.float64, device=device)
        labels = torch.tensor([0, 0, 1], device=device)
        loss = ops.batch_hard_triplet_loss(x, labels, "soft", reduction="none")
        assert abs(loss[0].item() - 21 - math.log1p(math.exp(-21))) < 1e-14

    def test_equal_embeddings_have_no_gradient(self, backend, device):
        x = torch.ones(6, 4, device=device, requires_grad=True)
        loss = call(x)
        loss.backward()
        assert loss.item() == pytest.approx(0.2)
        assert not x.grad.any()

    @pytest.mark.parametrize("labels", [[0, 0, 0, 0], [0, 1, 2, 3], [0]])
    @pytest.mark.parametrize("incomplete", ["drop", "zero"])
    def test_no_anchor_counts(self, backend, device, labels, incomplete):
        """A single class, no class twice, a single embedding."""
        x = torch.randn(len(labels), 3, device=device, requires_grad=True)
        loss = ops.batch_hard_triplet_loss(
            x, torch.tensor(labels, device=device), incomplete=incomplete
        )
        loss.backward()
        assert loss.item() == 0
        assert not x.grad.any()

    @pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
    def test_labels_of_any_integer_dtype(self, backend, device, dtype):
        x = torch.randn(9, 3, device=device)
        expected = call(x)
        assert torch.equal(ops.batch_hard_triplet_loss(x, labels_of(x).to(dtype)), expected)

    def test_labels_far_apart(self, backend, device):
        """They are compared as the 64 bits that they are."""
        x = torch.randn(9, 3, device=device)
        far = labels_of(x) * 2**40 - 2**62
        assert torch.equal(ops.batch_hard_triplet_loss(x, far), call(x))

    def test_an_empty_memory_bank(self, backend, device):
        x = torch.randn(4, 3, device=device, requires_grad=True)
        none = torch.empty(0, 3, device=device)
        loss = ops.batch_hard_triplet_loss(
            x, labels_of(x), ref_emb=none, ref_labels=labels_of(none)
        )
        loss.backward()
        assert loss.item() == 0
        assert not x.grad.any()


class TestWithReferences(Battery):
    op = WITH_REFERENCES


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        *BAD_INPUT,
        ({"margin": "hard"}, ops.ArgumentError, "margin must be a number or 'soft', got 'hard'"),
        ({"incomplete": "keep"}, ops.ArgumentError, "incomplete must be one of drop, zero, got 'k"),
        ({"reduction": "avg"}, ops.ArgumentError, "reduction must be one of none, mean, sum, got"),
    ],
)
def test_bad_input(backend, device, change, error, text):
    check_bad_input(ops.batch_hard_triplet_loss, device, change, error, text)


def test_module():
    loss = ops.BatchHardTripletLoss("soft", distance="cosine")
    x = torch.randn(9, 4)
    assert torch.equal(loss(x, labels_of(x)), call(x, margin="soft", distance="cosine"))
    assert repr(loss) == (
        "BatchHardTripletLoss(margin='soft', distance='cosine', incomplete='drop', "
        "reduction='mean')"
    )


@pytest.mark.cpp
@pytest.mark.thorough
def test_more_elements_than_32_bits_count():
    """In 32 candidates, of which hardly any memory is touched. The last one is the nearest."""
    columns = 2**26 + 16
    near = torch.full((33, 16), 5.0).bfloat16()
    near[0], near[1], near[-1] = 1.0, 2.0, 3.0
    x, y = (torch.empty(rows, columns, dtype=torch.bfloat16) for rows in (1, 32))
    x[:, -16:], y[:, -16:] = near[:1], near[1:]
    labels, of_y = torch.tensor([0]), torch.tensor([0] + [1] * 31)
    with ops.use_backend("cpp"), torch.no_grad():
        far, expected = (
            ops.batch_hard_triplet_loss(
                a, labels, 20.0, ref_emb=b, ref_labels=of_y, reduction="none"
            )
            for a, b in ((x, y), (near[:1], near[1:]))
        )
    assert y.numel() > 2**31
    assert expected.item() == 20.0 + 4.0 - 8.0
    assert torch.equal(far, expected)
