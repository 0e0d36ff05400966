"""normalize_with_norm: several outputs, and gradients for any subset of them."""

from __future__ import annotations

import pytest
import torch

import ops
from tests.harness.battery import Battery
from tests.harness.op_under_test import OpUnderTest, close


def reference(input, dim=-1):
    norm = torch.sqrt((input * input).sum(dim, keepdim=True))
    return input / norm, norm.squeeze(dim), norm.squeeze(dim) == 0


def inputs(shape, dtype, device):
    return [torch.randn(shape, dtype=torch.float64, device=device).to(dtype)]


class TestNormalizeWithNorm(Battery):
    backends = ("torch",)
    op = OpUnderTest(
        name="normalize_with_norm",
        call=ops.normalize_with_norm,
        reference=reference,
        names=("input",),
        shards=True,
        inputs=inputs,
        shapes=((7,), (16, 64), (2, 3, 17), (4, 6)),
        variants=({}, {"dim": 0}),
        edges=((0, 4), (1, 4), (1, 1), (7,), (2, 0, 3)),  # without (4, 0): see below
    )


@pytest.mark.parametrize("which", ["direction", "norm", "both"])
def test_any_subset_of_the_outputs(which):
    x, y = (inputs((4, 6), torch.float64, "cpu")[0].requires_grad_() for _ in range(2))
    y = x.detach().clone().requires_grad_()
    results, expected = ops.normalize_with_norm(x), reference(y)
    chosen = {"direction": (0,), "norm": (1,), "both": (0, 1)}[which]
    seeds = [torch.randn_like(results[i]) for i in chosen]
    torch.autograd.backward([results[i] for i in chosen], seeds)
    torch.autograd.backward([expected[i] for i in chosen], seeds)
    close(x.grad, y.grad, torch.float64)


def test_unused_outputs_arrive_as_none(monkeypatch):
    """The backward pass gets None for them, not zeros."""
    import sys

    function = sys.modules["ops.layers.normalize_with_norm"].NormalizeWithNormFunction
    arrived = []

    def spy(ctx, *grads):
        arrived.append([grad is None for grad in grads])
        return torch.zeros(4, 6, dtype=torch.float64), None

    monkeypatch.setattr(function, "backward", staticmethod(spy))
    for output in (0, 1):
        x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
        ops.normalize_with_norm(x)[output].sum().backward()
    assert arrived == [[False, True, True], [True, False, True]]


def test_zero_vectors():
    """Direction, norm and every gradient are zero, not NaN, and so is the second derivative."""
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    direction, norm, is_zero = ops.normalize_with_norm(x)
    assert direction.tolist() == [[0.0, 0.0], [0.6, 0.8]]
    assert norm.tolist() == [0.0, 5.0]
    assert is_zero.tolist() == [True, False]
    assert not is_zero.requires_grad
    (grad,) = torch.autograd.grad(direction[:, 0].sum() + norm.sum(), x, create_graph=True)
    assert grad[0].tolist() == [0.0, 0.0]
    (second,) = torch.autograd.grad(grad.square().sum(), x)
    assert second[0].tolist() == [0.0, 0.0]
    assert second.isfinite().all()
    tangent = torch.func.jvp(lambda t: ops.normalize_with_norm(t)[1], (x,), (x + 1,))[1]
    assert tangent[0] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_vectors_of_any_magnitude(dtype):
    """3-4-5 triangles whose squares overflow or underflow, on both paths."""
    finfo = torch.finfo(dtype)
    sizes = torch.tensor([finfo.smallest_normal, 1e-30, 1.0, 1e30, finfo.max / 8], dtype=dtype)
    x = (sizes[:, None] * torch.tensor([3.0, -4.0], dtype=dtype)).requires_grad_()
    for split in (ops.normalize_with_norm, torch.func.vmap(ops.normalize_with_norm)):
        direction, norm, is_zero = split(x)
        torch.testing.assert_close(norm, 5 * sizes, rtol=4 * finfo.eps, atol=0)
        expected = torch.tensor([0.6, -0.8], dtype=dtype).expand(5, 2)
        torch.testing.assert_close(direction, expected, rtol=4 * finfo.eps, atol=0)
        assert not is_zero.any()
        (grad,) = torch.autograd.grad(norm.sum(), x)
        torch.testing.assert_close(grad, expected, rtol=4 * finfo.eps, atol=0)


def test_vectors_of_no_dimension():
    for split in (ops.normalize_with_norm, torch.func.vmap(ops.normalize_with_norm)):
        direction, norm, is_zero = split(torch.ones(3, 0))
        assert (direction.shape, norm.tolist(), is_zero.tolist()) == ((3, 0), [0.0] * 3, [True] * 3)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((3.0,), ops.ArgumentTypeError, "input must be a torch.Tensor, got float"),
        ((torch.ones(2, 3), 2), ops.ArgumentError, r"dimension of input, .* \[2, 3\], got 2"),
        ((torch.tensor(1.0),), ops.ArgumentError, r"input must have at least one dimension, got"),
        ((torch.ones(2), 0.5), ops.ArgumentTypeError, "dim must be an int, got float"),
        ((torch.ones(2, dtype=torch.int64),), ops.ArgumentTypeError, "input must have dtype"),
    ],
)
def test_bad_arguments(arguments, error, text):
    with pytest.raises(error, match=text):
        ops.normalize_with_norm(*arguments)
