"""The local normalised cross-correlation: its reference, the battery, and its own tests."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import ops
from tests.harness.battery import Battery
from tests.harness.op_under_test import Mutation, OpUnderTest, applies, close
from tests.losses import windows


def weights_of(kernel_type, size):
    """MONAI's weights along one dimension, which are not scaled."""
    if kernel_type == "gaussian":
        away = torch.arange(size, dtype=torch.float64) - size // 2
        return torch.exp(-away.square() / (2 * (size / 3) ** 2))
    if kernel_type == "triangular":
        half = (size + 1) // 2
        half -= half % 2 == 0
        box = torch.full((half,), 1.0 / half, dtype=torch.float64)
        triangle = torch.nn.functional.conv1d(
            box[None, None], box[None, None], padding=half - 1
        ).flatten()
        return triangle
    return torch.ones(size, dtype=torch.float64)


def reference(x, y, kernel_size=3, kernel_type="rectangular", smooth_nr=0.0, smooth_dr=1e-5,
              smoothing="maximum", reduction="mean"):  # fmt: skip
    weights = weights_of(kernel_type, kernel_size)
    volume = weights.sum() ** (x.dim() - 2)
    moments = windows.moments(x, y, weights / weights.sum(), "same")
    var_x, var_y, covariance = (volume * one for one in moments[2:])
    if smoothing == "maximum":
        below = var_x.clamp(min=smooth_dr) * var_y.clamp(min=smooth_dr)
    else:
        below = var_x * var_y + smooth_dr
    loss = -(covariance**2 + smooth_nr) / below
    return {"mean": loss.mean, "sum": loss.sum, "none": lambda: loss}[reduction]()


