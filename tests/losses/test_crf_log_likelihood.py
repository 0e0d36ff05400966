"""The conditional random field: its reference, the battery, and its own tests."""

from __future__ import annotations

import itertools

import pytest
import torch

import ops
from ops._core import crf
from tests.harness.battery import Battery
from tests.harness.op_under_test import Mutation, OpUnderTest, applies, close, leaves


def lengths_of(steps, batch):
    return torch.tensor([steps - b * 3 % steps for b in range(batch)], dtype=torch.int64)


def tags_of(emissions):
    """Tags for emissions (T, B, K)."""
    steps, batch, labels = emissions.shape
    tags = torch.arange(steps)[:, None] ** 2 + 2 * torch.arange(batch)
    return (tags % labels).to(emissions.device)


def mask_of(emissions):
    steps, batch, _ = emissions.shape
    return (torch.arange(steps)[:, None] < lengths_of(steps, batch)).to(emissions.device)


def log_likelihood(emissions, tags, transitions, start, end):
    """Of one sequence, (T, K)."""
    score = start[tags[0]] + emissions[0, tags[0]]
    a = start + emissions[0]
    for t in range(1, len(tags)):
        score = score + transitions[tags[t - 1], tags[t]] + emissions[t, tags[t]]
        a = torch.logsumexp(a[:, None] + transitions, 0) + emissions[t]
    return score + end[tags[-1]] - torch.logsumexp(a + end, 0)


def without_a_pair(transitions):
    """Tag 0 behind tag 0 is forbidden. ``tags_of`` has no such pair."""
    pair = torch.zeros_like(transitions, dtype=torch.bool)
    pair[:1, :1] = len(transitions) > 1
    return transitions.masked_fill(pair, -torch.inf)


def reference(emissions, transitions, start, end, ragged=False, reduction="sum", forbids=False):
    steps, batch, _ = emissions.shape
    lengths = lengths_of(steps, batch) if ragged else torch.full((batch,), steps)
    tags = tags_of(emissions)
    allowed = without_a_pair(transitions) if forbids else transitions
    found = [
        log_likelihood(emissions[:n, b], tags[:n, b], allowed, start, end)
        for b, n in enumerate(lengths.tolist())
    ]
    value = torch.stack(found) if found else emissions.sum((0, 2))
    for one in (transitions, start, end):
        value = value + 0 * one.sum()
    if reduction == "none":
        return value
    return value.sum() / {"sum": 1, "mean": batch, "token_mean": lengths.sum()}[reduction]


def call(emissions, transitions, start, end, ragged=False, reduction="sum", forbids=False):
    if not isinstance(emissions, torch.Tensor) or emissions.is_nested or emissions.is_sparse:
        tags, mask = torch.zeros(1, 1), None
    else:
        tags, mask = tags_of(emissions), mask_of(emissions) if ragged else None
    transitions = without_a_pair(transitions) if forbids else transitions
    return ops.crf_log_likelihood(emissions, tags, transitions, start, end, mask, reduction)


def inputs(shape, dtype, device):
    """Emissions and parameters, for a shape (T, B, K)."""
    labels = shape[2]
    shapes = (shape, (labels, labels), (labels,), (labels,))
    return [torch.randn(one).double().to(device, dtype) for one in shapes]


def operator_samples(device):
    names = (
        "crf_log_likelihood_forward",
        "crf_log_likelihood_backward",
        "crf_log_likelihood_decode_forward",
    )
    forward, backward, decode = (getattr(torch.ops.jitops, name).default for name in names)
    for dtype, lengths in ((torch.float32, None), (torch.float64, torch.tensor([3, 4]).to(device))):
        emissions, *parameters = inputs((4, 2, 5), dtype, device)
        tags = tags_of(emissions).T.contiguous()
        emissions = emissions.transpose(0, 1)
        arguments = (emissions, tags, lengths, *parameters)
        yield forward, arguments
        saved = forward(*arguments)
        for needed in ((True,) * 4, (False, True, False, True)):
            yield backward, (torch.ones_like(saved[0]), *arguments, *saved, *needed)
        yield decode, (emissions, lengths, *parameters)


