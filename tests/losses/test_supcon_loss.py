"""The supervised contrastive loss: its reference, other packages, the battery, its own tests."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import ops
from tests.harness.battery import Battery
from tests.harness.op_under_test import OpUnderTest, close


def labels_of(x):
    """Three of a class, and an anchor without a positive where the count is not a multiple."""
    count = 2 if x.is_nested else x.shape[0]
    return 7 - 5 * (torch.arange(count, device=x.device) // 3)


def reference(
    x, temperature=0.1, y=None, normalize=True, incomplete="drop", reduction="mean", labels=None
):
    """As the paper writes it, with a list of positives and of candidates for each anchor."""
    labels = labels_of(x) if labels is None else labels
    others = labels if y is None else labels_of(y)
    if normalize:
        x = x / x.square().sum(1, keepdim=True).sqrt().clamp(min=1e-12)
        if y is not None:
            y = y / y.square().sum(1, keepdim=True).sqrt().clamp(min=1e-12)
    z = x @ (x if y is None else y).mT / temperature
    losses, counted = [], []
    for i, row in enumerate(z):
        candidate = torch.ones(len(row), dtype=torch.bool, device=x.device)
        if y is None:
            candidate[i] = False
        positive = candidate & (others == labels[i])
        counted.append(bool(positive.any()))
        value = 0 * row.sum() + 0 * z.sum()
        if counted[-1]:
            value = -(row[positive] - row[candidate].logsumexp(0)).mean()
        losses.append(value)
    losses = torch.stack(losses) if losses else 0 * z.sum(1)
    if reduction == "mean":
        return losses.sum() / max(1, len(losses) if incomplete == "zero" else sum(counted))
    return losses.sum() if reduction == "sum" else losses


def call(x, temperature=0.1, y=None, **keywords):
    if y is not None:
        keywords |= {"ref_emb": y, "ref_labels": labels_of(y)}
    return ops.supcon_loss(x, labels_of(x), temperature=temperature, **keywords)


def inputs(references):
    """A high temperature: where a gradient is 0, as for equal rows, logits leave a rounding."""

    def make(shape, dtype, device):
        made = [torch.randn(shape, dtype=torch.float64, device=device)]
        made += [torch.full((1,), 4.0, dtype=torch.float64, device=device)]
        if references:
            others = (shape[0] + 5, *shape[1:])
            made += [torch.randn(others, dtype=torch.float64, device=device)]
        return [one.to(dtype) for one in made]

    return make


def description(name, *names):
    return OpUnderTest(
        name=name,
        call=call,
        reference=reference,
        names=("embeddings", "temperature", *names),
        inputs=inputs(bool(names)),
        shapes=((5, 3), (33, 20), (20, 70), (7, 4)),
        variants=(
            {},
            {"normalize": False, "reduction": "sum"},
            {"incomplete": "zero"},
            {"reduction": "none"},
        ),
        edges=((0, 4), (4, 0), (0, 0), (1, 4), (1, 1)),
        large=(300, 130),
        variation=bool(names),
    )


class TestSupConLoss(Battery):
    backends = ("torch",)
    op = description("supcon_loss")


class TestReferences(Battery):
    backends = ("torch",)
    op = description("supcon_loss, references", "ref_emb")


def test_supcontrast():
    """Its loss of two views, (N, 2, D), is ours of both times temperature / base_temperature."""
    views = F.normalize(torch.randn(9, 2, 4, dtype=torch.float64), dim=2)
    labels = torch.arange(9) // 2
    temperature, base = 0.5, 0.07
    features = torch.cat(views.unbind(1))
    mask = (labels[:, None] == labels).double().repeat(2, 2)
    z = features @ features.mT / temperature
    z = z - z.max(1, keepdim=True).values.detach()
    other = 1 - torch.eye(18, dtype=torch.float64)
    mask = mask * other
    log_p = z - torch.log((z.exp() * other).sum(1, keepdim=True))
    theirs = -(temperature / base) * ((mask * log_p).sum(1) / mask.sum(1)).mean()
    mine = ops.supcon_loss(views.transpose(0, 1).flatten(0, 1), labels.repeat(2), temperature=0.5)
    close(mine * temperature / base, theirs, torch.float64)


def test_pytorch_metric_learning():
    """It averages the anchors whose loss is above 0. So do we if all complete ones are."""
    x = torch.randn(10, 4, dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 3, 4, 5, 6])
    losses = ops.supcon_loss(x, labels, reduction="none")
    theirs = losses[losses > 0].mean()
    close(ops.supcon_loss(x, labels), theirs, torch.float64)
    all_anchors = ops.supcon_loss(x, labels, incomplete="zero")
    close(all_anchors, theirs * 5 / 10, torch.float64)
    close(losses, reference(x, labels=labels, reduction="none"), torch.float64)


def test_two_views_of_each_are_nt_xent():
    """A class for each pair: the positive mean has one term."""
    query, key = torch.randn(2, 8, 5, dtype=torch.float64)
    both, labels = torch.cat((query, key)), torch.arange(8).repeat(2)
    expected = ops.info_nce_loss(query, key, form="two_views", temperature=0.1)
    close(ops.supcon_loss(both, labels), expected, torch.float64)


def test_worked_by_hand():
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    losses = ops.supcon_loss(x, torch.tensor([4, 4, 9]), temperature=1.0, reduction="none")
    assert losses.tolist() == pytest.approx([math.log(1 + math.exp(-1))] * 2 + [0.0], rel=1e-6)


@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [0], []])
@pytest.mark.parametrize("incomplete", ["drop", "zero"])
def test_no_anchor_counts(labels, incomplete):
    """No class twice, a single embedding, none."""
    x = torch.randn(len(labels), 3, requires_grad=True)
    loss = ops.supcon_loss(x, torch.tensor(labels, dtype=torch.int64), incomplete=incomplete)
    loss.backward()
    assert loss.item() == 0
    assert not x.grad.any()


def test_a_single_class():
    """There is no negative, but positives are candidates too."""
    x = torch.randn(6, 3, dtype=torch.float64)
    labels = torch.zeros(6, dtype=torch.int64)
    loss = ops.supcon_loss(x, labels)
    close(loss, reference(x, labels=labels), torch.float64)
    assert loss >= math.log(5)


def test_an_empty_memory_bank():
    x = torch.randn(4, 3, requires_grad=True)
    none = torch.empty(0, 3)
    loss = ops.supcon_loss(x, labels_of(x), ref_emb=none, ref_labels=labels_of(none))
    loss.backward()
    assert loss.item() == 0
    assert not x.grad.any()


def test_labels_of_any_integers():
    """Of any dtype, far apart, in any order."""
    x = torch.randn(9, 3)
    labels = torch.tensor([2, 0, 1, 1, 0, 2, 2, 1, 5])
    expected = ops.supcon_loss(x, labels)
    for same in (labels.to(torch.uint8), labels.int(), labels * 2**40 - 2**62, 7 - labels):
        assert ops.supcon_loss(x, same).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("size", [1e-3, 1e2, 1e4])
def test_logits_of_any_size(size):
    x = torch.randn(30, 6, dtype=torch.float64, requires_grad=True)
    loss = ops.supcon_loss(x, labels_of(x), temperature=1 / size)
    expected = reference(x, temperature=1 / size)
    close(loss, expected, torch.float64)
    mine, theirs = (torch.autograd.grad(one, x)[0] for one in (loss, expected))
    close(mine, theirs, torch.float64)
    single = x.detach().float().requires_grad_()
    loss = ops.supcon_loss(single, labels_of(x), temperature=1 / size)
    (gradient,) = torch.autograd.grad(loss, single)
    assert abs(loss.item() - expected.item()) < 1e-6 * max(1, size)
    assert (gradient - theirs).abs().max() < 1e-4 * max(1, size) * theirs.abs().max()


def test_long_and_short_rows_of_a_class():
    """The mean of the positives of a long row is that of the short ones, to the last digits."""
    x = torch.tensor([[1.0, 0.0], [3e-5, 2e-5], [1e4, 0.0], [0.0, 1.0]])
    labels = torch.tensor([0, 0, 0, 1])
    options = {"normalize": False, "temperature": 1.0, "reduction": "none"}
    exact = ops.supcon_loss(x.double(), labels, **options)
    close(ops.supcon_loss(x, labels, **options), exact, torch.float32)


def test_identical_embeddings():
    x = torch.ones(6, 4, requires_grad=True)
    loss = ops.supcon_loss(x, labels_of(x))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(5), rel=1e-6)
    assert x.grad.abs().max() < 1e-6


def test_export_from_two_rows_on():
    class Loss(torch.nn.Module):
        def forward(self, x, labels):
            return ops.supcon_loss(x, labels)

    rows = torch.export.Dim("rows", min=2)
    shapes = ({0: rows}, {0: rows})
    x = torch.randn(9, 4)
    exported = torch.export.export(Loss(), (x, labels_of(x)), dynamic_shapes=shapes).module()
    for x in (torch.randn(2, 4), torch.randn(12, 4)):
        close(exported(x, labels_of(x)), call(x), torch.float32)


def test_vmap_over_labels():
    """Without a warning, because each operator has a batching rule."""
    x = torch.randn(7, 4)
    labels = torch.stack((labels_of(x), torch.arange(7)))
    losses = torch.func.vmap(lambda one: ops.supcon_loss(x, one, incomplete="zero"))(labels)
    for loss, one in zip(losses, labels, strict=True):
        close(loss, ops.supcon_loss(x, one, incomplete="zero"), torch.float32)


def test_module():
    loss = ops.SupConLoss(0.3, incomplete="zero")
    x, y = torch.randn(2, 7, 4)
    assert torch.equal(loss(x, labels_of(x)), call(x, 0.3, incomplete="zero"))
    expected = call(x, 0.3, y, incomplete="zero")
    assert torch.equal(loss(x, labels_of(x), y, labels_of(y)), expected)
    learned = torch.tensor(0.7)
    assert torch.equal(
        loss(x, labels_of(x), temperature=learned), call(x, learned, incomplete="zero")
    )
    assert repr(loss) == (
        "SupConLoss(temperature=0.3, normalize=True, incomplete='zero', reduction='mean')"
    )


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"embeddings": [[0.0]]}, ops.ArgumentTypeError, "embeddings must be a torch.Tensor, got"),
        (
            {"embeddings": torch.ones(4)},
            ops.ArgumentError,
            r"embeddings must have shape \(rows, D\), got \[4\]",
        ),
        ({"labels": [0, 0, 1, 1]}, ops.ArgumentTypeError, "labels must be a torch.Tensor, got l"),
        (
            {"labels": torch.zeros(4)},
            ops.ArgumentTypeError,
            "labels must have an integer dtype, got float32",
        ),
        (
            {"labels": torch.zeros(3, dtype=torch.int64)},
            ops.ArgumentError,
            r"labels must have shape \[4\], one label for each row, got \[3\]",
        ),
        (
            {"temperature": 0},
            ops.ArgumentError,
            "temperature must be positive and finite, got 0",
        ),
        (
            {"temperature": 1e300},
            ops.ArgumentError,
            r"temperature must be in the range of float32, got 1e\+300",
        ),
        ({"temperature": None}, ops.ArgumentTypeError, "temperature must be a real number, got No"),
        (
            {"temperature": torch.ones(3)},
            ops.ArgumentError,
            r"temperature must have one element, got shape \[3\]",
        ),
        ({"incomplete": "keep"}, ops.ArgumentError, "incomplete must be one of drop, zero, got 'k"),
        ({"reduction": "avg"}, ops.ArgumentError, "reduction must be one of none, mean, sum, got"),
        (
            {"ref_emb": torch.ones(3, 2)},
            ops.ArgumentError,
            "ref_labels must be given with ref_emb, got None",
        ),
        (
            {"ref_emb": torch.ones(3, 5), "ref_labels": torch.zeros(3, dtype=torch.int64)},
            ops.ArgumentError,
            "ref_emb must have as many columns as embeddings, 2, got 5",
        ),
    ],
)
def test_bad_input(change, error, text):
    good = {"embeddings": torch.ones(4, 2), "labels": torch.tensor([0, 0, 1, 1])}
    with pytest.raises(error, match=text):
        ops.supcon_loss(**good | change)
