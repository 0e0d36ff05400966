"""scipy_conv2d: every mode of both operations, and the gradients of all three."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import ops
from tests.harness.battery import Battery
from tests.harness.op_under_test import OpUnderTest, close


def reference(input, filter, bias=None, mode="valid", operation="correlate"):
    """The same by torch's convolution, with explicit zero padding."""
    height, width = filter.shape
    before, after = {
        "valid": ((0, 0), (0, 0)),
        "full": ((height - 1, width - 1), (height - 1, width - 1)),
        "same": (((height - 1) // 2, (width - 1) // 2), (height // 2, width // 2)),
    }[mode]
    if operation == "convolve":
        filter = filter.flip(0, 1)
        before, after = after, before
    padded = F.pad(input, (before[1], after[1], before[0], after[0]))
    images = padded.reshape(-1, 1, *padded.shape[-2:])
    out = F.conv2d(images, filter[None, None]).squeeze(1)
    out = out.reshape(*input.shape[:-2], *out.shape[-2:])
    return out if bias is None else out + bias


def sized(height, width):
    def inputs(shape, dtype, device):
        shapes = (shape, (height, width), (1, 1))
        tensors = [torch.randn(s, dtype=torch.float64) for s in shapes]
        return [t.to(device, dtype) for t in tensors]

    return inputs


VARIANTS = tuple(
    {"mode": mode, "operation": operation}
    for mode in ("valid", "full", "same")
    for operation in ("correlate", "convolve")
)


class TestScipyConv2d(Battery):
    backends = ("torch",)
    op = OpUnderTest(
        name="scipy_conv2d",
        call=ops.scipy_conv2d,
        reference=reference,
        names=("input", "filter", "bias"),
        inputs=sized(3, 2),  # odd and even sizes have different middles
        shapes=((8, 9), (2, 3, 6, 7), (3, 2), (5, 4)),
        variants=VARIANTS,
        edges=((0, 4, 4), (1, 4, 4), (2, 0, 3, 5)),
        large=(4, 20, 30),
        module=lambda: ops.ScipyConv2d(3, 2),
        module_takes=1,
        compiles=False,
        numpy=True,
    )


class TestWithoutBiasAndWithTheFilterLarger(Battery):
    backends = ("torch",)
    op = OpUnderTest(
        name="scipy_conv2d, filter larger",
        variation=True,
        call=ops.scipy_conv2d,
        reference=reference,
        names=("input", "filter"),
        inputs=lambda *a: sized(2, 5)(*a)[:2],
        shapes=((3, 3), (2, 1, 1), (4, 3)),
        variants=VARIANTS[2:],
        edges=((1, 1), (0, 2, 2)),
        large=(4, 20, 30),
        compiles=False,
        numpy=True,
    )


def test_module_is_that_of_the_tutorial():
    torch.manual_seed(0)
    module = ops.ScipyConv2d(5, 3)
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {
        "filter": (5, 3),
        "bias": (1, 1),
    }
    assert ops.ScipyConv2d(5, 3, bias=False).bias is None
    x = torch.randn(10, 10)
    close(module(x), reference(x, module.filter, module.bias), torch.float32)
    assert repr(module) == ("ScipyConv2d(5, 3, bias=True, mode='valid', operation='correlate')")


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"input": 3}, ops.ArgumentTypeError, "input must be a torch.Tensor, got int"),
        ({"input": torch.ones(5)}, ops.ArgumentError, r"input must have shape .*, got \[5\]"),
        ({"input": torch.ones(2, 5)}, ops.ArgumentError, "at least as large as filter"),
        ({"filter": torch.ones(3)}, ops.ArgumentError, r"filter must have shape \(h, w\)"),
        ({"filter": torch.ones(0, 3)}, ops.ArgumentError, r"filter must have .*, got \[0, 3\]"),
        ({"filter": torch.ones(3, 3).double()}, ops.ArgumentTypeError, "input's dtype float32"),
        ({"bias": torch.ones(2)}, ops.ArgumentError, r"bias must have one element, got shape"),
        ({"mode": "wrap"}, ops.ArgumentError, "mode must be one of full, valid, same, got 'wrap'"),
        ({"operation": 3}, ops.ArgumentError, "operation must be one of correlate, convolve"),
    ],
)
def test_bad_arguments(change, error, text):
    good = {"input": torch.ones(6, 6), "filter": torch.ones(3, 3), "bias": torch.ones(1)}
    with pytest.raises(error, match=text):
        ops.scipy_conv2d(**{**good, **change})


@pytest.mark.parametrize("size", [0, -1, 2.0, True])
def test_bad_sizes(size):
    with pytest.raises(ops.JitopsError, match="filter_width must be"):
        ops.ScipyConv2d(3, size)
