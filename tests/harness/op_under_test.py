"""How an op describes itself to the battery, and how results are compared. Tolerances:

=========  ==========================================================================
float64    1e-9: two formulas for the same sums differ by a few hundred roundings
float32    2e-5 relative to the largest result: as above, in 24 bits
bfloat16   2^-7: inputs are the same bits; the result is rounded once to 8 bits
float16    2^-9: as above, 11 bits, with room for subnormals
=========  ==========================================================================

The half precisions are compared with the reference computed in float64 from the same rounded
inputs: an op that accumulated in half precision would miss by far more on the wide rows.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ops._core import extensions

TESTS = Path(__file__).resolve().parent.parent
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 2e-5,
    torch.bfloat16: 2**-7,
    torch.float16: 2**-9,
}

WIDEST = 16  # bytes of the widest load
# Another description of an op that has one takes part in these checks of the battery in the quick
# tests.
QUICK_OF_A_VARIATION = ("test_values_and_gradients", "test_every_requires_grad_subset")
# The checks of the battery that the emulator runs: those of the kernels. The others check the code
# around the kernels, which is the same for back end cpp.
EMULATED = (
    "test_values_and_gradients",
    "test_every_launch_shape",
    "test_every_requires_grad_subset",
    "test_layouts",
    "test_empty_and_single",
    "test_non_finite_inputs",
    "test_same_bits_every_time",
)


@dataclass(frozen=True)
class Mutation:
    """A bug to plant into a file of an op, and how it is caught.

    Attributes:
        caught: a pattern of the error.
        by: the check that raises it, of those in ``tests/test_cuda_emulator.py``.
    """

    file: str
    before: str
    after: str
    caught: str
    by: str = "launches"


@dataclass(frozen=True)
class Far:
    """Inputs with more elements than 32 bits can count, zeros but for a few small tensors.

    Attributes:
        varied: the number of the input of which some rows are given other values.
    """

    inputs: list[Tensor]
    varied: int
    keywords: dict = field(default_factory=dict)


def blank(*shape: int, device: str) -> Tensor:
    """Zeros in bfloat16; on the CPU untouched memory, which takes no space before it is written."""
    make = torch.zeros if device == "cuda" else torch.empty
    return make(shape, dtype=torch.bfloat16, device=device)


@dataclass
class OpUnderTest:
    """What the battery needs to know of an op.

    Attributes:
        name: how reports call it.
        call: the public function, of the inputs and keywords; one tensor or several.
        reference: independent, naive and differentiable; same signature and results.
        names: the inputs' names.
        inputs: makes the inputs from (shape, dtype, device).
        shapes: shapes to try; the last one is small, for finite differences.
        variants: keywords to try.
        edges: empty and single shapes.
        large: a shape that several threads share.
        module: makes the module, where there is one; it takes the first ``module_takes`` inputs.
        autocast: the dtype the op computes in under autocast.
        widens: whether results of half precisions are float32.
        compiles: whether ``torch.compile`` traces it in one graph.
        numpy: whether NumPy computes its gradients, so that there are neither forward mode nor
            batched gradients: they must be refused.
        shards: whether its tensor code runs on DTensors. All else must be refused.
        operator_samples: calls of the compiled operators, for ``opcheck``, on a device.
        source: the stem of its files in ``cuda_src``, if it has compiled back ends.
        launches: makes inputs that reach each kernel and each launch shape, from (dtype, device).
        busy: makes inputs that give a GPU some work, from (dtype, device).
        elements: compares each element with float64 where functions are flat, on back end cpp.
        far: makes inputs that 32-bit indices cannot reach, for a device.
        mutations: bugs that the emulator must catch when they are planted into its files.
        variation: whether another description of the op comes first. Then fewer checks of the
            battery are quick.
    """

    name: str
    call: Callable[..., Tensor | tuple[Tensor, ...]]
    reference: Callable[..., Tensor | tuple[Tensor, ...]]
    names: tuple[str, ...]
    inputs: Callable[..., list[Tensor]]
    shapes: tuple[tuple[int, ...], ...]
    variants: tuple[dict, ...] = ({},)
    edges: tuple[tuple[int, ...], ...] = (
        (0, 4),
        (4, 0),
        (0, 0),
        (1, 4),
        (1, 1),
        (7,),
        (2, 0, 3),
    )
    large: tuple[int, ...] = (777, 333)
    module: Callable[[], torch.nn.Module] | None = None
    module_takes: int | None = None
    autocast: torch.dtype = torch.float32
    widens: bool = False
    compiles: bool = True
    numpy: bool = False
    shards: bool = False
    operator_samples: Callable[[torch.device], list] | None = None
    source: str | None = None
    launches: Callable[..., Iterator[list[Tensor]]] | None = None
    busy: Callable[..., list[Tensor]] | None = None
    elements: Callable[[], None] | None = None
    far: Callable[[str], Far] | None = None
    mutations: tuple[Mutation, ...] = ()
    variation: bool = False

    def results(self, inputs, keywords) -> tuple[Tensor, ...]:
        return several(self.call(*inputs, **keywords))

    def differentiable(self, inputs, keywords) -> tuple[Tensor, ...]:
        return tuple(x for x in self.results(inputs, keywords) if x.is_floating_point())

    def naive(self, inputs, keywords) -> tuple[Tensor, ...]:
        return several(self.reference(*inputs, **keywords))


def applies(condition: Callable[[OpUnderTest, str], bool]) -> pytest.MarkDecorator:
    """Mark a check of the battery that applies to some ops, or on some back ends, alone.

    Args:
        condition: takes the op and the back end. Where it is false, the check is not collected.
    """
    return pytest.mark.applies.with_args(condition)


def compiled_ops() -> dict[str, OpUnderTest]:
    """The descriptions of all ops that have kernels: each op's test module holds its own."""
    found = {}
    for stem in extensions.stems():
        (path,) = TESTS.glob(f"*/test_{stem}.py")
        module = importlib.import_module(f"tests.{path.parent.name}.{path.stem}")
        mine = [one for one in vars(module).values() if isinstance(one, OpUnderTest)]
        assert mine, f"{module.__file__} describes no op"
        assert all(op.source == stem for op in mine), stem
        found |= {op.name: op for op in mine}
    return found


