"""Functions with side effects, or that keep tensors where autograd does not see changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ops
from tests.gradcheck.test_hidden_gradients import Square, x


class KeepsInput(Square):
    @staticmethod
    def forward(ctx, x):
        ctx.x = x
        return x.detach().square()

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.x


class KeepsResult(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.y = y = x.exp()
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * ctx.y


MEMORY = {}


class OneMemoryForResults(Square):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        key = x.shape, x.dtype
        result = MEMORY.setdefault(key, torch.empty(x.shape, dtype=x.dtype))
        return result.copy_(x * x).detach()


def takes_a_gradient_of_its_own(x):
    if x.requires_grad and x.is_leaf:
        (x * x).sum().backward()
    return 3 * x


@pytest.mark.parametrize(
    ("function", "check", "text"),
    [
        (KeepsInput.apply, "interleaved calls", "after an in-place change of its inputs"),
        (KeepsResult.apply, "interleaved calls", "after an in-place change of its results"),
        (OneMemoryForResults.apply, "interleaved calls", "the result"),
        (takes_a_gradient_of_its_own, "inputs untouched", "written to: the .grad of x"),
    ],
)
def test_side_effects_are_found(function, check, text):
    report = ops.check_gradients(function, x())
    assert [found.name for found in report.failures] == [check], str(report)
    assert text in str(report)


class FirstTangentOnly(torch.autograd.Function):
    @staticmethod
    def forward(x, w):
        return x * w

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w, g * x

    @staticmethod
    def jvp(ctx, dx, dw):
        x, w = ctx.saved_tensors
        return dx * w if bool(dx.any()) else x * dw


def test_forward_mode_in_all_inputs_at_once():
    report = ops.check_gradients(FirstTangentOnly.apply, x(), x())
    assert [found.name for found in report.failures] == ["forward mode"], str(report)
    assert "the derivative in a direction of all inputs is" in str(report)
    assert ops.check_gradients(torch.mul, x(), x())


def test_the_report_names_tensors_that_are_no_inputs():
    module = nn.Linear(4, 2)
    for function in (module.forward, lambda x: module(x).sin()):
        report = ops.check_gradients(function, x())
        assert report.ok, str(report)
        assert "depend on tensors that are no inputs, of shapes [2], [2, 4], whose" in str(report)
    assert "no inputs" not in str(ops.check_gradients(module, x()))
    assert "no inputs" not in str(ops.check_gradients(module.requires_grad_(False).forward, x()))


class MixedDtypes(torch.autograd.Function):
    """Its gradient is wrong where the inputs have two dtypes."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w.to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        factor = 1 if x.dtype == w.dtype else 2
        return g * w.to(x.dtype), factor * (g * x).to(w.dtype)


def test_the_given_dtypes_are_checked_if_they_differ():
    for one, other in (("bfloat16", "float32"), ("float32", "float64")):
        inputs = x().to(getattr(torch, one)), x().to(getattr(torch, other))
        report = ops.check_gradients(MixedDtypes.apply, *inputs, dtypes=())
        assert [found.name for found in report.failures] == [f"agrees in {one} and {other}"]
        assert "in the given dtypes" in str(report)
        assert ops.check_gradients(torch.mul, *inputs)
        assert ops.check_gradients(nn.functional.linear, *inputs)  # it refuses them
