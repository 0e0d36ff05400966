"""Planted gradients with one error: each must be caught by the right check and described."""

from __future__ import annotations

import pytest
import torch

import ops

# ---- each is x**2 * w with one error -------------------------------------------------------------


class Right(torch.autograd.Function):
    """The right gradient, from which each other class differs in one way."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * x * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return 2 * g * x * w, g * x * x


class FlippedSign(Right):
    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return -2 * g * x * w, g * x * x


class MissingFactor(Right):
    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * x * w, g * x * x


class MissingGradient(Right):
    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return 2 * g * x * w, None


class ZeroGradient(Right):
    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return 2 * g * x * w, torch.zeros_like(w)


class WrongAtOneElement(Right):
    @staticmethod
    def backward(ctx, g):
        gx, gw = Right.backward(ctx, g)
        change = torch.ones_like(gw)
        change[1, 2] += 1e-4
        return gx, gw * change


class WrongIfNotContiguous(Right):
    """Like a kernel that ignores strides."""

    @staticmethod
    def forward(ctx, x, w):
        return Right.forward(ctx, torch.as_strided(x, x.shape, (x.shape[1], 1)), w)


class WrongIfArrivingNotContiguous(Right):
    @staticmethod
    def backward(ctx, g):
        flat = torch.as_strided(g, g.shape, (g.shape[1], 1)) if g.stride(0) == 1 else g
        return Right.backward(ctx, flat)


class WrongIfExpanded(Right):
    """Like a kernel that adds into the arriving gradient."""

    @staticmethod
    def backward(ctx, g):
        return Right.backward(ctx, 2 * g if 0 in g.stride() else g)


class NotDeterministic(Right):
    @staticmethod
    def backward(ctx, g):
        gx, gw = Right.backward(ctx, g)
        return gx * (1 + 1e-6 * torch.rand(())), gw


class WrongSecondOrder(Right):
    """The gradient is right, but its derivative lacks a term."""

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return 2 * g * x * w.detach(), g * x * x


class OtherWhenRecorded(Right):
    """The gradient is right, but has another value with create_graph=True."""

    @staticmethod
    def backward(ctx, g):
        gx, gw = Right.backward(ctx, g)
        return gx + 5 * torch.is_grad_enabled(), gw


class WrongIfFromOneElement(Right):
    """Like a kernel that takes the expanded gradient of .sum() for dense."""

    @staticmethod
    def backward(ctx, g):
        gx, gw = Right.backward(ctx, g)
        return gx, gw if any(g.stride()) else 2 * gw


class WrongWhereTheTrueOneIsZero(Right):
    """A shift cancels, so its quotients are rounding errors, which grow as steps shrink."""

    @staticmethod
    def forward(ctx, x, w):
        y = x + w.flatten()[0]
        return y - y.mean()

    @staticmethod
    def backward(ctx, g):
        return g - g.mean(), g.sum().expand(3, 4)


class WrongInSinglePrecision(Right):
    @staticmethod
    def backward(ctx, g):
        gx, gw = Right.backward(ctx, g)
        return gx, gw if g.dtype is torch.float64 else 50 * gw


class NoSecondOrder(Right):
    """The gradient is right, but a constant to autograd."""

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return (2 * g * x * w).detach(), (g * x * x).detach()


class WrongForSome(Right):
    """Right only if both gradients are requested."""

    @staticmethod
    def backward(ctx, g):
        gx, gw = Right.backward(ctx, g)
        return gx, gw if ctx.needs_input_grad[0] else 3 * gw


class WritesInput(Right):
    @staticmethod
    def backward(ctx, g):
        gx, gw = Right.backward(ctx, g)
        gw = gw.clone()
        ctx.saved_tensors[0].detach().numpy()[0, 0] += 1.0
        return gx, gw


class WritesArriving(Right):
    @staticmethod
    def backward(ctx, g):
        result = tuple(grad.clone() for grad in Right.backward(ctx, g))
        g.mul_(0)
        return result


class WrongForwardMode(Right):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_forward(x, w)
        return Right.forward(ctx, x, w)

    @staticmethod
    def jvp(ctx, dx, dw):
        x, w = ctx.saved_tensors
        dx = torch.zeros_like(x) if dx is None else dx
        return 2 * x * w * dx


class AccumulatesInHalf(Right):
    """It sums one by one, in the dtype of the inputs."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        total = torch.zeros((), dtype=x.dtype)
        for term in (x * x * w * w + 1).flatten().repeat(40):
            total = total + term
        return total

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return 80 * g * x * w * w, 80 * g * x * x * w


