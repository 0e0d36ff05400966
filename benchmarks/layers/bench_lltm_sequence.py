"""A sequence of the LLTM against its cell in a loop, which torch.compile compiles for minutes."""

from __future__ import annotations

from benchmarks.layers.bench_lltm import SIZES, race

STEPS = 64


def run() -> list[dict]:
    return race(SIZES[:1], STEPS)
