"""The Chamfer distance: the battery, the formula of pytorch3d, and edge cases."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

import ops
from tests.harness.battery import Battery
from tests.harness.op_under_test import OpUnderTest, applies, close
from tests.losses.clouds import (
    BAD_INPUT,
    bad_lengths,
    check_bad_input,
    inputs,
    lengths_of,
    nearest,
    whole,
)


def one_direction(x, y, of_x, of_y, normals, weights, reduction, norm, abs_cosine):
    """``_chamfer_distance_single_direction`` of pytorch3d, over the reference of the neighbours."""
    dists, idx = nearest(x, y, of_x, of_y, norm, 1)
    loss, of_normals = dists[..., 0], None
    padding = torch.arange(x.shape[1], device=x.device)[None] >= of_x[:, None]
    if weights is not None:
        loss = loss * weights[:, None]
    if normals is not None:
        near = torch.gather(normals[1], 1, idx.expand(-1, -1, normals[1].shape[2]))
        cosine = F.cosine_similarity(normals[0], near, dim=2, eps=1e-6)
        of_normals = 1 - (cosine.abs() if abs_cosine else cosine)
        of_normals = of_normals.masked_fill(padding, 0.0)
        if weights is not None:
            of_normals = of_normals * weights[:, None]
    if reduction == "max":
        return loss.max(1).values, None
    if reduction is not None:
        count = of_x.clamp(min=1) if reduction == "mean" else 1
        loss = loss.sum(1) / count
        of_normals = None if of_normals is None else of_normals.sum(1) / count
    return loss, of_normals


def pytorch3d(x, y, x_lengths=None, y_lengths=None, x_normals=None, y_normals=None, weights=None,
              batch_reduction="mean", point_reduction="mean", norm=2, single_directional=False,
              abs_cosine=True):  # fmt: skip
    """The formula of pytorch3d's ``chamfer_distance``, as of 0.7.8, in tensor code."""
    of_x = whole(x) if x_lengths is None else x_lengths
    of_y = whole(y) if y_lengths is None else y_lengths
    forth = back = None
    if x_normals is not None:
        forth, back = (x_normals, y_normals), (y_normals, x_normals)
    settings = (weights, point_reduction, norm, abs_cosine)
    loss, of_normals = one_direction(x, y, of_x, of_y, forth, *settings)
    if not single_directional:
        other, others = one_direction(y, x, of_y, of_x, back, *settings)
        if point_reduction == "max":
            loss = torch.maximum(loss, other)
        elif point_reduction is None:
            return (loss, other), None if of_normals is None else (of_normals, others)
        else:
            loss = loss + other
            of_normals = None if of_normals is None else of_normals + others
    if batch_reduction is None:
        return loss, of_normals
    divisor = 1
    if batch_reduction == "mean":
        divisor = max(1, len(x)) if weights is None else weights.sum()
    return loss.sum() / divisor, None if of_normals is None else of_normals.sum() / divisor


def flat(result):
    """All tensors of a result."""
    if isinstance(result, tuple):
        return tuple(tensor for one in result for tensor in flat(one))
    return () if result is None else (result,)


def settings(x, y, ragged, keywords):
    if ragged:
        keywords = keywords | {"x_lengths": lengths_of(x), "y_lengths": lengths_of(y, 2)}
    return keywords


def call(x, y, ragged=False, **keywords):
    return flat(ops.chamfer_distance(x, y, **settings(x, y, ragged, keywords)))


def reference(x, y, ragged=False, **keywords):
    return flat(pytorch3d(x, y, **settings(x, y, ragged, keywords)))


CHAMFER = OpUnderTest(
    name="chamfer_distance",
    call=call,
    reference=reference,
    names=("x", "y"),
    inputs=inputs,
    shapes=((1, 1, 1, 1), (2, 20, 37, 3), (1, 9, 15, 20), (2, 3, 4, 2)),
    variants=(
        {},
        {"norm": 1, "point_reduction": "sum", "single_directional": True},
        {"ragged": True, "point_reduction": None, "batch_reduction": None},
    ),
    edges=((0, 3, 4, 2), (2, 0, 4, 3), (2, 4, 0, 3), (2, 3, 4, 0), (1, 1, 1, 1)),
    large=(2, 300, 400, 3),
    variation=True,
)


