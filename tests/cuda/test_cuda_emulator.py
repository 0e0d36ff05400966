"""The emulator itself: it computes as a GPU does, and catches errors that a GPU hides."""

from __future__ import annotations

import dataclasses
import functools
import re
import shutil
import subprocess

import pytest
import torch

import ops
from ops._core import extensions
from ops._core.dispatch import built_in
from ops.jit._compile import _compilers
from tests.cuda import emulator as cuda_emulator
from tests.cuda.emulator.objects import compile_all
from tests.harness.op_under_test import (
    Mutation,
    aligned_and_not,
    backward,
    check_far_rows,
    close,
    compiled_ops,
    leaves,
)

pytestmark = pytest.mark.emulator


@functools.cache
def planted(include):
    """The kernels of planted.cu, built with the headers in ``include``."""
    folder = cuda_emulator.FOLDER
    sources = (folder / "planted.cpp", folder / "planted.cu")
    cuda_emulator.library("jitops_planted", *sources, include=include).load()
    return torch.ops.jitops_planted.run


def run(name, x, n=None, size=None, shared_bytes=0, folder=None):
    n = x.numel() if n is None else n
    kernels = planted(folder or extensions.source_folder())
    return kernels(name, x, n, n if size is None else size, shared_bytes)


# ---- correct kernels -----------------------------------------------------------------------------


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


def test_local_memory_is_as_large_as_on_a_gpu():
    x = torch.zeros(32)
    assert torch.equal(run("large_local_array", x), 127999.0 - torch.arange(32))


@pytest.mark.parametrize("n", [128, 131, 3])
def test_vectors(n):
    x = torch.rand(n)
    assert torch.equal(run("fours", x), x)


def test_shuffles_votes_and_reductions():
    """Results are those of the CUDA C++ programming guide."""
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


# ---- planted errors ------------------------------------------------------------------------------

