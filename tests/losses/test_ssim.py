"""The structural similarity: its reference, the battery, and its own tests."""

from __future__ import annotations

import math

import pytest
import torch

import ops
from tests.harness.battery import Battery
from tests.harness.op_under_test import Mutation, OpUnderTest, applies, close
from tests.losses import windows


def similarity(x, y, data_range, window_size, sigma=1.5, padding="valid", k1=0.01, k2=0.03):
    """SSIM of each window, as the paper writes it."""
    weights = windows.gaussian(window_size, sigma)
    mean_x, mean_y, var_x, var_y, covariance = windows.moments(x, y, weights, padding)
    c1, c2 = (k1 * data_range) ** 2, (k2 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return luminance * (2 * covariance + c2) / (var_x + var_y + c2)


def reference(x, y, weight=1.0, reduction="mean", **keywords):
    pixels = tuple(range(2, x.dim()))
    loss = weight * (1 - similarity(x, y, **keywords).mean(pixels))
    loss = (loss + (1 - weight) * (x - y).abs().mean(pixels)).mean(1)
    return {"mean": loss.mean, "sum": loss.sum, "none": lambda: loss}[reduction]()


def operator_samples(device):
    x, y = windows.inputs((2, 2, 6, 5), torch.float32, device)
    for reduces in (True, False):
        parameters = (1.0, 3, 1.5, 0.01, 0.03, 2, 0.3, 0.7, False, reduces)
        forward = torch.ops.jitops.ssim_forward.default
        yield forward, (x, y, *parameters, True, False)
        result = forward(x, y, *parameters, False, False)[0]
        backward = torch.ops.jitops.ssim_backward.default
        yield backward, (torch.ones_like(result), x, y, *parameters, False, True)


SHAPES = ((2, 2, 17, 18), (1, 1, 6, 5, 7), (1, 1, 3, 4))
# Parts of a square of windows, several squares, several slices.
LAUNCHES = ((1, 1, 5, 6), (2, 1, 17, 18), (1, 1, 5, 5, 6))
VARIANTS = (
    {"data_range": 2.0, "window_size": 3},
    {"data_range": 1.0, "window_size": 5, "padding": "same", "weight": 0.3, "reduction": "sum"},
    {"data_range": 4.0, "window_size": 5, "sigma": 0.8, "padding": "reflect", "weight": 0.9,
     "reduction": "none"},
)  # fmt: skip


def description(name, call, reference, variants, **more):
    return OpUnderTest(
        name=name,
        source="ssim",
        call=call,
        reference=reference,
        names=("input", "target"),
        inputs=windows.inputs,
        shapes=SHAPES,
        variants=variants,
        edges=((0, 2, 5, 6), (2, 0, 5, 6), (1, 1, 5, 5)),
        large=(1, 2, 140, 20),
        operator_samples=operator_samples,
        launches=lambda dtype, device: (windows.inputs(one, dtype, device) for one in LAUNCHES),
        busy=lambda dtype, device: windows.inputs((4, 3, 256, 256), dtype, device),
        **more,
    )


LOSS = description(
    "ssim",
    ops.ssim_loss,
    reference,
    VARIANTS,
    module=lambda: ops.SSIMLoss(**VARIANTS[0]),
    mutations=(
        Mutation(
            "common/windows.cuh",
            "is_pixel = row < height.size && col < width.size;",
            "is_pixel = col < width.size;",
            "out of bounds|race in global memory",
        ),
        Mutation(
            "common/windows.cuh",
            "  __syncthreads();  // the sums are complete, and the tile has been read\n",
            "",
            "race in shared memory|read before it was written",
        ),
    ),
)
MAP = description(
    "ssim_map",
    ops.ssim_map,
    similarity,
    (VARIANTS[0], {"data_range": 1.0, "window_size": 5, "padding": "reflect"}),
    variation=True,
    mutations=(
        Mutation(
            "common/windows.cuh",
            "if (i < 0 || i >= height.windows || j < 0 || j >= width.windows) return sum;",
            "if (i < 0 || i >= height.windows || j < 0) return sum;",
            "out of bounds|never written",
        ),
    ),
)


class TestSSIM(Battery):
    op = LOSS

    def test_worked_by_hand(self, backend, device):
        """One window of one pixel has no variance, so the luminance is all."""
        x, y = torch.tensor([[[[0.5]]]], device=device), torch.tensor([[[[0.25]]]], device=device)
        value = ops.ssim(x, y, data_range=1.0, window_size=1)
        expected = (2 * 0.5 * 0.25 + 1e-4) / (0.5**2 + 0.25**2 + 1e-4)
        assert value.item() == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize("padding", ["valid", "same", "reflect"])
    def test_the_defaults(self, backend, device, padding):
        """The window of the paper, on images that are a little larger."""
        x, y = windows.inputs((2, 2, 13, 12), torch.float64, device)
        value = ops.ssim(x, y, data_range=1.0, padding=padding, reduction="none")
        expected = similarity(x, y, 1.0, 11, padding=padding).mean((1, 2, 3))
        close(value, expected, torch.float64)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, backend, device, dtype):
        """The value is that of float64, rounded once."""
        x, y = windows.inputs((2, 3, 24, 24), dtype, device)
        exact = ops.ssim(x.double(), y.double(), data_range=1.0)
        value = ops.ssim(x, y, data_range=1.0)
        assert value.dtype is dtype
        assert abs(value.double() - exact) <= torch.finfo(dtype).eps * exact.abs()
        loss = ops.ssim_loss(x, y, data_range=1.0)
        assert abs(loss.double() - (1 - exact)) <= torch.finfo(dtype).eps * (1 - exact).abs()

    @pytest.mark.parametrize("brightness", [250.0, 1e4, 1e6])
    def test_flat_bright_images(self, backend, device, brightness):
        """Their squares have lost the variance of 0.02 and less, in float32."""
        noise = torch.randint(-2, 3, (2, 1, 2, 15, 14), device=device) / 16
        x, y = (brightness + noise).unbind()
        x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
        assert x.dtype is torch.float32
        loss = ops.ssim_loss(x, y, data_range=1.0, window_size=5)
        a, b = (one.detach().double().requires_grad_() for one in (x, y))
        exact = reference(a, b, data_range=1.0, window_size=5)
        assert abs(loss - exact) < 1e-5 * exact
        for one, other in zip(
            torch.autograd.grad(loss, (x, y)), torch.autograd.grad(exact, (a, b)), strict=True
        ):
            assert (one - other).abs().max() < 1e-5 * other.abs().max()

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_flat_bright_images_with_a_bad_pixel(self, backend, device, value):
        """Windows without it lose no digits either."""
        noise = torch.randint(-2, 3, (2, 1, 1, 15, 14), device=device) / 16
        x, y = (250 + noise).unbind()
        expected = similarity(x.double(), y.double(), 1.0, 5)[..., 1:, :]
        x[0, 0, 0, 3] = value
        found = ops.ssim_map(x, y, data_range=1.0, window_size=5)[..., 1:, :]
        assert (found - expected).abs().max() < 1e-5

    @pytest.mark.parametrize("sigma", [1e-3, 1e-200, 1e-320])
    def test_a_narrow_window(self, backend, device, sigma):
        """It is the pixel in the middle alone."""
        x, y = windows.inputs((1, 1, 7, 7), torch.float64, device)
        found = ops.ssim_map(x, y, data_range=1.0, window_size=3, sigma=sigma, padding="same")
        expected = ops.ssim_map(x, y, data_range=1.0, window_size=1)
        close(found, expected, torch.float64)

    def test_images_that_are_almost_alike(self, backend, device):
        """1 - SSIM keeps its digits, far below the rounding of 1."""
        x = torch.rand(1, 1, 20, 20, device=device)
        y = x + 2.0**-14 * (torch.rand_like(x) - 0.5)
        loss = ops.ssim_loss(x, y, data_range=1.0)
        exact = 1 - similarity(x.double(), y.double(), 1.0, 11).mean()
        assert 0 < exact < 1e-6
        assert abs(loss - exact) < 1e-4 * exact

    @pytest.mark.parametrize("value", [0.0, 0.3, 1.0, 200.0])
    def test_constant_images(self, backend, device, value):
        """Equal ones have SSIM 1 and no gradient; different ones have the luminance alone."""
        x = torch.full((1, 2, 12, 13), value, device=device, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        alike = ops.ssim(x, y, data_range=1.0, window_size=5)
        assert alike.item() == 1.0
        for gradient in torch.autograd.grad(alike, (x, y)):
            assert gradient.abs().max() < 1e-6
        other = ops.ssim(x, y + 1, data_range=1.0, window_size=5)
        expected = (2 * value * (value + 1) + 1e-4) / (value**2 + (value + 1) ** 2 + 1e-4)
        assert other.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)

    def test_never_above_one(self, backend, device):
        """Rounding makes no variance negative."""
        x = 1 + 1e-3 * torch.rand(4, 1, 16, 16, device=device)
        y = x + 1e-7 * torch.rand_like(x)
        for size in (3, 11):
            assert ops.ssim_map(x, y, data_range=1.0, window_size=size).max() <= 1
        assert ops.ssim_loss(x, y, data_range=1.0) >= 0

    def test_nan_stays_in_its_windows(self, backend, device):
        x, y = windows.inputs((2, 1, 12, 12), torch.float32, device)
        x[0, 0, 2, 3] = torch.nan
        found = ops.ssim_map(x, y, data_range=1.0, window_size=5).isnan()
        expected = torch.zeros_like(found)
        expected[0, 0, :3, :4] = True
        assert torch.equal(found, expected)
        values = ops.ssim(x, y, data_range=1.0, window_size=5, reduction="none")
        assert values.isnan().tolist() == [True, False]

    def test_the_mean_of_the_map(self, backend, device):
        x, y = windows.inputs((2, 3, 9, 10), torch.float64, device)
        for padding in ("valid", "same", "reflect"):
            keywords = {"data_range": 2.0, "window_size": 5, "padding": padding}
            expected = ops.ssim_map(x, y, **keywords).mean()
            close(ops.ssim(x, y, **keywords), expected, torch.float64)

    @applies(lambda op, backend: backend != "cuda-emulated")  # which has no bands
    def test_several_bands(self, backend, device):
        """Rows that several threads share, and blocks of planes, are as if alone."""
        x, y = windows.inputs((3, 4, 150, 37), torch.float64, device)
        x.requires_grad_()
        for padding in ("valid", "same", "reflect"):
            loss = ops.ssim_loss(x, y, data_range=1.0, padding=padding, reduction="none")
            (gradient,) = torch.autograd.grad(loss.sum(), x)
            for place in (0, 2):
                a, b = x[place : place + 1].detach().requires_grad_(), y[place : place + 1]
                one = ops.ssim_loss(a, b, data_range=1.0, padding=padding)
                close(loss[place], one, torch.float64)
                close(gradient[place], torch.autograd.grad(one, a)[0][0], torch.float64)

    def test_only_l1(self, backend, device):
        """With weight 0 no window counts, not even one that is infinite."""
        x = torch.tensor([[[[1.0, 1e30], [2.0, 3.0]]]], device=device, requires_grad=True)
        y = torch.tensor([[[[1.0, 0.0], [4.0, 2.0]]]], device=device)
        keywords = {"data_range": 1.0, "weight": 0.0, "window_size": 3, "padding": "same"}
        loss = ops.ssim_loss(x, y, **keywords)
        assert loss.item() == pytest.approx(1e30 / 4)


