"""The example that trains embeddings of digits."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits

import ops

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "metric_learning.py"


@pytest.mark.thorough
def test_training_brings_equal_digits_together():
    example = runpy.run_path(str(EXAMPLE))
    images, labels = (torch.from_numpy(x) for x in load_digits(return_X_y=True))
    images = images.float() / 16
    for name, loss in example["LOSSES"].items():
        recall = []
        for steps in (0, 150):
            torch.manual_seed(0)
            with ops.use_backend("compiled"):  # faster
                model = example["train"](loss, images, labels, steps)
            embeddings = torch.nn.functional.normalize(model(images)).detach()
            recall.append(example["recall_at_1"](embeddings, labels))
        assert recall[1] > recall[0] + 0.2, name
