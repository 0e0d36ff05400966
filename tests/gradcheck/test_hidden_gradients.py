"""Wrong gradients hidden by state, modes, layouts and results. Each must be found."""

from __future__ import annotations

import pytest
import torch

import ops
from ops.gradcheck._mismatch import identical

# ---- each is x**2 with one error -----------------------------------------------------------------


class Square(torch.autograd.Function):
    """The right gradient, from which each other class differs in one way."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * g * x


class StateOfTheClass(Square):
    kept = None

    @staticmethod
    def forward(ctx, x):
        StateOfTheClass.kept = x.detach()
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g * StateOfTheClass.kept


STACK = []


class StateInAStack(Square):
    """Right only if backward passes run in reverse order."""

    @staticmethod
    def forward(ctx, x):
        STACK.append(x.detach())
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g * (STACK.pop() if len(STACK) > 1 else STACK[0])


class UsesUpItsState(Square):
    @staticmethod
    def forward(ctx, x):
        ctx.kept = x.detach().clone()
        return x * x

    @staticmethod
    def backward(ctx, g):
        result = 2 * g * ctx.kept
        ctx.kept = torch.zeros_like(ctx.kept)
        return result


class LastForward:
    """A function that keeps state in ``self``."""

    def __call__(self, x):
        owner = self

        class Inner(Square):
            @staticmethod
            def forward(ctx, x):
                owner.kept = x.detach()
                return x * x

            @staticmethod
            def backward(ctx, g):
                return 2 * g * owner.kept

        return Inner.apply(x)


def other_without_gradients(x):
    return Square.apply(x) if torch.is_grad_enabled() else x**3


def other_in_inference_mode(x):
    return x * x if not torch.is_inference_mode_enabled() else x * x + 1


def other_if_no_gradient_is_required(x):
    return Square.apply(x) if x.requires_grad else x * x + 1


def other_value_where_recorded(x):
    """The gradient is that of the value that it computes without gradients."""
    return x * x + (x**3 - x * x).detach() if torch.is_grad_enabled() else x * x


class NaNForNothing(Square):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * (g / g.norm()) * g.norm()


class NaNForOneZero(Square):
    @staticmethod
    def backward(ctx, g):
        return Square.backward(ctx, g / g * g)


class Clamped(Square):
    @staticmethod
    def backward(ctx, g):
        return Square.backward(ctx, g.clamp(-5, 5))


class Offset(Square):
    @staticmethod
    def backward(ctx, g):
        return Square.backward(ctx, g + 1e-12)


class OfTheMagnitude(Square):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g * torch.where(g.sum() == g.abs().sum(), 3, 1)


class WrongIfLastStrideIsZero(Square):
    @staticmethod
    def backward(ctx, g):
        gx = Square.backward(ctx, g)
        return 2 * gx if g.dim() > 1 and g.stride()[-1] == 0 and g.stride()[0] else gx


class WrongIfInputExpandedAtTheEnd(Square):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x * (2 if x.stride()[-1] == 0 and x.stride()[0] else 1)


class WrongInWiderRows(Square):
    """Like a kernel that takes a unit stride for a dense tensor."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        dense = x.stride()[-1] == 1 and x.stride()[0] != 1
        return torch.as_strided(x, x.shape, (x.shape[1], 1)) ** 2 if dense else x * x


class WrongLayoutInHalf(Square):
    @staticmethod
    def backward(ctx, g):
        gx = Square.backward(ctx, g)
        return 3 * gx if g.dtype is torch.bfloat16 and not g.is_contiguous() else gx


class WritesInHalf(Square):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.clone())
        y = x * x
        if x.dtype is torch.float16:
            x.data.view(-1)[0] = 0
        return y


class WritesWithoutGradients(Square):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.clone())
        y = x * x
        if not ctx.needs_input_grad[0]:
            x.data.mul_(2)
        return y


class WritesIfNotContiguous(Square):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.clone())
        y = x * x
        if not x.is_contiguous() and 0 not in x.stride():
            x.data.mul_(2)
        return y


class WrongAtZero(Square):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return torch.where(x == 0, g, 2 * g * x)


