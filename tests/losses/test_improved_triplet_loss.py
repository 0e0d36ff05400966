"""The improved triplet loss: its reference, the battery, and its own tests."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ops
from ops._core import blocks
from tests.harness.helpers import run
from tests.harness.op_under_test import DTYPES, Far, Mutation, OpUnderTest, blank, close, leaves
from tests.harness.row_battery import RowBattery


def reference(anchor, positive, negative, t1, t2, beta, eps=1e-6, reduction="mean"):
    """The loss as a tutorial writes it, through torch's distance and its square root."""
    matched = F.pairwise_distance(anchor, positive, eps=eps) ** 2
    mismatched = F.pairwise_distance(anchor, negative, eps=eps) ** 2
    hinge = torch.clamp(matched - mismatched, min=t1) + beta * torch.clamp(matched, min=t2)
    return {"mean": torch.mean, "sum": torch.sum, "none": lambda x: x}[reduction](hinge)


def inputs(shape, dtype, device):
    """Embeddings on the scale where all four combinations of the clamps occur."""
    return [
        0.5 * torch.randn(shape, dtype=torch.float64, device=device).to(dtype) for _ in range(3)
    ]


def operator_samples(device):
    for dtype in (torch.float32, torch.float64):
        a, p, n = inputs((3, 5), dtype, device)
        for reduction in (0, 1, 2):
            forward = torch.ops.jitops.improved_triplet_loss_forward.default
            yield forward, (a, p, n, -0.5, 1.0, 0.3, 1e-6, reduction)
            loss, state = forward(a, p, n, -0.5, 1.0, 0.3, 1e-6, reduction)
            backward = torch.ops.jitops.improved_triplet_loss_backward.default
            for needed in ((True, True, True), (False, True, False), (False, False, False)):
                grad = torch.ones_like(loss)
                yield backward, (grad, a, p, n, state, 0.3, 1e-6, reduction, *needed)


# More rows than the grid has places for; parts of a warp to a row; a block; several blocks.
LAUNCHES = (
    *((37, cols) for cols in (1, 2, 3, 6, 20, 36, 68, 132)),
    (130, 4096),
    (3, 16384),
    (1, 2051),
    (17000, 33),
)


