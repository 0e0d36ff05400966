"""A loss made of tensor functions: autograd computes its gradient.

The focal loss is the mean of -q (1 - p)^gamma log p - (1 - q) p^gamma log(1 - p). p is the sigmoid
of the logits and q the target. T.-Y. Lin et al., "Focal Loss for Dense Object Detection", ICCV
2017.
"""

import torch.nn.functional as F


def focal_loss(logits, target, gamma=2.0):
    p = logits.sigmoid()
    of_ones = target * (1 - p) ** gamma * F.logsigmoid(logits)
    of_zeros = (1 - target) * p**gamma * F.logsigmoid(-logits)
    return -(of_ones + of_zeros).mean()