# One step, part of a warp, more labels than a warp and than a block.
LAUNCHES = ((1, 2, 3), (4, 3, 5), (3, 2, 33), (2, 1, 260))

LIKELIHOOD = OpUnderTest(
    name="crf_log_likelihood",
    source="crf_log_likelihood",
    call=call,
    reference=reference,
    names=("emissions", "transitions", "start", "end"),
    inputs=inputs,
    shapes=((6, 3, 4), (3, 2, 9), (1, 2, 3), (3, 2, 2)),
    variants=(
        {},
        {"ragged": True, "reduction": "token_mean"},
        {"ragged": True, "reduction": "none", "forbids": True},
    ),
    edges=((3, 0, 2), (1, 1, 1), (4, 1, 1)),
    large=(12, 70, 3),
    operator_samples=operator_samples,
    launches=lambda dtype, device: (inputs(one, dtype, device) for one in LAUNCHES),
    busy=lambda dtype, device: inputs((256, 32, 32), dtype, device),
    mutations=(
        Mutation(
            "crf_log_likelihood.cu",
            "              return chain.a(t - 1, i) + chain.transition(i, k);\n"
            "            });\n      }\n      __syncthreads();",
            "              return chain.a(t - 1, i) + chain.transition(i, k);\n"
            "            });\n      }",
            "race in global memory|read before it was written",
        ),
        Mutation(
            "crf_log_likelihood.cu",
            "        if (lane == 0) next[i] = sum;\n      }\n      __syncthreads();",
            "        if (lane == 0) next[i] = sum;\n      }",
            "race in global memory|read before it was written",
        ),
        Mutation(
            "crf_log_likelihood.cu",
            "for (int64_t k = lane; k < count; k += kWarp)",
            "for (int64_t k = lane; k <= count; k += kWarp)",
            "out of bounds|race in global memory|read before it was written",
        ),
    ),
)


def decoded(emissions, transitions, start, end, ragged=False):
    mask = mask_of(emissions) if ragged else None
    return ops.crf_decode(emissions, transitions, start, end, mask)


