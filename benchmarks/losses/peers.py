"""Losses of other packages as functions of two tensors. The extra ``peers`` has them."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]


def package(name: str) -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def installed(**losses: Callable[[], Loss]) -> dict[str, Loss]:
    """The losses of the packages that are installed, by the name of the package."""
    return {name: make() for name, make in losses.items() if importlib.util.find_spec(name)}


def pytorch_metric_learning(
    name: str, miner: str | None = None, of_miner: dict[str, Any] | None = None, **parameters: Any
) -> Loss:
    losses, miners = (package(f"pytorch_metric_learning.{one}") for one in ("losses", "miners"))
    loss = getattr(losses, name)(**parameters)
    if miner is None:
        return loss
    mine = getattr(miners, miner)(**(of_miner or {}))
    return lambda x, labels: loss(x, labels, mine(x, labels))


class Identity(nn.Module):
    """A model whose embeddings are its features."""

    similarity_fn_name = None

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features["x"]}


def sentence_transformers(name: str, **parameters: Any) -> Loss:
    loss = getattr(package("sentence_transformers.losses"), name)(Identity(), **parameters)
    return lambda x, labels: loss([{"x": x}], labels)


def online_triplet_loss(name: str, margin: float) -> Loss:
    function = getattr(package("online_triplet_loss.losses"), name)

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        result = function(labels, x, margin)
        return result[0] if isinstance(result, tuple) else result

    return loss


def pytorch_msssim(name: str) -> Loss:
    similarity = getattr(package("pytorch_msssim"), name)
    return lambda x, y: 1 - similarity(x, y, data_range=1.0)


def monai_lncc(kernel_size: int) -> Loss:
    make = package("monai.losses").LocalNormalizedCrossCorrelationLoss
    return make(spatial_dims=3, kernel_size=kernel_size)


def pysdtw(gamma: float) -> Loss:
    return package("pysdtw").SoftDTW(gamma, use_cuda=False)


def tslearn(gamma: float) -> Loss:
    return package("tslearn.metrics").SoftDTWLossPyTorch(gamma)
