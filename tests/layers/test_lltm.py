"""The LLTM, compared with its formulas: steps and sequences."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import pytest
import torch

import ops
from tests.harness.battery import Battery
from tests.harness.op_under_test import (
    DTYPES,
    Far,
    Mutation,
    OpUnderTest,
    backward,
    blank,
    close,
    leaves,
)


def reference(input, weights, bias, h, cell):
    """The unit from its formulas; for a sequence, all outputs and the last state."""
    if input.dim() == 3:
        outputs = []
        for step in input:
            h, cell = reference(step, weights, bias, h, cell)
            outputs.append(h)
        if not outputs:  # nothing depends on the parameters, so their gradients are 0
            nothing = 0 * sum(t.sum() for t in (input, weights, bias, h, cell))
            return nothing.expand(0, *h.shape), h + nothing, cell + nothing
        return torch.stack(outputs), h, cell
    joined = torch.cat((h, input), 1)
    gates = (joined[:, None] * weights[None]).sum(-1) + bias
    i, o, z = gates.split(h.shape[1], 1)
    elu = torch.where(z > 0, z, torch.expm1(z.clamp(max=0)))
    cell = cell + elu / (1 + torch.exp(-i))
    return torch.tanh(cell) / (1 + torch.exp(-o)), cell


def sequence(*tensors):
    output, state = ops.lltm_sequence(*tensors)
    return output, *state


def inputs(shape, dtype, device, size=3):
    """All inputs, for an ``input`` of this shape; parameters have the scale of the module's."""
    *_, batch, features = shape
    shapes = (shape, (3 * size, size + features), (1, 3 * size), (batch, size), (batch, size))
    tensors = [torch.randn(s, dtype=torch.float64) for s in shapes]
    tensors[1] = tensors[1] / math.sqrt(size + features)
    return [t.to(device, dtype) for t in tensors]


def operator_samples(name, shape):
    def samples(device):
        forward = getattr(torch.ops.jitops, f"{name}_forward").default
        backward = getattr(torch.ops.jitops, f"{name}_backward").default
        for dtype in (torch.float32, torch.float64):
            x, w, b, h, c = inputs(shape, dtype, device)
            yield forward, (x, w, b, h, c)
            kept = forward(x, w, b, h, c)
            saved = kept[2:] if name == "lltm" else (kept[0], *kept[2:])
            for needed in ((True,) * 5, (False, True, False, True, False), (False,) * 5):
                for grads in ((kept[0], c), (kept[0], None), (None, c)):
                    yield backward, (*grads, x, w, b, h, c, *saved, *needed)

    return samples


NAMES = ("input", "weights", "bias", "h", "cell")


class Outputs(ops.LLTM):
    """Only the outputs of a sequence."""

    def forward(self, input):
        return super().forward(input)[0]


def launches(*shapes):
    """Inputs for each launch shape: packs, single elements, several blocks."""
    return lambda dtype, device: (inputs(shape, dtype, device, size) for shape, size in shapes)


