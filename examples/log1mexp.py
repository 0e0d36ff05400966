"""An autograd Function: a handwritten gradient, because that of autograd would be wrong.

log(1 - exp(-x)) for x > 0, by M. Maechler, "Accurately Computing log(1 - exp(-|a|))", 2012. One
of two forms loses all digits near zero, the other far from it. Tensor code would choose by
torch.where, but the form that is not chosen would make the gradient NaN.
"""

import math

import torch


class Log1mExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)  # the backward pass needs nothing else
        near = torch.log(-torch.expm1(-x))
        far = torch.log1p(-torch.exp(-x))
        return torch.where(x < math.log(2), near, far)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad / torch.expm1(x)  # tensor functions, so that autograd can record them


def log1mexp(x):
    return Log1mExp.apply(x)
