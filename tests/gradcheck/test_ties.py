"""Points where several kinks meet: equal elements, and zeros."""

from __future__ import annotations

import pytest
import torch

import ops


def sort(x):
    return x.sort().values


def median(x):
    return torch.quantile(x, 0.5)


def concatenated_relu(x):
    return torch.cat([x.relu(), (-x).relu()], -1)


def root(x):
    """Its slope is infinite at zero, where the gradient is zero."""
    return torch.where(x == 0, 0, x.where(x != 0, 1).abs().sqrt())


TIES = torch.tensor([1.0, 2.0, 2.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("function", "at"),
    [
        (sort, TIES),
        (median, TIES),
        (lambda x: x.topk(2).values, TIES),
        (lambda x: x.cummax(0).values, TIES),
        (lambda x: x.amax(), TIES.flip(0).clamp(max=2)),
        (median, torch.randn(9)),
        (concatenated_relu, torch.randn(3, 4)),
        (lambda x: x.relu().sum() - (-x).clamp(min=0).sum(), torch.randn(3, 4)),
        (torch.linalg.vector_norm, torch.zeros(4)),
        (root, torch.zeros(4)),
    ],
)
def test_each_gradient_that_occurs_nearby_is_right(function, at):
    torch.manual_seed(3)
    report = ops.check_gradients(function, at, dtypes=(), order=1)
    failed = {check.name for check in report.failures}
    assert not failed & {"reverse mode", "exact zeros"}, str(report)


class MaxForAll(torch.autograd.Function):
    """Each of several equal elements gets the whole gradient."""

    @staticmethod
    def forward(ctx, x):
        y = x.amax(-1)
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        return g[..., None] * (x == y[..., None])


class NormWithOnes(torch.autograd.Function):
    """At zero, the gradient is longer than that of a norm can be."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.norm()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (x / x.norm() if x.any() else torch.ones_like(x))


@pytest.mark.parametrize(
    ("function", "at", "text"),
    [
        (MaxForAll.apply, torch.tensor([2.0, 1.0, 2.0]), "along its 2 elements at kinks together"),
        (NormWithOnes.apply, torch.zeros(4), "along its 4 elements at kinks together"),
    ],
)
def test_gradients_that_are_too_large_in_sum(function, at, text):
    report = ops.check_gradients(function, at)
    assert [check.name for check in report.failures] == ["reverse mode"], str(report)
    assert text in str(report)


class WrongSort(torch.autograd.Function):
    factor = 1.0

    @classmethod
    def of(cls, factor):
        return type("WrongSort", (cls,), {"factor": factor}).apply

    @staticmethod
    def forward(ctx, x):
        y, order = x.sort()
        ctx.save_for_backward(order)
        return y

    @classmethod
    def backward(cls, ctx, g):
        (order,) = ctx.saved_tensors
        return cls.factor * torch.zeros_like(g).index_put((order,), g)


@pytest.mark.parametrize("factor", [1.0, -1.0, 1.01, 2.0])
def test_wrong_gradients_at_ties(factor):
    report = ops.check_gradients(WrongSort.of(factor), TIES)
    assert report.ok is (factor == 1), str(report)
