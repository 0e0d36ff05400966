"""Linear cross entropy: against torch's on all logits; every option, dtype and order."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

import ops
from ops._core import linear_logits, linear_loss
from tests.harness.battery import Battery
from tests.harness.helpers import run
from tests.harness.op_under_test import DTYPES, OpUnderTest, close, leaves, several

CLASSES = 11


@pytest.fixture(autouse=True)
def many_blocks(monkeypatch):
    """Small tensors would fit into one block."""
    torch.manual_seed(0)
    monkeypatch.setattr(linear_logits, "ELEMENTS", 1)
    monkeypatch.setattr(linear_logits, "FEWEST_ROWS", 3)


@pytest.fixture(params=["many blocks", "one block", "every row"])
def blocks(request, many_blocks, monkeypatch):
    """On other devices than CPUs, the rows that do not count are computed too."""
    if request.param == "one block":
        monkeypatch.setattr(linear_logits, "FEWEST_ROWS", 1000)
    if request.param == "every row":
        monkeypatch.setattr(linear_logits, "_counted", lambda label: torch.arange(len(label)))


def targets_of(x):
    """A class for each row, and every fifth row does not count."""
    shape = (2,) if x.is_nested else x.shape[:-1]
    count = int(torch.tensor(shape).prod()) if shape else 1
    numbers = torch.arange(count, device=x.device)
    target = (numbers * 7 + 3) % CLASSES
    return target.masked_fill(numbers % 5 == 4, -100).reshape(shape)


def class_weights(x):
    return torch.linspace(0.3, 2.0, CLASSES, dtype=torch.float64, device=x.device)


def cross_entropy(x, w, b=None, *, weighted=False, **keywords):
    weight = class_weights(x) if weighted else None
    return ops.linear_cross_entropy(x, w, targets_of(x), linear_bias=b, weight=weight, **keywords)


def logits(x, w, b, softcap):
    z = (x.unsqueeze(-2) * w).sum(-1)
    z = z if b is None else z + b
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def reference(
    x, w, b=None, *, weighted=False, reduction="mean", label_smoothing=0.0, z_loss=0.0, softcap=None
):
    """Row by row, from the definition of each term."""
    z, target = logits(x, w, b, softcap), targets_of(x)
    log_p, log_sum = z.log_softmax(-1), z.logsumexp(-1)
    weight = class_weights(x) if weighted else torch.ones(CLASSES, dtype=x.dtype)
    index = target.clamp(min=0)
    of_target = -log_p.gather(-1, index.unsqueeze(-1)).squeeze(-1) * weight[index]
    of_all = -(log_p * weight).sum(-1) / CLASSES
    entropy = (1 - label_smoothing) * of_target + label_smoothing * of_all
    counts = target != -100
    entropy, square = (
        torch.where(counts, one, 0.0) for one in (entropy, z_loss * log_sum.square())
    )
    if reduction == "none":
        return entropy + square
    if reduction == "sum":
        return (entropy + square).sum()
    return entropy.sum() / weight[index][counts].sum() + square.sum() / counts.sum()


def log_prob(x, w, b=None, **keywords):
    return ops.linear_log_prob(x, w, targets_of(x), linear_bias=b, **keywords)


def log_prob_reference(x, w, b=None, *, softcap=None):
    log_p, target = logits(x, w, b, softcap).log_softmax(-1), targets_of(x)
    chosen = log_p.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return tuple(torch.where(target != -100, one, 0.0) for one in (chosen, entropy))


def inputs(count):
    def make(shape, dtype, device):
        shapes = (shape, (CLASSES, shape[-1]), (CLASSES,))[:count]
        return [torch.randn(one, dtype=torch.float64).to(device, dtype) for one in shapes]

    return make


SHAPES = ((9,), (16, 33), (2, 7, 17), (6, 4))
ALL_TERMS = {"label_smoothing": 0.1, "z_loss": 0.03, "softcap": 1.5, "weighted": True}


class TestLinearCrossEntropy(Battery):
    backends = ("torch",)
    op = OpUnderTest(
        name="linear_cross_entropy",
        call=cross_entropy,
        reference=reference,
        names=("input", "linear_weight", "linear_bias"),
        inputs=inputs(3),
        shapes=SHAPES,
        variants=(
            {"label_smoothing": 0.1, "z_loss": 0.03},
            {},
            ALL_TERMS,
            {**ALL_TERMS, "reduction": "sum"},
            {**ALL_TERMS, "reduction": "none"},
            {"reduction": "none"},
        ),
        large=(333, 77),
        widens=True,
    )

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_values_and_gradients(self, backend, device, dtype, blocks):
        super().test_values_and_gradients(backend, device, dtype)

    def test_gradients_formed_ahead_survive_a_backward_pass(self, backend, device):
        """A pass through a retained graph leaves them as they are; the last one may not."""
        tensors = leaves(self.inputs(device))
        loss = cross_entropy(*tensors, **ALL_TERMS)
        passes = [
            torch.autograd.grad(factor * loss, tensors, retain_graph=factor != 3)
            for factor in (1, 2, 3)
        ]
        for once, twice, thrice in zip(*passes, strict=True):
            close(twice, 2 * once, torch.float64)
            close(thrice, 3 * once, torch.float64)

    def test_gradients_of_one_argument_at_a_time(self, backend, device):
        tensors = leaves(self.inputs(device))
        whole = torch.autograd.grad(cross_entropy(*tensors, **ALL_TERMS), tensors)
        loss = cross_entropy(*tensors, **ALL_TERMS)
        for one, expected in zip(tensors, whole, strict=True):
            (alone,) = torch.autograd.grad(loss, one, retain_graph=True)
            close(alone, expected, torch.float64)

    def test_nothing_is_formed_without_gradients(self, backend, device, monkeypatch):
        def refuse(*arguments):
            raise AssertionError("a gradient was computed")

        tensors = leaves(self.inputs(device))
        expected = cross_entropy(*tensors, **ALL_TERMS).detach()
        monkeypatch.setattr(linear_loss, "slopes_", refuse)
        with torch.no_grad():
            assert torch.equal(cross_entropy(*tensors, **ALL_TERMS), expected)
        assert torch.equal(cross_entropy(*[t.detach() for t in tensors], **ALL_TERMS), expected)
        with pytest.raises(AssertionError, match="a gradient was computed"):
            cross_entropy(*tensors, **ALL_TERMS)

    @pytest.mark.parametrize("softcap", [None, 2.0])
    @pytest.mark.parametrize("z_loss", [0.0, 0.02])
    def test_agrees_with_torch_on_all_logits(self, backend, device, softcap, z_loss):
        """Every combination of options, in float64."""
        x, w, b = leaves(self.inputs(device, shape=(13, 6)))
        target = torch.arange(13, device=device) % CLASSES
        target[3] = 4
        weight = class_weights(x)
        for reduction, ignored, smoothing, bias, factors in itertools.product(
            ("mean", "sum", "none"), (-100, 4), (0.0, 0.2, 1.0), (None, b), (None, weight)
        ):
            z = F.linear(x, w, bias)
            z = z if softcap is None else softcap * torch.tanh(z / softcap)
            options = {
                "reduction": reduction,
                "ignore_index": ignored,
                "label_smoothing": smoothing,
                "weight": factors,
            }
            expected = F.cross_entropy(z, target, **options)
            square = z_loss * z.logsumexp(1).square() * (target != ignored)
            if reduction == "none":
                expected = expected + square
            else:
                counted = (target != ignored).sum() if reduction == "mean" else 1
                expected = expected + square.sum() / counted
            loss = ops.linear_cross_entropy(
                x, w, target, linear_bias=bias, z_loss=z_loss, softcap=softcap, **options
            )
            close(loss, expected, torch.float64)
            seed = torch.randn_like(expected)
            of = [x, w, *([] if bias is None else [bias])]
            for one, other in zip(
                torch.autograd.grad(loss, of, seed),
                torch.autograd.grad(expected, of, seed),
                strict=True,
            ):
                close(one, other, torch.float64)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_saturated_logits(self, backend, device, dtype, blocks):
        """One class takes all, some exponentials underflow, and nothing becomes NaN."""
        for scale in (30.0, 3000.0):
            plain = [scale * t for t in self.inputs(device, dtype)]
            for keywords in ({"label_smoothing": 0.1, "z_loss": 1e-3}, {"reduction": "none"}):
                self.agree(plain, keywords)
                loss = cross_entropy(*leaves(plain), **keywords)
                assert loss.isfinite().all()

    def test_classes_that_a_bias_forbids(self, backend, device):
        """Logits of −∞ have probability 0 and gradient 0."""
        x, w, b = leaves(self.inputs(device))
        with torch.no_grad():
            b[[1, 5]] = -torch.inf
        target = torch.tensor([0, 2, 3, 4, 6, 7], device=device)
        for function in (ops.linear_cross_entropy, ops.linear_log_prob):
            results = several(function(x, w, target, linear_bias=b))
            kept = [i for i in range(CLASSES) if i not in (1, 5)]
            rank = torch.tensor([kept.index(t) for t in target.tolist()], device=device)
            expected = several(function(x, w[kept], rank, linear_bias=b[kept]))
            for one, other in zip(results, expected, strict=True):
                close(one, other, torch.float64)
            gradients = torch.autograd.grad(sum(r.sum() for r in results), (x, w, b))
            reference = torch.autograd.grad(sum(r.sum() for r in expected), (x, w, b))
            for one, other in zip(gradients, reference, strict=True):
                close(one, other, torch.float64)

    def test_rows_that_do_not_count_may_hold_anything(self, backend, device, blocks):
        tensors = self.inputs(device)
        for keywords in ({"z_loss": 0.1}, {"reduction": "none"}):
            mine, clean = leaves(tensors), leaves(tensors)
            with torch.no_grad():
                mine[0][4] = torch.nan  # the row that does not count
            losses = [cross_entropy(*one, **keywords).sum() for one in (mine, clean)]
            assert torch.equal(*losses)
            first = [
                torch.autograd.grad(loss, of, create_graph=True)
                for loss, of in zip(losses, (mine, clean), strict=True)
            ]
            for one, other in zip(*first, strict=True):
                close(one, other, torch.float64)
            second = [
                torch.autograd.grad(sum(g.square().sum() for g in its), of)
                for its, of in zip(first, (mine, clean), strict=True)
            ]
            for one, other in zip(*second, strict=True):
                close(one, other, torch.float64)

    def test_no_row_counts(self, backend, device, blocks):
        """The mean of nothing is NaN, the sum is 0, as in torch; all gradients are 0."""
        for rows, smoothing in itertools.product((0, 3), (0.0, 0.1)):
            x, w, b = leaves(self.inputs(device, shape=(rows, 4)))
            target = torch.full((rows,), -100, device=device)
            for reduction in ("mean", "sum", "none"):
                options = {"reduction": reduction, "label_smoothing": smoothing}
                loss = ops.linear_cross_entropy(x, w, target, linear_bias=b, **options)
                expected = F.cross_entropy(F.linear(x, w, b), target, **options)
                close(loss, expected, torch.float64)
                for one in torch.autograd.grad(loss.sum(), (x, w, b)):
                    assert not one.any()

    def test_a_label_outside_the_vocabulary(self, backend, device):
        x, w, _ = leaves(self.inputs(device))
        for wrong in (-1, CLASSES, 2**40):
            target = torch.tensor([0, 1, -100, wrong, 2, 3], device=device)
            words = f"target must hold classes from 0 to 10, or ignore_index -100, got {wrong}"
            for function in (
                ops.linear_cross_entropy,
                ops.linear_log_prob,
                torch.compile(ops.linear_cross_entropy, backend="aot_eager", fullgraph=True),
                torch.func.grad(ops.linear_cross_entropy),
            ):
                with pytest.raises(ops.ArgumentError, match=words):
                    function(x, w, target)
            ops.linear_cross_entropy(x, w, target.clamp(0, 10), ignore_index=-1)

    def test_where_nothing_waits_for_the_device_a_wrong_label_is_nan(
        self, backend, device, monkeypatch, blocks
    ):
        """As on a GPU, where the label cannot be looked at."""
        target = torch.tensor([0, 1, 99, 2, -100, 3], device=device)
        label = torch.tensor([0, 1, linear_logits.UNKNOWN, 2, linear_logits.IGNORED, 3])
        monkeypatch.setattr(linear_logits, "labels", lambda *arguments: label.to(device))
        x, w, _ = leaves(self.inputs(device))
        for call in (
            lambda: ops.linear_cross_entropy(x, w, target, label_smoothing=0.1),
            lambda: ops.linear_cross_entropy(x, w, target, reduction="none").sum(),
            lambda: torch.sum(ops.linear_log_prob(x, w, target).log_prob),
        ):
            assert call().isnan()
            for order in (False, True):  # by the kernel, and by the definition
                to_x, to_w = torch.autograd.grad(call(), (x, w), create_graph=order)
                assert to_x.isnan().all(1).tolist() == [False, False, True, False, False, False]
                assert to_w[0].isnan().all()

    def test_float16_gradients_are_scaled_before_they_are_rounded(self, backend, device):
        """A loss scaler keeps small gradients from underflow, though they are formed before it."""
        x, w, _ = leaves(self.inputs(device, torch.float16, (4000, 5)))
        target = torch.arange(4000, device=device) % CLASSES
        with torch.no_grad():
            w *= 1e-3
        loss = ops.linear_cross_entropy(x, w, target)
        exact = F.cross_entropy(F.linear(x.double(), w.double()), target)
        (mine,), (expected,) = (torch.autograd.grad(65536.0 * one, x) for one in (loss, exact))
        close(mine, expected, torch.float16)

    @pytest.mark.thorough
    def test_compiled_graphs(self, backend, device):
        """In one graph: several backward passes, with and without gradients, rows and sums."""
        tensors = self.inputs(device)
        for keywords in (ALL_TERMS, {**ALL_TERMS, "reduction": "none"}):
            call = lambda *t: cross_entropy(*t, **keywords)  # noqa: B023, E731
            for compiler in ("aot_eager", "inductor"):
                torch._dynamo.reset()
                compiled = torch.compile(call, backend=compiler, fullgraph=True)
                mine, theirs = leaves(tensors), leaves(tensors)
                for factor in (1.0, 2.0, 3.0):
                    losses = compiled(*mine).sum(), call(*theirs).sum()
                    close(*losses, torch.float64)
                    for keep in (True, False):
                        gradients = [
                            torch.autograd.grad(factor * loss, of, retain_graph=keep)
                            for loss, of in zip(losses, (mine, theirs), strict=True)
                        ]
                        for one, other in zip(*gradients, strict=True):
                            close(one, other, torch.float64)
                with torch.no_grad():
                    close(compiled(*tensors), call(*tensors), torch.float64)

    def test_vmap_over_targets(self, backend, device):
        x, w, _ = self.inputs(device)
        many = torch.stack([x, 2 * x])
        targets = torch.tensor([[0, 1, 2, -100, 4, 5], [3, 3, 1, 0, 2, -100]], device=device)
        call = lambda x, target: ops.linear_cross_entropy(x, w, target)  # noqa: E731
        expected = [call(*pair) for pair in zip(many, targets, strict=True)]
        close(torch.func.vmap(call)(many, targets), torch.stack(expected), torch.float64)
        close(
            torch.func.vmap(torch.func.grad(call))(many, targets)[1],
            torch.func.grad(call)(many[1], targets[1]),
            torch.float64,
        )

    def test_bfloat16_adds_up_in_float32(self, backend, device):
        """Many classes: a sum in bfloat16, or a result in it, would be off by 3 in a thousand."""
        x, w = torch.randn(40, 64), torch.randn(8000, 64) / 8
        target = torch.arange(40) * 199
        x, w = (t.to(device, torch.bfloat16).requires_grad_() for t in (x, w))
        exact = F.cross_entropy(F.linear(x.double(), w.double()), target)
        loss = ops.linear_cross_entropy(x, w, target.to(device))
        assert abs(loss.item() / exact.item() - 1) < 1e-6
        assert all(g.dtype is torch.bfloat16 for g in torch.autograd.grad(loss, (x, w)))


class TestLinearLogProb(Battery):
    backends = ("torch",)
    layout_dtypes = (torch.float64,)  # gradients of equal classes are 0, but for rounding
    op = OpUnderTest(
        name="linear_log_prob",
        call=log_prob,
        reference=log_prob_reference,
        names=("input", "linear_weight", "linear_bias"),
        inputs=inputs(3),
        shapes=SHAPES,
        variants=({}, {"softcap": 1.5}),
        large=(333, 77),
        widens=True,
    )

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_values_and_gradients(self, backend, device, dtype, blocks):
        super().test_values_and_gradients(backend, device, dtype)

    def test_each_result_alone(self, backend, device):
        tensors = leaves(self.inputs(device))
        for place in range(2):
            mine, expected = log_prob(*tensors)[place], log_prob_reference(*tensors)[place]
            seed = torch.randn_like(mine)
            for one, other in zip(
                torch.autograd.grad(mine, tensors, seed),
                torch.autograd.grad(expected, tensors, seed),
                strict=True,
            ):
                close(one, other, torch.float64)

    def test_saturated_logits(self, backend, device):
        for scale in (30.0, 3000.0):
            self.agree([scale * t for t in self.inputs(device, torch.float32)], {})


MEMORY = """
import torch, ops
torch.set_num_threads(1)
rows, cols, classes = 1024, 256, 16000
x, w = torch.randn(rows, cols).requires_grad_(), torch.randn(classes, cols).requires_grad_()
target = torch.randint(classes, (rows,))
def step(rows):
    loss = ops.linear_cross_entropy(x[:rows], w, target[:rows], label_smoothing=0.1, z_loss=1e-4)
    return torch.autograd.grad(loss, (x, w))
