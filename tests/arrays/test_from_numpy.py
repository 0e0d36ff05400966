"""from_numpy: dtypes, devices, memory, gradients and errors of ops made from NumPy functions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ops
from tests.harness.op_under_test import DTYPES, close


def product_forward(x, y, power=2):
    return x**power * y


def product_backward(g, x, y, power=2):
    return power * g * x ** (power - 1) * y, g * x**power


def product_second(gx, gy, g, x, y, power=2):
    d, dd = power * x ** (power - 1), power * (power - 1) * x ** (power - 2)
    return gx * d * y + gy * x**power, gx * g * dd * y + gy * g * d, gx * g * d


PRODUCT = ops.from_numpy(
    product_forward, ops.from_numpy(product_backward, product_second), name="product"
)
ONCE = ops.from_numpy(lambda x: x**3, lambda g, x: 3 * g * x**2, name="cube")


def leaf(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()


def test_first_and_second_order():
    inputs = (leaf(3, 4), leaf(3, 4))
    assert torch.autograd.gradcheck(PRODUCT, inputs)
    assert torch.autograd.gradgradcheck(PRODUCT, inputs)
    for needed in ((True, False), (False, True)):
        some = [t.detach().requires_grad_(need) for t, need in zip(inputs, needed, strict=True)]
        assert torch.autograd.gradcheck(PRODUCT, some)


def test_keywords_are_passed_on():
    x, y = leaf(3), leaf(3)
    close(PRODUCT(x, y, power=3), x**3 * y, torch.float64)
    assert torch.autograd.gradcheck(lambda *t: PRODUCT(*t, power=3), (x, y))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype_is_kept(dtype):
    """The dtype is kept even if NumPy widens, as in a division by an integer array."""
    x = leaf(5, dtype=dtype)
    op = ops.from_numpy(lambda x: x / np.arange(1, 6), lambda g, x: g / np.arange(1, 6))
    y = op(x)
    assert y.dtype == dtype
    close(y, x / torch.arange(1, 6), dtype)
    y.sum().backward()
    assert x.grad.dtype == dtype


@pytest.mark.parametrize(
    "lay",
    [
        lambda t: t.mT.contiguous().mT,
        lambda t: t[:1].expand(4, 6),
        lambda t: torch.stack([t, t], -1)[..., 0],
        lambda t: torch.complex(t, -t).conj().imag,
    ],
)
def test_layouts(lay):
    x = lay(torch.randn(4, 6, dtype=torch.float64)).requires_grad_()
    y = ONCE(x)
    close(y, x**3, torch.float64)
    (grad,) = torch.autograd.grad(y.sum(), x)
    close(grad, 3 * x**2, torch.float64)


def test_empty_and_scalar():
    for shape in ((), (0,), (3, 0)):
        x = leaf(*shape)
        ONCE(x).sum().backward()
        close(x.grad, 3 * x**2, torch.float64)


def test_several_outputs_and_none_of_integers():
    op = ops.from_numpy(
        lambda x: (np.sort(x), np.argsort(x), x.max()),
        lambda g, _, m, x: g[np.argsort(np.argsort(x))] + m * (x == x.max()),
    )
    x = leaf(7)
    values, order, _ = op(x)
    assert order.dtype == torch.int64
    assert not order.requires_grad
    assert torch.equal(values, x[order])
    assert torch.autograd.gradcheck(lambda t: (op(t)[0], op(t)[2]), (x,))
    torch.autograd.backward([values], [torch.arange(7.0, dtype=torch.float64)])
    assert x.grad[order].tolist() == list(range(7))


def test_integer_inputs_take_no_gradient():
    op = ops.from_numpy(lambda x, i: x[i], lambda g, x, i: (np.bincount(i, g, len(x)), None))
    x, index = leaf(4), torch.tensor([0, 2, 2])
    op(x, index).sum().backward()
    assert x.grad.tolist() == [1.0, 0.0, 2.0, 0.0]
    assert op(torch.arange(3), torch.tensor([1])).dtype == torch.int64


def test_integer_inputs_of_an_op_that_is_differentiated_twice():
    """A gradient of None counts as zeros in the second derivative."""

    def first(g, x, i):
        return np.bincount(i, 2 * g * x[i], len(x)), None

    def second(gx, gi, g, x, i):
        assert not gi.any()
        return 2 * gx[i] * x[i], np.bincount(i, 2 * g * gx[i], len(x)), None

    op = ops.from_numpy(lambda x, i: x[i] ** 2, ops.from_numpy(first, second))
    index = torch.tensor([0, 2, 2])
    assert torch.autograd.gradgradcheck(lambda x: op(x, index), (leaf(4),))


def test_results_in_another_byte_order():
    for kind in (">f8", ">i4", ">f4"):
        mine = ops.from_numpy(lambda x: x.astype(kind))(torch.arange(3.0))  # noqa: B023
        assert mine.tolist() == [0, 1, 2]


def test_the_callers_memory_is_safe():
    """The function cannot write to inputs, return them, or share its buffers with results."""
    x = torch.ones(3)
    with pytest.raises(ValueError, match="read-only"):
        ops.from_numpy(lambda x: np.add(x, 1, out=x))(x)
    same = ops.from_numpy(lambda x: x)(x)
    same += 1
    assert x.tolist() == [1.0] * 3
    buffer = np.zeros(3)
    ops.from_numpy(lambda x: buffer)(x).add_(1)
    assert buffer.tolist() == [0.0] * 3
    flipped = ops.from_numpy(lambda x: x[::-1])(torch.arange(3.0))
    assert flipped.tolist() == [2.0, 1.0, 0.0]


def test_function_transforms():
    x, y = torch.randn(2, 4, 3, dtype=torch.float64)
    total = lambda x, y: PRODUCT(x, y).sum()  # noqa: E731
    close(torch.func.grad(total)(x, y), 2 * x * y, torch.float64)
    close(torch.func.vmap(PRODUCT, (0, None))(x, y[0]), x**2 * y[0], torch.float64)
    empty = torch.func.vmap(PRODUCT)(torch.ones(0, 4), torch.ones(0, 4))
    assert (empty.shape, empty.dtype) == ((0, 4), torch.float32)
    each = torch.func.vmap(torch.func.grad(total))(x, y)
    close(each, 2 * x * y, torch.float64)
    close(torch.func.jacrev(ONCE)(x[0]), torch.diag(3 * x[0] ** 2), torch.float64)


# torch itself warns after a graph break that leaves an intermediate tensor.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_torch_compile_works_around_it():
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: 2 * ONCE(t + 1), backend="aot_eager")
    x = leaf(4)
    y = compiled(x)
    close(y, 2 * (x + 1) ** 3, torch.float64)
    y.sum().backward()
    close(x.grad, 6 * (x + 1) ** 2, torch.float64)


@pytest.mark.cuda
def test_device_is_restored():
    x = torch.randn(4, device="cuda", requires_grad=True)
    y = ONCE(x)
    assert y.device == x.device
    y.sum().backward()
    close(x.grad, 3 * x**2, torch.float32)


# ---- errors --------------------------------------------------------------------------------------


def test_no_backward_is_an_error_not_a_zero():
    x = leaf(3)
    y = ops.from_numpy(np.sin)(x)
    assert y.requires_grad
    with pytest.raises(ops.GradientError, match="sin has no backward function"):
        y.sum().backward()


def test_no_second_backward_is_an_error_not_a_zero():
    x = leaf(3)
    (grad,) = torch.autograd.grad(ONCE(x).sum(), x, create_graph=True)
    with pytest.raises(ops.GradientError, match="the backward of cube has no backward function"):
        grad.sum().backward()


def test_forward_mode_is_an_error_not_a_zero():
    x = torch.randn(3)
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(ONCE, (x,), (x,))


def test_batched_gradients_are_an_error():
    x = leaf(3)
    with pytest.raises(ops.GradientError, match=r"cannot take batched gradients .*torch.func.vmap"):
        torch.autograd.grad(ONCE(x), x, torch.eye(3, dtype=torch.float64), is_grads_batched=True)


@pytest.mark.parametrize(
    ("returned", "error", "text"),
    [
        (lambda g, x, y: g, ops.ArgumentTypeError, "a gradient for each of the 2 inputs, got 1"),
        (
            lambda g, x, y: (g, None),
            ops.GradientError,
            "must return an array for input 1, .* got None",
        ),
        (
            lambda g, x, y: (g, g.sum()),
            ops.ArgumentError,
            r"the backward of f must return a gradient of shape \[3\] for input 1, got \[\]",
        ),
        (
            lambda g, x, y: (g, g + 1j),
            ops.ArgumentTypeError,
            "must return real arrays, got ndarray",
        ),
    ],
)
def test_wrong_gradients(returned, error, text):
    op = ops.from_numpy(lambda x, y: x + y, returned, name="f")
    with pytest.raises(error, match=text):
        op(leaf(3), leaf(3)).sum().backward()


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: ops.from_numpy(3), ops.ArgumentTypeError, "forward must be callable, got int"),
        (
            lambda: ops.from_numpy(np.sin, 3),
            ops.ArgumentTypeError,
            "backward must be callable, got int",
        ),
        (ONCE, ops.ArgumentError, "cube must be called with at least one tensor"),
        (
            lambda: ONCE(np.ones(3)),
            ops.ArgumentTypeError,
            "argument 0 of cube must be a torch.Tensor, got ndarray",
        ),
        (
            lambda: PRODUCT(leaf(3), leaf(3), power=torch.tensor(2)),
            ops.ArgumentTypeError,
            "power of product must not hold a tensor, because its gradient",
        ),
        (
            lambda: PRODUCT(leaf(3), leaf(3), power={"of": [torch.tensor(2)]}),
            ops.ArgumentTypeError,
            "power of product must not hold a tensor, because its gradient",
        ),
        (
            lambda: PRODUCT(torch.ones(3), torch.ones(3, device="meta")),
            ops.ArgumentError,
            "argument 1 of product must be on the device of the first, cpu, got meta",
        ),
        (
            lambda: ONCE(torch.ones(3, device="meta")),
            ops.ArgumentError,
            "argument 0 of cube must have values, got a meta tensor",
        ),
        (
            lambda: ONCE(torch.ones(3).to_sparse()),
            ops.ArgumentError,
            "argument 0 of cube must be a dense tensor, got layout sparse_coo",
        ),
        (
            lambda: ops.from_numpy(lambda x: "text", name="f")(torch.ones(3)),
            ops.ArgumentTypeError,
            "f must return real arrays, got str",
        ),
        (
            lambda: ops.from_numpy(lambda x: None, name="f")(torch.ones(3)),
            ops.ArgumentTypeError,
            "f must return real arrays, got NoneType",
        ),
    ],
)
def test_bad_arguments(call, error, text):
    with pytest.raises(error, match=text):
        call()
