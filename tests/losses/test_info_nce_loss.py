"""InfoNCE in its forms: the formulas of other packages, the battery, and its own tests."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import ops
from tests.harness.battery import Battery
from tests.harness.op_under_test import OpUnderTest, close


def unit(x, normalize):
    return x / x.square().sum(1, keepdim=True).sqrt().clamp(min=1e-12) if normalize else x


def reduced(losses, reduction):
    return {"mean": torch.mean, "sum": torch.sum, "none": lambda x: x}[reduction](losses)


def of_open_clip(query, key, scale):
    """ClipLoss(query, key, scale), but one loss for each pair."""
    z = scale * query @ key.mT
    labels = torch.arange(len(z), device=z.device)
    of_images = F.cross_entropy(z, labels, reduction="none")
    return (of_images + F.cross_entropy(z.mT, labels, reduction="none")) / 2


def of_open_clip_siglip(query, key, scale, bias):
    """SigLipLoss(query, key, scale, bias), but one loss for each row."""
    signs = 2 * torch.eye(len(query), dtype=query.dtype, device=query.device) - 1
    return -F.logsigmoid(signs * (scale * query @ key.mT + bias)).sum(1)


def of_lightly(query, key, scale):
    """NTXentLoss(1 / scale)(query, key): both views, without the diagonal."""
    views = torch.cat((query, key))
    rows, count = len(query), len(views)
    z = scale * views @ views.mT
    other = ~torch.eye(count, dtype=torch.bool, device=z.device)
    z = z[other].view(count, max(0, count - 1))
    place = torch.arange(rows, device=z.device)
    labels = torch.cat((place + rows - 1, place))
    return F.cross_entropy(z, labels, reduction="none")


def of_info_nce_pytorch(query, key, negatives, scale):
    """info_nce(query, key, negatives, 1 / scale)."""
    z = scale * torch.cat(((query * key).sum(1, keepdim=True), query @ negatives.mT), 1)
    zeros = torch.zeros(len(z), dtype=torch.int64, device=z.device)
    return F.cross_entropy(z, zeros, reduction="none")


def reference(
    query, key, negatives=None, form="one_way", scale=None, bias=None, normalize=True,
    reduction="mean", temperature=None,
):  # fmt: skip
    if temperature is not None:
        scale = 1 / temperature
    if scale is None:
        scale = 10 if form == "sigmoid" else 1 / 0.07
    query, key = unit(query, normalize), unit(key, normalize)
    if negatives is not None:
        losses = of_info_nce_pytorch(query, key, unit(negatives, normalize), scale)
    elif form == "one_way":
        places = torch.arange(len(query), device=query.device)
        losses = F.cross_entropy(scale * query @ key.mT, places, reduction="none")
    elif form == "symmetric":
        losses = of_open_clip(query, key, scale)
    elif form == "two_views":
        losses = of_lightly(query, key, scale)
    else:
        losses = of_open_clip_siglip(query, key, scale, -10 if bias is None else bias)
    return reduced(losses, reduction)


def inputs(count, scalars=()):
    """Matrices, then numbers as tensors with one element."""

    def make(shape, dtype, device):
        rows = [shape, shape, (shape[0] + 5, *shape[1:])][:count]
        made = [torch.randn(one, dtype=torch.float64, device=device) for one in rows]
        made += [torch.full((1,), one, dtype=torch.float64, device=device) for one in scalars]
        return [one.to(dtype) for one in made]

    return make


EDGES = ((0, 4), (4, 0), (0, 0), (1, 4), (1, 1))


def description(name, names, variants, scalars=(), **more):
    return OpUnderTest(
        name=name,
        names=names,
        inputs=inputs(len(names) - len(scalars), scalars),
        shapes=((2, 3), (33, 20), (7, 70), (5, 4)),
        variants=variants,
        edges=EDGES,
        large=(300, 130),
        **{"call": ops.info_nce_loss, "reference": reference} | more,
    )


class TestInfoNCELoss(Battery):
    backends = ("torch",)
    op = description(
        "info_nce_loss",
        ("query", "key"),
        (
            {"temperature": 5.0},  # high: the gradient of equal rows is 0 but for its rounding
            {},
            {"form": "symmetric", "temperature": 0.5, "reduction": "none"},
            {"form": "two_views", "temperature": 0.2, "reduction": "sum"},
            {"form": "sigmoid", "scale": 3.0, "bias": -1.0},
            {"form": "two_views", "normalize": False, "scale": 0.5, "reduction": "none"},
        ),
        module=lambda: ops.InfoNCELoss("symmetric"),
    )


class TestNegatives(Battery):
    backends = ("torch",)
    op = description(
        "info_nce_loss, negatives",
        ("query", "key", "negatives"),
        ({}, {"temperature": 0.3, "normalize": False, "reduction": "none"}),
        variation=True,
    )


class TestLearnedScale(Battery):
    backends = ("torch",)
    op = description(
        "info_nce_loss, learned scale",
        ("query", "key", "scale"),
        ({"form": "symmetric"}, {"form": "two_views"}, {"form": "one_way", "reduction": "none"}),
        scalars=(2.5,),
        call=lambda *t, **k: ops.info_nce_loss(*t[:2], scale=t[2], **k),
        reference=lambda *t, **k: reference(*t[:2], scale=t[2], **k),
        variation=True,
    )


class TestLearnedTemperatureAndBias(Battery):
    backends = ("torch",)
    op = description(
        "info_nce_loss, learned temperature and bias",
        ("query", "key", "temperature", "bias"),
        ({"form": "sigmoid"}, {"form": "sigmoid", "reduction": "none"}),
        scalars=(0.4, -2.0),
        call=lambda *t, **k: ops.info_nce_loss(*t[:2], temperature=t[2], bias=t[3], **k),
        reference=lambda *t, **k: reference(*t[:2], temperature=t[2], bias=t[3], **k),
        variation=True,
    )


# ---- labels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["one_way", "symmetric", "two_views", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_false_negatives_are_left_out(form, dtype):
    """The loss of each pair, over its positive and those with another label alone."""
    labels = torch.tensor([0, 1, 0, 2, 1, 0])
    query, key = torch.randn(2, 6, 4, dtype=torch.float64).requires_grad_()
    found = ops.info_nce_loss(
        query, key, form=form, scale=3.0, labels=labels.to(dtype), reduction="none"
    )
    q, k = unit(query, True), unit(key, True)
    expected = []
    for rows, columns, others in (
        ((torch.cat((q, k)), torch.cat((k, q)), torch.cat((q, k))),)
        if form == "two_views"
        else ((q, k, k), (k, q, q))
    ):
        of_rows = labels.repeat(len(rows) // 6)
        one = []
        for i, row in enumerate(rows):
            negative = others[of_rows != of_rows[i]]
            positive, z = 3 * row @ columns[i], 3 * negative @ row
            if form == "sigmoid":
                one.append(F.softplus(10 - positive) + F.softplus(z - 10).sum())
            else:
                one.append(torch.cat((positive[None], z)).logsumexp(0) - positive)
        expected.append(torch.stack(one))
    expected = sum(expected) / 2 if form == "symmetric" else expected[0]
    close(found, expected, torch.float64)
    weights = torch.randn_like(found)
    mine, theirs = (
        torch.autograd.grad((loss * weights).sum(), query, retain_graph=True)[0]
        for loss in (found, expected)
    )
    close(mine, theirs, torch.float64)


def test_labels_that_all_differ_leave_out_nothing():
    query, key = torch.randn(2, 6, 4, dtype=torch.float64)
    for form in ("one_way", "symmetric", "two_views", "sigmoid"):
        plain = ops.info_nce_loss(query, key, form=form)
        close(ops.info_nce_loss(query, key, form=form, labels=torch.arange(6)), plain, plain.dtype)


# ---- values --------------------------------------------------------------------------------------


def test_worked_by_hand():
    query, key = torch.eye(2), torch.eye(2)
    for form, expected in (
        ("one_way", math.log(1 + math.exp(-2))),
        ("symmetric", math.log(1 + math.exp(-2))),
        ("two_views", math.log(1 + 2 * math.exp(-2))),
        ("sigmoid", math.log(1 + math.exp(8)) + math.log(1 + math.exp(-10))),
    ):
        loss = ops.info_nce_loss(query, key, form=form, scale=2.0)
        assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_temperature_is_the_inverse_of_scale():
    query, key = torch.randn(2, 6, 4, dtype=torch.float64)
    default = ops.info_nce_loss(query, key)
    for given in ({"temperature": 0.07}, {"scale": 1 / 0.07}, {"temperature": torch.tensor(0.07)}):
        assert ops.info_nce_loss(query, key, **given).item() == pytest.approx(default.item(), 1e-6)
    siglip = ops.info_nce_loss(query, key, form="sigmoid")
    given = {"temperature": 0.1, "bias": -10}
    close(ops.info_nce_loss(query, key, form="sigmoid", **given), siglip, siglip.dtype)


@pytest.mark.parametrize("form", ["one_way", "symmetric", "two_views", "sigmoid"])
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_saturated_logits(form, size):
    """Logits of ±1e4: the loss is finite, as are its gradients of both orders."""
    query, key = torch.randn(2, 40, 8, dtype=torch.float64).requires_grad_()
    scale = torch.tensor(size, dtype=torch.float64, requires_grad=True)
    loss = ops.info_nce_loss(query, key, form=form, scale=scale)
    expected = reference(query, key, form=form, scale=scale)
    close(loss, expected, torch.float64)
    tensors = (query, key, scale)
    mine = torch.autograd.grad(loss, tensors, create_graph=True)
    for one, other in zip(mine, torch.autograd.grad(expected, tensors), strict=True):
        close(one, other, torch.float64)
    (second,) = torch.autograd.grad(sum(x.sum() for x in mine), query)
    assert second.isfinite().all()
    single = [t.detach().float().requires_grad_() for t in tensors]
    loss = ops.info_nce_loss(*single[:2], form=form, scale=single[2])
    assert abs(loss.item() - expected.item()) < 1e-6 * size
    assert all(x.isfinite().all() for x in torch.autograd.grad(loss, single))


def test_small_losses_keep_their_digits():
    """A cross entropy in float32 is 0 here, because it subtracts numbers near 30."""
    query = torch.eye(8)
    loss = ops.info_nce_loss(query, query, scale=30.0)
    assert loss.item() == pytest.approx(math.log1p(7 * math.exp(-30)), rel=1e-4)
    assert reference(query, query, scale=30.0).item() == 0


@pytest.mark.parametrize("form", ["one_way", "symmetric", "two_views", "sigmoid"])
@pytest.mark.parametrize("rows", [0, 1])
def test_too_few_pairs(form, rows):
    """No pair: NaN as a mean, 0 as a sum. One pair has no negative."""
    query, key = torch.randn(2, rows, 4).requires_grad_()
    losses = ops.info_nce_loss(query, key, form=form, reduction="none")
    assert losses.shape == (rows * (2 if form == "two_views" else 1),)
    total, mean = (
        ops.info_nce_loss(query, key, form=form, reduction=one) for one in ("sum", "mean")
    )
    if rows == 0:
        assert total.item() == 0
        assert mean.isnan()
    elif form == "sigmoid":
        z = 10 * F.cosine_similarity(query, key) - 10
        close(mean, F.softplus(-z).mean(), torch.float32)
    else:
        assert mean.item() == 0
        (gradient,) = torch.autograd.grad(mean, query)
        assert not gradient.any()


def test_no_negatives():
    query, key = torch.randn(2, 3, 4).requires_grad_()
    loss = ops.info_nce_loss(query, key, torch.empty(0, 4))
    loss.backward()
    assert loss.item() == 0


def test_identical_embeddings():
    query = torch.ones(6, 4, requires_grad=True)
    loss = ops.info_nce_loss(query, query)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(6), rel=1e-6)
    assert query.grad.abs().max() < 1e-6


def test_nan_embeddings_give_nan():
    query, key = torch.randn(2, 6, 4)
    key[3, 1] = torch.nan
    for form in ("one_way", "symmetric", "two_views", "sigmoid"):
        assert ops.info_nce_loss(query, key, form=form).isnan()


def test_half_precision_multiplies_in_float32():
    """A product in bfloat16 would round these logits, up to 100, to 8 bits."""
    query, key = torch.randn(2, 200, 64).bfloat16()
    exact = ops.info_nce_loss(query.double(), key.double(), scale=100.0, reduction="none")
    found = ops.info_nce_loss(query, key, scale=100.0, reduction="none")
    assert ((found.double() - exact).abs() <= 2**-8 * exact.clamp(min=1e-3)).all()


# ---- the module, and bad input -------------------------------------------------------------------


def test_bias_beyond_the_range():
    """A bias of 1e300 is infinite in float32, as a margin would be."""
    x = torch.randn(3, 4)
    assert ops.info_nce_loss(x, x, form="sigmoid", bias=1e300).item() == torch.inf


def test_module():
    loss = ops.InfoNCELoss("sigmoid", scale=5.0)
    query, key = torch.randn(2, 6, 4)
    assert torch.equal(loss(query, key), ops.info_nce_loss(query, key, form="sigmoid", scale=5.0))
    scale, bias = torch.tensor(3.0), torch.tensor(-2.0)
    learned = ops.info_nce_loss(query, key, form="sigmoid", scale=scale, bias=bias)
    assert torch.equal(loss(query, key, scale=scale, bias=bias), learned)
    warm = ops.InfoNCELoss(temperature=0.5)
    assert torch.equal(warm(query, key, scale=scale), ops.info_nce_loss(query, key, scale=3.0))
    temperature = torch.tensor(0.25)
    assert torch.equal(
        ops.InfoNCELoss(scale=2.0)(query, key, temperature=temperature),
        ops.info_nce_loss(query, key, temperature=temperature),
    )
    labels = torch.arange(6) // 2
    assert torch.equal(
        warm(query, key, labels=labels),
        ops.info_nce_loss(query, key, temperature=0.5, labels=labels),
    )
    assert repr(warm) == (
        "InfoNCELoss(form='one_way', temperature=0.5, scale=None, bias=None, normalize=True, "
        "reduction='mean')"
    )
    with pytest.raises(ops.ArgumentError, match="temperature must be a number, got nan"):
        ops.InfoNCELoss(temperature=float("nan"))


GOOD = torch.ones(4, 2)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"query": [1.0]}, ops.ArgumentTypeError, "query must be a torch.Tensor, got list"),
        ({"key": GOOD.long()}, ops.ArgumentTypeError, "key must have dtype float64, .*, got int64"),
        (
            {"key": GOOD.double()},
            ops.ArgumentTypeError,
            "key must have query's dtype float32, got float64",
        ),
        (
            {"query": torch.ones(4)},
            ops.ArgumentError,
            r"query must have shape \(rows, D\), got \[4\]",
        ),
        (
            {"key": torch.ones(4, 3)},
            ops.ArgumentError,
            "key must have as many columns as query, 2, got 3",
        ),
        (
            {"key": torch.ones(3, 2)},
            ops.ArgumentError,
            r"key must have the shape of query, \[4, 2\], got \[3, 2\]",
        ),
        (
            {"negatives": torch.ones(3, 5)},
            ops.ArgumentError,
            "negatives must have as many columns as query, 2, got 5",
        ),
        (
            {"negatives": GOOD, "form": "symmetric"},
            ops.ArgumentError,
            "negatives must be None with form='symmetric', got a tensor",
        ),
        (
            {"negatives": GOOD, "labels": torch.arange(4)},
            ops.ArgumentError,
            "labels must be None with negatives, got a tensor",
        ),
        ({"form": "clip"}, ops.ArgumentError, "form must be one of one_way, .*, got 'clip'"),
        ({"reduction": "avg"}, ops.ArgumentError, "reduction must be one of none, mean, sum, got"),
        (
            {"temperature": 0.0},
            ops.ArgumentError,
            "temperature must be positive and finite, got 0.0",
        ),
        ({"temperature": -1}, ops.ArgumentError, "temperature must be positive and finite, got -1"),
        (
            {"temperature": float("nan")},
            ops.ArgumentError,
            "temperature must be a number, got nan",
        ),
        (
            {"temperature": 1e-40},
            ops.ArgumentError,
            "temperature must be in the range of float32, got 1e-40",
        ),
        (
            {"scale": 1e300},
            ops.ArgumentError,
            r"scale must be in the range of float32, got 1e\+300",
        ),
        ({"scale": float("inf")}, ops.ArgumentError, "scale must be positive and finite, got inf"),
        ({"scale": "10"}, ops.ArgumentTypeError, "scale must be a real number, got str"),
        (
            {"scale": torch.ones(2)},
            ops.ArgumentError,
            r"scale must have one element, got shape \[2\]",
        ),
        (
            {"scale": torch.ones(1, 1)},
            ops.ArgumentError,
            r"scale must have one element, got shape \[1, 1\]",
        ),
        (
            {"scale": torch.ones((), dtype=torch.int64)},
            ops.ArgumentTypeError,
            "scale must be a number or a floating-point tensor, got int64",
        ),
        (
            {"scale": 2.0, "temperature": 0.5},
            ops.ArgumentError,
            "scale must be None with temperature",
        ),
        ({"bias": -1.0}, ops.ArgumentError, "bias must be None with form='one_way', where it canc"),
        (
            {"bias": float("nan"), "form": "sigmoid"},
            ops.ArgumentError,
            "bias must be a number, got nan",
        ),
        (
            {"labels": torch.zeros(3, dtype=torch.int64)},
            ops.ArgumentError,
            r"labels must have shape \[4\], one label for each row, got \[3\]",
        ),
        (
            {"labels": torch.zeros(4)},
            ops.ArgumentTypeError,
            "labels must have an integer dtype, got float32",
        ),
        (
            {"scale": torch.ones((), device="meta")},
            ops.ArgumentError,
            "scale must be on device cpu, got meta",
        ),
    ],
)
def test_bad_input(change, error, text):
    with pytest.raises(error, match=text):
        ops.info_nce_loss(**{"query": GOOD, "key": GOOD} | change)
