"""The emulator itself: it computes what a GPU does, and catches what a GPU hides."""

from __future__ import annotations

import functools
import itertools
import shutil

import pytest
import torch

import ops
from ops import _extensions
from ops._op import built_in
from tests import cuda_emulator
from tests.op_under_test import leaves

pytestmark = pytest.mark.emulator


@functools.cache
def planted():
    folder = cuda_emulator.FOLDER
    host, source = folder / "planted.cpp", folder / "planted.cu"
    sources = f"-I{_extensions.source_folder()}"
    cuda_emulator.library("jitops_planted", host, source, kernel_flags=[sources]).load()
    return torch.ops.jitops_planted.run


def run(name, x, n=None, size=None, shared_bytes=0):
    n = x.numel() if n is None else n
    return planted()(name, x, n, n if size is None else size, shared_bytes)


# ---- what is right -------------------------------------------------------------------------------


def test_indices_in_three_dimensions():
    x = torch.rand(720)
    assert torch.equal(run("indices", x), x + torch.arange(720))
    assert torch.equal(run("indices", x, 700), (x + torch.arange(720))[:700])


def test_static_shared_memory():
    x = torch.rand(150)
    expected = torch.cat([part.flip(0) for part in x.split(64)])
    assert torch.equal(run("reversed_in_blocks", x), expected)


def test_dynamic_shared_memory():
    x = torch.arange(100.0)
    assert run("dynamic_sum", x, size=1, shared_bytes=512).item() == 4950


def test_atomics():
    x = torch.randperm(100).float()
    assert run("atomics", x, size=3).tolist() == [100, 99, 1]
    sums = run("adds_up_atomically", torch.ones(50))
    assert sums.nonzero().flatten().tolist() == [0, 32]
    assert sums[[0, 32]].tolist() == [32, 18]


def test_lanes_pass_values_on():
    x = torch.rand(32)
    assert torch.equal(run("passed_on_in_a_warp", x), x.flip(0))
    halves = torch.cat([half.flip(0) for half in x.split(16)])
    assert torch.equal(run("passed_on_in_halves_of_a_warp", x), halves + 2)


@pytest.mark.parametrize("n", [128, 131, 3])
def test_vectors(n):
    x = torch.rand(n)
    assert torch.equal(run("fours", x), x)


