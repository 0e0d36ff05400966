"""Wrong derivatives that only some of torch's transforms use."""

from __future__ import annotations

import torch

import ops
from tests.gradcheck.test_hidden_gradients import x


class Square(torch.autograd.Function):
    """Right in each mode, from which each other class differs in one way."""

    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return Slope.apply(x, g)

    @staticmethod
    def jvp(ctx, dx):
        (x,) = ctx.saved_tensors
        return 2 * x * dx


class Slope(torch.autograd.Function):
    @staticmethod
    def forward(x, g):
        return 2 * x * g

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, gg):
        x, g = ctx.saved_tensors
        return 2 * gg * g, 2 * gg * x

    @staticmethod
    def jvp(ctx, dx, dg):
        x, g = ctx.saved_tensors
        return (0 if dx is None else 2 * dx * g) + (0 if dg is None else 2 * x * dg)


class HalfOfSlope(Slope):
    """It forgets the tangent of ``x``."""

    @staticmethod
    def jvp(ctx, dx, dg):
        x, g = ctx.saved_tensors
        return 0 * x * g if dg is None else 2 * x * dg


class WrongForwardOverReverse(Square):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return HalfOfSlope.apply(x, g)


def test_second_derivatives_in_forward_mode():
    assert ops.check_gradients(Square.apply, x())
    report = ops.check_gradients(WrongForwardOverReverse.apply, x())
    assert [found.name for found in report.failures] == ["forward mode"], str(report)
    assert "in forward over reverse mode" in str(report)


def test_vmap_at_equal_elements():
    """Under vmap, these choose one of the equal elements, and else share the gradient."""
    for function in (torch.median, torch.max):
        report = ops.check_gradients(function, torch.tensor([0.0, 0.0, 0.0]), order=1)
        assert report.ok, str(report)


class OfThree(torch.autograd.Function):
    factor = 1

    @staticmethod
    def forward(a, b, c):
        return a * b + c

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        a, b, _ = ctx.saved_tensors
        return g * b, g * a, g

    @classmethod
    def vmap(cls, info, in_dims, *tensors):
        moved = [
            t.unsqueeze(0) if dim is None else t.movedim(dim, 0)
            for t, dim in zip(tensors, in_dims, strict=True)
        ]
        return cls.apply(*moved) * (cls.factor if in_dims.count(None) == 1 else 1), 0


class WrongForTwo(OfThree):
    """Its rule for vmap is wrong for two of three inputs."""

    factor = 2


def test_vmap_over_all_inputs_but_one():
    inputs = torch.randn(3, 4).unbind()
    assert ops.check_gradients(OfThree.apply, *inputs)
    report = ops.check_gradients(WrongForTwo.apply, *inputs)
    assert [found.name for found in report.failures] == ["vmap"], str(report)
