"""Wrong gradients that hide behind larger numbers and rounding errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ops


def x():
    return torch.randn(3, 4)


# ---- hidden by differences -----------------------------------------------------------------------


class Saturated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (1e8 * x).tanh()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 5 * g * 1e8 / (1e8 * x).cosh() ** 2


class BesideAJump(torch.autograd.Function):
    """A step function plus a slope of one."""

    @staticmethod
    def forward(ctx, x):
        return x + (x >= 0.5)

    @staticmethod
    def backward(ctx, g):
        return 3 * g


class StraightThrough(torch.autograd.Function):
    """Fine steps, as in quantisation, are not a computation in lower precision."""

    @staticmethod
    def forward(ctx, x):
        return (x * 1024).round() / 1024

    @staticmethod
    def backward(ctx, g):
        return g


class WrongInFloat(torch.autograd.Function):
    """It computes in float32, with a wrong gradient."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.float().square().to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2.02 * g * x


class OneOfMany(torch.autograd.Function):
    """The gradient is wrong at one element of thousands."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        gx = 2 * g * x
        gx.view(-1)[1234] *= 1.05
        return gx


@pytest.mark.parametrize(
    ("function", "at"),
    [
        (Saturated.apply, torch.full((3,), 1e-8)),
        (BesideAJump.apply, torch.tensor([0.5, 2.0])),
        (StraightThrough.apply, torch.randn(4)),
        (WrongInFloat.apply, torch.randn(4)),
        (OneOfMany.apply, torch.randn(50, 60)),
    ],
    ids=lambda value: getattr(getattr(value, "__self__", value), "__name__", None),
)
def test_what_differences_hide(function, at):
    report = ops.check_gradients(function, at)
    assert "reverse mode" in {found.name for found in report.failures}, str(report)


# ---- hidden by scale -----------------------------------------------------------------------------


class Sum(torch.autograd.Function):
    """``x + scale * s``, without a gradient of ``s`` in one dtype."""

    scale, missing, factor = 1.0, torch.float64, 0.0

    @classmethod
    def of(cls, **attributes):
        return type("Sum", (cls,), attributes).apply

    @classmethod
    def forward(cls, ctx, x, s):
        ctx.wrong = x.dtype is cls.missing
        return x + cls.scale * s

    @classmethod
    def backward(cls, ctx, g):
        return g, g * cls.scale * (cls.factor if ctx.wrong else 1)


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [
        (0.01, torch.bfloat16),
        (1e-3, torch.float16),
        (1e-5, torch.float32),
        (1e-10, torch.float64),
    ],
)
@pytest.mark.parametrize("factor", [0.0, -1.0, 3.0])
def test_a_gradient_that_is_small_beside_another(scale, dtype, factor):
    report = ops.check_gradients(Sum.of(scale=scale, missing=dtype, factor=factor), x(), x())
    name = str(dtype).removeprefix("torch.")
    check = "reverse mode" if dtype is torch.float64 else f"agrees in {name}"
    assert check in {found.name for found in report.failures}, str(report)
    assert ops.check_gradients(Sum.of(scale=scale, missing=None), x(), x())


class SmallElements(torch.autograd.Function):
    """One gradient lacks its small elements in bfloat16."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x * torch.tensor([1, 1, 1, 1e-2]).to(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        small = 0 if x.dtype is torch.bfloat16 else 1e-2
        return 2 * g * x * torch.tensor([1, 1, 1, small]).to(x)


def test_elements_that_are_small_beside_others():
    report = ops.check_gradients(SmallElements.apply, x())
    assert [found.name for found in report.failures] == ["agrees in bfloat16"], str(report)


class Shift(torch.autograd.Function):
    size, factor = 1e6, 1.0

    @classmethod
    def of(cls, **attributes):
        return type("Shift", (cls,), attributes).apply

    @classmethod
    def forward(cls, ctx, x):
        ctx.save_for_backward(x)
        return cls.size + 1e-4 * x.sin()

    @classmethod
    def backward(cls, ctx, g):
        (x,) = ctx.saved_tensors
        return 1e-4 * g * x.cos() * cls.factor


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, 2.0])
def test_a_gradient_that_is_small_beside_its_result(factor):
    """Larger steps see through a constant of a million."""
    report = ops.check_gradients(Shift.of(size=1e6, factor=factor), x(), dtypes=())
    assert report.ok is (factor == 1), str(report)


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, 2.0])
def test_a_gradient_that_nobody_can_tell(factor):
    """Beside 1e12, a change of 1e-4 is one rounding."""
    with pytest.warns(ops.GradientCheckWarning, match="reverse mode: cannot tell"):
        report = ops.check_gradients(Shift.of(size=1e12, factor=factor), x(), dtypes=())
    assert report.checks[0].status == "cannot tell", str(report)
    assert "are lost in rounding errors, in x" in str(report)
    assert report.ok
    assert [found.name for found in report.doubts] == ["reverse mode"]
    assert report.to_dict()["checks"][0]["unclear"]


# ---- outside torch -------------------------------------------------------------------------------


class InNumpy(torch.autograd.Function):
    """It computes in float32 in NumPy, which no dispatch mode sees."""

    factor = 2.0

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.from_numpy(np.square(x.detach().numpy().astype(np.float32))).to(x.dtype)

    @classmethod
    def backward(cls, ctx, g):
        (x,) = ctx.saved_tensors
        return cls.factor * g * x


@pytest.mark.parametrize("factor", [2.0, 2.01])
@pytest.mark.parametrize("given", [torch.float32, torch.float64])
def test_float32_in_numpy(factor, given):
    function = type("InNumpy", (InNumpy,), {"factor": factor}).apply
    report = ops.check_gradients(function, torch.randn(4, dtype=given), dtypes=(torch.float32,))
    assert report.ok is (factor == 2), str(report)
    assert "computes in float32" in str(report)
