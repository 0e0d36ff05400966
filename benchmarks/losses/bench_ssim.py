"""SSIM, forward + backward, against tensor code, its compile, and other packages."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ops
from benchmarks.common import COMPILED, Kernel, devices
from benchmarks.losses import images, peers

SHAPES = ((2, 3, 128, 128), (8, 3, 512, 512))
SIZE, SIGMA, C1, C2 = 11, 1.5, 0.01**2, 0.03**2


class Separable(nn.Module):
    """The loss with depthwise convolutions, as packages write it."""

    def __init__(self) -> None:
        super().__init__()
        away = torch.arange(SIZE) - SIZE // 2
        weights = torch.exp(-away.square() / (2 * SIGMA**2))
        self.register_buffer("weights", weights / weights.sum())

    def means(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        row = self.weights.expand(channels, 1, 1, SIZE)
        return F.conv2d(F.conv2d(x, row.mT, groups=channels), row, groups=channels)

    def factors(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The mean similarity of each channel, and its part of variances and covariance."""
        mean_x, mean_y = self.means(x), self.means(y)
        var_x, var_y = self.means(x * x) - mean_x**2, self.means(y * y) - mean_y**2
        covariance = self.means(x * y) - mean_x * mean_y
        luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
        contrast = (2 * covariance + C2) / (var_x + var_y + C2)
        return (luminance * contrast).mean((2, 3)), contrast.mean((2, 3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return 1 - self.factors(x, y)[0].mean()


class Shifted(Separable):
    """The same with sums of shifted images, which torch.compile fuses."""

    def means(self, x: Tensor) -> Tensor:
        for dim in (2, 3):
            count = x.shape[dim] - SIZE + 1
            x = sum(self.weights[k] * x.narrow(dim, k, count) for k in range(SIZE))
        return x


def run() -> dict:
    return {
        COMPILED[device]: images.speed(
            "SSIM",
            SHAPES,
            ops.SSIMLoss(data_range=1.0),
            Separable(),
            Shifted(),
            peers.installed(pytorch_msssim=lambda: peers.pytorch_msssim("ssim")),
            device,
        )
        for device in devices()
    }


def kernels(device: str, dtype: torch.dtype) -> Iterator[Kernel]:
    """The value alone, and with the gradient of the first image."""
    for shape in SHAPES:
        x = torch.rand(shape, device=device)
        y = (x + 0.1 * torch.randn_like(x)).to(dtype)
        parameters = (1.0, SIZE, SIGMA, 0.01, 0.03, 0, 0.0, 1.0, False, True)
        forward = torch.ops.jitops.ssim_forward.default
        for title, needs, moved in (("value", False, 2), ("value and gradient", True, 3)):
            arguments = (x.to(dtype), y, *parameters, needs, False)
            yield Kernel(f"SSIM, {title}", shape, forward, arguments, moved * y.nbytes)