class TestCRFLogLikelihood(Battery):
    op = LIKELIHOOD

    @pytest.mark.parametrize("scale", [1.0, 60.0])
    def test_every_sequence_of_tags(self, backend, device, scale):
        """Their probabilities sum to 1, and the best one is decoded."""
        emissions, transitions, start, end = inputs((4, 1, 3), torch.float64, device)
        transitions = scale * transitions
        every = torch.tensor(list(itertools.product(range(3), repeat=4)), device=device).T
        many = emissions.expand(-1, every.shape[1], -1)
        found = ops.crf_log_likelihood(many, every, transitions, start, end, reduction="none")
        close(found.exp().sum(), torch.ones((), dtype=torch.float64, device=device), torch.float64)
        best = ops.crf_decode(emissions, transitions, start, end)
        assert torch.equal(best[0], every[:, found.argmax()])

    def test_batch_first(self, backend, device):
        emissions, *parameters = inputs((5, 3, 4), torch.float64, device)
        tags, mask = tags_of(emissions), mask_of(emissions)
        expected = ops.crf_log_likelihood(emissions, tags, *parameters, mask)
        turned = emissions.transpose(0, 1), tags.T, *parameters, mask.T.to(torch.uint8)
        assert torch.equal(ops.crf_log_likelihood(*turned, batch_first=True), expected)
        paths = ops.crf_decode(emissions, *parameters, mask)
        again = ops.crf_decode(turned[0].contiguous(), *parameters, mask.T, batch_first=True)
        assert torch.equal(paths, again)

    def test_padding_has_no_influence(self, backend, device):
        """Not even NaN, and tags may be any number there. Its gradient is 0."""
        for scale in (1.0, 60.0):
            tensors = inputs((5, 3, 4), torch.float64, device)
            tensors[1] *= scale
            tags, mask = tags_of(tensors[0]), mask_of(tensors[0])
            plain = leaves(tensors)
            expected = ops.crf_log_likelihood(plain[0], tags, *plain[1:], mask)
            expected.backward()
            tensors[0][~mask] = torch.nan
            mine = leaves(tensors)
            found = ops.crf_log_likelihood(mine[0], tags.masked_fill(~mask, -100), *mine[1:], mask)
            found.backward()
            assert torch.equal(found, expected)
            for one, other in zip(mine, plain, strict=True):
                assert torch.equal(one.grad, other.grad)
            assert not mine[0].grad[~mask].any()
            paths = ops.crf_decode(tensors[0], *tensors[1:], mask)
            assert torch.equal(paths >= 0, mask.T)

    @pytest.mark.parametrize("forbidden", [-1e4, -torch.inf])
    def test_forbidden_transitions(self, backend, device, forbidden):
        """Their probability is 0, and tags that need one have no likelihood."""
        tensors = inputs((6, 2, 4), torch.float32, device)
        tensors[1][0, 2], tensors[2][3] = forbidden, forbidden
        mine, theirs = leaves(tensors), leaves([x.double() for x in tensors])
        tags = torch.ones((6, 2), dtype=torch.int64, device=device)
        found = ops.crf_log_likelihood(mine[0], tags, *mine[1:])
        found.backward()
        expected = sum(log_likelihood(theirs[0][:, b], tags[:, b], *theirs[1:]) for b in range(2))
        expected.backward()
        close(found, expected, torch.float32)
        for one, other in zip(mine, theirs, strict=True):
            close(one.grad, other.grad, torch.float32)
        assert mine[1].grad[0, 2] == 0
        tags[0, 0] = 3
        values = ops.crf_log_likelihood(mine[0], tags, *mine[1:], reduction="none")
        assert values[0] < -9e3
        assert values[1] > -100

    def test_a_tag_that_no_sequence_reaches(self, backend, device):
        """Also the gradients of autograd's own formulas are finite, of both orders."""
        tensors = inputs((4, 2, 3), torch.float64, device)
        tensors[1][:, 0] = tensors[2][0] = -torch.inf
        tags = tags_of(tensors[0]) % 2 + 1

        def value(emissions, *parameters):
            return ops.crf_log_likelihood(emissions, tags, *parameters)

        mine, reached = leaves(tensors), leaves([x[..., 1:] for x in tensors])
        without = reached[0], reached[1][1:], *reached[2:]
        plain = torch.autograd.grad(value(*mine), mine)
        first = torch.autograd.grad(value(*mine), mine, create_graph=True)
        functional = torch.func.grad(value, argnums=(0, 1, 2, 3))(*tensors)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), mine)
        tags = tags - 1  # those of a model without the tag
        same = torch.autograd.grad(value(*without), without, create_graph=True)
        expected = torch.autograd.grad(sum(x.square().sum() for x in same), reached)
        for one, other, again in zip(plain, first, functional, strict=True):
            close(other, one, torch.float64)
            close(again, one, torch.float64)
        for one, other in zip(second, expected, strict=True):
            close(one[..., 1:], other, torch.float64)
            assert not one[..., 0].any()

    @pytest.mark.parametrize("place", range(4))
    def test_gradients_of_a_value_that_is_not_finite(self, backend, device, place):
        """They are NaN, also in autograd's own formulas. Other sequences keep theirs."""
        tensors = inputs((3, 3, 3), torch.float64, device)
        tags = torch.tensor([[0, 1, 2], [2, 1, 2], [2, 2, 0]], device=device)
        mask = torch.tensor([[1, 1, 1], [1, 1, 1], [0, 1, 0]], dtype=torch.bool, device=device)
        tensors[0][~mask] = torch.nan
        if place == 0:  # the tags need it
            tensors[1][0, 2] = -torch.inf
        elif place == 1:  # no tags are possible
            tensors[0][1, 0] = -torch.inf
        else:
            tensors[0][0, 0, 1] = torch.nan if place == 2 else torch.inf

        def values(emissions, *parameters):
            return ops.crf_log_likelihood(emissions, tags, *parameters, mask, "none")

        def total(*those):
            return values(*those).sum()

        mine = leaves(tensors)
        assert values(*mine).isfinite().tolist() == [False, True, True]
        plain = torch.autograd.grad(total(*mine), mine)
        graph = torch.autograd.grad(total(*mine), mine, create_graph=True)
        functional = torch.func.grad(total, argnums=(0, 1, 2, 3))(*tensors)
        for gradients in (plain, graph, functional):
            assert gradients[0][:2, 0].isnan().all()
            assert not gradients[0][~mask].any()
            assert gradients[0][:, 1:].isfinite().all()
            for one in gradients[1:]:
                assert one.isnan().all()

    @pytest.mark.parametrize(("size", "scale"), [(300.0, 1.0), (1e4, 1.0), (300.0, 40.0)])
    def test_large_scores(self, backend, device, size, scale):
        """Those of float32 are those of float64, also where linear numbers would underflow."""
        steps = 6 if backend == "cuda-emulated" else 60
        tensors = inputs((steps, 2, 5), torch.float32, device)
        tensors[0] *= size
        tensors[1] *= scale
        mine, theirs = leaves(tensors), leaves([x.double() for x in tensors])
        found = call(*mine)
        expected = reference(*theirs)
        found.backward()
        expected.backward()
        close(found, expected, torch.float32)
        for one, other in zip(mine, theirs, strict=True):
            close(one.grad, other.grad, torch.float32)

    @pytest.mark.parametrize("far", [-720.0, -1e4])
    def test_a_start_as_unlikely_as_the_first_emission(self, backend, device, far):
        """Each of the two would underflow for its tag. Their sums are equal."""
        tensors = [torch.zeros(one, device=device) for one in ((2, 1, 2), (2, 2), (2,), (2,))]
        tensors[0][0, 0, 0] = tensors[2][1] = far
        mine, theirs = leaves(tensors), leaves([x.double() for x in tensors])
        found = call(*mine)
        expected = reference(*theirs)
        found.backward()
        expected.backward()
        close(found, expected, torch.float32)
        for one, other in zip(mine, theirs, strict=True):
            close(one.grad, other.grad, torch.float32)

    def test_a_change_of_tags_that_all_sequences_need(self, backend, device):
        """Its transition has a factor of exp(-800), which would underflow beside the others."""
        tensors = [torch.zeros(one, device=device) for one in ((3, 1, 2), (2, 2), (2,), (2,))]
        tensors[1][0, 1] = tensors[1][1, 0] = -800.0
        tensors[2][1] = tensors[3][0] = -1e4  # from tag 0 to tag 1
        mine, theirs = leaves(tensors), leaves([x.double() for x in tensors])
        found, expected = call(*mine), reference(*theirs)
        found.backward()
        expected.backward()
        assert found.isfinite()
        close(found, expected, torch.float32)
        for one, other in zip(mine, theirs, strict=True):
            close(one.grad, other.grad, torch.float32)

    @applies(lambda op, backend: backend != "cuda-emulated")
    def test_long_sequences(self, backend, device):
        tensors = inputs((1500, 1, 3), torch.float32, device)
        mine, theirs = leaves(tensors), leaves([x.double() for x in tensors])
        found = call(*mine)
        expected = reference(*theirs)
        found.backward()
        expected.backward()
        assert abs(found.item() - expected.item()) < 1e-6 * abs(expected.item())
        for one, other in zip(mine, theirs, strict=True):
            assert (one.grad - other.grad).abs().max() < 1e-5 * other.grad.abs().max()

    def test_wrong_input_that_a_gpu_does_not_wait_for(self, backend, device):
        """A sequence with a wrong mask or tag has a NaN value and gradient, and no tags."""
        emissions, *parameters = inputs((4, 3, 2), torch.float64, device)
        tags = tags_of(emissions)
        ops.crf_log_likelihood(emissions, tags, *parameters)  # loads the library
        emissions, tags = emissions.transpose(0, 1), tags.T.contiguous()
        lengths = torch.tensor([4, 0, 4], device=device)
        tags[2, 1] = -1
        if backend == "torch":
            value = crf.forward(emissions, tags, lengths, *parameters)[0]
            path = torch.ops.jitops.crf_log_likelihood_viterbi(emissions, lengths, *parameters)
        else:
            kernel = torch.ops.jitops.crf_log_likelihood_forward
            value = kernel(emissions, tags, lengths, *parameters)[0]
            path = torch.ops.jitops.crf_log_likelihood_decode_forward(
                emissions, lengths, *parameters
            )
        assert value.isnan().tolist() == [False, True, True]
        assert (path >= 0).all(1).tolist() == [True, False, True]
        assert (path[1] == -1).all()


