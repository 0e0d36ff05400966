"""Sums over tiles of logits, compared with those over the whole matrix, for all arguments."""

from __future__ import annotations

import itertools

import pytest
import torch

from ops._core import logits
from tests.harness.op_under_test import close

CHOICES = (
    {},
    {"columns": True},
    {"entropy": True},
    {"columns": True, "entropy": True},
    {"sigmoid": True},
)


@pytest.fixture(autouse=True, params=[64, 1 << 18], ids=["many tiles", "one tile"])
def tile(request, monkeypatch):
    monkeypatch.setattr(logits, "ELEMENTS_OF_A_THREAD", request.param)
    torch.manual_seed(0)


def whole(x, y, scale, bias, labels, ref_labels, excluded, columns, entropy, sigmoid):
    """Row by row, each over the list of its allowed columns."""
    y = x if y is None else y
    ref_labels = labels if ref_labels is None else ref_labels
    z = scale * (x[:, None] * y).sum(-1) + (0 if bias is None else bias)
    allowed = torch.ones(z.shape, dtype=torch.bool)
    for i, j in itertools.product(*map(range, z.shape)):
        if excluded is not None and j in excluded[i].tolist():
            allowed[i, j] = False
        if labels is not None and labels[i] == ref_labels[j]:
            allowed[i, j] = False

    def log_sum(values):
        return values.logsumexp(0) if len(values) else 0 * z.sum() - torch.inf

    def entropy_of(values):
        p = values.softmax(0)
        return -(p * values.log_softmax(0)).sum()

    of_rows = [row[ok] for row, ok in zip(z, allowed, strict=True)]
    if sigmoid:
        rows = [torch.logaddexp(row, torch.zeros_like(row)).sum() for row in of_rows]
    else:
        rows = [log_sum(row) for row in of_rows]
    of_columns = [column[ok] for column, ok in zip(z.mT, allowed.mT, strict=True)]
    empty = z.new_empty(0)
    return (
        torch.stack(rows),
        torch.stack([log_sum(column) for column in of_columns]) if columns else empty,
        torch.stack([entropy_of(row) for row in of_rows]) if entropy else empty,
    )


def inputs(dtype=torch.float64, rows=37, others=25, symmetric=False, scale=1.0):
    x = torch.randn(rows, 6, dtype=torch.float64)
    y = None if symmetric else torch.randn(others, 6, dtype=torch.float64)
    bias = None if symmetric else torch.randn(others, dtype=torch.float64)
    values = (x, y, torch.tensor(scale, dtype=torch.float64), bias)
    return [None if one is None else one.to(dtype).requires_grad_() for one in values]


def left_out(rows, others, labels, excluded):
    """Some labels, and two columns of each row, of which one may be none."""
    places = torch.stack([torch.arange(rows) % others, torch.randint(-1, others, (rows,))], 1)
    of_rows, of_columns = torch.randint(4, (rows,)), torch.randint(4, (others,))
    return {
        "labels": of_rows if labels else None,
        "ref_labels": of_columns if labels else None,
        "excluded": places if excluded else None,
    }


def mirrored(rows, labels, excluded):
    """As above, where i is left out for j if j is for i."""
    numbers = torch.arange(rows)
    return {
        "labels": torch.randint(4, (rows,)) if labels else None,
        "excluded": torch.stack([numbers, rows - 1 - numbers], 1) if excluded else None,
    }


