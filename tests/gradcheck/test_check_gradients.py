"""check_gradients: it passes right functions, and reports errors, kinks and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ops
from ops._core import selection
from ops.gradcheck._comparison import Tolerance
from ops.gradcheck._quotients import Compared, compare
from tests.cuda import emulator as cuda_emulator
from tests.gradcheck.test_planted_gradients import (
    FlippedSign,
    MissingGradient,
    Right,
    WrongAtOneElement,
    inputs,
)


def test_what_is_right_passes_everything():
    report = ops.check_gradients(Right.apply, *inputs())
    statuses = {check.name: check.status for check in report.checks}
    assert statuses.pop("forward mode") == statuses.pop("vmap") == "not supported"
    assert set(statuses.values()) == {"pass"}
    assert report
    assert report.raise_if_failed() is report


torch.manual_seed(0)  # collecting the tests makes modules and inputs


class Nested(nn.Module):
    """A module with arguments in containers, parameters, buffers and several results."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 3)
        self.register_buffer("scale", torch.tensor(2.0))
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x, state, factor=1.0):
        y = self.norm(self.inner(x)) * self.scale * factor
        return {"y": y.tanh(), "rest": (state["h"] * y.sin().sum(), y.argmax())}


@pytest.mark.parametrize(
    ("function", "arguments", "names"),
    [
        (F.mse_loss, inputs(), ["input", "target"]),
        (lambda *xs: sum(x.exp() for x in xs), inputs(), ["xs[0]", "xs[1]"]),
        (torch.mul, inputs(), ["input[0]", "input[1]"]),
        (lambda x, index: x[index], (torch.randn(4), torch.tensor([2, 2])), ["x"]),
        (lambda x: x.sum(), (torch.randn(()),), ["x"]),
        (lambda x: x * 2, (torch.randn(0, 3),), ["x"]),
        (torch.linalg.vector_norm, (torch.randn(5) * 1e4,), ["input[0]"]),
        (
            Nested(),
            (torch.randn(5, 4), {"h": torch.randn(2)}, 0.5),
            ["x", "state['h']", "inner.weight", "inner.bias", "norm.weight", "norm.bias"],
        ),
    ],
)
def test_right_functions_and_modules(function, arguments, names):
    report = ops.check_gradients(function, *arguments)
    assert report.ok, str(report)
    reverse = next(check for check in report.checks if check.name == "reverse mode")
    assert list(dict.fromkeys(e.input for e in reverse.comparison.elements)) == (
        names if reverse.comparison.elements else []
    )


@pytest.mark.parametrize("size", [1e-20, 1e-3, 1e6, 1e20])
def test_results_of_any_size(size):
    """Tolerances follow the size of results and inputs; a lost gradient is always found."""
    x = torch.randn(4)
    assert ops.check_gradients(lambda x: size * x.sin(), x, dtypes=())
    assert not ops.check_gradients(lambda x: size * x.detach().sin() + 0 * x, x, dtypes=())
    far_from_zero = max(size, 1e-3) * (0.1 + torch.rand(4, dtype=torch.float64))
    assert ops.check_gradients(torch.log, far_from_zero, dtypes=())


def test_what_a_function_refuses_is_no_failure():
    """The function refuses a layout, a second derivative or a dtype by an error."""

    class Once(Right):
        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return Right.backward(ctx, g)

    def not_in_half(x):
        if x.dtype is torch.float16:
            raise TypeError("x must not be float16")
        return x.sin()

    for function, arguments, name in (
        (lambda x: x.view(-1)[1:], (torch.randn(3, 4),), "layouts"),
        (Once.apply, inputs(), "second order"),
        (torch.linalg.inv, (torch.randn(3, 3),), "agrees in float16"),
        (not_in_half, (torch.randn(3, 3),), "agrees in float16"),
    ):
        report = ops.check_gradients(function, *arguments)
        assert report.ok, str(report)
        assert "not supported" in {c.status for c in report.checks if c.name == name}