def detached(x, w):
    return (x * x * w).detach()


def half_detached(x, w):
    return x * x * w, (x * w).detach()


PLANTED = [
    (FlippedSign.apply, ("reverse mode",), "x: all signs are flipped"),
    (
        MissingFactor.apply,
        ("reverse mode",),
        "x: a factor is missing: analytic = 0.5 numeric, everywhere",
    ),
    (MissingGradient.apply, ("reverse mode",), "w: the gradient is zero or missing"),
    (ZeroGradient.apply, ("reverse mode",), "w: the gradient is zero or missing"),
    (
        WrongAtOneElement.apply,
        ("reverse mode",),
        "1 of 24 elements are wrong, in w\n    worst: w[1, 2]:",
    ),
    (WrongIfNotContiguous.apply, ("layouts",), "all inputs transposed"),
    (WrongIfArrivingNotContiguous.apply, ("layouts",), "arriving gradient transposed"),
    (WrongIfExpanded.apply, ("layouts",), "arriving gradient expanded"),
    (NotDeterministic.apply, ("determinism",), "the gradient of x"),
    (WrongSecondOrder.apply, ("second order",), "w: the gradient is zero or missing"),
    (OtherWhenRecorded.apply, ("second order",), "the gradient of x"),
    (WrongIfFromOneElement.apply, ("layouts",), "arriving gradient expanded from one element"),
    (WrongWhereTheTrueOneIsZero.apply, ("reverse mode",), "elements are wrong, in w"),
    (WrongInSinglePrecision.apply, ("agrees in float32",), "the gradient of w"),
    (NoSecondOrder.apply, ("second order",), "x: the gradient is zero or missing"),
    (
        WrongForSome.apply,
        ("requires_grad subsets",),
        "with gradients for w only",
    ),
    (WritesInput.apply, ("inputs untouched",), "written to: x"),
    (WritesArriving.apply, ("inputs untouched",), "written to: the gradient of result 0"),
    (WrongForwardMode.apply, ("forward mode",), "the derivative in a direction of w is 0"),
    (AccumulatesInHalf.apply, ("agrees in bfloat16",), "torch path in float64"),
    (detached, ("reverse mode",), "the gradient is zero or missing"),
    (half_detached, ("reverse mode",), "elements are wrong, in x, w"),
]


def inputs():
    return torch.randn(2, 3, 4).add(0.1).unbind()


@pytest.mark.parametrize(
    ("function", "checks", "text"),
    PLANTED,
    ids=lambda value: getattr(getattr(value, "__self__", value), "__name__", None),
)
def test_planted_mistakes_are_caught_and_named(function, checks, text):
    report = ops.check_gradients(function, *inputs())
    assert not report.ok
    failed = {check.name for check in report.failures}
    assert set(checks) <= failed
    assert text in str(report)
    with pytest.raises(ops.GradientCheckError, match=checks[0]):
        report.raise_if_failed()
    if checks[0] not in ("reverse mode", "inputs untouched"):
        assert "reverse mode" not in failed  # only the wrong derivative is reported


@pytest.mark.parametrize("seed", range(8))
def test_a_wrong_gradient_of_one_number_that_drops_out(seed):
    """Its rounding errors are not a jump."""
    torch.manual_seed(seed)
    report = ops.check_gradients(WrongWhereTheTrueOneIsZero.apply, torch.randn(6), torch.randn(1))
    assert "w[0]" in str(report)
    assert not report


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("function", [WrongInSinglePrecision, WrongForSome, Right])
def test_whatever_mode_the_caller_is_in(function, mode):
    with mode():
        assert bool(ops.check_gradients(function.apply, *inputs())) == (function is Right)
