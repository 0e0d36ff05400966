"""Monotonic alignment search, against the loop that Glow-TTS and VITS compile with Cython."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import ops
from benchmarks.common import COMPILED, Kernel, devices, in_turns, ratios
from ops.jit import load_inline

SIZES = ((32, 200, 800), (8, 100, 400), (1, 400, 2000))  # pairs, tokens, frames

# The loop is the same in C, because Cython writes C. The score matrix becomes that of the sums.
LOOP = """
#include <algorithm>
#include <cstdint>
extern "C" void search(float* sums, int* path, int64_t pairs, int64_t frames, int64_t tokens) {
  const float never = -1e9f;
  for (int64_t b = 0; b < pairs; ++b, sums += frames * tokens, path += frames * tokens) {
    for (int64_t j = 0; j < frames; ++j) {
      const int64_t first = std::max<int64_t>(0, tokens + j - frames);
      for (int64_t i = first; i < std::min(tokens, j + 1); ++i) {
        const float stays = i == j ? never : sums[(j - 1) * tokens + i];
        const float comes = i == 0 ? (j == 0 ? 0.0f : never) : sums[(j - 1) * tokens + i - 1];
        sums[j * tokens + i] += std::max(stays, comes);
      }
    }
    int64_t i = tokens - 1;
    for (int64_t j = frames - 1; j >= 0; --j) {
      path[j * tokens + i] = 1;
      if (i > 0 && (i == j || sums[(j - 1) * tokens + i] < sums[(j - 1) * tokens + i - 1])) --i;
    }
  }
}
"""


@functools.cache
def loop() -> Callable[[Tensor], Tensor]:
    """``maximum_path`` of VITS: its axes are (pair, frame, token). All lengths are full."""
    name, flags = "jitops_bench_alignment", ["-O3"]
    path = load_inline(
        name, LOOP, extra_cflags=flags, is_python_module=False, no_implicit_headers=True
    )
    search = ctypes.CDLL(str(path)).search

    def maximum_path(value: Tensor) -> Tensor:
        sums = value.clone(memory_format=torch.contiguous_format)
        path = torch.zeros(value.shape, dtype=torch.int32)
        sizes = map(ctypes.c_int64, value.shape)
        search(ctypes.c_void_p(sums.data_ptr()), ctypes.c_void_p(path.data_ptr()), *sizes)
        return path.to(value.dtype)

    return maximum_path


def inputs(shape: tuple[int, int, int], device: str) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(shape, device=device)


def run() -> dict:
    return {COMPILED[one]: _speed(one) for one in devices()}


def kernels(device: str, dtype: torch.dtype) -> Iterator[Kernel]:
    """The search, in both layouts of the scores."""
    for shape in SIZES:
        scores = inputs(shape, device).to(dtype)
        operator = torch.ops.jitops.monotonic_alignment_search_forward.default
        for name, one in (("", scores), (", by frame", scores.mT.contiguous().mT)):
            yield Kernel(f"alignment{name}", shape, operator, (one, None), 2 * scores.nbytes)


def _speed(device: str) -> list[dict]:
    backend, figures = COMPILED[device], []
    for shape in SIZES:
        scores = inputs(shape, device)
        by_frame = scores.mT.contiguous()
        calls = {
            "torch": lambda scores=scores: ops.monotonic_alignment_search(scores),
            backend: lambda scores=scores: ops.monotonic_alignment_search(scores),
            f"{backend}, by frame": lambda x=by_frame: ops.monotonic_alignment_search(x.mT).mT,
        }
        if device == "cpu":
            calls["loop"] = lambda x=by_frame: loop()(x)
            torch.testing.assert_close(calls["loop"](), calls[f"{backend}, by frame"]())
        backends = {name: name.partition(",")[0] for name in calls if name != "loop"}
        seconds = in_turns(calls, backends, device)
        figures.append({"shape": shape, "ms": {name: 1e3 * s for name, s in seconds.items()}})
    ratios(
        f"Monotonic alignment search, {backend}: milliseconds",
        "pairs, tokens, frames",
        figures,
        backend,
    )
    return figures