class TestMap(Battery):
    op = MAP


def pair(*shape):
    return torch.rand(2, *shape).unbind()


@pytest.mark.parametrize(
    ("shape", "keywords", "error", "text"),
    [
        ((1, 1, 9, 9), {"data_range": None}, ops.ArgumentTypeError,
         "data_range must be the largest minus the smallest value that pixels can have, such as "
         "1.0 or 255, got None"),
        ((1, 1, 9, 9), {"data_range": 0}, ops.ArgumentError,
         "data_range must be a finite number greater than 0, got 0"),
        ((1, 1, 9, 9), {"data_range": math.inf}, ops.ArgumentError, "data_range must be a finite"),
        ((1, 1, 9, 9), {"window_size": 4}, ops.ArgumentError,
         "window_size must be an odd number from 1 to 51, got 4"),
        ((1, 1, 9, 9), {"window_size": 53}, ops.ArgumentError, "window_size must be an odd"),
        ((1, 1, 9, 9), {"window_size": 3.0}, ops.ArgumentTypeError, "window_size must be an int"),
        ((1, 1, 9, 9), {"sigma": 0}, ops.ArgumentError, "sigma must be a finite number greater"),
        ((1, 1, 9, 9), {"k1": 1e155}, ops.ArgumentError, "k1 times data_range must have a finite"),
        ((1, 1, 9, 9), {"k2": 1e200}, ops.ArgumentError, "k2 times data_range must have a finite"),
        ((1, 1, 9, 9), {"k1": -1}, ops.ArgumentError, "k1 must be a finite number of at least 0"),
        ((1, 1, 9, 9), {"weight": 1.5}, ops.ArgumentError, "weight must be a number from 0 to 1"),
        ((1, 1, 9, 9), {"padding": "zeros"}, ops.ArgumentError,
         "padding must be one of valid, same, reflect, got 'zeros'"),
        ((1, 1, 9, 9), {"reduction": "avg"}, ops.ArgumentError, "reduction must be one of none"),
        ((1, 9, 9), {}, ops.ArgumentError,
         r"input must have shape \(B, C, H, W\) or \(B, C, D, H, W\), got \[1, 9, 9\]"),
        ((1, 1, 8, 20), {"window_size": 11}, ops.ArgumentError,
         r"input must have at least 11 pixels along each dimension \(window_size with padding "
         r"'valid'\), got \[8, 20\]"),
        ((1, 1, 5, 20), {"window_size": 11, "padding": "reflect"}, ops.ArgumentError,
         r"input must have at least 6 pixels along each dimension"),
        ((1, 1, 0, 3), {"padding": "same"}, ops.ArgumentError, "input must have at least 1 pixels"),
    ],
)  # fmt: skip
def test_bad_input(backend, device, shape, keywords, error, text):
    x, y = (one.to(device) for one in pair(*shape))
    with pytest.raises(error, match=text):
        ops.ssim_loss(x, y, **({"data_range": 1.0, "window_size": 3} | keywords))