def agree(tensors, keywords, dtype=torch.float64):
    mine = logits.sums(tensors[0], tensors[1], tensors[2], bias=tensors[3], **keywords)
    named = ("labels", "ref_labels", "excluded", "columns", "entropy", "sigmoid")
    theirs = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    expected = whole(*theirs, *(keywords.get(name) for name in named))
    losses = 0, 0
    for one, other in zip(mine, expected, strict=True):
        close(one, other, dtype)
        weights = torch.randn_like(other)
        losses = [
            loss + (value.masked_fill(value == -torch.inf, 0.0) * weights).sum()
            for loss, value in zip(losses, (one, other), strict=True)
        ]
    gradients = torch.autograd.grad(losses[0], [t for t in tensors if t is not None])
    reference = torch.autograd.grad(losses[1], [t for t in theirs if t is not None])
    for one, other in zip(gradients, reference, strict=True):
        close(one, other, dtype)


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("excluded", [False, True])
def test_two_sides(choice, labels, excluded):
    for rows, others in ((37, 25), (8, 8), (1, 25), (37, 1)):
        agree(inputs(rows=rows, others=others), left_out(rows, others, labels, excluded) | choice)


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("excluded", [False, True])
def test_one_side(labels, excluded):
    for rows in (37, 8, 1):
        agree(inputs(rows=rows, symmetric=True), mirrored(rows, labels, excluded))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision(dtype):
    """Half precisions are multiplied and summed up in float32: only gradients are rounded."""
    for choice in CHOICES:
        tensors = inputs(dtype)
        results = logits.sums(*tensors[:3], bias=tensors[3], **choice)
        assert all(one.dtype is torch.float32 for one in results)
        exact = [t.detach().double() for t in tensors]
        expected = logits.sums(*exact[:3], bias=exact[3], **choice)
        for one, other in zip(results, expected, strict=True):
            close(one, other, torch.float32)
        agree(tensors, dict(choice), dtype)


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("scale", [30.0, 3000.0, -3000.0])
def test_saturated_logits(choice, scale):
    """Log-sums too far apart for one exponential: the largest logit of each row is the level."""
    keywords = left_out(37, 25, False, True) | choice
    agree(inputs(scale=scale), keywords)
    agree(inputs(scale=scale, symmetric=True), mirrored(37, False, True))
    x, y, factor, bias = inputs(torch.float32, scale=scale)
    for result in logits.sums(x, y, factor, bias=bias, **keywords):
        assert not result.isnan().any()


@pytest.mark.parametrize("level", [0.0, 50.0, -70.0, 5000.0])
@pytest.mark.parametrize("spread", [0.5, 5.0, 20.0])
def test_one_exponential_and_two_agree(level, spread):
    """Around the border between them, where a wrong bound would overflow or lose terms."""
    for seed in range(3):
        torch.manual_seed(seed)
        x, y, scale, bias = inputs(torch.float32, scale=spread)
        with torch.no_grad():
            bias += level
        tensors = [x, y, scale, bias]
        results = logits.sums(x, y, scale, bias=bias, columns=True)
        exact = [t.detach().double().requires_grad_() for t in tensors]
        reference = whole(*exact, None, None, None, True, False, False)
        weights = torch.randn(2, 37)
        rounding = 1e-6 * (1 + abs(level) + 40 * spread)  # of the logits themselves
        losses = []
        for found in (results, reference):
            losses.append((found[0] * weights[0]).sum() + (found[1] * weights[1, :25]).sum())
        for one, other in zip(results[:2], reference[:2], strict=True):
            assert (one - other).abs().max() < rounding
        gradients, expected = (
            torch.autograd.grad(loss, of) for loss, of in zip(losses, (tensors, exact), strict=True)
        )
        for one, other in zip(gradients, expected, strict=True):
            assert (one - other).abs().max() < 10 * rounding * (1 + other.abs().max())


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_any_order(choice):
    for symmetric in (False, True):
        if symmetric and choice:
            continue
        tensors = inputs(rows=4, others=3, symmetric=symmetric, scale=0.7)
        out = mirrored(4, False, True) if symmetric else left_out(4, 3, False, True)

        def call(*values, symmetric=symmetric, out=out):
            x, y, scale, bias = (values[0], None, values[1], None) if symmetric else values
            found = logits.sums(x, y, scale, bias=bias, **out, **choice)
            return tuple(one for one in found if one.numel())

        given = [t for t in tensors if t is not None]
        for needed in itertools.product((True, False), repeat=len(given)):
            if any(needed):
                pairs = zip(given, needed, strict=True)
                some = [t.detach().clone().requires_grad_(need) for t, need in pairs]
                assert torch.autograd.gradcheck(call, some)
        assert torch.autograd.gradgradcheck(call, given)


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_nothing_allowed(choice):
    """Rows without a column, columns without a row, and a matrix without either."""
    for rows, others in ((0, 4), (4, 0), (0, 0), (3, 3)):
        tensors = inputs(rows=rows, others=others)
        labels = torch.zeros(rows, dtype=torch.int64)
        of_columns = torch.zeros(others, dtype=torch.int64)
        found = logits.sums(
            *tensors[:3], bias=tensors[3], labels=labels, ref_labels=of_columns, **choice
        )
        nothing = 0.0 if choice.get("sigmoid") else -torch.inf
        assert found.rows.tolist() == [nothing] * rows
        assert found.columns.tolist() == [nothing] * (others if choice.get("columns") else 0)
        assert found.entropy.tolist() == [0.0] * (rows if choice.get("entropy") else 0)
        for one in torch.autograd.grad(sum(x.sum() for x in found), tensors):
            assert not one.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_spread_as_in_the_definition(value):
    for choice in CHOICES:
        for place in range(3):
            tensors = [t.detach() for t in inputs()]
            tensors[place].view(-1)[-1] = value
            arguments = (
                *tensors,
                None,
                None,
                None,
                *(choice.get(name, False) for name in ("sigmoid", "columns", "entropy")),
            )
            mine, theirs = logits._fused(*arguments), logits._fused.definition(*arguments)
            for one, other in zip(mine, theirs, strict=True):
                close(one, other, torch.float64)