def test_a_backward_pass_that_takes_data():
    """``.data`` of a batch of gradients would crash the process."""

    class Data(Right):
        @staticmethod
        def backward(ctx, g):
            return Right.backward(ctx, g.data.mul(1))

    report = ops.check_gradients(Data.apply, *inputs())
    (batched,) = (check for check in report.checks if check.name == "batched gradients")
    assert batched.status == "not supported"
    assert "takes .data of a batch of gradients" in str(report)
    assert "data" not in vars(torch.Tensor)


def test_layouts_of_values_that_a_function_refuses():
    """Expanded inputs have equal elements, which the function refuses."""

    def hinges(x, knots):
        if not bool((knots[1:] > knots[:-1]).all()):
            raise ValueError("knots must increase")
        return torch.relu(x[:, None] - knots).square().sum(1)

    report = ops.check_gradients(hinges, torch.randn(4), torch.tensor([-1.0, 0.1, 1.3]))
    assert report.ok, str(report)


@pytest.mark.parametrize(
    ("function", "at"),
    [(torch.acos, 0.99), (lambda x: torch.log1p(-x), 0.996), (lambda x: (1 - x).sqrt(), 0.99)],
)
def test_near_the_edge_of_a_domain(function, at):
    """Rounding the inputs once more would leave the domain."""
    report = ops.check_gradients(function, torch.tensor([at, 0.5, -0.3]))
    assert report.ok, str(report)


def test_results_without_gradients():
    report = ops.check_gradients(lambda x: torch.ones(3), torch.randn(3))
    assert report.ok, str(report)


def test_only_the_inputs_that_require_gradients():
    x, w = inputs()
    report = ops.check_gradients(MissingGradient.apply, x.requires_grad_(), w)
    assert report.ok, str(report)


def test_a_module_is_not_changed():
    module = Nested().requires_grad_(True)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    ops.check_gradients(module, torch.randn(5, 4), {"h": torch.randn(2)})
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


# ---- kinks ---------------------------------------------------------------------------------------


def test_kinks_are_reported_not_failed():
    """At a kink, nearer to it than the step, and far away; the second order has jumps."""
    x = torch.tensor([-1.0, 0.0, 3e-7, -4e-6, 1.0], dtype=torch.float64)
    report = ops.check_gradients(F.relu, x)
    assert report.ok, str(report)
    kinks = {e.index for c in report.checks if c.comparison for e in c.comparison.kinks}
    assert (1,) in kinks
    assert "kinks, where only the slopes on both sides can be compared: input[1]\n" in str(report)
    for function in (torch.abs, lambda x: x.clamp(0, 1), lambda x: x.max(), torch.round):
        assert ops.check_gradients(function, x).ok


