"""linear: the model of an op without an extension. It saves and computes only what is needed."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import ops
from tests.harness.battery import Battery
from tests.harness.op_under_test import OpUnderTest, leaves


def reference(input, weight, bias=None):
    """The formula as sums of products."""
    out = (input.unsqueeze(-2) * weight).sum(-1)
    return out if bias is None else out + bias


def inputs(shape, dtype, device):
    """An input of the shape, and a weight and bias for five outputs, or none without features."""
    many = 5 if shape[-1] else 0
    tensors = [torch.randn(s, dtype=torch.float64) for s in (shape, (many, shape[-1]), (many,))]
    return [t.to(device, dtype) for t in tensors]


class TestLinear(Battery):
    backends = ("torch",)
    op = OpUnderTest(
        name="linear",
        call=ops.linear,
        reference=reference,
        names=("input", "weight", "bias"),
        shards=True,
        inputs=inputs,
        shapes=((7,), (16, 64), (2, 3, 17), (4, 6)),
        autocast=torch.bfloat16,
    )


class TestLinearWithoutBias(Battery):
    backends = ("torch",)
    op = OpUnderTest(
        name="linear without bias",
        variation=True,
        call=ops.linear,
        reference=reference,
        names=("input", "weight"),
        shards=True,
        inputs=lambda *a: inputs(*a)[:2],
        shapes=((7,), (16, 64), (2, 3, 17), (4, 6)),
        autocast=torch.bfloat16,
    )


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names = ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear")
        self.count += func.name().split(".")[0] in names
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("needed", list(itertools.product((True, False), repeat=3))[:-1])
def test_only_what_is_needed(needed):
    input, weight, bias = leaves(inputs((4, 6), torch.float64, "cpu"), needed)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = ops.linear(input, weight, bias)
    kept = {t.data_ptr() for t in saved}
    expected = [t for t, need in ((weight, needed[0]), (input, needed[1])) if need]
    assert kept == {t.data_ptr() for t in expected}
    assert len(saved) == len(expected)
    with Products() as products:
        out.sum().backward()
    assert products.count == needed[0] + needed[1]


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6), (2, 2, 2, 6), (0, 4, 6)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_result_may_be_changed_in_place(shape, with_bias):
    input, weight, bias = leaves(inputs(shape, torch.float64, "cpu"), (True, True, True))
    bias = bias if with_bias else None
    mine, theirs = (
        torch.autograd.grad(function(input, weight, bias).relu_().square().sum(), (input, weight))
        for function in (ops.linear, F.linear)
    )
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"input": [1.0]}, ops.ArgumentTypeError, "input must be a torch.Tensor, got list"),
        ({"weight": torch.ones(5)}, ops.ArgumentError, r"weight must have shape \(out_features, "),
        (
            {"weight": torch.ones(5, 7)},
            ops.ArgumentError,
            r"input must have shape \(\*, 7\), as weight has 7 in_features, got \[4, 6\]",
        ),
        ({"input": torch.tensor(1.0)}, ops.ArgumentError, r"input must have shape .*, got \[\]"),
        (
            {"bias": torch.ones(6)},
            ops.ArgumentError,
            r"bias must have shape \(5,\), as weight has 5 out_features, got \[6\]",
        ),
        (
            {"weight": torch.ones(5, 6).double()},
            ops.ArgumentTypeError,
            "weight must have input's dtype float32, got float64",
        ),
        (
            {"input": torch.ones(4, 6).int()},
            ops.ArgumentTypeError,
            "input must have dtype float64, float32, bfloat16 or float16, got int32",
        ),
    ],
)
def test_bad_arguments(change, error, text):
    good = dict(zip(("input", "weight", "bias"), inputs((4, 6), torch.float32, "cpu"), strict=True))
    with pytest.raises(error, match=text):
        ops.linear(**{**good, **change})