def by_pooling(x, y, kernel_size, smooth_dr):
    """The loss of each window of equal weights, in float64."""
    pool = (torch.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[x.dim() - 3]
    volume = kernel_size ** (x.dim() - 2)

    def mean(values):
        return pool(F.pad(values, [kernel_size // 2] * 2 * (x.dim() - 2)), kernel_size, 1)

    mean_x, mean_y = mean(x), mean(y)
    cross = volume * (mean(x * y) - mean_x * mean_y)
    var_x, var_y = (volume * (mean(one**2) - mean(one) ** 2) for one in (x, y))
    return -(cross**2) / (var_x.clamp(min=smooth_dr) * var_y.clamp(min=smooth_dr))


def operator_samples(device):
    x, y = windows.inputs((2, 2, 6, 5), torch.float32, device)
    for reduces in (True, False):
        parameters = (1, 3, 1.0, 9.0, 0.0, 1e-5, False, reduces)
        forward = torch.ops.jitops.lncc_loss_forward.default
        yield forward, (x, y, *parameters, True, False)
        result = forward(x, y, *parameters, False, False)[0]
        backward = torch.ops.jitops.lncc_loss_backward.default
        yield backward, (torch.ones_like(result), x, y, *parameters, False, True)


# Parts of a square of windows, several squares, several slices, a line.
LAUNCHES = ((1, 1, 5, 6), (2, 1, 17, 18), (1, 1, 5, 5, 6), (2, 1, 19))
OP = OpUnderTest(
    name="lncc_loss",
    source="lncc_loss",
    call=ops.lncc_loss,
    reference=reference,
    names=("input", "target"),
    inputs=windows.inputs,
    shapes=((2, 2, 9), (1, 1, 17, 18), (1, 1, 5, 6, 7), (1, 1, 3, 4)),
    variants=(
        {"kernel_size": 5, "smooth_dr": 0.5},
        {"kernel_type": "gaussian", "smooth_nr": 0.1, "smooth_dr": 0.1, "smoothing": "sum",
         "reduction": "sum"},
        {"kernel_size": 7, "kernel_type": "triangular", "smooth_dr": 0.3, "reduction": "none"},
    ),
    edges=((0, 2, 3, 4), (2, 0, 3, 4), (1, 1, 1), (1, 1, 1, 2, 1)),
    large=(1, 2, 140, 20),
    module=lambda: ops.LNCCLoss(kernel_size=5, smooth_dr=0.5),
    operator_samples=operator_samples,
    launches=lambda dtype, device: (windows.inputs(one, dtype, device) for one in LAUNCHES),
    busy=lambda dtype, device: windows.inputs((2, 1, 64, 64, 64), dtype, device),
    mutations=(
        Mutation(
            "common/windows.cuh",
            "if (d < 0 || d >= depth.windows) continue;",
            "if (d >= depth.windows) continue;",
            "out of bounds|never written|an access .* from its begin",  # by the order of threads
        ),
    ),
)  # fmt: skip


class TestLNCC(Battery):
    op = OP

    @applies(lambda op, backend: backend != "cuda-emulated")  # slow, and much like the variants
    @pytest.mark.parametrize("shape", [(2, 1, 30), (1, 2, 20, 17), (1, 1, 12, 11, 13)])
    @pytest.mark.parametrize("kernel_size", [1, 3, 9, 11])
    @pytest.mark.parametrize("kernel_type", ["rectangular", "triangular", "gaussian"])
    def test_windows_of_any_size(self, backend, device, shape, kernel_size, kernel_type):
        x, y = windows.inputs(shape, torch.float64, device)
        keywords = {"kernel_size": kernel_size, "kernel_type": kernel_type, "smooth_dr": 0.1}
        x.requires_grad_()
        loss, expected = ops.lncc_loss(x, y, **keywords), reference(x, y, **keywords)
        close(loss, expected, torch.float64)
        close(torch.autograd.grad(loss, x)[0], torch.autograd.grad(expected, x)[0], torch.float64)

    @applies(lambda op, backend: backend != "cuda-emulated")  # slow: the windows are large
    @pytest.mark.parametrize(
        ("shape", "kernel_size"),
        [((1, 1, 1100), 21), ((1, 2, 150, 9), 13), ((1, 1, 20, 9, 11), 9), ((1, 1, 11, 10, 5), 21)],
    )
    def test_large_boxes(self, backend, device, shape, kernel_size):
        """Windows that share their sums, in parts of a row, several bands, groups of slices."""
        x, y = windows.inputs(shape, torch.float64, device)
        x.requires_grad_(), y.requires_grad_()
        loss = ops.lncc_loss(x, y, kernel_size=kernel_size, smooth_dr=0.1)
        expected = by_pooling(x, y, kernel_size, 0.1).mean()
        close(loss, expected, torch.float64)
        for one, other in zip(
            torch.autograd.grad(loss, (x, y)), torch.autograd.grad(expected, (x, y)), strict=True
        ):
            close(one, other, torch.float64)

    @applies(lambda op, backend: backend != "cuda-emulated")  # slow: the row is long
    @pytest.mark.parametrize("kernel_size", [9, 51])
    def test_a_long_bright_row(self, backend, device, kernel_size):
        """No error grows along the row, and a huge pixel spoils its own windows alone."""
        noise = torch.randint(-8, 9, (2, 1, 1, 4000), device=device) / 64
        x, y = (1e4 + noise).unbind()
        x[..., 5] = 1e6
        half = kernel_size // 2
        x.requires_grad_()
        loss = ops.lncc_loss(x, y, kernel_size=kernel_size, reduction="none")
        loss = loss[..., 6 + half : -half]
        near = x.detach().double().sub(1e4).requires_grad_()
        expected = by_pooling(near, y.double() - 1e4, kernel_size, 1e-5)[..., 6 + half : -half]
        assert (loss - expected).abs().max() < 1e-6
        close(
            torch.autograd.grad(loss.sum(), x)[0],
            torch.autograd.grad(expected.sum(), near)[0],
            torch.float32,
        )

    def test_a_linear_function(self, backend, device):
        """Then the loss is -1, inside the image."""
        x = torch.rand(1, 1, 9, 9, device=device)
        loss = ops.lncc_loss(x, 3 - 2 * x, smooth_dr=1e-9, reduction="none")
        close(loss[..., 1:-1, 1:-1], torch.full_like(loss[..., 1:-1, 1:-1], -1.0), torch.float32)

    def test_flat_parts_have_no_correlation(self, backend, device):
        """The rounding of squares in float32 would be divided by the same rounding."""
        x, y = torch.full((2, 1, 1, 8, 12), 0.3, device=device).unbind()
        x, y = x.clone(), y + 0.4
        x[..., 6:], y[..., 6:] = torch.rand(2, 1, 1, 8, 6, device=device).unbind()
        x.requires_grad_()
        loss = ops.lncc_loss(x, y, kernel_size=3, reduction="none")
        assert loss[..., 1:-1, 1:5].abs().max() < 1e-12
        (gradient,) = torch.autograd.grad(loss[..., 1:-1, 1:5].sum(), x)
        assert gradient.abs().max() < 1e-6

    @pytest.mark.parametrize("far", [1e2, 1e4])
    def test_images_far_from_zero(self, backend, device, far):
        noise = torch.randint(-8, 9, (2, 1, 1, 12, 12), device=device) / 64
        x, y = (far + noise).unbind()
        x.requires_grad_()
        loss = ops.lncc_loss(x, y, kernel_size=5, reduction="none")[..., 2:-2, 2:-2].mean()
        z = x.detach().double().requires_grad_()
        exact = reference(z, y.double(), kernel_size=5, reduction="none")[..., 2:-2, 2:-2].mean()
        close(loss, exact, torch.float32)
        close(torch.autograd.grad(loss, x)[0], torch.autograd.grad(exact, z)[0], torch.float32)

    def test_nan_stays_in_its_windows(self, backend, device):
        x, y = windows.inputs((1, 1, 9, 9), torch.float32, device)
        x[0, 0, 2, 3] = torch.nan
        found = ops.lncc_loss(x, y, kernel_size=5, reduction="none").isnan()
        expected = torch.zeros_like(found)
        expected[..., :5, 1:6] = True
        assert torch.equal(found, expected)

    def test_infinite_pixels_leave_no_trace(self, backend, device):
        """A window beside a huge pixel is as if the pixel were not there: nothing is subtracted."""
        x, y = windows.inputs((1, 1, 4, 12), torch.float32, device)
        plain = ops.lncc_loss(x, y, kernel_size=3, reduction="none")
        x[0, 0, 1, 2] = 1e3
        other = ops.lncc_loss(x, y, kernel_size=3, reduction="none")
        close(other[..., 4:], plain[..., 4:], torch.float32)


@pytest.mark.parametrize(
    ("keywords", "error", "text"),
    [
        ({"kernel_size": 4}, ops.ArgumentError,
         "kernel_size must be an odd number from 1 to 51, got 4"),
        ({"kernel_type": "box"}, ops.ArgumentError,
         "kernel_type must be one of gaussian, rectangular, triangular, got 'box'"),
        ({"smooth_nr": -1}, ops.ArgumentError, "smooth_nr must be a finite number of at least 0"),
        ({"smooth_dr": "x"}, ops.ArgumentTypeError, "smooth_dr must be a real number, got str"),
        ({"smoothing": "max"}, ops.ArgumentError, "smoothing must be one of maximum, sum"),
        ({"reduction": "avg"}, ops.ArgumentError, "reduction must be one of none, mean, sum"),
    ],
)  # fmt: skip
def test_bad_input(keywords, error, text):
    x = torch.rand(1, 1, 9, 9)
    with pytest.raises(error, match=text):
        ops.lncc_loss(x, x, **keywords)


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((9, 9), r"input must have shape \(B, C, W\) or \(B, C, H, W\) or \(B, C, D, H, W\)"),
        ((1, 1, 0, 9), "input must have at least 1 pixels along each dimension"),
    ],
)
def test_bad_shapes(shape, text):
    with pytest.raises(ops.ArgumentError, match=text):
        ops.lncc_loss(torch.rand(shape), torch.rand(shape))


def test_module():
    loss = ops.LNCCLoss(kernel_size=9, kernel_type="gaussian", smoothing="sum")
    x, y = torch.rand(2, 1, 1, 12, 12).unbind()
    expected = ops.lncc_loss(x, y, kernel_size=9, kernel_type="gaussian", smoothing="sum")
    assert torch.equal(loss(x, y), expected)
    assert repr(loss) == (
        "LNCCLoss(kernel_size=9, kernel_type='gaussian', smooth_nr=0.0, smooth_dr=1e-05, "
        "smoothing='sum', reduction='mean')"
    )