def several(results) -> tuple[Tensor, ...]:
    """One tensor or a tuple of them, as a tuple."""
    return (results,) if isinstance(results, Tensor) else tuple(results)


def backward(results, grads) -> None:
    """Propagate the gradients that are not ``None``."""
    pairs = [(x, grad) for x, grad in zip(results, grads, strict=True) if grad is not None]
    if pairs:
        torch.autograd.backward(*map(list, zip(*pairs, strict=True)))


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Within the tolerance of ``dtype``, relative to the largest finite expected value.

    Where all are near 0, sums of terms that cancel leave the rounding of the terms.
    """
    if not expected.is_floating_point():
        assert torch.equal(actual, expected)
        return
    finite = expected.detach().double()[expected.detach().isfinite()].abs()
    scale = max(1e-2, finite.max().item() if finite.numel() else 0.0)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=tolerance, atol=tolerance * scale, equal_nan=True
    )


def check_far_rows(op: OpUnderTest, device: str, only_last_block=lambda only: None) -> None:
    """The last rows that are computed, far behind what 32 bits can count, are as if alone.

    ``only_last_block`` tells the emulator to run one block of a grid: to run all takes hours.
    """
    far = op.far(device)
    varied, rows_of_all = far.inputs[far.varied], len(far.inputs[far.varied])
    try:
        only_last_block(True)
        with torch.no_grad():
            first = op.results(far.inputs, far.keywords)[0].reshape(rows_of_all, -1)[:, 0]
            rows = first.nonzero()[-3:, 0]
        assert len(rows) == 3
        assert rows[-1] * varied.shape[1] > 2**31 - 2**21  # the last block may end before the grid
        varied[rows] = torch.randn(3, *varied.shape[1:], device=device).bfloat16()
        varied.requires_grad_()
        results = op.results(far.inputs, far.keywords)
        grads = [blank(*x.shape, device=device) for x in results]
        for grad in grads:
            grad[rows] = torch.randn_like(grad[rows])
        (gradient,) = torch.autograd.grad(results, varied, grads)
    finally:
        only_last_block(False)
    alone = [t.detach()[rows] if len(t) == rows_of_all else t for t in far.inputs]
    alone[far.varied].requires_grad_()
    expected = op.results(alone, far.keywords)
    (its,) = torch.autograd.grad(expected, alone[far.varied], [grad[rows] for grad in grads])
    for one, other in zip((*results, gradient), (*expected, its), strict=True):
        close(one[rows], other, torch.bfloat16)


def leaves(tensors, needed=None):
    """Copies of the tensors, with their strides and alignment, that require gradients if needed."""
    needed = needed or [True] * len(tensors)
    return [
        _copy(t).requires_grad_(need)
        if 0 not in t.stride() or t.numel() == 0
        else t.detach().requires_grad_(need)
        for t, need in zip(tensors, needed, strict=True)
    ]


def aligned_and_not(tensors):
    """Yield copies of the tensors, and copies that no wide load fits, where one fits the former.

    Of several rows of 17 numbers most begin beside an aligned address anyway.
    """
    yield leaves(tensors)
    rows = [t.flatten(0, -2) if t.dim() > 1 else t[None] for t in tensors]
    if any(len(t) == 1 or t.shape[1] * t.element_size() % WIDEST == 0 for t in rows):
        yield misaligned(tensors)


def misaligned(tensors):
    """Copies that begin one element behind an aligned address: kernels cannot use wide loads."""
    return [_copy(t, offset=1).requires_grad_() for t in tensors]


def _copy(tensor, offset=None):
    if offset is None:
        offset = tensor.data_ptr() % 64 // tensor.element_size()  # torch aligns its own memory so
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    span = sum((size - 1) * stride for size, stride in pairs) + 1 if tensor.numel() else 0
    memory = torch.empty(offset + span, dtype=tensor.dtype, device=tensor.device)
    return memory.as_strided(tensor.shape, tensor.stride(), offset).copy_(tensor.detach())
