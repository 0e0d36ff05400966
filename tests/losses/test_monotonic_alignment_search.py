"""Monotonic alignment search: its reference, the battery, and its own tests."""

from __future__ import annotations

import itertools

import pytest
import torch

import ops
from tests.harness.battery import Battery
from tests.harness.op_under_test import Mutation, OpUnderTest


def lengths_of(batch, tokens, frames):
    """Lengths from 0 to all, with as many frames as tokens in the second pair."""
    text = torch.tensor([tokens - b * 7 % (tokens + 1) for b in range(batch)], dtype=torch.int64)
    audio = torch.tensor([frames - b for b in range(batch)], dtype=torch.int64)
    audio = torch.maximum(audio, text)
    audio[1:2] = text[1:2]
    return text, audio


def best_path(scores):
    """The best path of one pair, as a list of tokens: the recursion cell by cell."""
    tokens, frames = scores.shape
    values, sums = scores.tolist(), {}
    for j, i in itertools.product(range(frames), range(tokens)):
        if i == j == 0:
            sums[i, j] = values[0][0]
            continue
        before = [sums[one] for one in ((i, j - 1), (i - 1, j - 1)) if one in sums]
        if before:
            sums[i, j] = values[i][j] + (before[1] if before[-1] > before[0] else before[0])
    path, i = [], tokens - 1
    for j in range(frames - 1, -1, -1):
        path.append(i)
        stays, comes = sums.get((i, j - 1)), sums.get((i - 1, j - 1))
        if comes is not None and (stays is None or comes > stays):
            i -= 1
    return path[::-1]


def reference(scores, ragged=False):
    batch, tokens, frames = scores.shape
    text, audio = [tokens] * batch, [frames] * batch
    if ragged:
        text, audio = (one.tolist() for one in lengths_of(batch, tokens, frames))
    taken = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    for b, (n, m) in enumerate(zip(text, audio, strict=True)):
        if n:
            taken[b, best_path(scores[b, :n, :m].detach()), range(m)] = True
    return taken, along(scores, taken)


def along(scores, taken):
    """The sum of the magnitudes of a path's scores. They have a gradient, the path has none."""
    wide = scores.float() if scores.element_size() == 2 else scores
    return torch.where(taken, wide.abs(), 0).sum((1, 2))


def path_of(scores, ragged=False):
    lengths = lengths_of(*scores.shape) if ragged else ()
    return ops.monotonic_alignment_search(scores, *(one.to(scores.device) for one in lengths))


def call(scores, ragged=False):
    path = path_of(scores, ragged)
    assert not path.requires_grad
    return path == 1, along(scores, path == 1)


def inputs(shape, dtype, device):
    return [torch.randn(shape).double().to(device, dtype)]


def operator_samples(device):
    forward = torch.ops.jitops.monotonic_alignment_search_forward.default
    lengths = torch.tensor([[3, 0], [40, 5]], device=device)
    for dtype, its in ((torch.float32, None), (torch.float64, lengths)):
        (scores,) = inputs((2, 9, 40), dtype, device)
        yield forward, (scores, its)
        yield forward, (scores.mT.contiguous().mT, its)


# Parts of a warp, one frame a token, several words, several tiles of 256 tokens.
LAUNCHES = ((1, 3, 4), (2, 5, 5), (2, 33, 70), (1, 260, 263))

SEARCH = OpUnderTest(
    name="monotonic_alignment_search",
    source="monotonic_alignment_search",
    call=call,
    reference=reference,
    names=("scores",),
    inputs=inputs,
    shapes=((3, 5, 9), (2, 17, 40), (2, 1, 3), (2, 3, 5)),
    variants=({}, {"ragged": True}),
    edges=((0, 3, 4), (2, 0, 4), (2, 0, 0), (1, 1, 1), (1, 4, 4)),
    large=(5, 30, 90),
    widens=True,
    operator_samples=operator_samples,
    launches=lambda dtype, device: (inputs(one, dtype, device) for one in LAUNCHES),
    busy=lambda dtype, device: inputs((32, 200, 800), dtype, device),
    mutations=(
        Mutation(
            "monotonic_alignment_search.cu",
            "last[frame] = sum;\n      __syncthreads();",
            "last[frame] = sum;",
            "race in shared memory|read before it was written",
        ),
        Mutation(
            "monotonic_alignment_search.cu",
            "const bool there = mine && frame < pair.frames;",
            "const bool there = mine;",
            "out of bounds",
        ),
        Mutation(
            "monotonic_alignment_search.cu",
            "scratch.of_above + (tile + 1) % 2 * params.frames",
            "scratch.of_above + tile % 2 * params.frames",
            "read before it was written|race in global memory",
        ),
    ),
)


