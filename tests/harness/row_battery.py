"""The battery of ops of rows: :class:`Battery`, and what inputs alike can do besides."""

from __future__ import annotations

import torch

from tests.harness.battery import Battery
from tests.harness.op_under_test import close, leaves


class RowBattery(Battery):
    """For ops along the last dimension, whose inputs are alike and broadcast together."""

    def test_broadcasting(self, backend, device):
        wide, keywords = self.inputs(device, shape=(3, 4, 5)), self.op.variants[0]
        for narrow_shape in ((5,), (4, 5), (3, 1, 5), (1, 1, 1)):
            for place in range(len(wide)):
                inputs = list(wide)
                inputs[place] = self.inputs(device, shape=narrow_shape)[place]
                self.agree(inputs, keywords)

    def test_permuted_dimensions(self, backend, device):
        inputs = self.inputs(device, shape=(3, 4, 5))
        self.agree(
            [t.permute(1, 0, 2).contiguous().permute(1, 0, 2) for t in inputs],
            {**self.op.variants[0]},
        )

    def test_same_tensor_twice(self, backend, device):
        x, _, *rest = self.inputs(device)
        keywords = self.op.variants[0]
        mine, other = leaves([x, *rest]), leaves([x, *rest])
        self.op.call(mine[0], mine[0], *mine[1:], **keywords).sum().backward()
        self.op.reference(other[0], other[0], *other[1:], **keywords).sum().backward()
        close(mine[0].grad, other[0].grad, torch.float64)