@pytest.mark.parametrize(
    ("slope", "ok"), [(0.0, True), (0.3, True), (1.0, True), (1.2, False), (-0.1, False)]
)
def test_at_a_kink_any_slope_between_the_sides_is_right(slope, ok):
    class Relu(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.clamp(min=0)

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return g * torch.where(x == 0, slope, (x > 0).to(x.dtype))

    x = torch.tensor([-1.0, 0.0, 1.0])
    found = ops.check_gradients(Relu.apply, x, dtypes=())
    reverse = found.checks[0]
    assert (reverse.status == "pass") is ok
    if not ok:
        assert [e.index for e in reverse.comparison.wrong] == [(1,)]


def test_a_wrong_gradient_near_a_kink_is_wrong():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.clamp(min=0)

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return g * 1.01 * (x > 0)

    assert not ops.check_gradients(Wrong.apply, torch.tensor([1e-6, -2.0]))


def test_strong_curvature_is_no_kink():
    report = ops.check_gradients(lambda x: (1000 * x).sin(), torch.randn(4), dtypes=())
    assert report.ok, str(report)
    assert not report.checks[0].comparison.kinks


# ---- the differences themselves ------------------------------------------------------------------


def test_quotients_of_a_polynomial():
    x = torch.randn(3, dtype=torch.float64)
    found = compare(
        Compared(
            names=["x"],
            inputs=[x],
            analytic=[3 * x[None] ** 2],
            values=lambda points: points[0] ** 3,
            weights=torch.ones(1, 3, dtype=torch.float64),
            tolerance=Tolerance(1e-5, 1e-8, 1e-5),
            at_most=200,
        )
    )
    assert not found.wrong
    assert not found.kinks
    np.testing.assert_allclose([element.numeric for element in found.elements], 3 * x**2, rtol=1e-8)


def test_large_inputs_are_sampled_and_the_report_says_so():
    report = ops.check_gradients(torch.sin, torch.randn(50, 40), max_elements=30, dtypes=())
    assert report.ok
    assert "pass (30 of 2000 elements)" in str(report)


def test_nan_gradients_fail():
    report = ops.check_gradients(lambda x: torch.where(x > 0, x, 0 * x.sqrt()), -torch.rand(3))
    assert "reverse mode" in {check.name for check in report.failures}
    assert "analytic nan" in str(report)


# ---- back ends -----------------------------------------------------------------------------------


def test_each_backend_is_checked(compiled):
    loss = ops.ImprovedTripletLoss(-0.3, 2.0, 0.5)
    report = ops.check_gradients(loss, *torch.randn(3, 4, 5))
    assert report.ok, str(report)
    name = selection.request.backend  # emulated CUDA has the name cpp
    assert name == compiled or (name, compiled) == ("cpp", cuda_emulator.NAME)
    ran = {check.backend for check in report.checks if check.status == "pass"}
    assert {"torch", name} <= ran
    names = {check.name for check in report.checks if check.backend == name}
    assert "agrees in float64" in names


@pytest.mark.cpp
def test_a_backend_that_disagrees_fails():
    """The compiled op has a right gradient, but of another function."""
    calls = {"torch": lambda x: x.square(), "cpp": lambda x: 1.001 * x.square()}
    op = ops.Op("disagreeing", cpp=_Nothing())
    report = ops.check_gradients(lambda x: calls[op.backend_for(x)](x), torch.randn(4))
    assert {(check.backend, check.name) for check in report.failures} == {
        ("cpp", f"agrees in {dtype}") for dtype in ("float64", "float32")
    }


class _Nothing(ops.jit.Extension):
    """An extension without content."""

    def __init__(self):
        pass

    def find(self):
        return Path("/nowhere")

    def load(self):
        return Path("/nowhere")


def test_asking_for_a_backend_that_cannot_run_fails():
    report = ops.check_gradients(F.relu, torch.ones(2), backends=("torch", "cpp"))
    assert not report.ok
    assert "cpp: FAIL\n    the function calls no op that has back ends" in str(report)


# ---- the report ----------------------------------------------------------------------------------


def test_the_table():
    text = str(ops.check_gradients(FlippedSign.apply, *inputs(), dtypes=()))
    lines = text.splitlines()
    assert lines[0] == "FlippedSign(x [3, 4], w [3, 4])"
    assert lines[1].split() == ["torch"]
    assert lines[2].split() == ["reverse", "mode", "FAIL"]
    assert lines[5].split() == ["forward", "mode", "not", "supported"]
    assert lines[-1] == "1 failed"


def test_json(tmp_path):
    report = ops.check_gradients(WrongAtOneElement.apply, *inputs())
    told = json.loads(report.to_json(tmp_path / "report.json"))
    assert told == json.loads((tmp_path / "report.json").read_text())
    assert told == report.to_dict()
    assert told["ok"] is False
    reverse = told["checks"][0]
    assert (reverse["check"], reverse["status"]) == ("reverse mode", "FAIL")
    assert reverse["worst"]["input"] == "w"
    assert reverse["worst"]["index"] == [1, 2]
    assert reverse["worst"]["error"] == pytest.approx(
        abs(reverse["worst"]["analytic"] - reverse["worst"]["numeric"])
    )
    assert reverse["elements"] == reverse["compared"] == 24


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_plot(tmp_path, shape):
    report = ops.check_gradients(lambda x: x.sin(), torch.randn(shape), dtypes=())
    figure = report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 5000
    assert [axes.get_title() for axes in figure.axes[:2]] == [
        "torch: gradient",
        "torch: error in x",
    ]


def test_notebooks_show_the_figure():
    figure = ops.check_gradients(torch.sin, torch.randn(3), dtypes=()).plot()
    assert figure._repr_png_()[:4] == b"\x89PNG"


def test_a_picture_of_no_known_kind(tmp_path):
    report = ops.check_gradients(torch.sin, torch.randn(3), dtypes=())
    with pytest.raises(ops.ArgumentError, match=r"path must end in \..*, got '.*k\.xyz'"):
        report.plot(tmp_path / "k.xyz")


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: ops.check_gradients(F.relu, torch.ones(2), order=6),
            ops.ArgumentError,
            "order must be at most 5, got 6",
        ),
        (
            lambda: ops.check_gradients(F.relu, torch.ones(2), order=0),
            ops.ArgumentError,
            "order must be at least 1, got 0",
        ),
        (lambda: ops.check_gradients(3), ops.ArgumentTypeError, "function must be a function or"),
        (lambda: ops.check_gradients(F.relu), ops.ArgumentError, "at least one floating tensor"),
        (
            lambda: ops.check_gradients(F.relu, torch.ones(2).cfloat()),
            ops.ArgumentError,
            "input must be a dense real tensor",
        ),
        (
            lambda: ops.check_gradients(lambda x: 3, torch.ones(2)),
            ops.ArgumentTypeError,
            "must return at least one floating tensor, got int",
        ),
        (
            lambda: ops.check_gradients(lambda x: (x, x.cfloat()), torch.ones(2)),
            ops.ArgumentTypeError,
            "must return real tensors to be checked, got a complex one",
        ),
        (
            lambda: ops.check_gradients(F.relu, torch.ones(2), seed=1.5),
            ops.ArgumentTypeError,
            "seed must be an int, got float",
        ),
        (
            lambda: ops.check_gradients(F.relu, torch.ones(2), dtypes=torch.float32),
            ops.ArgumentTypeError,
            "dtypes must be a list or tuple of float64, float32, bfloat16, float16, got dtype",
        ),
        (
            lambda: ops.check_gradients(F.relu, torch.ones(2), backends="cpp"),
            ops.ArgumentTypeError,
            "backends must be a list or tuple of torch, cpp, cuda, got str",
        ),
        (
            lambda: ops.check_gradients(F.relu, torch.ones(2), backends=[]),
            ops.ArgumentError,
            "backends must name at least one",
        ),
        (
            lambda: ops.check_gradients(F.relu, torch.ones(2), step=0.0),
            ops.ArgumentError,
            "step must be positive, got 0.0",
        ),
        (
            lambda: ops.check_gradients(F.relu, torch.ones(2), rtol=-1.0),
            ops.ArgumentError,
            "rtol must be finite and at least 0, got -1.0",
        ),
        (
            lambda: ops.check_gradients(F.relu, torch.ones(2), dtypes=(torch.int32,)),
            ops.ArgumentError,
            "dtypes must be among float64",
        ),
        (
            lambda: ops.check_gradients(F.relu, torch.ones(2), backends=("gpu",)),
            ops.ConfigError,
            "backends must be among torch, cpp, cuda, got 'gpu'",
        ),
    ],
)
def test_bad_arguments(call, error, text):
    with pytest.raises(error, match=text):
        call()
