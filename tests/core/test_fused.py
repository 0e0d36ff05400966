"""An op without compiled kernels: a FusedOp whose kernels are tensor code."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import Tensor

import ops
from ops._core.fused import FusedOp
from ops.layers import lltm


def _cube(x: Tensor, y: Tensor, scale: float) -> Tensor:
    return scale * (x**3 + y)


def _forward(x, y, scale):
    square = x * x
    return scale * (square * x + y), square


def _backward(grad, square, scale, needs_x, needs_y):
    gradients = (3 * scale * grad * square, needs_x), (scale * grad, needs_y)
    return [gradient for gradient, need in gradients if need]


cube = FusedOp(
    "cube_of_a_test",
    _cube,
    results=["cube"],
    saved=["square"],
    backward=["square", "scale"],
    tensor_code=(_forward, _backward),
)


def leaf(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def test_it_runs_its_kernels_for_any_request():
    x, y = leaf(1.0, 2.0), leaf(3.0, 4.0)
    for request in ("auto", "torch", "cpp", "cuda", "compiled"):
        with ops.use_backend(request), warnings.catch_warnings():
            warnings.simplefilter("error")
            result = cube(x, y, 2.0)
        assert type(result.grad_fn).__name__ == "CubeOfATestFunctionBackward"
        assert result.tolist() == [8.0, 24.0]
        assert [t.tolist() for t in torch.autograd.grad(result.sum(), (x, y))] == [[6, 24], [2, 2]]
    assert "cube_of_a_test" not in [one.op for one in ops.explain()]


def test_subsets_and_second_order():
    x, y = leaf(1.0, 2.0), leaf(3.0, 4.0)
    assert torch.autograd.grad(cube(x, y.detach(), 2.0).sum(), x)[0].tolist() == [6, 24]
    assert torch.autograd.grad(cube(x.detach(), y, 2.0).sum(), y)[0].tolist() == [2, 2]
    assert torch.autograd.gradcheck(cube, (x, y, 2.0), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(cube, (x, y, 2.0))


def test_transforms_and_graphs_see_the_definition():
    x, y = leaf(1.0, 2.0).detach(), leaf(3.0, 4.0).detach()
    assert torch.func.vmap(cube, (0, 0, None))(x, y, 2.0).tolist() == [8, 24]
    assert torch.func.jvp(lambda x: cube(x, y, 2.0), (x,), (x,))[1].tolist() == [6, 48]
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(lambda x, y: cube(x, y, 2.0), fullgraph=True, backend=keep)
    assert compiled(x, y).tolist() == [8, 24]
    assert "** 3" in graphs[0].code


class Subclass(Tensor):
    """As DTensor is one."""


def _half_square(x: Tensor, y: Tensor, half: float, forms_x: bool, forms_y: bool) -> Tensor:
    return half * (x * x + y).sum()


def _half_square_forward(x, y, half, forms_x, forms_y):
    nothing = x.new_empty(0)
    of_x, of_y = 2 * x if forms_x else nothing, torch.ones_like(y) if forms_y else nothing
    return half * (x * x + y).sum(), of_x, of_y, x.new_tensor(half)


half_square = FusedOp(
    "half_square_of_a_test",
    _half_square,
    results=["sum"],
    saved=["of_x", "of_y", "factor"],
    formed=["of_x", "of_y"],
    factor="factor",
    tensor_code=[_half_square_forward],
)


@pytest.mark.parametrize("formed", [(True, True), (True, False), (False, True), (False, False)])
def test_gradients_formed_in_the_forward_pass(formed):
    """Those that were not formed are the definition's."""
    x, y = leaf(1.0, 2.0), leaf(3.0, 4.0)
    for needed in ((x, y), (x,), (y,)):
        loss = half_square(x, y, 0.5, *formed)
        for _ in range(2):
            gradients = torch.autograd.grad(3 * loss, needed, retain_graph=True)
            expected = {x: [3.0, 6.0], y: [1.5, 1.5]}
            assert [one.tolist() for one in gradients] == [expected[one] for one in needed]
        (3 * loss).backward()
        assert x.grad.tolist() == [3.0, 6.0]
        x.grad = y.grad = None
    assert torch.autograd.gradcheck(half_square, (x, y, 0.5, *formed), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(half_square, (x, y, 0.5, *formed))


def test_a_tensor_of_another_class_gets_the_definition():
    x, y = leaf(1.0, 2.0), leaf(3.0, 4.0)
    for arguments in ((x.as_subclass(Subclass), y), (x, y.as_subclass(Subclass))):
        result = cube(*arguments, 2.0)
        assert type(result) is Subclass
        assert type(result.grad_fn).__name__ != "CubeOfATestFunctionBackward"
        assert result.tolist() == [8.0, 24.0]


def unordered(scale: float, x: Tensor) -> Tensor:
    raise NotImplementedError


def untyped(x: Tensor, scale) -> Tensor:
    raise NotImplementedError


@pytest.mark.parametrize(
    ("definition", "names", "message"),
    [
        (_cube, {"backward": ["sqare"]}, "must be one of x, y, scale, cube, square, got 'sqare'"),
        (_cube, {"constants": ["square"]}, "must be one of x, y, cube, got 'square'"),
        (_cube, {"formed": ["of_x"]}, "must be one of square, got 'of_x'"),
        (_cube, {"formed": ["square"]}, "formed must name a gradient for each differentiable"),
        (unordered, {}, "the definition must take its tensors first, then its parameters"),
        (
            untyped,
            {},
            "scale must be annotated with one of Tensor, Tensor | None, float, int, bool",
        ),
    ],
)
def test_a_wrong_declaration_is_refused(definition, names, message):
    names = {"results": ["cube"], "saved": ["square"], "backward": [], **names}
    with pytest.raises(ValueError, match=re.escape(message)):
        FusedOp("wrong_of_a_test", definition, **names, tensor_code=(_forward, _backward))


def test_an_op_without_kernels_is_refused():
    with pytest.raises(ValueError, match="nothing has neither compiled kernels nor kernels of"):
        FusedOp("nothing", _cube, results=["cube"], backward=[])


@pytest.mark.thorough
@pytest.mark.cpp
def test_an_error_of_a_kernel_is_told_and_the_kernel_is_not_run_again(monkeypatch):
    """The Python checks find nothing wrong, so the reason is another one."""
    x = torch.ones(2, 2)
    arguments = x, torch.ones(9, 5), torch.ones(9), torch.ones(2, 3), torch.ones(2, 3)
    runs = []

    def fails(*arguments):
        runs.append(arguments)
        raise RuntimeError("a kernel failed")

    with ops.use_backend("cpp"):
        ops.lltm(*arguments)
        monkeypatch.setattr(lltm._step, "_run_kernels", fails)
        with pytest.raises(RuntimeError, match="a kernel failed"):
            ops.lltm(*arguments)
        assert len(runs) == 1
        with pytest.raises(ops.ArgumentError, match="cell must have shape"):
            ops.lltm(*arguments[:4], torch.ones(2, 4))


class BatchAll(torch.nn.Module):
    def forward(self, x, labels):
        return ops.batch_all_triplet_loss(x, labels)


class LinearCrossEntropy(torch.nn.Module):
    def forward(self, x, labels):
        return ops.linear_cross_entropy(x, x[:3], labels)


@pytest.mark.parametrize("request_", ["torch", "cpp"])
@pytest.mark.parametrize("loss", [BatchAll(), LinearCrossEntropy()])
def test_exported_without_gradients_but_trained(loss, request_):
    """The exported forward pass forms no gradient."""
    x, labels = torch.randn(9, 4), torch.arange(9) // 3
    with ops.use_backend(request_):
        exported = torch.export.export(loss, (x, labels)).module()
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(exported(x, labels), x)
        (expected,) = torch.autograd.grad(loss(x, labels), x)
    torch.testing.assert_close(gradient, expected)
    assert expected.any()
