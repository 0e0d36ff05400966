"""Other packages' losses and ours, on the same batches: the calls on the pages of our losses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import ops
from benchmarks.losses import peers

pytestmark = pytest.mark.peers


def late(make, *arguments, **keywords):
    """A loss that imports its package when it is called: other tests may run without."""

    def loss(*tensors):
        return make(*arguments, **keywords)(*tensors)

    return loss


def of_pml(*arguments, **keywords):
    return late(peers.pytorch_metric_learning, *arguments, **keywords)


def of_st(*arguments, **keywords):
    return late(peers.sentence_transformers, *arguments, **keywords)


def of_otl(name):
    return late(peers.online_triplet_loss, name, 0.2)


def info_nce(*tensors):
    return peers.package("info_nce").info_nce(*tensors, temperature=0.1)


def halves(loss):
    """A loss of pairs, on the two halves of a batch."""
    return lambda x, _: loss(*x.chunk(2))


def two_views(x, _):
    pairs = torch.arange(len(x) // 2).repeat(2)
    return peers.pytorch_metric_learning("NTXentLoss", temperature=0.07)(x, pairs)


def ranking(x, y):
    losses = peers.package("sentence_transformers.losses")
    loss = losses.MultipleNegativesRankingLoss(peers.Identity(), 20)
    return loss([{"x": x}, {"x": y}], None)


def supcon_of_pml(x, labels, **references):
    return peers.pytorch_metric_learning("SupConLoss", temperature=0.1)(x, labels, **references)


def with_margin_of_pml(name, **parameters):
    def loss(x, labels):
        made = peers.pytorch_metric_learning(
            name, num_classes=12, embedding_size=x.shape[1], **parameters
        )
        made.W = torch.nn.Parameter(x[:12].detach().mT.flip(1).clone())
        return made(x, labels)

    return loss


def with_margin(**keywords):
    def loss(x, labels):
        return ops.margin_softmax_loss(x, x[:12].detach().flip(0), labels, **keywords)

    return loss


def with_references(loss):
    return lambda x, labels: loss(x[:20], labels[:20], ref_emb=x[20:], ref_labels=labels[20:])


def normalised(loss, *arguments, **keywords):
    return lambda x, labels: loss(F.normalize(x), labels, *arguments, **keywords)


def ours(loss, *arguments, **keywords):
    return lambda x, labels: loss(x, labels, *arguments, **keywords)


SEMI_HARD = {"margin": 0.2, "type_of_triplets": "semihard"}
# Every anchor has a positive and a negative. Packages treat other anchors differently.
AGREE = {
    "batch-all, PML": (
        of_pml("TripletMarginLoss", margin=0.2),
        normalised(ops.batch_all_triplet_loss, 0.2),
    ),
    "batch-all, ST": (
        of_st("BatchAllTripletLoss", margin=5),
        ours(ops.batch_all_triplet_loss, 5.0),
    ),
    "batch-all, OTL": (
        of_otl("batch_all_triplet_loss"),
        ours(ops.batch_all_triplet_loss, 0.2),
    ),
    "batch-hard, PML": (
        of_pml("TripletMarginLoss", "BatchHardMiner", margin=2.0),
        normalised(ops.batch_hard_triplet_loss, 2.0),
    ),
    "batch-hard, ST": (
        of_st("BatchHardTripletLoss", margin=5),
        ours(ops.batch_hard_triplet_loss, 5.0, incomplete="zero"),
    ),
    "batch-hard, soft, ST": (
        of_st("BatchHardSoftMarginTripletLoss"),
        ours(ops.batch_hard_triplet_loss, "soft", incomplete="zero"),
    ),
    "batch-hard, OTL": (
        of_otl("batch_hard_triplet_loss"),
        ours(ops.batch_hard_triplet_loss, 0.2, incomplete="zero"),
    ),
    "semi-hard, ST": (
        of_st("BatchSemiHardTripletLoss", margin=5),
        ours(ops.batch_semi_hard_triplet_loss, 5.0),
    ),
    "semi-hard, PML": (
        of_pml("TripletMarginLoss", "TripletMarginMiner", SEMI_HARD, margin=0.2),
        normalised(ops.batch_semi_hard_triplet_loss, 0.2, negatives="all"),
    ),
    "InfoNCE, info-nce-pytorch": (
        halves(info_nce),
        halves(lambda x, y: ops.info_nce_loss(x, y, temperature=0.1)),
    ),
    "InfoNCE with negatives, info-nce-pytorch": (
        halves(lambda x, y: info_nce(x, y, x.flip(0))),
        halves(lambda x, y: ops.info_nce_loss(x, y, x.flip(0), temperature=0.1)),
    ),
    "InfoNCE, ST": (halves(ranking), halves(lambda x, y: ops.info_nce_loss(x, y, scale=20))),
    "NT-Xent, PML": (two_views, halves(lambda x, y: ops.info_nce_loss(x, y, form="two_views"))),
    "SupCon, PML": (supcon_of_pml, ops.supcon_loss),
    "ArcFace, PML": (with_margin_of_pml("ArcFaceLoss", margin=90), with_margin(margin=math.pi / 2)),
    "CosFace, PML": (with_margin_of_pml("CosFaceLoss"), with_margin(form="cosface")),
    "SupCon with references, PML": (
        with_references(supcon_of_pml),
        with_references(ops.supcon_loss),
    ),
}


def value_and_gradient(loss, x, *rest):
    x = x.detach().requires_grad_()
    value = loss(x, *rest)
    return value.detach(), *torch.autograd.grad(value.sum(), x)


@pytest.mark.parametrize("case", AGREE)
def test_they_agree(case):
    """Within 1e-6 of the largest, or 1e-4 for PML, which computes in float32 in part."""
    theirs, mine = AGREE[case]
    x, labels = torch.randn(48, 24, dtype=torch.float64), torch.arange(48) % 12
    tolerance = 1e-4 if "PML" in case else 1e-6
    for one, other in zip(
        value_and_gradient(mine, x, labels), value_and_gradient(theirs, x, labels), strict=True
    ):
        assert other.abs().max() > 0
        assert (one - other).abs().max() <= tolerance * other.abs().max()


# ---- where they do not agree, float64 shows who is right ----------------------------------------

NEAR = {
    "batch-all": (AGREE["batch-all, ST"], AGREE["batch-all, OTL"]),
    "batch-hard": (AGREE["batch-hard, ST"], AGREE["batch-hard, OTL"]),
    "semi-hard": (AGREE["semi-hard, ST"],),
}


@pytest.mark.parametrize("name", NEAR)
def test_near_points_far_from_the_origin(name):
    """Theirs are from a matrix product, whose digits cancel."""
    labels = torch.arange(48) % 12
    x = (1000 + 0.05 * torch.randn(48, 24)).float()
    for theirs, mine in NEAR[name]:
        exact = value_and_gradient(mine, x.double(), labels)
        of_mine, of_theirs = (
            value_and_gradient(mine, x, labels),
            value_and_gradient(theirs, x, labels),
        )
        for one, other in zip(of_mine, exact, strict=True):
            assert (one - other).abs().max() < 1e-5 * other.abs().max()
        assert (of_theirs[1] - exact[1]).abs().max() > 0.9 * exact[1].abs().max()


def test_an_anchor_without_a_positive():
    """There its distance to a positive is 0, and its loss 2 - 1.5. Here there is no triplet."""
    x = torch.tensor([[0.0], [1.0], [2.5]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1])
    theirs = of_st("BatchHardTripletLoss", margin=2)(x, labels)
    assert theirs.item() == pytest.approx((0.5 + 1.5 + 0.5) / 3)
    mine = ops.batch_hard_triplet_loss(x, labels, 2.0, reduction="none")
    assert mine.tolist() == [0.5, 1.5, 0.0]


# ---- losses of images ----------------------------------------------------------------------------


def of_msssim(name, **parameters):
    def loss(x, y):
        return getattr(peers.package("pytorch_msssim"), name)(x, y, data_range=1.0, **parameters)

    return loss


def of_torchmetrics(x, y):
    functions = peers.package("torchmetrics.functional")
    return functions.structural_similarity_index_measure(x, y, data_range=1.0)


def of_monai(**parameters):
    def loss(x, y):
        make = peers.package("monai.losses").LocalNormalizedCrossCorrelationLoss
        return make(spatial_dims=x.dim() - 2, **parameters)(x, y)

    return loss


def ssim(**keywords):
    return lambda x, y: ops.ssim(x, y, data_range=1.0, **keywords)


def as_volume(image):
    return image[:, :1, :48, :80].reshape(2, 1, 12, 16, 20)


OF_IMAGES = {
    "SSIM, pytorch-msssim": (of_msssim("ssim"), ssim()),
    "SSIM of each image, pytorch-msssim": (
        lambda x, y: of_msssim("ssim", size_average=False)(x, y)[1],
        lambda x, y: ssim(reduction="none")(x, y)[1],
    ),
    "SSIM, torchmetrics": (of_torchmetrics, ssim(padding="reflect")),
    "MS-SSIM, pytorch-msssim": (
        of_msssim("ms_ssim"),
        lambda x, y: ops.ms_ssim(x, y, data_range=1.0),
    ),
    **{
        f"LNCC, {kernel_type}, MONAI": (
            of_monai(kernel_size=7, kernel_type=kernel_type),
            lambda x, y, kernel_type=kernel_type: ops.lncc_loss(
                x, y, kernel_size=7, kernel_type=kernel_type
            ),
        )
        for kernel_type in ("rectangular", "triangular", "gaussian")
    },
    "LNCC of volumes, MONAI": (
        lambda x, y: of_monai(kernel_size=9)(as_volume(x), as_volume(y)),
        lambda x, y: ops.lncc_loss(as_volume(x), as_volume(y), kernel_size=9),
    ),
}


@pytest.mark.parametrize("case", OF_IMAGES)
def test_losses_of_images_agree(case):
    """Within 1e-4 of the largest, because some packages have their weights in float32."""
    theirs, mine = OF_IMAGES[case]
    x = torch.rand(2, 3, 192, 176, dtype=torch.float64)
    y = x + 0.1 * torch.randn_like(x)
    for one, other in zip(
        value_and_gradient(mine, x, y), value_and_gradient(theirs, x, y), strict=True
    ):
        assert other.abs().max() > 0
        assert (one - other).abs().max() <= 1e-4 * other.abs().max()


def test_a_flat_bright_image():
    """Pixels of 250 and a data range of 1: squares have no digits left for the variance."""
    x, y = (250 + torch.randint(-2, 3, (2, 1, 1, 40, 40)) / 16).unbind()
    exact = ssim()(x.double(), y.double())
    assert abs(ssim()(x, y) - exact) < 1e-6
    assert abs(of_msssim("ssim")(x, y) - exact) > 1e-4
    assert abs(of_torchmetrics(x, y) - ssim(padding="reflect")(x.double(), y.double())) > 0.1


def test_the_ranges_that_are_guessed():
    """A default of 255, for images in [0, 1], makes any pair look alike."""
    x, y = torch.rand(2, 1, 1, 40, 40).unbind()
    assert peers.package("pytorch_msssim").ssim(x, y) > 0.99
    assert ssim()(x, y) < 0.2


def test_monai_and_voxelmorph():
    """The loss of one, and the other's formula: at pixels around 100 float32 loses the variance."""

    def sums(x):
        for dim in (2, 3):
            shape = [1, 1, 1, 1]
            shape[dim] = 9
            x = F.conv2d(x, x.new_ones(shape), padding=[4 * (size > 1) for size in shape[2:]])
        return x

    def voxelmorph(x, y):
        mean_x, mean_y = sums(x) / 81, sums(y) / 81
        cross = sums(x * y) - mean_y * sums(x) - mean_x * sums(y) + mean_x * mean_y * 81
        var_x = sums(x * x) - 2 * mean_x * sums(x) + mean_x * mean_x * 81
        var_y = sums(y * y) - 2 * mean_y * sums(y) + mean_y * mean_y * 81
        return -cross * cross / (var_x * var_y + 1e-5)

    x, y = (100 + torch.randint(-8, 9, (2, 1, 1, 30, 30)) / 1024).unbind()
    monai = of_monai(kernel_size=9, reduction="none")
    for theirs, smoothing in ((monai, "maximum"), (voxelmorph, "sum")):
        exact = theirs(x.double(), y.double())[..., 4:-4, 4:-4]
        mine, wrong = (
            loss[..., 4:-4, 4:-4]
            for loss in (
                ops.lncc_loss(x, y, kernel_size=9, smoothing=smoothing, reduction="none"),
                theirs(x, y),
            )
        )
        assert (mine - exact).abs().max() < 1e-6
        assert (wrong - exact).abs().max() > 0.1