@pytest.mark.parametrize(
    ("target", "error", "text"),
    [
        (torch.rand(1, 1, 9, 8), ops.ArgumentError,
         r"target must have input's shape \[1, 1, 9, 9\], got \[1, 1, 9, 8\]"),
        (torch.rand(1, 1, 9, 9).double(), ops.ArgumentTypeError, "target must have input's dtype"),
        (torch.ones(1, 1, 9, 9).byte(), ops.ArgumentTypeError, "target must have dtype float64"),
        ([1], ops.ArgumentTypeError, "target must be a torch.Tensor, got list"),
    ],
)  # fmt: skip
def test_bad_target(target, error, text):
    with pytest.raises(error, match=text):
        ops.ssim(torch.rand(1, 1, 9, 9), target, data_range=1.0, window_size=3)


def test_module():
    loss = ops.SSIMLoss(data_range=1.0, weight=0.2, padding="same")
    x, y = pair(2, 3, 12, 12)
    assert torch.equal(loss(x, y), ops.ssim_loss(x, y, data_range=1.0, weight=0.2, padding="same"))
    assert repr(loss) == (
        "SSIMLoss(data_range=1.0, weight=0.2, window_size=11, sigma=1.5, k1=0.01, k2=0.03, "
        "padding='same', reduction='mean')"
    )
    with pytest.raises(ops.ArgumentTypeError, match="data_range must be the largest"):
        ops.SSIMLoss()
