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
        call: the public function, of the inputs and keywords.
        reference: independent, naive and differentiable; same signature.
        names: the inputs' names.
        inputs: makes the inputs from (shape, dtype, device).
        shapes: shapes to try; the last one is small, for finite differences.
        variants: keywords to try.
        module: makes the module.
        operator_samples: calls of the compiled operators, for ``opcheck``, on a device.
    """

    call: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    names: tuple[str, ...]
    inputs: Callable[..., list[Tensor]]
    shapes: tuple[tuple[int, ...], ...]
    variants: tuple[dict, ...]
    module: Callable[[], torch.nn.Module]
    operator_samples: Callable[[torch.device], list] = field(default=lambda device: [])


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Within the tolerance of ``dtype``, relative to the largest finite expected value."""
    finite = expected.detach().double()[expected.detach().isfinite()].abs()
    scale = max(1e-3, finite.max().item() if finite.numel() else 0.0)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=tolerance, atol=tolerance * scale, equal_nan=True
    )


def leaves(tensors, needed=None):
    """Copies of the tensors, with their strides, that require gradients where needed."""
    needed = needed or [True] * len(tensors)
    return [
        torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
        .copy_(t.detach())
        .requires_grad_(need)
        if 0 not in t.stride() or t.numel() == 0
        else t.detach().requires_grad_(need)
        for t, need in zip(tensors, needed, strict=True)
    ]
