"""How ops treat magnitudes near the ends of a dtype's range, by the table of the docs.

Within the range of an op, results and gradients are those of float64. Beyond it, a wrong result is
infinite or NaN, so that it shows.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import pytest
import torch

import ops
from tests.harness.helpers import ROOT
from tests.harness.matrix import batteries
from tests.harness.op_under_test import TOLERANCE, backward

BATTERIES = {name: one for name, one in batteries().items() if not one.op.variation}
PAIRS = [
    pytest.param(name, backend, id=f"{name}-{backend}", marks=marks)
    for name, one in BATTERIES.items()
    for backend, marks in (("torch", ()), ("cpp", pytest.mark.cpp))
    if backend in one.backends
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Range:
    """The magnitudes of an op, as powers of the ends of the dtype's range.

    Attributes:
        low: right from ``smallest normal ** low`` on; 2 stands for subnormal numbers.
        high: right up to ``largest ** high`` over 16.
        hides: whether a result beyond may be finite and wrong, for a reason that the docs give.
        scaled: how many inputs have the magnitude; the others keep theirs.
    """

    low: float = 2
    high: float = 1
    hides: bool = False
    scaled: int | None = None

    def magnitudes(self, dtype):
        info = torch.finfo(dtype)
        low = info.smallest_normal / 8 if self.low == 2 else info.smallest_normal**self.low
        return (low, low * 16, info.max**self.high / 256, info.max**self.high / 16)


SQUARES = Range(low=0.5, high=0.5)
PRODUCTS = Range(high=0.5)
RANGES = {
    "batch_all_triplet_loss": Range(low=0.5, high=0.5, hides=True),
    "batch_hard_triplet_loss": SQUARES,
    "batch_semi_hard_triplet_loss": Range(low=0.5, high=0.5, hides=True),
    "hausdorff_dt_loss": PRODUCTS,
    "improved_triplet_loss": PRODUCTS,
    "info_nce_loss": PRODUCTS,
    "knn_points": SQUARES,
    "linear": PRODUCTS,
    "linear_cross_entropy": Range(high=0.25),
    "linear_log_prob": Range(high=0.25),
    "lltm": Range(high=0.5, hides=True),
    "lltm_sequence": Range(high=0.5, hides=True),
    "lncc_loss": Range(),
    "margin_softmax_loss": Range(low=0.25),
    "monotonic_alignment_search": Range(),
    "normalize_with_norm": Range(),
    "rfft2_magnitude": Range(),
    "scipy_conv2d": PRODUCTS,
    "set_matching_loss": Range(),
    "soft_dtw": Range(),
    "ssim": PRODUCTS,
    "supcon_loss": Range(high=0.5, scaled=1),
}

SHOWN = [pair for pair in PAIRS if not RANGES[pair.values[0]].hides]


def keywords_of(op):
    """The variants of the battery. Beside ``eps`` small differences would lose all digits."""
    return [{**one, "eps": 0.0} if "t1" in one else one for one in op.variants]


def inputs(op, magnitude, dtype, scaled):
    """Inputs whose largest elements have this magnitude."""
    torch.manual_seed(0)
    plain = op.inputs(op.shapes[-1], torch.float64, "cpu")
    places = range(len(plain) if scaled is None else scaled)
    return [
        ((x / x.abs().max() * magnitude) if place in places else x).to(dtype).requires_grad_()
        for place, x in enumerate(plain)
    ]


def exact(op, tensors, keywords):
    """Results and gradients in float64. The reference of the LLTM overflows where it does not."""
    if op.name.startswith("lltm"):
        with ops.use_backend("torch"):
            results = op.results(tensors, keywords)
    else:
        results = op.naive(tensors, keywords)
    return gradients(results, tensors)


def gradients(results, tensors):
    results = [x for x in results if x.is_floating_point()]
    backward(results, [torch.ones_like(x) for x in results])
    return [x.detach() for x in results], [x.grad for x in tensors]


def right(one, other):
    """Which elements are right, relative to the largest. Below, subnormal numbers lose digits."""
    info = torch.finfo(one.dtype)
    expected = other.to(one.dtype).double()
    finite = expected[expected.isfinite()].abs()
    scale = finite.max() if finite.numel() else 0.0
    allowed = 8 * TOLERANCE[one.dtype] * scale + 4 * info.smallest_normal * info.eps
    return (one == expected) | ((one.double() - expected).abs() <= allowed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "asked"), PAIRS)
def test_within_the_range(name, asked, dtype):
    op, its = BATTERIES[name].op, RANGES[name]
    for magnitude in its.magnitudes(dtype):
        for keywords in keywords_of(op):
            mine = inputs(op, magnitude, dtype, its.scaled)
            theirs = [x.detach().double().requires_grad_() for x in mine]
            with ops.use_backend(asked):
                found = gradients(op.results(mine, keywords), mine)
            expected = exact(op, theirs, keywords)
            for some, others in zip(found, expected, strict=True):
                for one, other in zip(some, others, strict=True):
                    assert right(one, other).all(), (magnitude, keywords, one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "asked"), SHOWN)
def test_beyond_the_range(name, asked, dtype):
    """A wrong result shows: one of the results is infinite or NaN, or the op refuses."""
    op, its = BATTERIES[name].op, RANGES[name]
    for magnitude in (torch.finfo(dtype).max / 8, torch.finfo(dtype).max ** 0.5):
        for keywords in keywords_of(op):
            mine = inputs(op, magnitude, dtype, its.scaled)
            theirs = [x.detach().double().requires_grad_() for x in mine]
            with ops.use_backend(asked):
                results, _ = gradients(op.results(mine, keywords), mine)
            expected, _ = exact(op, theirs, keywords)
            if not all(right(x, y).all() for x, y in zip(results, expected, strict=True)):
                assert any(not x.isfinite().all() for x in results), (magnitude, keywords, results)


@pytest.mark.parametrize("magnitude", [1e-310, 1e-290, 1e-160, 1e160, 1e300])
def test_float64(magnitude):
    """Ops that take the whole range scale with their input, which float64 has no reference for."""
    x = torch.randn(4, 6, dtype=torch.float64)
    power = 2.0 ** round(torch.tensor(magnitude, dtype=torch.float64).log2().item())
    one, other = ops.normalize_with_norm(x), ops.normalize_with_norm(x * power)
    close = {"rtol": 1e-3 if magnitude < 1e-307 else 1e-12, "atol": 0}
    torch.testing.assert_close(other.direction, one.direction, **close)
    torch.testing.assert_close(other.norm / power, one.norm, **close)
    one, other = (ops.rfft2_magnitude(t) for t in (x, x * power))
    torch.testing.assert_close(other / power, one, rtol=close["rtol"], atol=1e-3)


NORMALISED = {
    "info_nce_loss": lambda x, labels: ops.info_nce_loss(x, x.flip(0)),
    "margin_softmax_loss": lambda x, labels: ops.margin_softmax_loss(x, x.flip(0), labels),
    "supcon_loss": ops.supcon_loss,
    **{
        loss.__name__: functools.partial(loss, distance="cosine")
        for loss in (
            ops.batch_all_triplet_loss,
            ops.batch_hard_triplet_loss,
            ops.batch_semi_hard_triplet_loss,
        )
    },
}


@pytest.mark.parametrize(
    ("dtype", "exponent"),
    [
        *((torch.float32, exponent) for exponent in (-36, 60, 63, 66, 80, 125)),
        *((torch.float64, exponent) for exponent in (-36, 500, 511, 515, 530, 1021)),
    ],
)
@pytest.mark.parametrize("name", NORMALISED)
def test_rows_of_any_length(name, dtype, exponent):
    """Their directions count, from a length of 1e-12 on, even if the length overflows."""
    x, labels = torch.randn(4, 6, dtype=dtype).clamp(-2, 2), torch.arange(4) % 2
    one = x.clone().requires_grad_()
    other = (x * 2.0**exponent).requires_grad_()
    losses = [NORMALISED[name](t, labels) for t in (one, other)]
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(*losses, **close)
    grads = [torch.autograd.grad(loss, t)[0] for loss, t in zip(losses, (one, other), strict=True)]
    info = torch.finfo(dtype)
    close["atol"] = max(1e-5, 8 * info.smallest_normal * info.eps * 2.0**exponent)  # subnormals
    torch.testing.assert_close(grads[1] * 2.0**exponent, grads[0], **close)


def test_the_page_has_all_ops():
    page = (ROOT / "docs/magnitudes.md").read_text()
    named = set(re.findall(r"`(\w+)`", page.partition("| --- |")[2]))
    assert {name for name in RANGES if name != "lltm_sequence"} <= named
    assert set(RANGES) == set(BATTERIES)