WRONG = {
    "reads_one_too_many": "read out of bounds: 4 bytes, 0 bytes behind a tensor of 256 bytes",
    "writes_one_too_many": "write out of bounds: 4 bytes, 0 bytes behind a tensor of 256 bytes",
    "reads_before_the_begin": r"read out of bounds: 4 bytes, 4 bytes before a .* thread \(0, 0",
    "reads_its_result": "memory of a tensor read before it was written",
    "misaligned": r"misaligned address at planted.cu:\d+; in .* thread",
    "misaligned_in_pieces": r"misaligned address at planted.cu:\d+; in .* thread",
    "copies_too_much": "read out of bounds: 260 bytes, the last 4 behind a tensor of 256 bytes",
    "writes_its_input": "write to a tensor that the host side asked a const pointer of",
    "without_a_barrier": "shared memory",  # a race or an unwritten read, by the order of threads
    "without_the_second_barrier": "race in shared memory: ",
    "without_syncwarp": "race in shared memory: read without a barrier after thread",
    "all_write_one": "race in shared memory: written without a barrier after thread",
    "counts_without_atomics": "race in shared memory",
    "unset_shared": r"shared memory read before it was written; in .* thread \(63, 0, 0\)",
    "shared_of_the_block_before": r"shared memory read before it was written; in block \(1, 0, 0\)",
    "beyond_its_array": r"index 64 beyond an array at planted.cu:\d+; .* thread \(63, 0, 0\)",
    "beyond_its_array_by_a_pointer": r"an access beyond an array at planted.cu:\d+",
    "divides_by_zero": r"division by zero at planted.cu:\d+",
    "shifts_by_all_bits": r"a shift by more bits than there are, .* at planted.cu:\d+",
    "waits_for_another_thread": "a block without end",
    "waits_for_another_block": "a block without end",
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


@pytest.mark.parametrize("name", ["unset_sum", "unset_local_array"])
def test_variables_that_are_not_set_spoil_the_result(name):
    assert not (run(name, torch.rand(64)).abs() < 1e38).any()


RACES = (
    "lanes_in_place",
    "warps_in_place",
    "counts_and_reads",
    "blocks_in_place",
    "blocks_count_and_one_reads",
    "without_syncwarp_at_last",
)


@pytest.mark.parametrize("name", RACES)
def test_races_are_caught_in_every_order(name):
    """Whichever thread or block runs last: each launch has another order."""
    for _ in range(64 if name != "without_syncwarp_at_last" else 2):
        with pytest.raises(RuntimeError, match=f"{name}: .*race in (shared|global) memory"):
            run(name, torch.rand(64))


def test_an_error_of_another_is_neither_reported_nor_cleared():
    x = torch.rand(64)
    assert torch.equal(run("beside_an_error_of_another", x), x + torch.arange(64))


def test_a_failed_launch_says_which_and_leaves_no_error_behind():
    shape = r"grid \(1, 1, 1\), block \(2048, 1, 1\), 0 bytes of dynamic shared memory"
    with pytest.raises(RuntimeError, match=f"block_of_2048: .*invalid configuration.*; {shape}"):
        run("block_of_2048", torch.rand(64))
    with pytest.raises(RuntimeError) as error:
        run("empty_grid", torch.rand(64))
    assert "an earlier call left" not in str(error.value)


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
    """The memory around a view is allocated, but does not belong to it."""
    wide = torch.rand(3, 64)
    with pytest.raises(RuntimeError, match="0 bytes behind a tensor of 256 bytes"):
        run("reads_one_too_many", wide[1])


def test_fibers_change_stacks_where_the_system_checks_longjmp(monkeypatch):
    here = _compilers.cxx()
    checks = dataclasses.replace(here, command=(*here.command, "-D_FORTIFY_SOURCE=2"))
    monkeypatch.setattr(_compilers, "cxx", lambda: checks)
    threads, *_ = compile_all(*cuda_emulator.emulator())
    names = subprocess.run(["nm", threads], capture_output=True, text=True, check=True).stdout
    assert "longjmp" in names
    assert "longjmp_chk" not in names


# ---- bugs planted into the kernels that ship -----------------------------------------------------


def exercise(op):
    """The launches of the battery's check of every launch shape, without the reference."""
    for dtype, keywords in (
        (torch.float32, op.variants[-1]),
        (torch.bfloat16, op.variants[0]),
    ):
        for plain in op.launches(dtype, "cpu"):
            for inputs in aligned_and_not(plain):
                results = op.differentiable(inputs, keywords)
                backward(results, [torch.ones_like(x) for x in results])


@pytest.fixture
def emulated():
    cuda_emulator.select(True)
    with ops.use_backend("cpp"):
        yield
    cuda_emulator.select(False)


OPS = compiled_ops()


FAR = [name for name, op in OPS.items() if op.far]


def check_far(op):
    check_far_rows(op, "cpu", lambda only: cuda_emulator.only_last_block(op.source, only))


@pytest.mark.parametrize("op", FAR)
def test_indices_beyond_32_bits(emulated, op):
    check_far(OPS[op])


@pytest.mark.parametrize("op", OPS)
def test_mutations_are_there(op):
    assert OPS[op].mutations, "an op names bugs that the emulator must catch in its kernels"


CHECKS = {
    "compilation": exercise,
    "launches": exercise,
    "far": check_far,
    "elements": lambda op: op.elements(),
}

# Bugs in the code that all ops share, planted under one of them.
SHARED = (
    Mutation(
        "common/tensor.h",
        "torch::stable::accelerator::DeviceGuard guard_;",
        "int32_t guard_;",
        "launched on another stream than the tensors' current one",
    ),
    Mutation(
        "common/tensor.h",
        "guard_(tensor.get_device_index())",
        "guard_(0)",
        "a guard of another device than the tensors'",
    ),
    Mutation(
        "common/tensor.h",
        "aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_)",
        "aoti_torch_get_current_cuda_stream(0, &stream_)",
        "the stream of another device than the tensors'",
    ),
)


def planted_into_a_copy(folder, file, before, after):
    """A copy of the sources with one change."""
    shutil.copytree(extensions.source_folder(), folder)
    text = (folder / file).read_text()
    assert before in text
    (folder / file).write_text(text.replace(before, after))
    return folder


def only_for(folder, *dtypes):
    """Take the kernels of other dtypes out of a copy, which then compiles in half of the time.

    A launch of one that is missing returns an error that no test expects.
    """
    for name in {"Float64", "Float32", "BFloat16", "Float16"}.difference(dtypes):
        case = re.compile(rf"\n +case DType::k{name}: return \w+\(.*\);")
        assert case.search((folder / "common" / "cuda.cuh").read_text())
        for path in folder.rglob("*.cuh"):
            path.write_text(case.sub("", path.read_text()))


@pytest.mark.parametrize(
    ("op", "mutation"),
    [
        *((name, one) for name, op in OPS.items() for one in op.mutations),
        *((next(iter(OPS)), one) for one in SHARED),
    ],
)
def test_bugs_in_shipped_kernels_are_caught(emulated, tmp_path, op, mutation):
    stem = OPS[op].source
    folder = planted_into_a_copy(
        tmp_path / "cuda_src", mutation.file, mutation.before, mutation.after
    )
    only_for(folder, "Float32", "BFloat16")  # those of all checks
    sources = (folder / f"{stem}.cpp", folder / f"{stem}.cu")

    def build_and_check():
        extension = cuda_emulator.library(f"jitops_{stem}_cpp", *sources, include=folder)
        cuda_emulator.exchange(built_in(stem), extension)
        CHECKS[mutation.by](OPS[op])

    error = RuntimeError if mutation.by in ("launches", "far") else AssertionError
    with pytest.raises(error, match=mutation.caught):
        build_and_check()


def test_batch_all_in_several_chunks(emulated, tmp_path):
    """The launchers take some anchors at a time, in tests all of them."""
    stem = "batch_all_triplet_loss"
    folder = planted_into_a_copy(
        tmp_path / "cuda_src", f"{stem}.cu", "int64_t{1} << 22", "int64_t{100}"
    )
    only_for(folder, "Float64")
    sources = (folder / f"{stem}.cpp", folder / f"{stem}.cu")
    extension = cuda_emulator.library(f"jitops_{stem}_cpp", *sources, include=folder)
    cuda_emulator.exchange(built_in(stem), extension)
    for name in (stem, f"{stem}, references"):
        op = OPS[name]
        inputs = leaves(op.inputs((33, 5), torch.float64, "cpu"))
        theirs = leaves(inputs)
        for one, other in zip(
            torch.autograd.grad(op.call(*inputs), inputs),
            torch.autograd.grad(op.reference(*theirs), theirs),
            strict=True,
        ):
            close(one, other, torch.float64)


# ---- conversions, bit for bit --------------------------------------------------------------------


def stored(dtype, folder=None):
    """The bits that ``store`` of common/cuda.cuh writes for numbers."""
    exact = torch.arange(2**16).int().to(torch.uint16).view(dtype).float()
    exact = exact[exact.isfinite()].sort().values.unique()
    between = (exact[:-1] + exact[1:]) / 2  # ties, and numbers beside them
    inf = torch.tensor(float("inf"))
    x = torch.cat([exact, between, between.nextafter(inf), between.nextafter(-inf)])
    x = torch.cat(
        [x, torch.tensor([65519.996, 65520.0, -65520.0, 3.4e38, -3.4e38, inf, -inf, 0.0])]
    )
    name = {torch.float16: "stores_float16", torch.bfloat16: "stores_bfloat16"}[dtype]
    return x, run(name, x, folder=folder).to(torch.int32).to(torch.uint16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_stores_round_to_nearest_even(dtype):
    x, bits = stored(dtype)
    assert torch.equal(bits, x.to(dtype).view(torch.uint16))


@pytest.mark.parametrize(
    ("dtype", "before", "after"),
    [
        (torch.float16, "__float2half_rn(x)", "__float2half_rz(x)"),
        (torch.bfloat16, "__float2bfloat16_rn(x)", "__float2bfloat16_rz(x)"),
    ],
    ids=str,
)
def test_stores_that_truncate_are_caught(tmp_path, dtype, before, after):
    folder = planted_into_a_copy(tmp_path / "cuda_src", "common/cuda.cuh", before, after)
    x, bits = stored(dtype, folder)
    assert not torch.equal(bits, x.to(dtype).view(torch.uint16))


def test_fast_functions_are_no_better_than_on_a_gpu():
    """They have the errors that the CUDA C++ programming guide allows, including zero results."""
    x = torch.linspace(-80, 80, 32)
    exponential, logarithm, quotient = run("fast", x, size=96).view(3, 32).double()
    wide = x.double()
    off = (exponential / wide.exp() - 1).abs()
    assert 2**-23 < off.max() < (2 + 1.173 * 80) * 2**-23
    positive = wide.abs()
    off = (logarithm - positive.log()).abs()
    assert 2**-24 < off.max() < 3 * 2**-21
    assert (quotient[wide.abs() > 10] != 0).all()  # 1 / x
    assert run("fast", torch.full((32,), 1.5e38), size=96).view(3, 32)[2].eq(0).all()