# ---- losses of sequences and points --------------------------------------------------------------


@pytest.mark.parametrize("case", ["soft-DTW", "soft-DTW, unequal lengths", "soft-DTW of costs"])
def test_soft_dtw_agrees(case):
    """Within 1e-5 of the largest, where the rounding of pysdtw is small: short and smooth."""
    x, y = torch.randn(3, 40, 4), torch.randn(3, 30 if "unequal" in case else 40, 4)
    costs = {"dist_func": torch.cdist} if "costs" in case else {}
    theirs = peers.package("pysdtw").SoftDTW(2.0, use_cuda=False, **costs)

    def mine(x, y):
        return ops.soft_dtw_from_cost(torch.cdist(x, y), 2.0) if costs else ops.soft_dtw(x, y, 2.0)

    for one, other in zip(
        value_and_gradient(mine, x, y), value_and_gradient(theirs, x, y), strict=True
    ):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


def test_gradients_of_soft_dtw_in_float32():
    """float64 says who is right: pysdtw takes differences of large numbers over gamma."""
    x, y = torch.randn(2, 1, 512, 8).unbind()
    exact = value_and_gradient(lambda x, y: ops.soft_dtw(x, y, 0.01), x.double(), y.double())[1]

    def error(loss):
        return (value_and_gradient(loss, x, y)[1] - exact).abs().max() / exact.abs().max()

    assert error(lambda x, y: ops.soft_dtw(x, y, 0.01)) < 1e-4
    assert error(peers.pysdtw(0.01)) > 1e-3


@pytest.mark.parametrize("shape", [(300, 3), (50, 40)])
def test_nearest_neighbours_of_scipy(shape):
    x, y = torch.randn(2, 1, *shape, dtype=torch.float64).unbind()
    tree = peers.package("scipy.spatial").cKDTree(y[0].numpy())
    distances, indices = tree.query(x[0].numpy(), k=5)
    mine = ops.knn_points(x, y, K=5)
    assert mine.idx[0].tolist() == indices.tolist()
    torch.testing.assert_close(mine.dists[0].sqrt(), torch.from_numpy(distances))