class TestMonotonicAlignmentSearch(Battery):
    op = SEARCH

    def test_worked_by_hand(self, backend, device):
        scores = torch.tensor([[5.0, 0.0, 4.0, 9.0], [9.0, 2.0, 1.0, 1.0]], device=device)
        path = ops.monotonic_alignment_search(scores)
        assert path.tolist() == [[1, 1, 1, 0], [0, 0, 0, 1]]
        assert path.sum(1).tolist() == [3, 1]

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_paths_of_all_sizes(self, backend, device, dtype):
        """Every token has a frame, every frame has a token, and the sum is the largest."""
        shapes = ((1, 1, 40), (2, 7, 33), (1, 40, 65), (1, 64, 64), (2, 13, 100))
        for shape in shapes[:2] if backend == "cuda-emulated" else shapes:
            (scores,) = inputs(shape, dtype, device)
            for its in (scores, scores.mT.contiguous().mT):
                path = ops.monotonic_alignment_search(its)
                assert path.dtype == dtype
                assert torch.equal(path == 1, reference(scores)[0])
                assert (path.sum(1) == 1).all()
                steps = path.long().argmax(1).diff()
                assert ((steps == 0) | (steps == 1)).all()

    def test_equal_sums_stay(self, backend, device):
        """Back from the last token, the path moves only when it must."""
        for scores in (torch.zeros(1, 3, 6), torch.full((1, 3, 6), -torch.inf)):
            path = ops.monotonic_alignment_search(scores.to(device))
            assert path[0].argmax(0).tolist() == [0, 1, 2, 2, 2, 2]

    def test_ties_of_integers(self, backend, device):
        scores = torch.randint(-1, 2, (4, 6, 14), device=device).float()
        assert torch.equal(path_of(scores) == 1, reference(scores)[0])

    def test_not_a_number(self, backend, device):
        """No sum is greater than NaN. The path is that of the rule, on every back end."""
        scores = torch.randn(6, 5, 40, dtype=torch.float64, device=device)
        at = torch.arange(6, device=device)
        scores[at, at % 5, 3 + 5 * at] = torch.nan
        scores[at, 4 - at % 5, 2 + 3 * at] = torch.inf
        scores[0, 0, 0] = torch.nan
        assert torch.equal(path_of(scores) == 1, reference(scores)[0])

    def test_padding_has_no_influence(self, backend, device):
        (scores,) = inputs((4, 6, 50), torch.float32, device)
        text = torch.tensor([6, 4, 0, 2], device=device)
        audio = torch.tensor([50, 4, 9, 35], device=device)
        for one, n, m in zip(scores, text.tolist(), audio.tolist(), strict=True):
            one[n:], one[:, m:] = torch.nan, torch.inf
        path = ops.monotonic_alignment_search(scores, text, audio)
        for b, (n, m) in enumerate(zip(text.tolist(), audio.tolist(), strict=True)):
            alone = ops.monotonic_alignment_search(scores[b, :n, :m])
            assert torch.equal(path[b, :n, :m], alone)
            assert path[b].sum() == (m if n else 0)

    def test_one_of_the_lengths(self, backend, device):
        (scores,) = inputs((2, 3, 8), torch.float32, device)
        audio = torch.tensor([8, 5], dtype=torch.int32, device=device)
        path = ops.monotonic_alignment_search(scores, audio_lengths=audio)
        assert torch.equal(path[1, :, :5], ops.monotonic_alignment_search(scores[1, :, :5]))
        path = ops.monotonic_alignment_search(scores, torch.tensor([3, 2], device=device))
        assert torch.equal(path[1, :2], ops.monotonic_alignment_search(scores[1, :2]))

    def test_lengths_that_a_gpu_does_not_wait_for(self, backend, device):
        """The path of a pair whose lengths are wrong is NaN, and no other."""
        (scores,) = inputs((3, 4, 6), torch.float32, device)
        lengths = torch.tensor([[4, -1, 2], [6, -1, 3]], device=device)
        if backend == "torch":
            path = torch.ops.jitops.monotonic_alignment_search_path(scores, lengths)
        else:
            path_of(scores)  # loads the library
            path = torch.ops.jitops.monotonic_alignment_search_forward(scores, lengths)
        assert path[1].isnan().all()
        assert path[[0, 2]].isfinite().all()

    def test_the_scores_get_no_gradient(self, backend, device):
        scores = torch.randn(2, 3, 5, device=device, requires_grad=True)
        assert ops.monotonic_alignment_search(scores).grad_fn is None
        weights = torch.randn(2, 3, 5, device=device, requires_grad=True)
        (weights * ops.monotonic_alignment_search(scores)).sum().backward()
        assert scores.grad is None
        assert torch.equal(weights.grad, ops.monotonic_alignment_search(scores))


