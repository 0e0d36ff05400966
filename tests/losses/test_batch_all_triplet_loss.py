"""The batch-all triplet loss: its reference, the battery, and its own tests."""

from __future__ import annotations

import functools
import math

import pytest
import torch

import ops
from ops._core import triplets
from tests.harness.battery import Battery
from tests.harness.op_under_test import Mutation, OpUnderTest, close
from tests.losses.triplets import BAD_INPUT, check_bad_input, distances, inputs, labels_of


def reference(x, y=None, margin=0.2, distance="euclidean", reduction="mean", return_fraction=False):
    """As one writes it, with the tensor of all triplets."""
    d, same, different = distances(x, y, distance)
    triplet = same[:, :, None] & different[:, None, :]
    z = d[:, :, None] - d[:, None, :]
    losses = torch.log1p(torch.exp(-z.abs())) + z.clamp(min=0) if margin == "soft" else z + margin
    active = triplet if margin == "soft" else triplet & (losses > 0)
    loss = torch.where(active, losses, 0.0).sum((1, 2)) + 0 * x.sum(1)
    fraction = active.sum().double() / triplet.sum().clamp(min=1)
    if reduction != "none":
        count = {"mean": active.sum(), "mean_all": triplet.sum(), "sum": 1}[reduction]
        loss = loss.sum() / max(1, int(count))
    return (loss, fraction) if return_fraction else loss


def call(x, y=None, **keywords):
    if y is not None:
        keywords |= {"ref_emb": y, "ref_labels": labels_of(y)}
    return ops.batch_all_triplet_loss(x, labels_of(x), **keywords)


def operator_samples(device):
    for dtype, variants in ((torch.float32, ((0, 0), (1, 1), (2, 2))), (torch.float64, ((1, 1),))):
        x, y = inputs(2)((7, 5), dtype, device)
        for references in ((None, None), (y, labels_of(y))):
            tensors = (x, labels_of(x), *references)
            for reduction, rule in variants:
                parameters = (0.2, False, False, rule, False, reduction)
                forward = torch.ops.jitops.batch_all_triplet_loss_forward.default
                needs = reduction != 0, reduction != 0 and references[0] is not None
                yield forward, (*tensors, *parameters, *needs)
                yield forward, (*tensors, *parameters, False, False)
                loss, _, scale, _, _ = forward(*tensors, *parameters, *needs)
                backward = torch.ops.jitops.batch_all_triplet_loss_backward.default
                for needed in ((True, True), (False, True), (True, False), (False, False)):
                    if references[0] is None and needed[1]:
                        continue
                    yield backward, (torch.ones_like(loss), *tensors, scale, *parameters, *needed)


# Parts of a tile, of a chunk of columns, several tiles.
LAUNCHES = ((1, 3), (33, 17), (64, 33), (65, 34))


def launches(count):
    """With references, negatives in several chunks of 256 candidates too."""

    def make(dtype, device):
        yield from (inputs(count)(one, dtype, device) for one in LAUNCHES)
        if count == 2:
            x, y = inputs(2)((260, 3), dtype, device)
            yield [x[:5], y]

    return make


def launches_of_many(dtype, device):
    """Positives in several chunks too, in one dtype because so many anchors take long."""
    yield from launches(1)(dtype, device)
    if dtype == torch.float32:
        yield inputs(1)((260, 3), dtype, device)


VARIANTS = (
    {},
    {"margin": 1.5, "distance": "squared_euclidean", "reduction": "mean_all"},
    {"margin": "soft", "distance": "cosine", "reduction": "sum"},
    {"margin": 0.7, "reduction": "none"},
)
FILE = "batch_all_triplet_loss.cu"
MUTATIONS = (
    Mutation(
        FILE,
        "if (i >= end || j >= params.others) continue;",
        "if (i >= end) continue;",
        "out of bounds",
    ),
    Mutation(
        FILE,
        "      positives[thread] = found;\n      __syncthreads();",
        "      positives[thread] = found;",
        "shared memory read before it was written",
    ),
    Mutation(
        FILE,
        "      __syncthreads();  // thread 0 has written the slopes of positives\n",
        "",
        "race",
    ),
    Mutation(
        FILE,
        "      __syncthreads();  // the rows before have been read\n",
        "",
        "race in shared memory",
    ),
    Mutation(
        "common/pairs.cuh",
        "inside && j < last ? load",
        "inside ? load",
        "read out of bounds",
    ),
)


