"""rfft2_magnitude: its gradient is right, unlike that of the tutorial, and zero at zeros."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ops
from tests.harness.battery import Battery
from tests.harness.op_under_test import OpUnderTest, close


def reference(input):
    """The same by torch's transform."""
    return torch.fft.rfft2(input).abs()


def inputs(shape, dtype, device):
    return [torch.randn(shape, dtype=torch.float64, device=device).to(dtype)]


class TestRfft2Magnitude(Battery):
    backends = ("torch",)
    op = OpUnderTest(
        name="rfft2_magnitude",
        call=ops.rfft2_magnitude,
        reference=reference,
        names=("input",),
        inputs=inputs,
        # With an odd width the last column has a mirror image, with an even width it has none.
        shapes=((8, 8), (7, 5), (2, 3, 6, 7), (1, 5), (5, 1), (1, 2), (4, 6)),
        edges=((1, 4, 4), (1, 1), (1, 1, 1, 1)),  # torch's own transform refuses an empty batch
        large=(64, 65),
        compiles=False,
        numpy=True,
    )


def test_the_tutorials_gradient_is_wrong_and_ours_is_not():
    """The tutorial uses the inverse transform instead of the adjoint, and fails the check."""
    tutorial = ops.from_numpy(
        lambda x: abs(np.fft.rfft2(x)), lambda g, x: np.fft.irfft2(g, s=x.shape)
    )
    x = torch.randn(8, 8, dtype=torch.float64, requires_grad=True)
    assert not torch.autograd.gradcheck(tutorial, x, raise_exception=False)
    assert torch.autograd.gradcheck(ops.rfft2_magnitude, x)


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 3, 1)])
def test_empty_batch(shape):
    x = torch.ones(shape, dtype=torch.float64, requires_grad=True)
    y = ops.rfft2_magnitude(x)
    assert y.shape == (*shape[:-1], shape[-1] // 2 + 1)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.shape == shape


def test_a_zero_magnitude_has_the_gradient_zero():
    """The spectrum of a constant image is zero but for one entry."""
    x = torch.full((4, 4), 0.5, dtype=torch.float64, requires_grad=True)
    y = ops.rfft2_magnitude(x)
    assert y[0, 0] == 8
    assert y.count_nonzero() == 1
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    close(grad, torch.ones_like(x), torch.float64)  # the gradient of |sum of x|
    (second,) = torch.autograd.grad(grad.square().sum(), x)
    assert second.tolist() == torch.zeros(4, 4).tolist()


@pytest.mark.parametrize(
    ("input", "error", "text"),
    [
        (3.0, ops.ArgumentTypeError, "input must be a torch.Tensor, got float"),
        (torch.ones(3), ops.ArgumentError, r"input must have shape \(\*, H, W\) .*, got \[3\]"),
        (torch.ones(3, 0, 2), ops.ArgumentError, r"at least 1, got \[3, 0, 2\]"),
        (torch.ones(3, 3).cfloat(), ops.ArgumentTypeError, "input must have dtype"),
    ],
)
def test_bad_arguments(input, error, text):
    with pytest.raises(error, match=text):
        ops.rfft2_magnitude(input)