class Product(torch.autograd.Function):
    """The gradient is NaN if a factor is zero."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.prod()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.prod() / x


class WrongVmap(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.cumsum(0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g.flip(0).cumsum(0).flip(0)

    @staticmethod
    def vmap(info, in_dims, x):
        return WrongVmap.apply(x), in_dims[0]  # sums along the batch


class WrongUnderAnotherDefault(Square):
    @staticmethod
    def backward(ctx, g):
        return Square.backward(ctx, g) * torch.ones(()).element_size() / 4


class WrongForResults(Square):
    """The gradient is wrong if the input is not a leaf."""

    @staticmethod
    def backward(ctx, g):
        return Square.backward(ctx, g) * (1 if ctx.leaf else 2)

    @staticmethod
    def forward(ctx, x):
        ctx.leaf = x.is_leaf
        return Square.forward(ctx, x)


class WrongThirdOrder(Square):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return Linearly.apply(x, g)


class Linearly(torch.autograd.Function):
    """Its backward pass lacks half of a derivative."""

    @staticmethod
    def forward(ctx, x, g):
        ctx.save_for_backward(x, g)
        return 2 * g * x

    @staticmethod
    def backward(ctx, gg):
        x, g = ctx.saved_tensors
        return 2 * gg * g.detach(), 2 * gg * x


def x():
    return torch.randn(3, 4)


ALONE = [
    (StateOfTheClass.apply, "interleaved calls", "with another call before its backward pass"),
    (StateInAStack.apply, "interleaved calls", "the gradient of x"),
    (UsesUpItsState.apply, "interleaved calls", "in a second backward pass"),
    (LastForward(), "interleaved calls", "with another call before its backward pass"),
    (other_without_gradients, "without gradients", "under no_grad"),
    (other_in_inference_mode, "without gradients", "under inference_mode"),
    (other_if_no_gradient_is_required, "without gradients", "that require no gradient"),
    (other_value_where_recorded, "reverse mode", ""),
    (NaNForNothing.apply, "linearity", "arriving gradient is 0 times as large"),
    (NaNForOneZero.apply, "linearity", "times as large"),
    (Clamped.apply, "linearity", "by linearity"),
    (Offset.apply, "linearity", "by linearity"),
    (OfTheMagnitude.apply, "linearity", ""),
    (WrongIfLastStrideIsZero.apply, "layouts", "gradient expanded along the last dimension"),
    (WrongIfInputExpandedAtTheEnd.apply, "layouts", "inputs expanded along the last dimension"),
    (WrongInWiderRows.apply, "layouts", "in wider rows"),
    (WrongLayoutInHalf.apply, "layouts", "in bfloat16"),
    (WritesInHalf.apply, "inputs untouched", "written to: x in float16"),
    (WritesWithoutGradients.apply, "inputs untouched", "written to: x"),
    (WritesIfNotContiguous.apply, "layouts", "it writes to its inputs"),
    (WrongAtZero.apply, "exact zeros", "with exact zeros in the inputs: "),
    (Product.apply, "exact zeros", "analytic nan"),
    (WrongVmap.apply, "vmap", "under vmap over input[0]"),
    (WrongUnderAnotherDefault.apply, "default dtype", "with the default dtype float64"),
    (WrongForResults.apply, "non-leaf inputs", "of inputs that are results themselves"),
]


@pytest.mark.parametrize(
    ("function", "check", "text"),
    ALONE,
    ids=lambda value: getattr(getattr(value, "__self__", value), "__name__", None),
)
def test_what_hides_is_found_and_named(function, check, text):
    report = ops.check_gradients(function, x())
    failed = {found.name for found in report.failures}
    assert check in failed, str(report)
    assert text in str(report)
    assert ("reverse mode" in failed) == (check == "reverse mode")


def test_third_order_is_checked_on_request():
    assert ops.check_gradients(WrongThirdOrder.apply, x())
    report = ops.check_gradients(WrongThirdOrder.apply, x(), order=3)
    assert [found.name for found in report.failures] == ["third order"]
    assert ops.check_gradients(lambda x: x.sin(), x(), order=4)
    names = {found.name for found in ops.check_gradients(lambda x: x.sin(), x(), order=1).checks}
    assert "second order" not in names


def test_a_function_that_writes_to_its_input():
    report = ops.check_gradients(lambda x: x.mul_(2), x())
    assert "reverse mode" in {found.name for found in report.failures}
    assert "a leaf Variable that requires grad is being used in an in-place operation" in str(
        report
    )


# ---- one tensor twice ----------------------------------------------------------------------------


class Twice(torch.autograd.Function):
    """It checks whether its inputs are the same tensor."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.one = x is y
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        return g * y, (None if ctx.one else g * x)


class ByAddress(Twice):
    @staticmethod
    def forward(ctx, x, y):
        result = Twice.forward(ctx, x, y)
        ctx.one = x.data_ptr() == y.data_ptr()
        return result


@pytest.mark.parametrize("function", [Twice.apply, ByAddress.apply])
def test_one_tensor_twice(function):
    one = x()
    for arguments in ((x(), x()), (one, one)):
        report = ops.check_gradients(function, *arguments)
        assert [found.name for found in report.failures] == ["one tensor twice"], str(report)
        assert "with one tensor as x and y" in str(report)
    assert ops.check_gradients(torch.mul, one, one)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (float("nan"), float("nan"), True),
        (float("nan"), 0.0, False),
        (float("inf"), torch.finfo(torch.float64).max, False),
    ],
)
def test_nan_is_identical_to_nan_alone(one, other, same):
    pair = [torch.tensor([1.0, value], dtype=torch.float64) for value in (one, other)]
    assert identical(*pair) == same