def test_autocast_does_not_reach_the_products():
    x, y, scale, bias = inputs(torch.float32)
    expected = logits.sums(x, y, scale, bias=bias, columns=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for found in (
            logits.sums(x, y, scale, bias=bias, columns=True),
            torch.func.vmap(lambda x: logits.sums(x, y, scale, bias=bias, columns=True))(x[None]),
        ):
            for one, other in zip(found, expected, strict=True):
                close(one.view_as(other), other, torch.float32)


def test_the_matrix_is_symmetric_without_y():
    x, _, scale, _ = inputs(symmetric=True)
    for keyword in ("sigmoid", "columns", "entropy"):
        with pytest.raises(ValueError, match="without y has log-sums over rows alone"):
            logits.sums(x, None, scale, **{keyword: True})


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_operators_in_graphs(choice):
    """Schema, shapes and tracing, by torch's own checker; and graphs do not hold the matrix."""
    flags = tuple(choice.get(name, False) for name in ("sigmoid", "columns", "entropy"))
    forward, backward = (
        getattr(torch.ops.jitops, f"logit_sums_in_torch_{one}").default
        for one in ("forward", "backward")
    )
    for symmetric in (False, True):
        if symmetric and choice:
            continue
        tensors = [t if t is None else t.detach() for t in inputs(symmetric=symmetric)]
        out = mirrored(37, True, True) if symmetric else left_out(37, 25, True, True)
        arguments = (*tensors, out["labels"], out.get("ref_labels", out["labels"]), out["excluded"])
        torch.library.opcheck(forward, (*arguments, *flags))
        found = forward(*arguments, *flags)
        needed = (True, not symmetric, True, not symmetric)
        call = (*map(torch.ones_like, found), *arguments, *found, *flags, *needed)
        torch.library.opcheck(backward, call)
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    x, y, scale, bias = inputs()
    compiled = torch.compile(
        lambda x: logits.sums(x, y, scale, bias=bias, **choice), fullgraph=True, backend=keep
    )
    for one, other in zip(compiled(x), logits.sums(x, y, scale, bias=bias, **choice), strict=True):
        close(one, other, torch.float64)
    assert "jitops.logit_sums" in graphs[0].code
    assert "@" not in graphs[0].code
