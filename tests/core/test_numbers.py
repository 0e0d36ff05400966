"""Numbers of NumPy as arguments: every op takes them as it takes Python's."""

from __future__ import annotations

import pytest
import torch

import ops

np = pytest.importorskip("numpy")

X = torch.linspace(-1, 1, 24).view(2, 3, 4)
ROWS, LABELS = X.view(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
IMAGES = X.view(1, 2, 3, 4).sigmoid()


def lltm(*sizes):
    torch.manual_seed(0)
    return ops.LLTM(*sizes)(torch.ones(2, 4)).h


# A call of each op, and its numbers as a user would write them.
CALLS = {
    "set_matching_loss": (lambda *n: ops.set_matching_loss(X, list(n)).loss, (3, 2)),
    "SetMatchingLoss": (lambda *n: ops.SetMatchingLoss()(X, n).loss, (3, 2)),
    "normalize_with_norm": (lambda n: ops.normalize_with_norm(X, n).norm, (1,)),
    "LLTM": (lltm, (4, 3)),
    "linear_cross_entropy": (
        lambda i, s, z, c: ops.linear_cross_entropy(
            ROWS, ROWS, LABELS, ignore_index=i, label_smoothing=s, z_loss=z, softcap=c
        ),
        (2, 0.125, 0.5, 3.0),
    ),
    "LinearCrossEntropyLoss": (
        lambda d, n, i: (torch.manual_seed(0), ops.LinearCrossEntropyLoss(d, n, ignore_index=i))[1](
            ROWS, LABELS
        ),
        (4, 3, 1),
    ),
    "linear_log_prob": (
        lambda i: ops.linear_log_prob(ROWS, ROWS, LABELS, ignore_index=i)[0],
        (2,),
    ),
    "improved_triplet_loss": (
        lambda *n: ops.improved_triplet_loss(ROWS, -ROWS, ROWS.flip(0), *n),
        (-1.0, 0.5, 2),
    ),
    "ImprovedTripletLoss": (
        lambda *n: ops.ImprovedTripletLoss(*n)(ROWS, -ROWS, ROWS.flip(0)),
        (-1.0, 0.5, 2),
    ),
    "batch_hard_triplet_loss": (
        lambda m: ops.batch_hard_triplet_loss(ROWS, LABELS, margin=m),
        (0.25,),
    ),
    "batch_all_triplet_loss": (lambda m: ops.batch_all_triplet_loss(ROWS, LABELS, margin=m), (1,)),
    "batch_semi_hard_triplet_loss": (
        lambda m: ops.batch_semi_hard_triplet_loss(ROWS, LABELS, margin=m),
        (1,),
    ),
    "info_nce_loss": (lambda t: ops.info_nce_loss(ROWS, -ROWS, temperature=t), (0.5,)),
    "margin_softmax_loss": (
        lambda m, s: ops.margin_softmax_loss(ROWS, -ROWS, LABELS, margin=m, scale=s),
        (0.5, 8),
    ),
    "supcon_loss": (lambda t: ops.supcon_loss(ROWS, LABELS, temperature=t), (2,)),
    "hausdorff_dt_loss": (
        lambda a, *s: ops.hausdorff_dt_loss(
            IMAGES, IMAGES.flip(2), a, include_background=True, spacing=s
        ),
        (2, 1.0, 0.5),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_numbers_of_numpy(name):
    call, numbers = CALLS[name]
    expected = call(*numbers)
    for integer, real in ((np.int64, np.float64), (np.int32, np.float32), (np.uint8, np.float16)):
        kinds = {int: integer, float: real}
        result = call(*[kinds[type(number)](number) for number in numbers])
        assert torch.equal(result, expected)


def test_an_array_of_sizes():
    expected = ops.set_matching_loss(X, [3, 2]).loss
    result = ops.set_matching_loss(X, np.array([3, 2])).loss
    assert torch.equal(result, expected)
    with pytest.raises(ops.ArgumentTypeError, match="sizes must be a list of ints or a tensor"):
        ops.set_matching_loss(X, np.array(3))
    with pytest.raises(ops.ArgumentTypeError, match=r"sizes\[0\] must be an int, got float64"):
        ops.set_matching_loss(X, np.array([3.0, 2.0]))


@pytest.mark.parametrize("wrong", [True, np.True_, 1.0, np.float32(1), "1", torch.tensor(1)])
def test_what_is_no_integer(wrong):
    for call in (
        lambda: ops.normalize_with_norm(X, wrong),
        lambda: ops.LLTM(wrong, 3),
        lambda: ops.linear_cross_entropy(ROWS, ROWS, LABELS, ignore_index=wrong),
        lambda: ops.set_matching_loss(X, [wrong, wrong]),
        lambda: ops.check_gradients(torch.sin, X, seed=wrong),
    ):
        with pytest.raises(ops.ArgumentTypeError, match="must be an int"):
            call()