def far(device):
    """Cells beyond 2^31, on the emulator, because untouched memory costs nothing there."""
    batch, size = (2**31 // 48 + 5, 16) if device == "cuda" else (2**31 + 2**20, 1)
    weights = torch.randn(3 * size, size).bfloat16().to(device)
    bias = torch.randn(3 * size).bfloat16().to(device)
    blanks = [blank(batch, cols, device=device) for cols in (0, size, size)]
    return Far([blanks[0], weights, bias, *blanks[1:]], 4)


MUTATIONS = (
    Mutation(
        "lltm.cu",
        "pack_at<T, kWidth>(params.grad_gates, gate + 2 * params.size) = gz;",
        "pack_at<T, kWidth>(params.grad_gates, gate + 3 * params.size) = gz;",
        "out of bounds|race in global memory|never written",
    ),
    Mutation(
        "lltm.cu",
        "for (int64_t n = static_cast<int64_t>(blockIdx.x)",
        "for (int n = static_cast<int64_t>(blockIdx.x)",
        "may change value",
        by="compilation",
    ),
    Mutation(
        "lltm.cu",
        "const int64_t row = n / packs",
        "const int64_t row = static_cast<int>(n) / packs",
        "out of bounds",
        by="far",
    ),
    Mutation(
        "lltm.cuh",
        "float exp_minus_1(float x) { return expm1f(x); }",
        "float exp_minus_1(float x) { return expf(x) - 1; }",
        "assert",
        by="elements",
    ),
    Mutation(
        "lltm.cuh",
        "float exponential(float x) { return expf(x); }",
        "float exponential(float x) { return __expf(x); }",
        "assert",
        by="elements",
    ),
)

SEQUENCE_MUTATIONS = (
    Mutation(
        "lltm.cu",
        "pack_at<A, kEach>(data, at + n * kEach) = packs[n];",
        "pack_at<A, kEach>(data, at + n * kEach) = packs[0], n = kWidth;",
        "memory of a tensor read before it was written",
    ),
    Mutation(
        "lltm.cuh",
        "    state += step;\n    __syncthreads();\n",
        "    state += step;\n",
        "race in shared memory",
    ),
    Mutation(
        "lltm.cuh",
        "    __syncthreads();\n  }\n  if (my.has_row && all.grad_old_cell)",
        "  }\n  if (my.has_row && all.grad_old_cell)",
        "race in shared memory",
    ),
    Mutation(
        "lltm.cuh",
        "const float* mine = gates[my.part] + my.at;",
        "const float* mine = gates[(my.part + 1) % kTileRows] + my.at;",
        "shared memory read before it was written",
    ),
    Mutation(
        "lltm.cuh",
        "has_row = real && part < rows;",
        "has_row = part < rows;",
        "out of bounds|race in global memory",
    ),
)

STEP = OpUnderTest(
    name="lltm",
    source="lltm",
    call=ops.lltm,
    reference=reference,
    names=NAMES,
    shards=True,
    inputs=inputs,
    shapes=((1, 1), (16, 32), (5, 17), (2, 4)),
    edges=((0, 4), (1, 4), (1, 1), (3, 0), (0, 0)),
    large=(300, 40),
    module=lambda: ops.LLTM(4, 3),
    module_takes=1,
    autocast=torch.bfloat16,
    operator_samples=operator_samples("lltm", (2, 4)),
    launches=launches(((16, 32), 128), ((17, 5), 33), ((4, 3), 4), ((20, 5), 7), ((70, 4), 16)),
    busy=lambda dtype, device: inputs((512, 64), dtype, device, 128),
    far=far,
    elements=lambda: check_elements("cpp", "cpu", torch.float32, None, 5),
    mutations=MUTATIONS,
)

SEQUENCE = OpUnderTest(
    name="lltm_sequence",
    source="lltm",
    call=sequence,
    reference=reference,
    names=NAMES,
    shards=True,
    inputs=inputs,
    shapes=((1, 2, 3), (7, 16, 5), (3, 2, 4)),
    edges=((1, 1, 1), (2, 0, 3), (3, 1, 0), (0, 2, 3), (0, 0, 3)),
    large=(20, 50, 30),
    module=lambda: Outputs(4, 3),
    module_takes=1,
    autocast=torch.bfloat16,
    operator_samples=operator_samples("lltm_sequence", (3, 2, 4)),
    launches=launches(
        ((2, 4, 3), 4), ((3, 131, 5), 7), ((2, 20, 4), 64), ((2, 4, 3), 136), ((2, 20, 1), 129)
    ),
    busy=lambda dtype, device: inputs((16, 64, 32), dtype, device, 128),
    mutations=SEQUENCE_MUTATIONS,
)


class TestLLTM(Battery):
    op = STEP


class TestLLTMSequence(Battery):
    op = SEQUENCE


@pytest.mark.parametrize("size", [1, 3, 8, 16, 33, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sizes_around_those_of_registers(backend, device, size, dtype):
    """Sizes give tiles, single vectors and remainders of products, and packs on a GPU."""
    for batch, features in itertools.product((1, 3, 16, 17), (0, 1, 5, 32)):
        mine = leaves(inputs((2, batch, features), dtype, device, size))
        theirs = [t.detach().double().requires_grad_() for t in mine]
        results, expected = sequence(*mine), reference(*theirs)
        grads = [torch.randn_like(x) for x in expected]
        backward(results, [g.to(dtype) for g in grads])
        backward(expected, grads)
        for one, other in zip(results, expected, strict=True):
            close(one, other, dtype)
        for one, other in zip(mine, theirs, strict=True):
            close(one.grad, other.grad, dtype)


def test_products_too_large_for_our_own(backend, device):
    """Beyond some millions of multiplications, torch's matrix product runs."""
    mine = leaves(inputs((80, 100), torch.float64, device, 250))
    theirs = leaves(mine)
    results, expected = ops.lltm(*mine), reference(*theirs)
    sum(x.sum() for x in results).backward()
    sum(x.sum() for x in expected).backward()
    for one, other in zip(
        (*results, *(t.grad for t in mine)), (*expected, *(t.grad for t in theirs)), strict=True
    ):
        close(one, other, torch.float64)


def test_extreme_gates(backend, device):
    """Exponentials overflow and underflow: results are the limits, and no gradient is NaN."""
    for dtype in (torch.float32, torch.float64, torch.float16):
        large = 6e4 if dtype is torch.float16 else 1e30
        values = torch.tensor([-large, -100, -20, -1e-3, 0, 1e-3, 20, 100, large], dtype=dtype)
        x = torch.cartesian_prod(values, values).to(device).requires_grad_()
        bias = torch.zeros(3, dtype=dtype, device=device)
        weights = torch.tensor([[0, 1, 0], [0, 0, 1], [0, 0, 0.5]], dtype=dtype, device=device)
        state = torch.zeros(len(x), 1, dtype=dtype, device=device)
        results = ops.lltm(x, weights, bias, state, state)
        with ops.use_backend("torch"):
            expected = ops.lltm(
                x.detach().double(), *(t.double() for t in (weights, bias, state, state))
            )
        for one, other in zip(results, expected, strict=True):
            assert one.isfinite().all() or dtype is torch.float16
            close(one, other.to(dtype).double(), dtype)
        (grad,) = torch.autograd.grad(results.h.sum(), x)
        assert grad.isfinite().all()


# ---- each element, even if the functions of the gates are flat -----------------------------------

VALUES = (0, 1e-7, 1e-5, 1e-3, 0.3, 1, 5, 9, 17, 30, 60, 88.5, 100)
CELLS = (0, 1e-7, 1e-3, 0.3, 1, 5, 10, 20)


class Exact(NamedTuple):
    """Exact results and gradients for gates, cells and arriving gradients, in float64."""

    h: torch.Tensor
    cell: torch.Tensor
    grad_gates: torch.Tensor
    grad_cell: torch.Tensor
    cells: torch.Tensor  # the cells of all steps
    unscaled: tuple[torch.Tensor, torch.Tensor]  # both gradients if all slopes were 1
    kept: torch.Tensor  # the cells whose sums lose no digits


def exact(gates, cell, grad_h, grad_cell):
    """It never subtracts numbers that are almost equal, so float64 is exact enough."""

    def sigmoid(x):
        small = torch.exp(-x.abs())
        return torch.where(x > 0, 1, small) / (1 + small), small / (1 + small) ** 2

    i, o, z = gates.chunk(3, -1)
    (i, slope_i), (o, slope_o) = sigmoid(i), sigmoid(o)
    slope_z, z = torch.exp(z.clamp(max=0)), torch.where(z > 0, z, torch.expm1(z.clamp(max=0)))
    cells, kept = [cell], torch.ones_like(cell, dtype=torch.bool)
    for product in i * z:
        cells.append(cells[-1] + product)
        kept &= 2 * cells[-1].abs() >= cells[-2].abs() + product.abs()
    cells = torch.stack(cells[1:])
    square = torch.exp(-2 * cells.abs())
    slope_c = 4 * square / (1 + square) ** 2
    arrived = [grad_cell]
    for from_h in (grad_h * o * slope_c).flip(0):
        arrived.append(arrived[-1] + from_h)
    arrived = torch.stack(arrived[1:]).flip(0)
    tanh = cells.tanh()
    grad_gates = (arrived * z * slope_i, grad_h * tanh * slope_o, arrived * i * slope_z)
    most = grad_cell + (grad_h * o).flip(0).cumsum(0).flip(0)
    unscaled = (torch.cat((most * z, grad_h * tanh, most * i), -1).abs(), most[0])
    return Exact(tanh * o, cells[-1], torch.cat(grad_gates, -1), arrived[0], cells, unscaled, kept)


def check_elements(backend, device, dtype, steps, size):
    """Compare results and gradients element by element, with flat and with tiny gates.

    The weights pass each input to a gate unchanged. Tolerances, in units of the last place:

    - 16 of the dtype of the computation: four functions of at most 2, and the roundings between
      them. In half precision the result is rounded once more.
    - For gradients, 16 times the largest later abs(cell). For a large cell, 1 - tanh(cell)^2 is
      4 exp(-2 abs(cell)), so one unit in the cell is 2 abs(cell) units of it.
    - Four of the smallest normal numbers, because subnormal factors may be off by these.

    torch's derivatives of sigmoid and tanh are s (1 - s) and 1 - t^2 of rounded results. They
    are only exact to 4 units of the largest value of the slope, and its sigmoid is 0 if exp(-x)
    overflows. The pure-torch path is held to that accuracy only.
    """
    rows = 400
    shape = (steps or 1, rows, size)
    pick = lambda values, *shape: (  # noqa: E731
        torch.tensor(values, dtype=torch.float64)[torch.randint(len(values), shape)]
        * (torch.randint(2, shape) * 2 - 1)
    )
    gates, cell = pick(VALUES, *shape[:2], 3 * size).to(dtype), pick(CELLS, rows, size).to(dtype)
    grad_h, grad_cell = (torch.rand(s).to(dtype) + 0.5 for s in (shape, (rows, size)))
    weights = torch.cat((torch.zeros(3 * size, size), torch.eye(3 * size)), 1).to(dtype)
    zeros = torch.zeros(rows, size, dtype=dtype)
    at_once = (lambda t: t) if steps else (lambda t: t[0])
    leaf, last = (t.to(device).requires_grad_() for t in (at_once(gates), cell))
    arguments = [t.to(device) for t in (weights, torch.zeros(3 * size, dtype=dtype), zeros)]
    for which in ((1, 1), (1, 0), (0, 1)):
        grads = [at_once(grad_h) * which[0], grad_cell * which[1]]
        output, *state = (sequence if steps else ops.lltm)(leaf, *arguments, last)
        new_cell = state[-1]
        mine = torch.autograd.grad(
            [x for x, use in zip((output, new_cell), which, strict=True) if use],
            (leaf, last),
            [g.to(device) for g, use in zip(grads, which, strict=True) if use],
        )
        right = exact(*(t.double() for t in (gates, cell, grad_h * which[0], grads[1])))
        computed = torch.finfo(torch.float32 if dtype.itemsize == 2 else dtype)
        units = 16 * computed.eps + (dtype.itemsize == 2) * torch.finfo(dtype).eps / 2
        flat = 16 * computed.eps * right.cells.abs().flip(0).cummax(0).values.flip(0)
        wide = torch.cat((flat, flat, flat), -1)
        results = ((output, right.h, 0, 0), (new_cell, right.cell, 0, 0))
        gradients = (
            (mine[0], right.grad_gates, wide, right.unscaled[0]),
            (mine[1], right.grad_cell, flat[0], right.unscaled[1]),
        )
        for actual, expected, relative, unscaled in (*results, *gradients):
            floor = 4 * torch.finfo(dtype).tiny
            if backend == "torch":
                floor = 128 * floor + 4 * computed.eps * unscaled
            allowed = (units + relative) * expected.abs() + floor
            off = (actual.detach().cpu().double().view_as(expected) - expected).abs() / allowed
            kept = right.kept.repeat(*[1] * (off.dim() - 1), off.shape[-1] // size)
            assert off.isfinite().all()
            assert (off * kept).amax() <= 1


# ---- sequences: CUDA runs one kernel for a small state -------------------------------------------


@pytest.mark.parametrize("size", [16, 5])
@pytest.mark.parametrize("steps", [None, 3], ids=["step", "sequence"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_element_is_right(backend, device, dtype, steps, size):
    check_elements(backend, device, dtype, steps, size)


def agree_with_reference(mine, grads=(True, True, True)):
    """Compare a sequence, its steps one by one, and the reference in float64."""
    dtype = mine[0].dtype
    theirs = [t.detach().double().requires_grad_(t.requires_grad) for t in mine]
    results, expected = sequence(*mine), reference(*theirs)
    arrived = [
        torch.randn_like(x).to(dtype) if use else None
        for x, use in zip(expected, grads, strict=True)
    ]
    backward(results, arrived)
    backward(expected, [g if g is None else g.double() for g in arrived])
    for one, other in zip(results, expected, strict=True):
        close(one, other, dtype)
    for one, other in zip(mine, theirs, strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            close(one.grad, other.grad, dtype)
    if dtype.itemsize == 2:
        return  # single steps round the cell between them
    input, weights, bias, *state = (t.detach() for t in mine)
    for step, output in zip(input, results[0], strict=True):
        state = ops.lltm(step, weights, bias, *state)
        close(output, state[0], dtype)


@pytest.mark.parametrize("size", [1, 3, 31, 33, 64, 65, 127, 128, 129])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sequences_of_each_size(backend, device, dtype, size):
    for steps, rows in ((3, 1), (2, 5)):
        agree_with_reference(leaves(inputs((steps, rows, 3), dtype, device, size)))


@pytest.mark.parametrize("rows", [2, 128, 129, 256, 257, 385, 513])
def test_sequences_of_many_rows(backend, device, rows):
    """A block takes one, two or three rows, and the last block the remaining ones."""
    for dtype in (torch.float32, torch.bfloat16):
        agree_with_reference(leaves(inputs((2, rows, 2), dtype, device, 5)))


def test_sequences_with_any_gradients(backend, device):
    for dtype, grads in itertools.product(
        (torch.float32, torch.float16), ((True, False, False), (False, False, True))
    ):
        for needed in itertools.product((True, False), repeat=5):
            if any(needed):
                agree_with_reference(leaves(inputs((3, 4, 2), dtype, device), needed), grads)


def test_long_sequences(backend, device):
    agree_with_reference(leaves(inputs((300, 4, 2), torch.float32, device, 6)))


def test_more_elements_than_one_grid(backend, device):
    batch, size = 20_000, 53  # odd, so that a thread takes one element
    x, w, b, h, c = inputs((batch, 1), torch.float32, device, size)
    results = ops.lltm(x, w, b, h.requires_grad_(), c)
    (grad,) = torch.autograd.grad(results.cell.sum(), h)
    few = slice(batch - 5, batch)
    alone = h[few].detach().requires_grad_()
    expected = ops.lltm(x[few], w, b, alone, c[few])
    for one, other in zip(results, expected, strict=True):
        close(one[few], other, torch.float32)
    close(grad[few], torch.autograd.grad(expected.cell.sum(), alone)[0], torch.float32)


def test_a_sequence_is_its_steps(backend, device):
    x, w, b, h, c = inputs((5, 2, 4), torch.float64, device)
    output, state = ops.lltm_sequence(x, w, b, h, c)
    for step, expected in zip(x, output, strict=True):
        h, c = ops.lltm(step, w, b, h, c)
        close(h, expected, torch.float64)
    close(state.h, h, torch.float64)
    close(state.cell, c, torch.float64)


def test_a_long_sequence_in_half_precision_adds_up_in_float32(backend, device):
    """The cell grows by 2^-9 of itself in each step. In bfloat16 it would not grow."""
    one = torch.ones(1, 1, dtype=torch.bfloat16, device=device)
    weights = torch.zeros(3, 2, dtype=torch.bfloat16, device=device)
    bias = torch.tensor(
        [30.0, 0.0, 2.0**-9], dtype=torch.bfloat16, device=device
    )  # the input gate is open
    steps = torch.zeros(512, 1, 1, dtype=torch.bfloat16, device=device)
    _, state = ops.lltm_sequence(steps, weights, bias, one, one)
    assert state.cell.item() == 2.0


def test_an_empty_sequence_hands_its_state_on(backend, device):
    x, w, b, h, c = inputs((0, 2, 4), torch.float32, device)
    output, state = ops.lltm_sequence(x, w, b, h.requires_grad_(), c)
    assert output.shape == (0, 2, 3)
    assert output.requires_grad
    assert torch.equal(state.h, h)
    state.h.sum().backward()
    assert h.grad.sum() == 6
    before = c.clone()
    state.cell.add_(1)
    assert torch.equal(c, before)


def test_module():
    torch.manual_seed(0)
    module = ops.LLTM(4, 100)
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    assert shapes == {"weights": (300, 104), "bias": (1, 300)}  # as in the tutorial
    for parameter in module.parameters():
        assert 0.095 < parameter.abs().max() <= 0.1
    x = torch.randn(5, 2, 4)
    output, _ = module(x)
    zeros = torch.zeros(2, 100)
    assert torch.equal(output, module(x, (zeros, zeros))[0])
    assert torch.equal(module(x[0]).h, output[0])
    assert repr(module) == "LLTM(input_features=4, state_size=100)"
    with pytest.raises(ops.ArgumentError, match="state_size must be at least 1, got 0"):
        ops.LLTM(4, 0)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"input": 3}, ops.ArgumentTypeError, "input must be a torch.Tensor, got int"),
        ({"input": torch.ones(2)}, ops.ArgumentError, r"input must have shape \(batch, features"),
        ({"h": torch.ones(3, 3)}, ops.ArgumentError, r"h must have shape \(2, state_size\)"),
        ({"cell": torch.ones(2, 4)}, ops.ArgumentError, r"cell must have shape \[2, 3\] .* \[2, 4"),
        ({"weights": torch.ones(9, 8)}, ops.ArgumentError, r"weights must have shape \[9, 7\] for"),
        ({"bias": torch.ones(8)}, ops.ArgumentError, r"bias must have shape \[1, 9\] or \[9\]"),
        ({"bias": torch.ones(9).double()}, ops.ArgumentTypeError, "bias must have input's dtype"),
        *(
            ({name: "meta"}, ops.ArgumentError, f"{name} must be on input's device cpu, got meta")
            for name in NAMES[1:]
        ),
    ],
)
def test_bad_arguments(backend, device, change, error, text):
    good = dict(zip(NAMES, inputs((2, 4), torch.float32, device), strict=True))
    change = {
        name: good[name].to("meta") if value == "meta" else value for name, value in change.items()
    }
    text = text.replace("device cpu", f"device {good['input'].device}")
    with pytest.raises(error, match=text):
        ops.lltm(**{**good, **change})
    with pytest.raises(ops.ArgumentError, match=r"input must have shape \(time, batch, features\)"):
        ops.lltm_sequence(**good)


@pytest.mark.parametrize("arguments", [(3.0,), (torch.ones(2, 4), torch.ones(2, 3)), (3.0, (1, 2))])
def test_bad_arguments_of_the_module(arguments):
    with pytest.raises(ops.ArgumentTypeError, match="input must be a torch.Tensor"):
        ops.LLTM(4, 3)(*arguments)


def test_no_gradient_arrives(backend, device):
    class Dropped(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return None

    tensors = leaves(inputs((2, 4), torch.float64, device))
    loss = sum(Dropped.apply(result).sum() for result in ops.lltm(*tensors))
    for recorded in (False, True):
        its = torch.autograd.grad(
            loss, tensors, create_graph=recorded, retain_graph=True, allow_unused=True
        )
        assert its == (None,) * len(tensors)


def test_the_last_cell_may_be_changed(backend, device):
    """It is not a view of a tensor that the backward pass needs."""
    tensors = leaves(inputs((3, 2, 4), torch.float64, device))
    _, state = ops.lltm_sequence(*tensors)
    (expected,) = torch.autograd.grad(state.cell.sum(), tensors[0], retain_graph=True)
    state.cell.add_(1)
    (grad,) = torch.autograd.grad(state.cell.sum(), tensors[0])
    assert torch.equal(grad, expected)
