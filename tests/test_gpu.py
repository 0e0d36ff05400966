"""What only a GPU can show: streams, graphs, sizes, devices. ``make gpu`` runs it."""

from __future__ import annotations

import pytest
import torch

import ops
from tests.op_under_test import close, leaves
from tests.test_improved_triplet_loss import OP
from tests.test_lltm import TestLLTM as Steps
from tests.test_lltm import TestLLTMSequence as Sequences

pytestmark = pytest.mark.cuda

OPS = {"improved_triplet_loss": OP, "lltm": Steps.op, "lltm_sequence": Sequences.op}
SHAPES = {
    "improved_triplet_loss": (4096, 512),
    "lltm": (512, 64),
    "lltm_sequence": (16, 64, 32),
}


@pytest.fixture(params=OPS)
def op(request):
    with ops.use_backend("cuda"):
        yield OPS[request.param], SHAPES[request.param]


def step(op, inputs):
    """Results and gradients."""
    results = op.differentiable(inputs, op.variants[0])
    return [*results, *torch.autograd.grad(sum(x.sum() for x in results), inputs)]


def all_equal(some, others):
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


def test_the_current_stream_is_used(op):
    """The inputs are ready late, and on that stream only."""
    op, shape = op
    source = op.inputs(shape, torch.float32, "cuda")
    expected = step(op, leaves(source))
    late = leaves([torch.full_like(t, float("nan")) for t in source])
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)
        with torch.no_grad():
            for one, other in zip(late, source, strict=True):
                one.copy_(other)
        got = step(op, late)
    torch.cuda.synchronize()
    assert all_equal(got, expected)


def test_two_streams_at_once(op):
    op, shape = op
    inputs = [leaves(op.inputs(shape, torch.float32, "cuda")) for _ in range(2)]
    expected = [step(op, one) for one in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    got = []
    for _ in range(20):
        for stream, one in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                got.append(step(op, one))
    torch.cuda.synchronize()
    for number, one in enumerate(got):
        assert all_equal(one, expected[number % 2])


def test_cuda_graph(op):
    """Captured once, replayed on other numbers."""
    op, shape = op
    inputs = leaves(op.inputs(shape, torch.float32, "cuda"))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(op, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(op, inputs)
    other = op.inputs(shape, torch.float32, "cuda")
    with torch.no_grad():
        for one, new in zip(inputs, other, strict=True):
            one.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    for one, expected in zip(captured, step(op, leaves(other)), strict=True):
        close(one, expected, torch.float32)


def test_nothing_waits_for_the_gpu(op):
    op, shape = op
    inputs = leaves(op.inputs(shape, torch.float32, "cuda"))
    step(op, inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(op, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_deterministic_mode(op):
    op, shape = op
    inputs = leaves(op.inputs(shape, torch.float32, "cuda"))
    torch.use_deterministic_algorithms(True)
    try:
        first = step(op, inputs)
        for _ in range(10):
            assert all_equal(step(op, inputs), first)
    finally:
        torch.use_deterministic_algorithms(False)


def test_inductor(op):
    op, shape = op
    torch._dynamo.reset()
    inputs = leaves(op.inputs(shape, torch.float32, "cuda"))
    compiled = torch.compile(
        lambda *t: sum((2 * x).sum() for x in op.differentiable(t, op.variants[0])), fullgraph=True
    )
    same = leaves(inputs)
    compiled(*inputs).backward()
    sum((2 * x).sum() for x in op.differentiable(same, op.variants[0])).backward()
    for one, other in zip(inputs, same, strict=True):
        close(one.grad, other.grad, torch.float32)


def needs_memory(gib):
    free, _ = torch.cuda.mem_get_info()
    if free < gib << 30:
        pytest.skip(f"needs {gib} GiB of free GPU memory, there are {free >> 30}")


def test_more_than_2_31_elements_of_a_loss():
    """The last row, whose elements lie beyond what 32 bits can count, is as if it were alone."""
    needs_memory(16)
    rows, cols = 2**31 // 512 + 3, 512
    anchor = torch.zeros(rows, cols, dtype=torch.bfloat16, device="cuda")
    anchor[-1] = torch.linspace(-1, 1, cols, device="cuda").bfloat16()
    others = torch.randn(2, 1, cols, device="cuda").bfloat16()
    arguments = (-1.0, 0.01, 0.5, 1e-6, "none")
    with ops.use_backend("cuda"):
        anchor.requires_grad_()
        loss = ops.improved_triplet_loss(anchor, *others, *arguments)
        loss[-1].backward()
        alone = anchor.detach()[-1:].clone().requires_grad_()
        expected = ops.improved_triplet_loss(alone, *others, *arguments)
        expected.backward()
    assert torch.equal(loss[-1:], expected)
    assert torch.equal(anchor.grad[-1:], alone.grad)
    assert anchor.grad[:-1].abs().amax() == 0


def test_more_than_2_31_elements_of_gates():
    needs_memory(24)
    batch, size = 2**31 // 48 + 5, 16
    w = torch.randn(3 * size, size + 1, device="cuda").bfloat16()
    b = torch.randn(3 * size, device="cuda").bfloat16()
    x, h, c = (torch.zeros(batch, n, dtype=torch.bfloat16, device="cuda") for n in (1, size, size))
    few = slice(batch - 3, batch)
    h[few] = 0.5
    with ops.use_backend("cuda"), torch.no_grad():
        results = ops.lltm(x, w, b, h, c)
        expected = ops.lltm(x[few], w, b, h[few], c[few])
    for one, other in zip(results, expected, strict=True):
        close(one[few], other, torch.bfloat16)


def test_another_device_than_the_current_one(op):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    op, shape = op
    inputs = op.inputs(shape, torch.float32, "cuda:0")
    there = leaves([t.to("cuda:1") for t in inputs])
    assert torch.cuda.current_device() == 0
    got = step(op, there)
    assert {t.device.index for t in got} == {1}
    assert torch.cuda.current_device() == 0
    for one, other in zip(got, step(op, leaves(inputs)), strict=True):
        close(one.to("cuda:0"), other, torch.float32)