def description(count, name, call=call, reference=reference, variants=VARIANTS, **more):
    return OpUnderTest(
        name=name,
        source="batch_all_triplet_loss",
        call=call,
        reference=reference,
        names=("embeddings", "ref_emb")[:count],
        inputs=inputs(count),
        # Small, because a rounding that moves a triplet across the hinge's edge changes a count.
        shapes=((3, 2), (33, 20), (9, 33), (5, 3)),
        variants=variants,
        edges=((0, 4), (4, 0), (0, 0), (1, 4), (1, 1)),
        large=(130, 70),
        busy=lambda dtype, device: inputs(count)((512, 128), dtype, device),
        **{"launches": launches(count), **more},
    )


# Its samples are those of the other descriptions too, because all run the same operators.
ALONE = description(
    1,
    "batch_all_triplet_loss",
    operator_samples=operator_samples,
    launches=launches_of_many,
    mutations=MUTATIONS,
)
WITH_REFERENCES = description(
    2,
    "batch_all_triplet_loss, references",
    variation=True,
    mutations=(
        Mutation(FILE, "other < b.count && k < cols ?", "k < cols ?", "read out of bounds"),
    ),
)


# ---- the semi-hard loss has the same kernels -----------------------------------------------------


def semi_hard_reference(
    x, y=None, margin=0.2, negatives="nearest", distance="euclidean", reduction="mean"
):
    """The same, with the negatives of each positive in a loop."""
    d, same, different = distances(x, y, distance)
    nothing = 0 * x.sum() + (0 if y is None else 0 * y.sum())
    losses, counted = [nothing for _ in x], 0
    for a, p in same.nonzero().tolist():
        others = different[a].nonzero()[:, 0].tolist()
        beyond = [n for n in others if d[a, n] > d[a, p]]
        if negatives == "all":
            taken = [n for n in beyond if d[a, n] < d[a, p] + margin]
        else:
            to = d[a].tolist()
            taken = sorted(beyond or others, key=to.__getitem__, reverse=not beyond)[:1]
        counted += len(taken)
        for n in taken:
            losses[a] = losses[a] + torch.relu(d[a, p] - d[a, n] + margin)
    loss = torch.stack(losses) if losses else nothing + x.sum(1)
    return loss if reduction == "none" else loss.sum() / max(1, counted)


def semi_hard(x, y=None, **keywords):
    if y is not None:
        keywords |= {"ref_emb": y, "ref_labels": labels_of(y)}
    return ops.batch_semi_hard_triplet_loss(x, labels_of(x), **keywords)


SEMI_HARD_VARIANTS = (
    {},
    {"margin": 1.5, "distance": "squared_euclidean", "negatives": "all"},
    {"margin": 0.4, "distance": "cosine", "negatives": "all", "reduction": "none"},
    {"margin": 0.7, "reduction": "none"},
)
SEMI_HARD, SEMI_HARD_WITH_REFERENCES = (
    description(
        count,
        f"batch_semi_hard_triplet_loss{', references' * (count > 1)}",
        call=semi_hard,
        reference=semi_hard_reference,
        variants=SEMI_HARD_VARIANTS,
        mutations=(mutation,),
        variation=count > 1,
    )
    for count, mutation in (
        (
            1,
            Mutation(
                FILE,
                "  __syncthreads();  // the choice before has been read\n",
                "",
                "race in shared memory",
            ),
        ),
        (
            2,
            Mutation(
                FILE,
                "if (thread % cuda::kWarp == 0) shared[thread / cuda::kWarp] = mine;\n"
                "  __syncthreads();",
                "if (thread % cuda::kWarp == 0) shared[thread / cuda::kWarp] = mine;",
                "shared memory read before it was written",
            ),
        ),
    )
)