class TestDecode:
    def test_worked_by_hand(self, backend, device):
        """The second tag alone would be 0, but 1 follows 1."""
        emissions = torch.tensor([[[0.0, 2.0]], [[1.0, 0.5]]], device=device)
        transitions = torch.tensor([[0.0, 0.0], [-3.0, 0.0]], device=device)
        ends = torch.zeros(2, device=device)
        assert ops.crf_decode(emissions, transitions, ends, ends).tolist() == [[1, 1]]

    def test_paths(self, backend, device):
        """The score of the path is the largest, found by the recursion with plain numbers."""
        for shape in ((7, 4, 5), (3, 2, 33), (1, 2, 3)):
            emissions, transitions, start, end = inputs(shape, torch.float64, device)
            lengths = lengths_of(*shape[:2]).tolist()
            paths = decoded(emissions, transitions, start, end, ragged=True)
            for b, n in enumerate(lengths):
                best = start + emissions[0, b]
                for t in range(1, n):
                    best = (best[:, None] + transitions).amax(0) + emissions[t, b]
                path = paths[b]
                score = start[path[0]] + end[path[n - 1]] + emissions[range(n), b, path[:n]].sum()
                score = score + transitions[path[: n - 1], path[1:n]].sum()
                close(score, (best + end).amax(), torch.float64)
                assert (path[n:] == -1).all()

    def test_equal_scores(self, backend, device):
        """The lower tag wins. Integers have many ties."""
        zeros = torch.zeros(3, 2, 4, device=device)
        parameters = zeros.new_zeros(4, 4), zeros[0, 0], zeros[0, 0]
        assert not ops.crf_decode(zeros, *parameters).any()
        integers = [torch.randint(-1, 2, x.shape, device=device).float()
                    for x in inputs((9, 3, 3), torch.float32, device)]  # fmt: skip
        with ops.use_backend("torch"):
            expected = decoded(*integers)
        assert torch.equal(decoded(*integers), expected)

    def test_not_a_number(self, backend, device):
        """It counts as minus infinity, on every back end."""
        tensors = inputs((6, 3, 4), torch.float32, device)
        tensors[0][2, 0, 1], tensors[0][3, 1], tensors[1][2, 1] = torch.nan, torch.nan, torch.nan
        tensors[0][4, 2, 2] = torch.inf
        with ops.use_backend("torch"):
            expected = decoded(*tensors)
        assert torch.equal(decoded(*tensors), expected)
        forbidden = [one.masked_fill(one.isnan(), -torch.inf) for one in tensors]
        assert torch.equal(decoded(*forbidden), expected)

    def test_dtypes(self, backend, device):
        tensors = inputs((5, 2, 3), torch.float16, device)
        expected = decoded(*(x.double() for x in tensors))
        for dtype in (torch.float16, torch.float32):
            assert torch.equal(decoded(*(x.to(dtype) for x in tensors)), expected)

    def test_no_gradient(self, backend, device):
        tensors = leaves(inputs((3, 2, 4), torch.float32, device))
        assert not decoded(*tensors).requires_grad


