"""Losses over a process group: value and gradients are those of one process with the whole batch.

The file is also the program that each process runs.
"""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import ops
from tests.harness.op_under_test import TOLERANCE

ROOT = Path(__file__).resolve().parents[2]
ROWS = (7, 3, 0, 5)  # of each process
MODULES = (ops.BatchHardTripletLoss, ops.InfoNCELoss, ops.SupConLoss)
LABELS = torch.tensor([0, 1, 2, 0, 1, 5, 0, 2, 2, 1, 0, 4, 1, 2, 0])


def batch_hard(x, group=None, **keywords):
    return ops.batch_hard_triplet_loss(x, labels_of(x), group=group, **keywords)


def supcon(x, group=None, **keywords):
    return ops.supcon_loss(x, labels_of(x), group=group, **keywords)


def info_nce(x, group=None, labels=False, **keywords):
    query, key = x.unflatten(1, (2, 2)).unbind(1)
    labels = labels_of(x) if labels else None
    return ops.info_nce_loss(query, key, labels=labels, group=group, **keywords)


# A loss, and its keywords.
CASES = [
    (batch_hard, {}),
    (batch_hard, {"incomplete": "zero", "distance": "cosine", "margin": "soft"}),
    (batch_hard, {"reduction": "sum", "distance": "squared_euclidean"}),
    (batch_hard, {"reduction": "none"}),
    (supcon, {}),
    (supcon, {"incomplete": "zero", "normalize": False}),
    (supcon, {"reduction": "sum"}),
    (supcon, {"reduction": "none"}),
    *(
        (info_nce, {"form": form, "temperature": 0.5, "reduction": reduction, "labels": labels})
        for form in ("one_way", "symmetric", "two_views", "sigmoid")
        for reduction, labels in (("mean", False), ("sum", True))
    ),
    (info_nce, {"reduction": "none"}),
]


# ---- in each process -----------------------------------------------------------------------------


def place():
    """The first row of this process, and the one behind its last."""
    rank = dist.get_rank()
    return sum(ROWS[:rank]), sum(ROWS[: rank + 1])


def labels_of(x):
    whole = LABELS[: sum(ROWS[: dist.get_world_size()])]
    first, end = place()
    return whole if len(x) == len(whole) else whole[first:end]


def check(loss, keywords, dtype, backend):
    torch.manual_seed(0)
    count, (first, end) = sum(ROWS[: dist.get_world_size()]), place()
    whole = torch.randn(count, 4, dtype=torch.float64).to(dtype).requires_grad_()
    own = whole.detach()[first:end].clone().requires_grad_()
    with ops.use_backend(backend):
        expected, result = loss(whole, **keywords), loss(own, group=dist.group.WORLD, **keywords)
        per_row = keywords.get("reduction") == "none"
        weights = torch.randn(count, dtype=torch.float64).to(dtype) if per_row else torch.tensor(1)
        (expected * weights).sum().backward()
        (result * (weights[first:end] if per_row else 1)).sum().backward()
    # Sums over processes have another order: a few hundred roundings, as in op_under_test.py.
    same = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(result, expected[first:end] if per_row else expected, **same)
    torch.testing.assert_close(own.grad, whole.grad[first:end], **same)


def refusals():
    rank, x = dist.get_rank(), torch.randn(4, 3)
    for mine, words in (
        (torch.randn(4, 3 + rank % 2), "the same columns on all processes"),
        (x.to(torch.float64 if rank else torch.float32), "the same dtype on all"),
        (x.clone().requires_grad_(rank == 0), "the same requires_grad on all"),
    ):
        with pytest.raises(ops.ArgumentError, match=f"embeddings must have {words}"):
            ops.batch_hard_triplet_loss(mine, torch.arange(4), group=dist.group.WORLD)
    x.requires_grad_()
    loss = ops.batch_hard_triplet_loss(x, torch.arange(4) % 2, group=dist.group.WORLD)
    with pytest.raises(ops.GradientError, match="has no second derivative"):
        torch.autograd.grad(loss, x, create_graph=True)


def copies():
    """A copy of a module talks to the same processes, as a model's moving average needs."""
    for module in MODULES:
        loss = module(reduction="sum", group=dist.group.WORLD)
        other = copy.deepcopy(torch.nn.ModuleList([loss, loss]))
        assert other[0] is other[1] is not loss
        assert other[0].group is loss.group
        assert repr(other[0]) == repr(loss)


def main():
    dist.init_process_group("gloo")
    for loss, keywords in CASES:
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            for backend in ("torch", "cpp"):
                check(loss, keywords, dtype, backend)
    refusals()
    copies()
    dist.destroy_process_group()
    print("all equal")


# ---- in pytest -----------------------------------------------------------------------------------


@pytest.mark.cpp
@pytest.mark.thorough
@pytest.mark.parametrize("processes", [2, 4])
def test_equal_to_one_process(processes):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc-per-node={processes}", "-m", "tests.losses.test_distributed"]  # fmt: skip
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count("all equal") == processes


def test_no_group():
    x = torch.randn(4, 3)
    with pytest.raises(ops.ArgumentTypeError, match="must be a torch.distributed.ProcessGroup, g"):
        ops.batch_hard_triplet_loss(x, torch.arange(4), group="world")


@pytest.mark.parametrize("module", MODULES)
def test_group_is_an_attribute_like_others(module):
    """All processes make the module, those outside the group too; only members call it."""
    loss = module(group=dist.GroupMember.NON_GROUP_MEMBER)
    assert loss.group is dist.GroupMember.NON_GROUP_MEMBER
    with pytest.raises(ops.ArgumentTypeError, match="must be a torch.distributed.ProcessGroup, g"):
        loss(torch.randn(4, 3), torch.randn(4, 3) if module is ops.InfoNCELoss else torch.arange(4))
    assert pickle.loads(pickle.dumps(module())).group is None
    assert not hasattr(module.__new__(module), "group")
    assert not hasattr(module, "group")


@pytest.mark.parametrize("module", MODULES)
def test_nothing_keeps_a_group_that_was_destroyed(process_group, module):
    """Otherwise its threads can end the process, when they free a graph or when Python exits."""
    group = dist.new_group()
    loss = module(group=group)
    x = torch.randn(6, 4, requires_grad=True)
    others = torch.arange(6) % 2
    if module is ops.InfoNCELoss:
        others = torch.randn(6, 4, requires_grad=True)
    with ops.use_backend("torch"):
        total = loss(x, others)
    dist.destroy_process_group(group)
    group = weakref.ref(group)
    assert group() is None
    for use in (total.backward, lambda: loss(x, others)):
        with pytest.raises(ops.ArgumentError, match=r"group must be alive, but it was destroyed"):
            use()


if __name__ == "__main__":
    main()