GOOD = {"scores": torch.randn(2, 3, 5)}
LENGTHS = torch.tensor([3, 2])


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"scores": [1.0]}, ops.ArgumentTypeError, "scores must be a torch.Tensor, got list"),
        ({"scores": torch.ones(2, 3, 5).int()}, ops.ArgumentTypeError, "scores must have dtype fl"),
        (
            {"scores": torch.ones(3)},
            ops.ArgumentError,
            r"scores must have shape \(B, T_text, T_audio\) or \(T_text, T_audio\), got \[3\]",
        ),
        (
            {"scores": torch.ones(2, 5, 3)},
            ops.ArgumentError,
            "text_lengths must be at most audio_lengths, because each token needs a frame, "
            "got 5 and 3",
        ),
        (
            {"text_lengths": LENGTHS, "audio_lengths": torch.tensor([3, 1])},
            ops.ArgumentError,
            "text_lengths must be at most audio_lengths, because each token needs a frame, "
            "got 2 and 1",
        ),
        ({"text_lengths": [3, 2]}, ops.ArgumentTypeError, "text_lengths must be a torch.Tensor, g"),
        ({"audio_lengths": LENGTHS.float()}, ops.ArgumentTypeError, "audio_lengths must have an i"),
        ({"text_lengths": LENGTHS[:1]}, ops.ArgumentError, r"text_lengths must be of shape \[2\],"),
        ({"text_lengths": -LENGTHS}, ops.ArgumentError, "text_lengths must hold numbers from 0 to"),
        ({"audio_lengths": 3 * LENGTHS}, ops.ArgumentError, "audio_lengths must hold numbers from"),
        (
            {"scores": torch.ones(3, 5), "text_lengths": LENGTHS[:1]},
            ops.ArgumentError,
            r"text_lengths must be None for a single pair, got shape \[1\]",
        ),
    ],
)
def test_bad_input(backend, device, change, error, text):
    arguments = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in (GOOD | change).items()
    }
    with pytest.raises(error, match=text):
        ops.monotonic_alignment_search(**arguments)


@pytest.mark.cpp
@pytest.mark.thorough
def test_more_elements_than_32_bits_count():
    """Rows so far apart that 32 bits cannot count the elements before the last one."""
    stride = 2**31 // 64
    memory = torch.empty(66 * stride, dtype=torch.bfloat16)
    scores = memory.as_strided((1, 66, 70), (0, stride, 1))
    scores.copy_(torch.randn(1, 66, 70))
    with ops.use_backend("cpp"):
        found = ops.monotonic_alignment_search(scores)
    with ops.use_backend("torch"):
        assert torch.equal(found, ops.monotonic_alignment_search(scores))