class TestModule:
    def test_module(self, backend, device):
        model = ops.CRF(4).to(device)
        emissions = torch.randn(5, 3, 4, device=device)
        tags, mask = tags_of(emissions), mask_of(emissions)
        parameters = (model.transitions, model.start_transitions, model.end_transitions)
        for reduction in ("none", "sum", "mean", "token_mean"):
            expected = ops.crf_log_likelihood(emissions, tags, *parameters, mask, reduction)
            assert torch.equal(model(emissions, tags, mask, reduction), expected)
        paths = ops.crf_decode(emissions, *parameters, mask)
        found = model.decode(emissions, mask)
        assert [len(path) for path in found] == mask.sum(0).tolist()
        assert [path + [-1] * (5 - len(path)) for path in found] == paths.tolist()
        model(emissions, tags).backward()
        assert all(one.grad is not None for one in model.parameters())
        turned = ops.CRF(4, batch_first=True).to(device)
        turned.load_state_dict(model.state_dict())
        assert torch.equal(turned(emissions.transpose(0, 1), tags.T), model(emissions, tags))
        assert repr(turned) == "CRF(num_tags=4, batch_first=True)"
        assert all(-0.1 <= x <= 0.1 for one in model.parameters() for x in one.flatten().tolist())
        with pytest.raises(ops.ArgumentError, match="num_tags must be at least 1, got 0"):
            ops.CRF(0)
        for call in (lambda x: model(x, tags), model.decode):
            with pytest.raises(ops.ArgumentError, match="emissions must have 4 tags, .*, got 5"):
                call(torch.cat((emissions, emissions[..., :1]), 2))


