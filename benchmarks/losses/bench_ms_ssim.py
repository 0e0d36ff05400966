"""MS-SSIM, forward + backward, against tensor code, its compile, and other packages."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

import ops
from benchmarks.common import COMPILED, devices
from benchmarks.losses import images, peers
from benchmarks.losses.bench_ssim import Separable, Shifted

SHAPES = ((2, 3, 192, 192), (8, 3, 512, 512))
WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


class Scales(Separable):
    """The loss as packages write it."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        product = 1.0
        for scale, weight in enumerate(WEIGHTS):
            similarity, contrast = self.factors(x, y)
            last = scale == len(WEIGHTS) - 1
            product = product * (similarity if last else contrast).relu() ** weight
            if not last:
                x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        return 1 - product.mean()


class ShiftedScales(Scales, Shifted):
    """The same with sums of shifted images, which torch.compile fuses."""


def run() -> dict:
    return {
        COMPILED[device]: images.speed(
            "MS-SSIM",
            SHAPES,
            ops.MSSSIMLoss(data_range=1.0),
            Scales(),
            ShiftedScales(),
            peers.installed(pytorch_msssim=lambda: peers.pytorch_msssim("ms_ssim")),
            device,
        )
        for device in devices()
    }