class TestChamferDistance(Battery):
    op = CHAMFER

    def test_worked_by_hand(self, backend, device):
        x = torch.tensor([[[0.0, 0.0], [2.0, 0.0]]], device=device, requires_grad=True)
        y = torch.tensor([[[0.0, 1.0], [5.0, 0.0], [2.0, 2.0]]], device=device)
        loss, normals, of_x, of_y = ops.chamfer_distance(x, y, return_indices=True)
        assert loss.item() == pytest.approx((1 + 4) / 2 + (1 + 9 + 4) / 3)
        assert normals is None
        assert of_x.tolist() == [[0, 2]]
        assert of_y.tolist() == [[0, 1, 1]]
        loss.backward()
        expected = torch.tensor([[[0.0, -1 - 2 / 3], [-6 / 3, -2 - 4 / 3]]], device=device)
        close(x.grad, expected, torch.float32)

    def test_all_arguments(self, backend, device):
        """Each combination of reductions, against the formula of pytorch3d, in both passes."""
        x, y = inputs((3, 5, 7, 3), torch.float64, device)
        x_normals, y_normals = inputs((3, 5, 7, 3), torch.float64, device)
        weights = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64, device=device)
        tensors = [x, y, x_normals, y_normals, weights]
        lengths = {"x_lengths": torch.tensor([5, 2, 1], device=device),
                   "y_lengths": torch.tensor([3, 7, 1], device=device)}  # fmt: skip
        reductions = (("mean", "mean"), ("sum", "sum"), (None, "mean"), (None, None),
                      ("mean", "max"))  # fmt: skip
        for (batch, point), single, weighted in itertools.product(
            reductions, (True, False), (True, False)
        ):
            keywords = {"batch_reduction": batch, "point_reduction": point}
            keywords |= {"single_directional": single, "abs_cosine": weighted, **lengths}
            found = []
            for loss in (ops.chamfer_distance, pytorch3d):
                mine = [t.clone().requires_grad_() for t in tensors]
                more = {} if point == "max" else {"x_normals": mine[2], "y_normals": mine[3]}
                more |= {"weights": mine[4]} if weighted else {}
                results = flat(loss(*mine[:2], **keywords, **more))
                grads = torch.autograd.grad(
                    sum((n + 1) * r.square().sum() for n, r in enumerate(results)),
                    [*mine[:2], *more.values()],
                )
                found.append((*results, *grads))
            for one, other in zip(*found, strict=True):
                close(one, other, torch.float64)

    def test_empty_clouds(self, backend, device):
        """The loss and all gradients are 0, also for the normals of the points opposite."""
        x, y = (t.requires_grad_() for t in inputs((2, 3, 4, 3), torch.float32, device))
        none = torch.zeros(2, dtype=torch.int64, device=device)
        loss, normals = ops.chamfer_distance(x, y, y_lengths=none, x_normals=x, y_normals=y)
        assert loss.item() == normals.item() == 0
        (loss + normals).backward()
        assert not x.grad.any()
        assert not y.grad.any()
        assert ops.chamfer_distance(x[:, :0], y, point_reduction="max")[0].item() == 0

    def test_normals_of_padding(self, backend, device):
        """They have no influence, even if they are NaN, and the gradient 0."""
        tensors = [t for _ in range(2) for t in inputs((2, 3, 4, 3), torch.float32, device)]
        lengths = {"x_lengths": torch.tensor([1, 3], device=device),
                   "y_lengths": torch.tensor([4, 2], device=device)}  # fmt: skip
        found = []
        for content in (0.0, torch.nan):
            filled = [t.clone() for t in tensors]
            for tensor, its in zip(filled, [*lengths.values()] * 2, strict=True):
                for cloud, length in zip(tensor, its, strict=True):
                    cloud[length:] = content
            x, y, x_normals, y_normals = (t.requires_grad_() for t in filled)
            loss, unlike = ops.chamfer_distance(
                x, y, x_normals=x_normals, y_normals=y_normals, **lengths
            )
            found.append((loss, unlike, *torch.autograd.grad(loss + unlike, filled)))
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)

    def test_weights_of_zero(self, backend, device):
        x, y = (t.requires_grad_() for t in inputs((2, 3, 4, 3), torch.float32, device))
        weights = torch.zeros(2, device=device)
        for batch, shape in (("mean", ()), (None, (2,))):
            loss, _ = ops.chamfer_distance(x, y, weights=weights, batch_reduction=batch)
            assert torch.equal(loss, torch.zeros(shape, device=device))
        loss.sum().backward()
        assert not x.grad.any()

    def test_nan_shows(self, backend, device):
        x, y = inputs((1, 4, 5, 3), torch.float32, device)
        y[0, 2, 1] = torch.nan
        loss, _, of_x, _ = ops.chamfer_distance(x, y, return_indices=True)
        assert loss.isnan()
        assert not (of_x == 2).any()

    # The other back ends have one algorithm for all sizes.
    @applies(lambda op, backend: backend == "cpp")
    def test_sweeps_and_trees(self, backend, device):
        """Both directions of clouds of several blocks, and of as many points as a tree takes."""
        for norm, shape in (
            (2, (2, 200, 500, 3)), (1, (1, 400, 100, 3)), (2, (1, 200, 300, 17)),
            (2, (1, 50, 200, 100)), (2, (1, 1030, 1100, 1)), (1, (1, 1030, 1100, 1)),
        ):  # fmt: skip
            x, y = inputs(shape, torch.float32, device)
            mine, theirs = ([t.clone().requires_grad_() for t in (x, y)] for _ in range(2))
            loss, expected = call(*mine, norm=norm)[0], reference(*theirs, norm=norm)[0]
            close(loss, expected, torch.float32)
            loss.backward()
            expected.backward()
            for one, other in zip(mine, theirs, strict=True):
                close(one.grad, other.grad, torch.float32)

    def test_half_precision_sums_in_float32(self, backend, device):
        """In bfloat16 a sum of ones ends at 256."""
        x = torch.zeros(1, 600, 1, dtype=torch.bfloat16, device=device)
        y = torch.ones(1, 1, 1, dtype=torch.bfloat16, device=device)
        loss = ops.chamfer_distance(x, y, point_reduction="sum", single_directional=True)[0]
        assert loss.item() == 600


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        *BAD_INPUT,
        *bad_lengths("x_lengths"),
        *bad_lengths("y_lengths"),
        (
            {"batch_reduction": "max"},
            ops.ArgumentError,
            "batch_reduction must be one of mean, sum or None",
        ),
        ({"point_reduction": "none"}, ops.ArgumentError, "point_reduction must be one of mean, s"),
        ({"point_reduction": None}, ops.ArgumentError, "batch_reduction must be None without poi"),
        ({"x_normals": torch.ones(2, 5, 3)}, ops.ArgumentError, "y_normals must be given with x_n"),
        (
            {"x_normals": torch.ones(2, 4, 3), "y_normals": torch.ones(2, 5, 3)},
            ops.ArgumentError,
            r"x_normals must have shape \[2, 5, C\], one normal for each point, got \[2, 4, 3\]",
        ),
        (
            {
                "x_normals": torch.ones(2, 5, 3),
                "y_normals": torch.ones(2, 5, 3),
                "point_reduction": "max",
            },
            ops.ArgumentError,
            "point_reduction must not be max with normals",
        ),
        ({"weights": torch.ones(3)}, ops.ArgumentError, r"weights must have shape \[2\], one for"),
        ({"weights": torch.tensor([1.0, -1.0])}, ops.ArgumentError, "weights must not be negative"),
        ({"weights": torch.ones(2).double()}, ops.ArgumentTypeError, "weights must have x's dtype"),
    ],
)
def test_bad_input(backend, device, change, error, text):
    check_bad_input(ops.chamfer_distance, ("x", "y"), device, change, error, text)


def test_module():
    loss = ops.ChamferDistance(point_reduction="sum", norm=1)
    x, y = torch.randn(2, 2, 5, 3)
    assert torch.equal(loss(x, y)[0], call(x, y, point_reduction="sum", norm=1)[0])
    assert repr(loss) == (
        "ChamferDistance(batch_reduction='mean', point_reduction='sum', single_directional=False, "
        "abs_cosine=True, return_indices=False, norm=1)"
    )
    with pytest.raises(ops.ArgumentError, match="norm must be 1 or 2, got 3"):
        ops.ChamferDistance(norm=3)