GOOD = {
    "emissions": torch.randn(4, 2, 3),
    "tags": torch.tensor([[0, 1], [1, 2], [2, 0], [0, 0]]),
    "transitions": torch.randn(3, 3),
    "start_transitions": torch.randn(3),
    "end_transitions": torch.randn(3),
}
ON = torch.ones(4, 2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"emissions": [1.0]}, ops.ArgumentTypeError, "emissions must be a torch.Tensor, got list"),
        (
            {"emissions": torch.ones(4, 3)},
            ops.ArgumentError,
            r"emissions must have shape \(T, B, K\), with at least one step and one tag, got \[4",
        ),
        ({"emissions": torch.ones(0, 2, 3)}, ops.ArgumentError, "emissions must have shape"),
        (
            {"emissions": torch.ones(4, 2, 3).double()},
            ops.ArgumentTypeError,
            "transitions must hav",
        ),
        (
            {"transitions": torch.ones(2, 3)},
            ops.ArgumentError,
            r"transitions must have shape \[3, 3\], for 3 tags, got \[2, 3\]",
        ),
        ({"end_transitions": torch.ones(2)}, ops.ArgumentError, r"end_transitions must have shape"),
        ({"tags": [0]}, ops.ArgumentTypeError, "tags must be a torch.Tensor, got list"),
        (
            {"tags": GOOD["tags"].to("meta")},
            ops.ArgumentError,
            "tags must be on device .*, got meta",
        ),
        ({"tags": torch.ones(4, 2)}, ops.ArgumentTypeError, "tags must have an integer dtype"),
        (
            {"tags": GOOD["tags"].T},
            ops.ArgumentError,
            r"tags must have shape \[4, 2\], that is \(T, B\), got \[2, 4\]",
        ),
        (
            {"tags": 2 * GOOD["tags"]},
            ops.ArgumentError,
            "tags must hold numbers from 0 to 2, got 4",
        ),
        (
            {"mask": ON.float()},
            ops.ArgumentTypeError,
            "mask must have dtype bool or uint8, got flo",
        ),
        ({"mask": ON[:3]}, ops.ArgumentError, r"mask must have shape \[4, 2\], that is \(T, B\)"),
        (
            {"mask": ON & (torch.arange(4) != 0)[:, None]},
            ops.ArgumentError,
            r"mask must have its first step on in each sequence, got \[0, 1, 1, 1\] for sequence 0",
        ),
        (
            {"mask": ON & (torch.arange(4) != 2)[:, None]},
            ops.ArgumentError,
            r"mask must have no gap in each sequence, got \[1, 1, 0, 1\] for sequence 0",
        ),
        (
            {"reduction": "max"},
            ops.ArgumentError,
            "reduction must be one of none, sum, mean, token",
        ),
    ],
)
def test_bad_input(backend, device, change, error, text):
    arguments = {
        name: value.to(device) if isinstance(value, torch.Tensor) and not value.is_meta else value
        for name, value in (GOOD | change).items()
    }
    with pytest.raises(error, match=text):
        ops.crf_log_likelihood(**arguments)


@pytest.mark.cpp
@pytest.mark.thorough
def test_more_elements_than_32_bits_count():
    """Sequences so far apart that 32 bits cannot count the elements before the last one."""
    stride = 2**31 // 64
    memory = torch.empty(66 * stride, dtype=torch.bfloat16)
    emissions = memory.as_strided((2, 66, 3), (3, stride, 1))
    plain, *parameters = inputs((2, 66, 3), torch.bfloat16, "cpu")
    emissions.copy_(plain)
    with ops.use_backend("cpp"):
        assert torch.equal(call(emissions, *parameters), call(plain, *parameters))
