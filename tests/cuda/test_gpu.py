"""Tests that need a GPU: streams, graphs, sizes, devices. ``make gpu`` runs them."""

from __future__ import annotations

import pytest
import torch

import ops
from tests.harness.helpers import run
from tests.harness.op_under_test import check_far_rows, close, compiled_ops, leaves

pytestmark = pytest.mark.cuda

OPS = compiled_ops()


@pytest.fixture(params=OPS, ids=lambda name: f"cuda-{name}")
def op(request):
    with ops.use_backend("cuda"):
        yield OPS[request.param]


def busy(op, device="cuda"):
    return op.busy(torch.float32, device)


def step(op, inputs):
    """Run forward and backward; return results and gradients."""
    results = op.differentiable(inputs, op.variants[0])
    return [*results, *torch.autograd.grad(sum(x.sum() for x in results), inputs)]


def all_equal(some, others):
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


def test_the_current_stream_is_used(op):
    """The inputs are ready late, and only on that stream."""
    source = busy(op)
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
    inputs = [leaves(busy(op)) for _ in range(2)]
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
    """A graph is captured once and replayed on other numbers."""
    inputs = leaves(busy(op))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(op, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(op, inputs)
    other = busy(op)
    with torch.no_grad():
        for one, new in zip(inputs, other, strict=True):
            one.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    for one, expected in zip(captured, step(op, leaves(other)), strict=True):
        close(one, expected, torch.float32)


def test_cuda_graph_of_a_first_call(op):
    """The first launch loads kernels, here while a graph is captured."""
    run(
        f"""
        import torch, ops
        from tests.harness.op_under_test import compiled_ops, leaves
        from tests.cuda.test_gpu import all_equal, step
        op = compiled_ops()[{op.name!r}]
        inputs = leaves(op.busy(torch.float32, "cuda"))
        torch.ones(64, 64, device="cuda").mm(torch.ones(64, 64, device="cuda"))  # starts cuBLAS
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with ops.use_backend("cuda"):
            with torch.cuda.graph(graph):
                captured = step(op, inputs)
            graph.replay()
            torch.cuda.synchronize()
            assert all_equal(captured, step(op, inputs))
        """
    )


# torch warns at the first call, but sets the mode.
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_nothing_waits_for_the_gpu(op):
    inputs = leaves(busy(op))
    step(op, inputs)
    try:
        torch.cuda.set_sync_debug_mode("error")
        step(op, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_deterministic_mode(op):
    inputs = leaves(busy(op))
    torch.use_deterministic_algorithms(True)
    try:
        first = step(op, inputs)
        for _ in range(10):
            assert all_equal(step(op, inputs), first)
    finally:
        torch.use_deterministic_algorithms(False)


def test_inductor(op):
    torch._dynamo.reset()
    inputs = leaves(busy(op))
    compiled = torch.compile(
        lambda *t: sum((2 * x).sum() for x in op.differentiable(t, op.variants[0])), fullgraph=True
    )
    same = leaves(inputs)
    compiled(*inputs).backward()
    sum((2 * x).sum() for x in op.differentiable(same, op.variants[0])).backward()
    for one, other in zip(inputs, same, strict=True):
        close(one.grad, other.grad, torch.float32)


@pytest.mark.parametrize("name", [f"cuda-{name}" for name, op in OPS.items() if op.far])
def test_indices_beyond_32_bits(name):
    free, _ = torch.cuda.mem_get_info()
    if free < 24 << 30:
        pytest.skip(f"needs 24 GiB of free GPU memory, there are {free >> 30}")
    with ops.use_backend("cuda"):
        check_far_rows(OPS[name.removeprefix("cuda-")], "cuda")


def test_another_device_than_the_current_one(op):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs = busy(op, "cuda:0")
    there = leaves([t.to("cuda:1") for t in inputs])
    assert torch.cuda.current_device() == 0
    got = step(op, there)
    assert {t.device.index for t in got} == {1}
    assert torch.cuda.current_device() == 0
    for one, other in zip(got, step(op, leaves(inputs)), strict=True):
        close(one.to("cuda:0"), other, torch.float32)
