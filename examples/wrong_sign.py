"""A wrong gradient, as an example for the report of the gradient check."""

import torch


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return -3 * grad * x**2


def cube(x):
    return Cube.apply(x)
