"""Ops on the DTensors of two processes: as with all values in one, or an error of ours.

The file is also the program that each process runs. ``test_dtensors`` of the battery has all ops.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import (
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)

import ops
from tests.harness.op_under_test import close

ROOT = Path(__file__).resolve().parents[2]
WHOLE, ROWS, COLUMNS = Replicate(), Shard(0), Shard(1)


def improved(reduction):
    return lambda *t: (ops.improved_triplet_loss(*t, -1.0, 0.1, 0.5, reduction=reduction),)


def both(x):
    return ops.normalize_with_norm(x)[:2]


def sequence(*tensors):
    output, state = ops.lltm_sequence(*tensors)
    return output, state.cell


def linear(*tensors):
    return (ops.linear(*tensors),)


# A function, the shapes of its inputs, and their placements. Five rows: one process has more.
LLTM = ((5, 2), (9, 5), (1, 9), (5, 3), (5, 3))
CASES = [
    *(
        (improved(reduction), ((5, 4),) * 3, placements)
        for reduction in ("mean", "sum", "none")
        for placements in ((ROWS,) * 3, (COLUMNS,) * 3, (WHOLE,) * 3, (ROWS, WHOLE, COLUMNS))
    ),
    *((both, ((5, 4),), (placement,)) for placement in (WHOLE, ROWS, COLUMNS)),
    *(
        (linear, ((5, 4), (3, 4), (3,)), placements)
        for placements in itertools.product(
            (WHOLE, ROWS, COLUMNS), (WHOLE, ROWS, COLUMNS), (WHOLE, ROWS)
        )
    ),
    (ops.lltm, LLTM, (WHOLE,) * 5),
    (ops.lltm, LLTM, (ROWS, WHOLE, WHOLE, ROWS, ROWS)),
    (ops.lltm, LLTM, (WHOLE, ROWS, COLUMNS, WHOLE, WHOLE)),
    (sequence, ((4, 5, 2), *LLTM[1:]), (COLUMNS, WHOLE, WHOLE, ROWS, ROWS)),
]


# ---- in each process -----------------------------------------------------------------------------


def main():
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))

    def spread(values, placements):
        pairs = zip(values, placements, strict=True)
        return [distribute_tensor(x.detach(), mesh, [one]).requires_grad_() for x, one in pairs]

    torch.manual_seed(0)
    for function, shapes, placements in CASES:
        plain = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
        parts = spread(plain, placements)
        results, expected = function(*parts), function(*plain)
        found = torch.autograd.grad(sum(x.square().sum() for x in results), parts)
        grads = torch.autograd.grad(sum(x.square().sum() for x in expected), plain)
        for one, other in zip((*results, *found), (*expected, *grads), strict=True):
            close(one.full_tensor(), other, torch.float64)
    steps = spread([torch.randn(shape) for shape in ((4, 5, 2), *LLTM[1:])], (ROWS, *[WHOLE] * 4))
    with pytest.raises(ops.ArgumentError, match="lltm_sequence cannot run on DTensors with these"):
        ops.lltm_sequence(*steps)
    plain = [torch.randn(5, 4, dtype=torch.float64) for _ in range(3)]
    own = [x.to_local() for x in spread(plain, (ROWS,) * 3)]  # as the docs say
    total = improved("sum")(*own)[0].detach() / 5
    dist.all_reduce(total)
    close(total, improved("mean")(*plain)[0], torch.float64)
    dist.destroy_process_group()
    print("all equal")


# ---- in pytest -----------------------------------------------------------------------------------


@pytest.mark.thorough
def test_equal_to_one_process():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node=2", "-m", "tests.core.test_dtensors"]  # fmt: skip
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count("all equal") == 2


def three(mesh):
    tensors = (torch.randn(5, 4) for _ in range(3))
    return [distribute_tensor(x, mesh, [ROWS]).requires_grad_() for x in tensors]


@pytest.mark.cpp
def test_only_a_request_by_name_refuses(process_group):
    inputs = three(init_device_mesh("cpu", (1,)))
    (loss,) = improved("mean")(*inputs)
    with ops.use_backend("compiled"):
        with pytest.warns(ops.BackendWarning, match="take no DTensor: call .full_tensor()"):
            (result,) = improved("mean")(*inputs)
        assert torch.equal(result.full_tensor(), loss.full_tensor())
    with (
        ops.use_backend("cpp"),
        pytest.raises(ops.BackendUnavailableError, match="'cpp' was asked for.*no DTensor"),
    ):
        improved("mean")(*inputs)


@pytest.mark.filterwarnings("ignore::ops.BackendWarning")
@pytest.mark.parametrize("asked", ["torch", "compiled"])
def test_in_a_graph(process_group, asked):
    inputs = three(init_device_mesh("cpu", (1,)))
    (loss,) = improved("mean")(*inputs)
    torch._dynamo.reset()
    compiled = torch.compile(improved("mean"), fullgraph=True, backend="eager")
    with ops.use_backend(asked):
        (result,) = compiled(*inputs)
    grads = [torch.autograd.grad(x, inputs) for x in (result, loss)]
    for one, other in zip((result, *grads[0]), (loss, *grads[1]), strict=True):
        close(one.full_tensor(), other.full_tensor(), torch.float32)


def test_labels_that_are_dtensors(process_group):
    labels = distribute_tensor(torch.arange(4), init_device_mesh("cpu", (1,)), [WHOLE])
    with pytest.raises(ops.ArgumentError, match="labels must be a plain tensor, got a DTensor"):
        ops.batch_hard_triplet_loss(torch.randn(4, 3), labels)
    with pytest.raises(ops.ArgumentError, match="target must be a plain tensor, got a DTensor"):
        ops.linear_cross_entropy(torch.randn(4, 3), torch.randn(5, 3), labels)


if __name__ == "__main__":
    main()