def far(device):
    anchor = blank(2**31 // 512 + 2**14, 512, device=device)
    others = [torch.randn(1, 512, device=device).bfloat16() for _ in range(2)]
    keywords = {"t1": -1.0, "t2": 0.01, "beta": 0.5, "reduction": "none"}
    return Far([anchor, *others], 0, keywords)


MUTATIONS = (
    Mutation(
        "improved_triplet_loss.cu",
        "row_sum(static_cast<A>(neg), of_negative)",
        "row_sum(static_cast<A>(neg), of_positive)",
        "race in shared memory",
    ),
    Mutation(
        "common/cuda.cuh",
        "shared[thread / kWarp] = x;\n  __syncthreads();",
        "shared[thread / kWarp] = x;",
        "shared memory",
    ),
    Mutation(
        "common/cuda.cuh",
        "<< (lane / count * count)",
        "",
        "which has not the lane that calls it",
    ),
    Mutation(
        "common/cuda.cuh",
        "(0xffffffffu >> (kWarp - count)) << (lane / count * count)",
        "0xffffffffu",
        "divergent threads: .* wait in __shfl_xor_sync|are not there or have returned",
    ),
    Mutation(
        "improved_triplet_loss.cu",
        "params.partials[2 * (row * splits + i) + 1]",
        "params.partials[2 * (row * splits + i) + 2]",
        "memory of a tensor read before it was written",
    ),
    Mutation(
        "common/cuda.cuh",
        "% kPackBytes == 0 &&",
        "% 4 == 0 &&",
        "misaligned address at improved_triplet_loss.cu:\\d+",
    ),
    Mutation(
        "improved_triplet_loss.cu",
        "neg = cuda::block_sum(neg, of_negative);\n  if (threadIdx.x != 0) return;",
        "if (threadIdx.x != 0) return;\n  neg = cuda::block_sum(neg, of_negative);",
        "divergent threads|have returned",
    ),
    Mutation(
        "improved_triplet_loss.cu",
        "row < params.rows; row += step) {\n    const A grad",
        "row <= params.rows; row += step) {\n    const A grad",
        "read out of bounds",
    ),
    Mutation(
        "improved_triplet_loss.cu",
        "for (; j < packs; j += apart) write",
        "for (; j + 1 < packs; j += apart) write",
        "a result of which .* bytes were never written",
    ),
    Mutation(
        "improved_triplet_loss.cu",
        "params.partials[blockIdx.x] = total;",
        "params.partials[0] = total;",
        "race in global memory|read before it was written",
    ),
    Mutation(
        "improved_triplet_loss.cu",
        "const int64_t at = row * params.cols + j * kWidth;",
        "const int at = row * params.cols + j * kWidth;",
        "may change value",
        by="compilation",
    ),
    Mutation(
        "improved_triplet_loss.cu",
        "const int64_t at = row * params.cols + j * kWidth;",
        "const int64_t at = static_cast<int>(row) * static_cast<int>(params.cols) + j * kWidth;",
        "a number beyond its type at improved_triplet_loss.cu",
        by="far",
    ),
)


OP = OpUnderTest(
    name="improved_triplet_loss",
    source="improved_triplet_loss",
    call=ops.improved_triplet_loss,
    reference=reference,
    names=("anchor", "positive", "negative"),
    shards=True,
    inputs=inputs,
    shapes=((1, 1), (32, 128), (5, 1023), (2, 3, 17), (40, 4, 8), (4, 5)),
    variants=(
        {"t1": -1.0, "t2": 0.01, "beta": 0.002},
        {"t1": -0.3, "t2": 2.0, "beta": 0.5, "reduction": "sum"},
        {"t1": 0.1, "t2": 0.7, "beta": 1.5, "eps": 1e-2, "reduction": "none"},
    ),
    module=lambda: ops.ImprovedTripletLoss(t1=-1.0, t2=0.01, beta=0.002),
    operator_samples=operator_samples,
    launches=lambda dtype, device: (inputs(shape, dtype, device) for shape in LAUNCHES),
    busy=lambda dtype, device: inputs((4096, 512), dtype, device),
    far=far,
    mutations=MUTATIONS,
)


class _InFloat32(TorchDispatchMode):
    """Notes how many elements the largest float32 tensor has that any function returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for one in tree_leaves(results):
            if isinstance(one, torch.Tensor) and one.dtype is torch.float32:
                self.largest = max(self.largest, one.numel())
        return results


class TestImprovedTripletLoss(RowBattery):
    op = OP

    def test_worked_by_hand(self, backend, device):
        """a=0, p=(3,0), n=(0,1): d+ = 9, d- = 1; max(8, -1) + 0.5 max(9, 2) = 12.5."""
        a = torch.zeros(1, 2, dtype=torch.float64, device=device, requires_grad=True)
        p = torch.tensor([[3.0, 0.0]], dtype=torch.float64, device=device, requires_grad=True)
        n = torch.tensor([[0.0, 1.0]], dtype=torch.float64, device=device, requires_grad=True)
        loss = ops.improved_triplet_loss(a, p, n, t1=-1.0, t2=2.0, beta=0.5, eps=0.0)
        loss.backward()
        assert loss.item() == 12.5
        assert a.grad.tolist() == [[-9.0, 2.0]]  # 2 * 1.5 * (a - p) - 2 * (a - n)
        assert p.grad.tolist() == [[9.0, 0.0]]
        assert n.grad.tolist() == [[0.0, -2.0]]

    def test_long_rows(self, backend, device):
        """Millions of equal terms: sums in float32 alone would be off by 1e-3 and more."""
        for dtype in (torch.float32, torch.bfloat16):
            a = torch.full((1, 2**22 + 3), 0.3162278, dtype=dtype, device=device)
            zero = torch.zeros_like(a)
            loss = ops.improved_triplet_loss(a, zero, zero, -1e30, 0.0, 1.0, eps=0.0)
            expected = a.double().square().sum()
            assert abs(loss.item() / expected.item() - 1) < 1e-6 + torch.finfo(dtype).eps

    def test_rows_far_apart(self, backend, device):
        """More than 2^31 elements from row to row; hardly any memory of it is ever touched."""
        apart = 2**31 + 64
        memory = torch.empty(apart + 64, dtype=torch.bfloat16, device=device)
        far = [memory.as_strided((2, 16), (apart, 1), 16 * i) for i in range(3)]
        near = inputs((2, 16), torch.bfloat16, device)
        for one, other in zip(far, near, strict=True):
            one.copy_(other)
        gradients = []
        for plain in (far, near):
            tensors = [t.detach().requires_grad_() for t in plain]
            ops.improved_triplet_loss(*tensors, **self.op.variants[0]).backward()
            gradients.append([t.grad for t in tensors])
        for one, other in zip(*gradients, strict=True):
            assert torch.equal(one, other)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_blocks_of_rows(self, backend, device, dtype, monkeypatch):
        """Several blocks, the last one shorter, and no block for an input without a gradient."""
        monkeypatch.setattr(blocks, "ELEMENTS_OF_A_THREAD", 64)
        monkeypatch.setattr(blocks, "ELEMENTS_ELSEWHERE", 64)
        for shape, keywords in itertools.product(((67, 5), (3, 41, 7)), self.op.variants):
            for needed in itertools.product((True, False), repeat=3):
                self.agree(inputs(shape, dtype, device), keywords, needed)

    def test_half_precision_is_widened_by_blocks(self, backend, device, monkeypatch):
        """Differences are taken in float32; all at once, they would double the memory."""
        monkeypatch.setattr(blocks, "ELEMENTS_OF_A_THREAD", 512)
        monkeypatch.setattr(blocks, "ELEMENTS_ELSEWHERE", 512)
        rows, cols = 1024, 64
        x = leaves(inputs((rows, cols), torch.bfloat16, device))
        with _InFloat32() as seen:
            torch.autograd.grad(ops.improved_triplet_loss(*x, -1.0, 0.01, 0.5), x)
        assert seen.largest <= max(2 * rows, 512 * torch.get_num_threads()) < rows * cols

    # d+ - d- and d+, and the gradient that reaches p through a factor of 2 * (p - a) = 2.
    @pytest.mark.parametrize(
        ("t1", "t2", "grad"),
        [
            (0.0, 1.0, 2 * 1.5),  # both clamps exactly at their edge: torch.clamp passes 1
            (0.1, 1.0, 2 * 0.5),  # the first one clamped
            (0.0, 1.1, 2 * 1.0),  # the second one clamped
            (0.1, 1.1, 0.0),
        ],
    )
    def test_gradient_at_the_clamps_edges(self, backend, device, t1, t2, grad):
        a = torch.zeros(1, 1, dtype=torch.float64, device=device)
        p = torch.ones(1, 1, dtype=torch.float64, device=device, requires_grad=True)
        n = torch.ones(1, 1, dtype=torch.float64, device=device)
        ops.improved_triplet_loss(a, p, n, t1, t2, beta=0.5, eps=0.0).backward()
        assert p.grad.item() == grad

    def test_anchor_equal_to_positive(self, backend, device):
        """At distance zero the gradient is zero: no square root is taken, so none is NaN."""
        a, n = inputs((3, 4), torch.float64, device)[:2]
        a.requires_grad_()
        ops.improved_triplet_loss(a, a.detach(), n, -1e9, 0.0, 1.0, eps=0.0).backward()
        assert torch.isfinite(a.grad).all()

    def test_half_precision_accumulates_in_float32(self, backend, device):
        """4096 ones: a bfloat16 sum would stop growing at 256."""
        a = torch.zeros(2, 4096, dtype=torch.bfloat16, device=device)
        p, n = torch.ones_like(a), torch.zeros_like(a)
        loss = ops.improved_triplet_loss(a, p, n, t1=0.0, t2=0.0, beta=0.0, eps=0.0)
        assert loss.item() == 4096.0

    def test_gradient_of_a_gradient_penalty(self, backend, device):
        """create_graph through a model, as gradient penalties use it."""
        weight = torch.randn(5, 4, dtype=torch.float64, device=device, requires_grad=True)
        x = inputs((6, 4), torch.float64, device)

        def penalty(loss):
            emb = [t.requires_grad_() @ weight.t() for t in x]
            (g,) = torch.autograd.grad(loss(*emb, -0.5, 0.1, 0.3), x[0], create_graph=True)
            return torch.autograd.grad(g.square().sum(), weight)[0]

        close(penalty(ops.improved_triplet_loss), penalty(reference), torch.float64)

    def test_a_margin_that_changes_under_compile(self, backend, device):
        torch._dynamo.reset()
        x = [t.to(device) for t in inputs((4, 5), torch.float64, device)]
        call = lambda t1: ops.improved_triplet_loss(*x, t1, 0.01, 0.5)  # noqa: E731
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
        for t1 in (-1.0, -0.5, 0.25, 0.75):
            close(compiled(t1), call(t1), torch.float64)

    def test_thresholds_beyond_float32_are_infinite(self, backend, device):
        x = [t.to(device) for t in inputs((4, 5), torch.float32, device)]
        assert ops.improved_triplet_loss(*x, 1e300, 0.0, 0.0).item() == torch.inf
        low = ops.improved_triplet_loss(*x, -1e300, -1e300, 1.0)
        close(low, ops.improved_triplet_loss(*x, -1e30, -1e30, 1.0), torch.float32)

    def test_names(self):
        assert ops.TripletLossFunc is ops.ImprovedTripletLoss

    def test_optimises(self, backend, device):
        """Gradient descent on the loss does what the loss is for."""
        a, p, n = leaves(inputs((16, 8), torch.float32, device))
        loss = ops.ImprovedTripletLoss(t1=-1.0, t2=0.01, beta=0.1)
        optimiser = torch.optim.SGD([a, p, n], lr=1.0)
        before = loss(a, p, n).item()
        for _ in range(50):
            optimiser.zero_grad()
            loss(a, p, n).backward()
            optimiser.step()
        assert loss(a, p, n).item() < -0.9 < before


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peak_memory_in_pure_torch(dtype):
    """Of inputs and gradients: neither intermediate tensors nor holes in the heap.

    The rest is code that torch loads at first use, and a block.
    """
    out, _ = run(
        f"""
        import re, torch, ops
        def step(rows):
            x = [torch.ones(rows, 512, dtype={dtype}, requires_grad=True) for _ in range(3)]
            torch.autograd.grad(ops.improved_triplet_loss(*x, -1.0, 0.01, 0.5), x)
        def peak():
            return int(re.search("VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
        step(8)
        open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew from here
        before = peak()
        for _ in range(3):
            step(32768)
        print(1024 * (peak() - before))
        """,
        JITOPS_BACKEND="torch",
        OMP_NUM_THREADS="1",
    )
    assert int(out) < 6 * 32768 * 512 * dtype.itemsize + 16e6


X = torch.randn(2, 3)
# arguments in place of (anchor, positive, negative, t1, t2, beta, eps, reduction) -> (error, text)
BAD = [
    ({"anchor": [1.0]}, ops.ArgumentTypeError, "anchor must be a torch.Tensor, got list"),
    (
        {"positive": X.int()},
        ops.ArgumentTypeError,
        "positive must have dtype float64, float32, bfloat16 or float16, got int32",
    ),
    (
        {"anchor": X.to(torch.complex64)},
        ops.ArgumentTypeError,
        "anchor must have dtype float64, float32, bfloat16 or float16, got complex64",
    ),
    (
        {"negative": X.double()},
        ops.ArgumentTypeError,
        "negative must have anchor's dtype float32, got float64",
    ),
    (
        {"negative": X.to_sparse()},
        ops.ArgumentError,
        "negative must be a dense tensor, got layout sparse_coo",
    ),
    (
        {"positive": X.to("meta")},
        ops.ArgumentError,
        "positive must be on anchor's device cpu, got meta",
    ),
    (
        {"positive": X[:, :2]},
        ops.ArgumentError,
        "anchor, positive and negative must have shapes that broadcast together, "
        "got anchor [2, 3], positive [2, 2], negative [2, 3]",
    ),
    (
        {"anchor": torch.tensor(1.0)},
        ops.ArgumentError,
        "anchor must have at least one dimension, got shape []",
    ),
    ({"t1": float("nan")}, ops.ArgumentError, "t1 must be a number, got nan"),
    ({"t2": float("nan")}, ops.ArgumentError, "t2 must be a number, got nan"),
    ({"beta": float("nan")}, ops.ArgumentError, "beta must be a number, got nan"),
    ({"eps": float("nan")}, ops.ArgumentError, "eps must be a number, got nan"),
    ({"beta": "0.1"}, ops.ArgumentTypeError, "beta must be a real number, got str"),
    ({"beta": True}, ops.ArgumentTypeError, "beta must be a real number, got bool"),
    (
        {"t1": torch.tensor(0.5, requires_grad=True)},
        ops.ArgumentTypeError,
        "t1 must be a real number, got Tensor",
    ),
    ({"t1": 10**400}, ops.ArgumentError, "t1 must be a number, got one beyond the range of floats"),
    (
        {"reduction": "avg"},
        ops.ArgumentError,
        "reduction must be one of none, mean, sum, got 'avg'; did you mean 'mean'?",
    ),
    (
        {"reduction": None},
        ops.ArgumentError,
        "reduction must be one of none, mean, sum, got None; did you mean 'none'?",
    ),
]


@pytest.mark.parametrize(("wrong", "error", "text"), BAD, ids=[text[:40] for *_, text in BAD])
def test_bad_arguments(backend, wrong, error, text):
    """One text, whatever the back end."""
    right = {"anchor": X, "positive": X, "negative": X, "t1": 0.0, "t2": 0.0, "beta": 1.0}
    with pytest.raises(error) as raised:
        ops.improved_triplet_loss(**{**right, **wrong})
    assert str(raised.value) == text
    assert isinstance(raised.value, ops.JitopsError)


@pytest.mark.parametrize(
    ("keywords", "text"),
    [
        ({"t1": float("nan")}, "t1 must be a number, got nan"),
        (
            {"reduction": "avg"},
            "reduction must be one of none, mean, sum, got 'avg'; did you mean 'mean'?",
        ),
    ],
)
def test_module_checks_when_it_is_made(keywords, text):
    with pytest.raises(ops.ArgumentError, match=text):
        ops.ImprovedTripletLoss(**{"t1": 0.0, "t2": 0.0, "beta": 1.0, **keywords})


@pytest.mark.parametrize("wrong", ["shape", "dtype", "rows"])
def test_operators_check_for_themselves(compiled, device, wrong):
    """Called past the Python checks, an operator refuses rather than read out of bounds."""
    ops.improved_triplet_loss(*inputs((2, 3), torch.float32, device), -1.0, 0.0, 1.0)  # loads it
    a, p, n = inputs((4, 3), torch.float32, device)
    forward = torch.ops.jitops.improved_triplet_loss_forward
    backward = torch.ops.jitops.improved_triplet_loss_backward
    with pytest.raises(RuntimeError, match="must have|must hold"):
        if wrong == "shape":
            forward(a, p[:2], n, 0.0, 0.0, 1.0, 0.0, 1)
        elif wrong == "dtype":
            forward(a, p.double(), n, 0.0, 0.0, 1.0, 0.0, 1)
        else:
            state = torch.zeros(3, dtype=torch.uint8, device=device)
            backward(a.new_ones(()), a, p, n, state, 1.0, 0.0, 1, True, True, True)