step(8)
open("/proc/self/clear_refs", "w").write("5")
def peak():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
before = peak()
gradients = step(rows)
print((peak() - before - sum(g.nbytes for g in gradients)) / (4 * rows * classes))
"""


@pytest.mark.thorough
def test_memory():
    """Beyond the gradients less than half of the logits, where eager code stores them thrice."""
    out, _ = run(MEMORY, MALLOC_MMAP_THRESHOLD_="65536")
    assert float(out) < 0.5


def test_second_order_of_everything():
    """Gradients of gradients for all arguments, with every term."""
    for keywords in (ALL_TERMS, {**ALL_TERMS, "reduction": "none"}):
        tensors = leaves(inputs(3)((5, 3), torch.float64, "cpu"))
        mine, expected = (
            torch.autograd.grad(f(*tensors, **keywords).square().sum(), tensors, create_graph=True)
            for f in (cross_entropy, reference)
        )
        mine, expected = (
            torch.autograd.grad(sum(g.square().sum() for g in its), tensors)
            for its in (mine, expected)
        )
        for one, other in zip(mine, expected, strict=True):
            close(one, other, torch.float64)


def test_module():
    torch.manual_seed(0)
    weight = torch.rand(5)
    module = ops.LinearCrossEntropyLoss(
        3, 5, bias=True, weight=weight, label_smoothing=0.1, z_loss=1e-3, softcap=20.0
    )
    theirs = torch.nn.Linear(3, 5)
    theirs.load_state_dict(module.linear.state_dict())
    x, target = torch.randn(2, 4, 3), torch.randint(5, (2, 4))
    expected = ops.linear_cross_entropy(
        x, theirs.weight, target, linear_bias=theirs.bias, weight=weight,
        label_smoothing=0.1, z_loss=1e-3, softcap=20.0,
    )  # fmt: skip
    assert torch.equal(module(x, target), expected)
    assert set(module.state_dict()) == {"linear.weight", "linear.bias", "weight"}
    assert "label_smoothing=0.1, z_loss=0.001, softcap=20.0" in repr(module)
    with pytest.raises(ops.ArgumentError, match="reduction must be one of none, mean, sum, got"):
        ops.LinearCrossEntropyLoss(3, 5, reduction="max")
    with pytest.raises(ops.ArgumentError, match=r"weight must have shape \[5\], one number"):
        ops.LinearCrossEntropyLoss(3, 5, weight=torch.ones(4))


GOOD = {
    "input": torch.ones(4, 3),
    "linear_weight": torch.ones(5, 3),
    "target": torch.zeros(4, dtype=torch.int64),
}
SHARED = [
    ({"input": [1.0]}, ops.ArgumentTypeError, "input must be a torch.Tensor, got list"),
    (
        {"linear_weight": torch.ones(5, 3).double()},
        ops.ArgumentTypeError,
        "linear_weight must have input's dtype float32, got float64",
    ),
    (
        {"linear_weight": torch.ones(5)},
        ops.ArgumentError,
        r"linear_weight must have shape \(classes, D\) with at least one class, got \[5\]",
    ),
    (
        {"linear_weight": torch.ones(0, 3)},
        ops.ArgumentError,
        r"at least one class, got \[0, 3\]",
    ),
    (
        {"linear_weight": torch.ones(5, 2)},
        ops.ArgumentError,
        r"input must have shape \(\*, 2\), as linear_weight has 2 columns, got \[4, 3\]",
    ),
    ({"target": [0] * 4}, ops.ArgumentTypeError, "target must be a torch.Tensor, got list"),
    (
        {"target": torch.ones(4)},
        ops.ArgumentTypeError,
        "target must have an integer dtype, got float32",
    ),
    (
        {"target": torch.zeros(3, dtype=torch.int64)},
        ops.ArgumentError,
        r"target must have shape \[4\], one class for each row of input, got \[3\]",
    ),
    (
        {"linear_bias": torch.ones(4)},
        ops.ArgumentError,
        r"linear_bias must have shape \[5\], one number for each class, got \[4\]",
    ),
    ({"ignore_index": 1.0}, ops.ArgumentTypeError, "ignore_index must be an int or None, got flo"),
    ({"softcap": 0.0}, ops.ArgumentError, "softcap must be a finite number above 0, or None, got"),
    ({"softcap": "5"}, ops.ArgumentTypeError, "softcap must be a real number, got str"),
]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        *SHARED,
        ({"reduction": "max"}, ops.ArgumentError, "reduction must be one of none, mean, sum"),
        ({"label_smoothing": 1.5}, ops.ArgumentError, "label_smoothing must be from 0 to 1, got"),
        ({"z_loss": -1.0}, ops.ArgumentError, "z_loss must be finite and at least 0, got -1.0"),
        ({"z_loss": float("inf")}, ops.ArgumentError, "z_loss must be finite and at least 0"),
        ({"weight": [1.0]}, ops.ArgumentTypeError, "weight must be a torch.Tensor, got list"),
        (
            {"weight": torch.ones(4)},
            ops.ArgumentError,
            r"weight must have shape \[5\], one number for each class, got \[4\]",
        ),
        (
            {"weight": torch.ones(5, requires_grad=True)},
            ops.ArgumentError,
            "weight must not require a gradient",
        ),
    ],
)
def test_bad_arguments(change, error, text):
    with pytest.raises(error, match=text):
        ops.linear_cross_entropy(**{**GOOD, **change})


@pytest.mark.parametrize(("change", "error", "text"), SHARED)
def test_bad_arguments_of_log_prob(change, error, text):
    with pytest.raises(error, match=text):
        ops.linear_log_prob(**{**GOOD, **change})


def test_targets_of_any_integer_dtype():
    expected = ops.linear_cross_entropy(**GOOD)
    for dtype in (torch.uint8, torch.int32):
        found = ops.linear_cross_entropy(**{**GOOD, "target": GOOD["target"].to(dtype)})
        assert torch.equal(found, expected)
