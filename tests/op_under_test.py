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

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 2e-5,
    torch.bfloat16: 2**-7,
    torch.float16: 2**-9,
}


@dataclass
class OpUnderTest:
    """What the battery needs to know of an op.

    Attributes:
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
        compiles: whether ``torch.compile`` traces it in one graph.
        numpy: whether NumPy computes its gradients, so that there are neither forward mode nor
            batched gradients: they must be refused.
        operator_samples: calls of the compiled operators, for ``opcheck``, on a device.
    """

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
    compiles: bool = True
    numpy: bool = False
    operator_samples: Callable[[torch.device], list] = field(default=lambda device: [])

    def results(self, inputs, keywords) -> tuple[Tensor, ...]:
        return several(self.call(*inputs, **keywords))

    def differentiable(self, inputs, keywords) -> tuple[Tensor, ...]:
        return tuple(x for x in self.results(inputs, keywords) if x.is_floating_point())

    def naive(self, inputs, keywords) -> tuple[Tensor, ...]:
        return several(self.reference(*inputs, **keywords))


def several(results) -> tuple[Tensor, ...]:
    """One tensor or a tuple of them, as a tuple."""
    return (results,) if isinstance(results, Tensor) else tuple(results)


def backward(results, grads) -> None:
    """Propagate the gradients that are not ``None``."""
    pairs = [(x, grad) for x, grad in zip(results, grads, strict=True) if grad is not None]
    if pairs:
        torch.autograd.backward(*map(list, zip(*pairs, strict=True)))


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Within the tolerance of ``dtype``, relative to the largest finite expected value."""
    if not expected.is_floating_point():
        assert torch.equal(actual, expected)
        return
    finite = expected.detach().double()[expected.detach().isfinite()].abs()
    scale = max(1e-3, finite.max().item() if finite.numel() else 0.0)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=tolerance, atol=tolerance * scale, equal_nan=True
    )


def leaves(tensors, needed=None):
    """Copies of the tensors, with their strides and alignment, that require gradients if needed."""
    needed = needed or [True] * len(tensors)
    return [
        _copy(t).requires_grad_(need)
        if 0 not in t.stride() or t.numel() == 0
        else t.detach().requires_grad_(need)
        for t, need in zip(tensors, needed, strict=True)
    ]


def _copy(tensor):
    offset = tensor.data_ptr() % 64 // tensor.element_size()  # torch's own memory is so aligned
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    span = sum((size - 1) * stride for size, stride in pairs) + 1 if tensor.numel() else 0
    memory = torch.empty(offset + span, dtype=tensor.dtype, device=tensor.device)
    return memory.as_strided(tensor.shape, tensor.stride(), offset).copy_(tensor.detach())