def test_shuffles_votes_and_reductions():
    """As the CUDA C++ programming guide defines them."""
    x, lane = torch.rand(32), torch.arange(32)
    clamped = lambda to, stays: torch.where(stays, lane, to)  # noqa: E731
    odd = lane % 2 == 1
    bits = torch.tensor(
        [i.bit_count() + (32 - i.bit_length()) + (i & -i).bit_length() for i in range(32)]
    )
    expected = [
        x[5].expand(32),
        x[lane // 8 * 8 + 3],
        x[lane ^ 6],
        x[clamped(lane - 3, lane < 3)],
        x[clamped(lane - 3, lane % 16 < 3)],
        x[clamped(lane + 2, lane > 29)],
        x[clamped(lane + 2, lane % 4 > 1)],
        torch.full((32,), float(0xAAAA)),
        torch.ones(32),
        torch.zeros(32),
        torch.full((32,), float(sum(range(-7, 25)))),
        torch.full((32,), -7.0),
        torch.full((32,), 31.0),
        torch.full((32,), 15.0),
        torch.full((32,), 16.0),
        torch.ones(32),
        torch.zeros(32),
        torch.where(odd, x[lane ^ 2], torch.tensor(240.0)),
        bits.float(),
    ]
    lines = run("intrinsics", x, size=32 * len(expected)).view(-1, 32)
    for number, (line, right) in enumerate(zip(lines, expected, strict=True)):
        assert torch.equal(line, right.float()), number


# ---- what is wrong -------------------------------------------------------------------------------

WRONG = {
    "reads_one_too_many": "read out of bounds: 4 bytes, 0 bytes behind a tensor of 256 bytes",
    "writes_one_too_many": "write out of bounds: 4 bytes, 0 bytes behind a tensor of 256 bytes",
    "reads_before_the_begin": r"read out of bounds: 4 bytes, 4 bytes before a .* thread \(0, 0",
    "reads_its_result": "memory of a tensor read before it was written",
    "misaligned": r"misaligned address at planted.cu:\d+; in .* thread \(0, 0, 0\)",
    "misaligned_in_pieces": r"misaligned address at planted.cu:\d+; in .* thread",
    "copies_too_much": "read out of bounds: 260 bytes, the last 4 behind a tensor of 256 bytes",
    "writes_its_input": "write to a tensor that the host side asked a const pointer of",
    "without_a_barrier": "shared memory",  # a race, or not written: whichever thread comes first
    "without_the_second_barrier": "race in shared memory: ",
    "without_syncwarp": "race in shared memory: read without a barrier after thread",
    "all_write_one": "race in shared memory: written without a barrier after thread",
    "counts_without_atomics": "race in shared memory",
    "unset_shared": r"shared memory read before it was written; in .* thread \(63, 0, 0\)",
    "shared_of_the_block_before": r"shared memory read before it was written; in block \(1, 0, 0\)",
    "beyond_its_array": r"index 64 beyond an array at planted.cu:\d+; .* thread \(63, 0, 0\)",
    "some_wait": r"divergent threads: 32 wait in __syncthreads at planted.cu:\d+, 32 have returned",
    "wait_apart": r"divergent threads: 32 wait .*:(\d+), 32 wait .* at planted.cu:\d+, 0 have",
    "mask_of_too_few": r"__shfl_xor_sync at .* with mask 0x0000ffff, which has not the lane",
    "reads_an_absent_lane": "reads from lane 20, which its mask 0x0000ffff has not",
    "counts_in_a_static_variable": "race in a static variable",
    "all_write_one_result": "race in global memory: written without a barrier after thread",
    "blocks_write_one": "race in global memory: written without a barrier after another block",
    "blocks_read_what_another_writes": "race in global memory|read before it was written",
    "reads_beside_atomics": "race in global memory|read before it was written",
    "block_of_2048": "invalid configuration argument",
    "block_of_1_by_1_by_65": "invalid configuration argument",
    "grid_of_65536_in_y": "invalid configuration argument",
    "empty_grid": "invalid configuration argument",
    "default_stream": "launched on another stream than the tensors' current one",
}


@pytest.mark.parametrize("name", WRONG)
def test_caught(name):
    with pytest.raises(RuntimeError, match=f"{name}: .*{WRONG[name]}"):
        run(name, torch.rand(64))
    x = torch.rand(64)
    assert torch.equal(run("indices", x), x + torch.arange(64))  # and the next launch is sound


def test_missing_tail_is_caught():
    with pytest.raises(RuntimeError, match="a result of which 12 bytes were never written"):
        run("forgets_the_tail", torch.rand(67))


def test_lanes_that_are_not_there_are_caught():
    with pytest.raises(RuntimeError, match="mask 0xffffffff, of which lanes"):
        run("mask_of_too_many", torch.rand(32), n=20)


def test_threads_that_leave_before_a_barrier_are_caught():
    with pytest.raises(RuntimeError, match="40 wait in __syncthreads at .*, 24 have returned"):
        run("leaves_before_the_barrier", torch.rand(64), n=40)


def test_dynamic_shared_memory_has_the_size_of_the_launch():
    assert run("more_than_asked_for", torch.rand(64), n=3, size=1, shared_bytes=16).item() == 1
    with pytest.raises(
        RuntimeError, match="an access 16 bytes from its begin, with 16 bytes asked"
    ):
        run("more_than_asked_for", torch.rand(64), n=4, size=1, shared_bytes=16)
    run("much_static_shared", torch.rand(64), shared_bytes=9000)
    with pytest.raises(RuntimeError, match="more than 49152 bytes of shared memory"):
        run("much_static_shared", torch.rand(64), shared_bytes=9200)  # 40,000 of its own
    with pytest.raises(RuntimeError, match="of shared memory, more than 49152 bytes"):
        run("more_than_asked_for", torch.rand(64), n=4, size=1, shared_bytes=49153)


def test_a_view_is_all_that_may_be_touched():
    """The memory around it is there, and somebody else's."""
    wide = torch.rand(3, 64)
    with pytest.raises(RuntimeError, match="0 bytes behind a tensor of 256 bytes"):
        run("reads_one_too_many", wide[1])


# ---- bugs planted into the kernels that ship -----------------------------------------------------

# An op and a file, what stands there, what takes its place, how it is caught.
MUTATIONS = [
    (
        "improved_triplet_loss",
        "improved_triplet_loss.cu",
        "row_sum(static_cast<A>(neg), of_negative)",
        "row_sum(static_cast<A>(neg), of_positive)",
        "race in shared memory",
    ),
    (
        "improved_triplet_loss",
        "common/cuda.cuh",
        "shared[thread / kWarp] = x;\n  __syncthreads();",
        "shared[thread / kWarp] = x;",
        "shared memory",
    ),
    (
        "improved_triplet_loss",
        "common/cuda.cuh",
        "<< (lane / count * count)",
        "",
        "which has not the lane that calls it",
    ),
    (
        "improved_triplet_loss",
        "common/cuda.cuh",
        "(0xffffffffu >> (kWarp - count)) << (lane / count * count)",
        "0xffffffffu",
        "divergent threads: .* wait in __shfl_xor_sync|are not there or have returned",
    ),
    (
        "improved_triplet_loss",
        "improved_triplet_loss.cu",
        "params.partials[2 * (row * splits + i) + 1]",
        "params.partials[2 * (row * splits + i) + 2]",
        "memory of a tensor read before it was written",
    ),
    (
        "improved_triplet_loss",
        "common/cuda.cuh",
        "% kPackBytes == 0 &&",
        "% 4 == 0 &&",
        r"misaligned address at improved_triplet_loss.cu:\d+",
    ),
    (
        "improved_triplet_loss",
        "improved_triplet_loss.cu",
        "neg = cuda::block_sum(neg, of_negative);\n  if (threadIdx.x != 0) return;",
        "if (threadIdx.x != 0) return;\n  neg = cuda::block_sum(neg, of_negative);",
        "divergent threads|have returned",
    ),
    (
        "improved_triplet_loss",
        "improved_triplet_loss.cu",
        "row < params.rows; row += step) {\n    const int state",
        "row <= params.rows; row += step) {\n    const int state",
        "read out of bounds",
    ),
    (
        "improved_triplet_loss",
        "improved_triplet_loss.cu",
        "threadIdx.x; j < packs;\n         j += stride",
        "threadIdx.x; j + 1 < packs;\n         j += stride",
        "a result of which .* bytes were never written",
    ),
    (
        "improved_triplet_loss",
        "improved_triplet_loss.cu",
        "params.partials[blockIdx.x] = total;",
        "params.partials[0] = total;",
        "race in global memory|read before it was written",
    ),
    (
        "lltm",
        "lltm.cu",
        "pack_at<T, kWidth>(params.grad_gates, gate + 2 * params.size) = gz;",
        "pack_at<T, kWidth>(params.grad_gates, gate + 3 * params.size) = gz;",
        "out of bounds|race in global memory|never written",
    ),
    (
        "lltm",
        "lltm.cu",
        "pack_at<A, kEach>(data, at + n * kEach) = packs[n];",
        "pack_at<A, kEach>(data, at + n * kEach) = packs[0], n = kWidth;",
        "memory of a tensor read before it was written",
    ),
    (
        "lltm",
        "lltm.cuh",
        "    state += step;\n    __syncthreads();\n",
        "    state += step;\n",
        "race in shared memory",
    ),
    (
        "lltm",
        "lltm.cuh",
        "    __syncthreads();\n  }\n  if (my.has_row && all.grad_old_cell)",
        "  }\n  if (my.has_row && all.grad_old_cell)",
        "race in shared memory",
    ),
    (
        "lltm",
        "lltm.cuh",
        "const float* mine = gates[my.part] + my.at;",
        "const float* mine = gates[(my.part + 1) % kTileRows] + my.at;",
        "shared memory read before it was written",
    ),
    (
        "lltm",
        "lltm.cuh",
        "has_row = real && part < rows;",
        "has_row = part < rows;",
        "out of bounds|race in global memory",
    ),
]


def exercise(op):
    """Each path of the kernels: packs and single elements, narrow rows and wide, several blocks."""
    if op == "lltm":
        shapes = [(2, 4, 3, 4), (3, 131, 5, 7), (2, 20, 4, 64), (2, 4, 3, 136), (2, 20, 1, 129)]
        for (steps, batch, features, size), dtype in itertools.product(
            shapes, (torch.float32, torch.bfloat16)
        ):
            state = torch.randn(2, batch, size).to(dtype)
            x = leaves([torch.randn(steps, batch, features).to(dtype)])[0]
            weights = torch.randn(3 * size, size + features).to(dtype)
            bias = torch.randn(3 * size).to(dtype)
            output, last = ops.lltm_sequence(x, weights, bias, *state)
            (output.sum() + last.cell.sum()).backward()
        return
    for rows, cols in ((20, 7), (20, 8), (130, 4096), (2, 8192), (2, 2051)):
        for reduction in ("mean", "none"):
            apart = torch.rand(3, rows * cols + 4)[:, 1 : rows * cols + 1].view(3, rows, cols)
            for inputs in (torch.rand(3, rows, cols), apart):  # these are aligned to 4 bytes only
                x = leaves(inputs)
                loss = ops.improved_triplet_loss(*x, -9e9, 0.0, 1.0, reduction=reduction)
                loss.sum().backward()


@pytest.fixture
def emulated():
    cuda_emulator.select(True)
    with ops.use_backend("cpp"):
        yield
    cuda_emulator.select(False)


@pytest.mark.parametrize("op", ["improved_triplet_loss", "lltm"])
def test_shipped_kernels_are_sound(emulated, op):
    exercise(op)


@pytest.mark.parametrize(("op", "file", "before", "after", "caught"), MUTATIONS)
def test_bugs_in_shipped_kernels_are_caught(emulated, tmp_path, op, file, before, after, caught):
    folder = tmp_path / "cuda_src"
    shutil.copytree(_extensions.source_folder(), folder)
    text = (folder / file).read_text()
    assert text.count(before) == 1
    (folder / file).write_text(text.replace(before, after))
    extension = cuda_emulator.library(f"jitops_{op}_cpp", folder / f"{op}.cpp", folder / f"{op}.cu")
    cuda_emulator.exchange(built_in(op), extension)
    with pytest.raises(RuntimeError, match=caught):
        exercise(op)
