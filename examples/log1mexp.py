"""An autograd Function: a gradient that autograd would get wrong, written by hand.

log(1 - exp(-x)) for x > 0, by M. Maechler, "Accurately Computing log(1 - exp(-|a|))", 2012. One
of two forms loses all digits near zero, the other far from it; choosing by torch.where, as tensor
code does, would make NaN of the gradient of the form not chosen.
"""

import math

import torch


class Log1mExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)  # and nothing else: the backward pass needs no more
        near = torch.log(-torch.expm1(-x))
        far = torch.log1p(-torch.exp(-x))
        return torch.where(x < math.log(2), near, far)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad / torch.expm1(x)  # tensor functions, so that autograd can go on from here


def log1mexp(x):
    return Log1mExp.apply(x)
