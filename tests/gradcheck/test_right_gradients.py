"""Right gradients that look wrong: each must pass, some with a note."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ops


def penalty(x, w):
    """A loss that contains the gradient of another loss."""
    with torch.enable_grad():
        y = (x * w).tanh().sum()
        (gradient,) = torch.autograd.grad(y, x, create_graph=True)
    return gradient.square().sum()


def bare_penalty(x):
    (gradient,) = torch.autograd.grad(x.sin().sum(), x, create_graph=True)
    return gradient.square().sum()


def in_float(x):
    return x.float().square().to(x.dtype)


def to_float(x):
    return x.float().square().sum()


def in_bfloat16(x, w):
    return (x.bfloat16() * w.bfloat16()).to(x.dtype)


def under_autocast(x, w):
    with torch.autocast("cpu", torch.bfloat16):
        return (x @ w.mT).float()


def seeded_dropout(x):
    torch.manual_seed(3)
    return F.dropout(x, 0.5) * x


def seeded_noise(x):
    torch.manual_seed(3)
    return x * torch.rand_like(x) + torch.randn_like(x).mul(x).sin()


def seeded_slopes(x):
    """The function writes its random numbers to an argument."""
    torch.manual_seed(7)
    return F.rrelu(x, training=True)


def with_a_generator(x):
    generator = torch.Generator().manual_seed(1)
    return x.sin() * torch.empty_like(x).bernoulli_(0.5, generator=generator)


def with_default_constants(x):
    return x @ torch.eye(4) + torch.ones(4).cumsum(0) @ x.mT.sum(1)


OUTSIDE = nn.Linear(4, 3)


def closes_over_float32(x):
    return OUTSIDE(x).tanh()


def large_offset(x):
    """Large numbers cancel within the function."""
    return (x.square() + 1e6) - 1e6


def safe_root(x):
    """The gradient at zero is chosen to be zero, because the slope is infinite."""
    zero = x == 0
    return torch.where(zero, 0, torch.where(zero, 1, x.abs()).sqrt())


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 3))

    def forward(self, index):
        return F.embedding(index, self.weight).tanh()


RIGHT = [
    (penalty, (torch.randn(4), torch.randn(4))),
    (bare_penalty, (torch.randn(4),)),
    (in_float, (torch.randn(3, 4),)),
    (to_float, (torch.randn(3, 4),)),
    (in_bfloat16, (torch.randn(4), torch.randn(4))),
    (seeded_dropout, (torch.randn(3, 4),)),
    (seeded_noise, (torch.randn(3, 4),)),
    (seeded_slopes, (torch.randn(3, 4),)),
    (with_a_generator, (torch.randn(3, 4),)),
    (with_default_constants, (torch.randn(4, 4),)),
    (closes_over_float32, (torch.randn(3, 4),)),
    (safe_root, (torch.tensor([0.0, 1.0, -2.0]),)),
    (lambda x: x.sqrt() + x.log(), (torch.tensor([1e-6, 0.5, 2.0]),)),
    (torch.logit, (torch.tensor([1e-7, 0.5, 1 - 1e-7], dtype=torch.float64),)),
    (torch.acos, (torch.tensor([1 - 1e-9, 0.5], dtype=torch.float64),)),
    (torch.sqrt, (torch.tensor([0.0, 1.0]),)),
    (lambda x: x.logsumexp(-1), (torch.tensor([[-torch.inf, 1.0, 2.0]]),)),
    (lambda x: x.nanmean(0), (torch.tensor([[1.0, torch.nan], [2.0, 3.0]]),)),
    (lambda x: x[x > 0].square(), (torch.tensor([1.0, -2.0, -0.5, 3.0]),)),
    (lambda x: x**1.5, (torch.tensor([0.0, 1.0]),)),
    (F.binary_cross_entropy, (torch.rand(3, 4), (torch.rand(3, 4) > 0.5).float())),
    (lambda x: torch.distributions.Beta(x, x + 1).log_prob(torch.tensor(0.3)), (torch.rand(3),)),
    (torch.special.entr, (torch.tensor([1e-9, 0.5]),)),
    (torch.atan2, (torch.randn(3), torch.randn(3))),
    (lambda x: F.normalize(x, dim=0), (torch.randn(4, 3),)),
    (lambda x: x.softmax(-1), (torch.randn(3, 4),)),
    (torch.linalg.svdvals, (torch.randn(3, 4),)),
    (lambda x: x.sort(dim=0).values.cumprod(0), (torch.randn(4, 3),)),
    (lambda x: (1e8 * x).tanh(), (torch.full((3,), 1e-8),)),
    (torch.round, (torch.tensor([0.5, 1.2]),)),
    (Embedded(), (torch.tensor([0, 2, 2]),)),
    (nn.Embedding(5, 3, sparse=True), (torch.tensor([1, 2, 2]),)),
    (lambda x: x, (torch.randn(3),)),
    (F.instance_norm, (torch.randn(2, 2, 5),)),
    (nn.LayerNorm(4), (torch.randn(3, 4),)),
    (nn.MultiheadAttention(4, 2), (torch.randn(3, 4), torch.randn(2, 4), torch.randn(2, 4))),
]


@pytest.mark.parametrize(
    ("function", "arguments"),
    RIGHT,
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_right_passes(function, arguments):
    report = ops.check_gradients(function, *arguments)
    assert report.ok, str(report)
    statuses = {check.name: check.status for check in report.checks}
    assert statuses["reverse mode"] == "pass", str(report)
    assert statuses["layouts"] == "pass", str(report)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (large_offset, (torch.randn(4),)),
        (F.binary_cross_entropy, (torch.tensor([1e-6, 1 - 1e-6]), torch.tensor([0.0, 1.0]))),
    ],
)
def test_what_only_float64_has_digits_for(function, arguments):
    report = ops.check_gradients(function, *arguments, dtypes=())
    assert report.ok, str(report)


@pytest.mark.parametrize(
    ("function", "arguments", "text"),
    [
        (in_float, (torch.randn(4),), "reverse mode: it computes in float32, so it was checked"),
        (to_float, (torch.randn(4),), "reverse mode: it computes in float32, so it was checked"),
        (in_bfloat16, (torch.randn(4), torch.randn(4)), "it computes in bfloat16"),
        (
            with_default_constants,
            (torch.randn(4, 4),),
            "checked with the default dtype float64, because float64 inputs raise an error: ",
        ),
        (
            closes_over_float32,
            (torch.randn(3, 4),),
            "checked in the dtypes of the inputs, with larger steps, because float64 inputs raise ",
        ),
    ],
)
def test_the_report_says_how_it_was_checked(function, arguments, text):
    report = ops.check_gradients(function, *arguments)
    assert text in str(report)
    assert any(text.partition(": ")[2] or text in note for note in report.to_dict()["notes"])


def test_the_report_says_where_a_formula_loses_digits():
    report = ops.check_gradients(large_offset, torch.randn(4), dtypes=(torch.float32,))
    assert [check.name for check in report.failures] == ["agrees in float32"], str(report)
    assert "rounding intermediate values to float32 explains it" in str(report)


def test_the_report_says_where_a_dtype_loses_digits():
    report = ops.check_gradients(under_autocast, torch.randn(3, 4), torch.randn(2, 4))
    assert {check.name for check in report.failures} <= {"agrees in float32", "agrees in float16"}
    assert "intermediate values are bfloat16" in str(report)


def test_a_function_that_draws_without_a_seed_is_not_deterministic():
    """All its other checks run and pass."""
    report = ops.check_gradients(lambda x: F.dropout(x, 0.5) * x, torch.randn(3, 4))
    assert [check.name for check in report.failures] == ["determinism"], str(report)
    assert "the function draws random numbers" in str(report)


def test_the_callers_random_numbers_are_not_disturbed():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    ops.check_gradients(lambda x: F.dropout(x, 0.5) * x, torch.ones(3))
    assert torch.equal(torch.rand(3), expected)


def test_a_layout_mistake_of_a_function_that_draws_is_found():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            torch.manual_seed(3)
            mask = torch.rand_like(x)
            ctx.save_for_backward(mask)
            return torch.as_strided(x, x.shape, (x.shape[1], 1)) * mask

        @staticmethod
        def backward(ctx, g):
            return g * ctx.saved_tensors[0]

    report = ops.check_gradients(Wrong.apply, torch.randn(3, 4))
    assert [check.name for check in report.failures] == ["layouts"], str(report)


# ---- the verdict of torch ------------------------------------------------------------------------


def test_rows_whose_gradient_torch_drops_on_purpose():
    report = ops.check_gradients(nn.Embedding(5, 3, padding_idx=0), torch.tensor([0, 2]))
    assert "reverse mode" in {check.name for check in report.failures}
    assert "torch.autograd.gradcheck finds it wrong, too" in str(report)
    assert "exact zeros" not in {check.name for check in report.failures}  # it adds nothing


def test_a_second_order_that_torch_gets_wrong():
    module = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    report = ops.check_gradients(module, torch.randn(2, 4))
    assert [check.name for check in report.failures] == ["second order"]
    assert "torch.autograd.gradgradcheck finds it wrong, too" in str(report)


def test_inputs_that_nobody_asked_gradients_of():
    """If none is marked, all are checked, and the report says how to choose."""

    class NoTarget(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, target):
            ctx.save_for_backward(x, target)
            return (x - target).square()

        @staticmethod
        def backward(ctx, g):
            x, target = ctx.saved_tensors
            return 2 * g * (x - target), None

    x, target = torch.randn(2, 4)
    report = ops.check_gradients(NoTarget.apply, x, target)
    assert "reverse mode" in {check.name for check in report.failures}
    hint = "no input requires gradients, so all floating ones are checked; mark some with"
    assert hint in str(report)
    report = ops.check_gradients(NoTarget.apply, x.requires_grad_(), target)
    assert report.ok, str(report)
    assert hint not in str(report)