class TestBatchAllTripletLoss(Battery):
    op = ALONE

    def test_worked_by_hand(self, backend, device):
        """At 0 and 3 of class 0, 1 of class 1: (3 - 1 + .5) + (3 - 2 + .5) are all there is."""
        x = torch.tensor([[0.0], [3.0], [1.0]], device=device, requires_grad=True)
        labels = torch.tensor([0, 0, 1], device=device)
        loss, fraction = ops.batch_all_triplet_loss(x, labels, 0.5, return_fraction=True)
        assert loss.item() == 2.0
        assert fraction.item() == 1.0
        loss.backward()
        assert x.grad.tolist() == [[-0.5], [0.5], [0.0]]

    @pytest.mark.parametrize("reduction", ["mean", "mean_all"])
    def test_mean_and_fraction(self, backend, device, reduction):
        x = torch.randn(20, 3, dtype=torch.float64, device=device)
        loss, fraction = call(x, margin=0.1, reduction=reduction, return_fraction=True)
        expected, part = reference(x, margin=0.1, reduction=reduction, return_fraction=True)
        close(loss, expected, torch.float64)
        close(fraction, part, torch.float64)
        assert 0 < fraction < 1
        assert not fraction.requires_grad

    @pytest.mark.parametrize(("apart", "margin"), [(1e-2, 5.0), (1e-4, 1e-3)])
    def test_near_points_far_from_the_origin(self, backend, device, apart, margin):
        """A product loses the digits of their distances, of the nearer ones even in float64."""
        x = torch.randn(90, 24, dtype=torch.float64, device=device)
        x = (apart * x + 300 * (torch.arange(90, device=device) % 2)[:, None]).float().double()
        mine, theirs = x.float().requires_grad_(), x.clone().requires_grad_()
        loss, expected = call(mine, margin=margin), reference(theirs, margin=margin)
        close(loss, expected.float(), torch.float32)
        (gradient,) = torch.autograd.grad(loss, mine)
        (other,) = torch.autograd.grad(expected, theirs)
        close(gradient, other, torch.float32)

    def test_the_soft_margin_of_far_triplets(self, backend, device):
        """Beyond 20, where torch's softplus returns its argument."""
        x = torch.tensor([[0.0], [22.0], [1.0]], dtype=torch.float64, device=device)
        labels = torch.tensor([0, 0, 1], device=device)
        loss = ops.batch_all_triplet_loss(x, labels, "soft", reduction="none")
        assert abs(loss[0].item() - 21 - math.log1p(math.exp(-21))) < 1e-14

    @pytest.mark.parametrize("margin", [0.2, "soft"])
    def test_equal_embeddings_have_no_gradient(self, backend, device, margin):
        x = torch.ones(6, 4, device=device, requires_grad=True)
        loss = call(x, margin=margin)
        loss.backward()
        assert loss.item() == pytest.approx(0.2 if margin == 0.2 else math.log(2))
        assert not x.grad.any()

    @pytest.mark.parametrize("labels", [[0, 0, 0, 0], [0, 1, 2, 3], [0], []])
    def test_no_triplet(self, backend, device, labels):
        """A single class, no class twice, a single embedding, none."""
        x = torch.randn(len(labels), 3, device=device, requires_grad=True)
        labels = torch.tensor(labels, dtype=torch.int64, device=device)
        loss, fraction = ops.batch_all_triplet_loss(x, labels, return_fraction=True)
        loss.backward()
        assert loss.item() == fraction.item() == 0
        assert not x.grad.any()
        of_each, fraction = ops.batch_all_triplet_loss(
            x, labels, reduction="none", return_fraction=True
        )
        assert of_each.tolist() == [0.0] * len(labels)
        assert fraction.item() == 0

    @pytest.mark.parametrize("margin", [0.2, "soft"])
    def test_nan_stays(self, backend, device, margin):
        x = torch.randn(9, 3, device=device)
        x[4, 1] = torch.nan
        losses = call(x, margin=margin, reduction="none")
        assert losses.isnan().all()

    def test_infinite_distances(self, backend, device):
        """A positive at infinity has infinite losses; a negative there has none."""
        x = torch.tensor([[0.0], [1.0], [1e30], [2.0]], device=device)
        labels = torch.tensor([0, 0, 0, 1], device=device)
        losses = ops.batch_all_triplet_loss(
            x, labels, 0.5, distance="squared_euclidean", reduction="none"
        )
        assert losses.tolist() == [math.inf, math.inf, 0.0, 0.0]

    @pytest.mark.parametrize("margin", [0.2, "soft"])
    def test_all_distances_infinite(self, backend, device, margin):
        """Then no negative has a loss, also in the definition, which torch.vmap runs."""
        x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.5, -1.0]], device=device) * 1e25
        x.requires_grad_()
        loss = functools.partial(
            ops.batch_all_triplet_loss, labels=torch.arange(4, device=device) % 2, margin=margin
        )
        for value in (loss(x), torch.vmap(loss)(x[None])[0]):
            assert value.item() == 0
            assert (torch.autograd.grad(value, x)[0] == 0).all()

    @pytest.mark.parametrize("margin", [math.inf, 1e39])  # both are infinite in float32
    def test_infinite_margin(self, backend, device, margin):
        """All triplets count. Other candidates do not, although infinity minus infinity is NaN."""
        x = torch.randn(9, 3, device=device, requires_grad=True)
        labels = torch.tensor([0, 0, 0, 1, 1, 2, 0, 1, 3], device=device)
        loss, fraction = ops.batch_all_triplet_loss(x, labels, margin, return_fraction=True)
        assert loss.item() == math.inf
        assert fraction.item() == 1
        for infinite, like in (
            (loss, ops.batch_all_triplet_loss(x, labels, 1e3)),
            *(
                [
                    ops.batch_semi_hard_triplet_loss(x, labels, one, negatives=negatives)
                    for one in (margin, 1e3)
                ]
                for negatives in ("nearest", "all")
            ),
        ):
            assert infinite.item() == math.inf
            gradient, expected = (torch.autograd.grad(one, x)[0] for one in (infinite, like))
            close(gradient, expected, torch.float32)

    def test_an_empty_memory_bank(self, backend, device):
        x = torch.randn(4, 3, device=device, requires_grad=True)
        none = torch.empty(0, 3, device=device)
        loss = ops.batch_all_triplet_loss(x, labels_of(x), ref_emb=none, ref_labels=labels_of(none))
        loss.backward()
        assert loss.item() == 0
        assert not x.grad.any()

    def test_several_blocks(self, backend, device, monkeypatch):
        """The pure-torch path takes some anchors at a time."""
        x = torch.randn(40, 3, dtype=torch.float64, device=device, requires_grad=True)
        (whole,) = torch.autograd.grad(call(x), x)
        monkeypatch.setattr(triplets.blocks, "elements_for", lambda tensor: 3 * 40)
        (parts,) = torch.autograd.grad(call(x), x)
        close(parts, whole, torch.float64)


class TestWithReferences(Battery):
    op = WITH_REFERENCES


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        *BAD_INPUT,
        ({"margin": "hard"}, ops.ArgumentError, "margin must be a number or 'soft', got 'hard'"),
        ({"reduction": "avg"}, ops.ArgumentError, "reduction must be one of none, mean, mean_all,"),
    ],
)
def test_bad_input(backend, device, change, error, text):
    check_bad_input(ops.batch_all_triplet_loss, device, change, error, text)


def test_module():
    loss = ops.BatchAllTripletLoss("soft", distance="cosine", reduction="mean_all")
    x = torch.randn(9, 4)
    expected = call(x, margin="soft", distance="cosine", reduction="mean_all")
    assert torch.equal(loss(x, labels_of(x)), expected)
    assert repr(loss) == (
        "BatchAllTripletLoss(margin='soft', distance='cosine', reduction='mean_all', "
        "return_fraction=False)"
    )
    with pytest.raises(ops.ArgumentError, match="reduction must be one of none, mean, mean_all"):
        ops.BatchAllTripletLoss(reduction="max")
