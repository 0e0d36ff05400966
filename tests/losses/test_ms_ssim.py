"""The multi-scale structural similarity: its reference, the battery, and its own tests."""

from __future__ import annotations

import pytest
import torch

import ops
from tests.harness.battery import Battery
from tests.harness.op_under_test import OpUnderTest, close
from tests.losses import windows


def halved(image):
    """The mean of 2 x 2 pixels, or of those that are left, from an image of their number."""
    total, count = image, torch.ones_like(image[:1, :1]).detach()
    for dim in range(2, image.dim()):
        if image.shape[dim] % 2:
            zero = (total.narrow(dim, 0, 1) * 0).nan_to_num(), count.narrow(dim, 0, 1) * 0
            total, count = (torch.cat(both, dim) for both in zip((total, count), zero, strict=True))
        places = torch.arange(0, total.shape[dim], 2, device=image.device)
        total, count = (
            one.index_select(dim, places) + one.index_select(dim, places + 1)
            for one in (total, count)
        )
    return total / count


def reference(x, y, data_range, weights, window_size=11, sigma=1.5, reduction="mean"):
    pixels = tuple(range(2, x.dim()))
    value = 1.0
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    for scale, weight in enumerate(weights):
        if scale:
            x, y = halved(x), halved(y)
        taps = windows.gaussian(window_size, sigma)
        mean_x, mean_y, var_x, var_y, covariance = windows.moments(x, y, taps, "valid")
        factor = (2 * covariance + c2) / (var_x + var_y + c2)
        if scale == len(weights) - 1:
            factor = factor * (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
        mean = factor.mean(pixels)
        value = value * torch.where(mean <= 0, 0.0, mean.clamp(min=1e-300) ** weight)
    value = value.mean(1)
    return {"mean": value.mean, "sum": value.sum, "none": lambda: value}[reduction]()


def inputs(shape, dtype, device):
    x, y = windows.inputs(shape, dtype, "cpu")
    return [x.to(device), (0.9 * x.double() + 0.1 * y.double()).to(dtype).to(device)]


OP = OpUnderTest(
    name="ms_ssim",
    call=ops.ms_ssim,
    reference=reference,
    names=("input", "target"),
    inputs=inputs,
    shapes=((2, 2, 19, 22), (1, 1, 5, 6, 7), (1, 1, 5, 6)),
    variants=(
        {"data_range": 2.0, "window_size": 3, "weights": (0.4, 0.6)},
        {"data_range": 2.0, "window_size": 3, "weights": (0.3, 1.2), "reduction": "none"},
    ),
    edges=((0, 2, 5, 6), (2, 0, 5, 6), (1, 1, 5, 5)),
    large=(1, 2, 140, 20),
    module=lambda: ops.MSSSIMLoss(data_range=2.0, window_size=3, weights=(0.4, 0.6)),
    variation=True,
)


class TestMSSSIM(Battery):
    op = OP
    backends = ("torch", "cpp")

    def test_the_defaults(self, backend, device):
        """Five scales of the smallest image, whose sizes are odd at each scale."""
        x, y = inputs((1, 2, 161, 165), torch.float64, device)
        value = ops.ms_ssim(x, y, data_range=1.0)
        weights = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
        close(value, reference(x, y, 1.0, weights), torch.float64)
        with pytest.raises(ops.ArgumentError, match=r"at least 161 pixels along each dimension, "
                           r"for 5 weights and a window_size of 11, got \[160, 165\]"):  # fmt: skip
            ops.ms_ssim(x[..., 1:, :], y[..., 1:, :], data_range=1.0)

    def test_negative_contrast(self, backend, device):
        """A channel whose mean is negative is 0 and has no gradient, in any order."""
        x = torch.rand(1, 2, 12, 12, dtype=torch.float64, device=device)
        y = torch.cat([1 - x[:, :1], x[:, 1:] + 0.1], 1)
        x.requires_grad_()
        value = ops.ms_ssim(x, y, data_range=1.0, window_size=3, weights=(0.4, 0.6))
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        assert 0 < value < 0.5
        assert not gradient[:, 0].any()
        assert gradient[:, 1].any()
        (second,) = torch.autograd.grad(gradient.square().sum(), x)
        assert not second[:, 0].any()
        assert second.isfinite().all()

    def test_equal_images(self, backend, device):
        x = torch.rand(2, 3, 20, 20, device=device, requires_grad=True)
        value = ops.ms_ssim(x, x.detach(), data_range=1.0, window_size=3, weights=(0.4, 0.6))
        assert value.item() == 1.0
        assert torch.autograd.grad(value, x)[0].abs().max() < 1e-6

    @pytest.mark.parametrize("shape", [(2, 1, 1, 6), (2, 1, 5, 2), (1, 2, 3, 1, 4)])
    def test_scales_of_one_pixel(self, backend, device, shape):
        """A window of one pixel fits them."""
        x, y = inputs(shape, torch.float64, device)
        weights = (0.0, 0.0, 0.7)
        value = ops.ms_ssim(x, y, data_range=1.0, window_size=1, weights=weights)
        for _ in range(2):
            for dim in range(2, x.dim()):
                x, y = (
                    torch.cat([part.mean(dim, keepdim=True) for part in one.split(2, dim)], dim)
                    for one in (x, y)
                )
        similarity = (2 * x * y + 1e-4) / (x * x + y * y + 1e-4)
        expected = similarity.mean(tuple(range(2, x.dim()))).clamp(min=0) ** 0.7
        close(value, expected.mean(), torch.float64)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_the_loss_in_half_precision(self, backend, device, dtype):
        """It is that of float64, rounded once. 1 minus a rounded similarity has lost its digits."""
        x = torch.rand(2, 1, 12, 12, device=device).to(dtype)
        y = (x.float() + 0.02 * torch.rand(2, 1, 12, 12, device=device)).to(dtype)
        loss = ops.MSSSIMLoss(data_range=1.0, window_size=3, weights=(0.4, 0.6))
        exact, value = loss(x.double(), y.double()), loss(x, y)
        assert 0 < exact < 0.02
        assert value.dtype is dtype
        assert abs(value.double() - exact) <= torch.finfo(dtype).eps * exact

    def test_nan_stays(self, backend, device):
        x, y = inputs((2, 1, 9, 9), torch.float32, device)
        x[1, 0, 0, 0] = torch.nan
        keywords = {"data_range": 1.0, "window_size": 3, "weights": (0.4, 0.6)}
        values = ops.ms_ssim(x, y, reduction="none", **keywords)
        assert values.isnan().tolist() == [False, True]


@pytest.mark.parametrize(
    ("keywords", "error", "text"),
    [
        ({"weights": 0.5}, ops.ArgumentTypeError, "weights must be a list of numbers, one for"),
        ({"weights": ()}, ops.ArgumentError, "weights must be one finite number of at least 0"),
        ({"weights": (0.5, -1)}, ops.ArgumentError, r"for each scale, got \[0.5, -1.0\]"),
        ({"data_range": None}, ops.ArgumentTypeError, "data_range must be the largest minus the"),
        ({"reduction": "avg"}, ops.ArgumentError, "reduction must be one of none, mean, sum"),
    ],
)
def test_bad_input(keywords, error, text):
    x = torch.rand(1, 1, 9, 9)
    with pytest.raises(error, match=text):
        ops.ms_ssim(x, x, **({"data_range": 1.0, "window_size": 3, "weights": (1.0,)} | keywords))


def test_module():
    loss = ops.MSSSIMLoss(data_range=1, weights=(0.5, 0.5), window_size=3, reduction="sum")
    x, y = torch.rand(2, 2, 3, 12, 12).unbind()
    values = ops.ms_ssim(x, y, data_range=1.0, weights=(0.5, 0.5), window_size=3, reduction="none")
    assert torch.equal(loss(x, y), (1 - values).sum())
    loss.reduction = "none"
    assert torch.equal(loss(x, y), 1 - values)
    loss.reduction = "sum"
    assert repr(loss) == (
        "MSSSIMLoss(data_range=1.0, weights=(0.5, 0.5), window_size=3, sigma=1.5, k1=0.01, "
        "k2=0.03, reduction='sum')"
    )
