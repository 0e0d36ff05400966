"""Naive losses of local windows: each window is cut out, and its moments are central ones."""

from __future__ import annotations

import torch


def gaussian(size, sigma):
    away = torch.arange(size, dtype=torch.float64) - size // 2
    weights = torch.exp(-away.square() / (2 * sigma**2))
    return weights / weights.sum()


def padded(image, size, padding):
    """The images with a border, by a list of indices."""
    if padding == "valid":
        return image
    for dim in range(2, image.dim()):
        count, pad = image.shape[dim], size // 2
        places = list(range(-pad, count + pad))
        if padding == "reflect":
            places = [-i if i < 0 else 2 * (count - 1) - i if i >= count else i for i in places]
            image = image.index_select(dim, torch.tensor(places, device=image.device))
        else:
            zeros = torch.zeros_like(image.narrow(dim, 0, 1))
            image = torch.cat([zeros] * pad + [image] + [zeros] * pad, dim)
    return image


def moments(x, y, weights, padding):
    """Means, variances and the covariance of all windows."""
    dims = x.dim() - 2
    size = len(weights)
    cut = [padded(one, size, padding) for one in (x, y)]
    for dim in range(2, x.dim()):
        cut = [one.unfold(dim, size, 1) for one in cut]
    weight = weights.to(x)
    for _ in range(dims - 1):
        weight = weight[..., None] * weights.to(x)
    within = tuple(range(-dims, 0))

    def mean(values):
        return (weight * values).sum(within)

    means = [mean(one) for one in cut]
    away = [one - m.reshape(*m.shape, *[1] * dims) for one, m in zip(cut, means, strict=True)]
    return *means, mean(away[0] ** 2), mean(away[1] ** 2), mean(away[0] * away[1])


def inputs(shape, dtype, device):
    x = torch.randn(shape, dtype=torch.float64)
    y = 0.8 * x + 0.4 * torch.randn(shape, dtype=torch.float64)
    return [x.to(dtype).to(device), y.to(dtype).to(device)]
