"""Each op with kernels, in each dtype and launch shape, against its naive reference in float64.

``python -m tests.harness.first_light`` takes seconds, so that compute-sanitizer can watch it too.
It reports each error at once, and ends with status 1 if there was one.
"""

from __future__ import annotations

import argparse
import time
import traceback

import torch

import ops
from tests.harness.op_under_test import (
    DTYPES,
    TOLERANCE,
    OpUnderTest,
    backward,
    compiled_ops,
    leaves,
    misaligned,
)

DEVICES = {"torch": "cpu", "cpp": "cpu", "cuda": "cuda"}


def main() -> int:
    """Compare all; the status."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = "cuda" if torch.cuda.is_available() else "cpp"
    parser.add_argument("--backend", choices=DEVICES, default=default)
    backend = parser.parse_args().backend
    torch.manual_seed(0)
    started, wrong = time.perf_counter(), 0
    for name, op in compiled_ops().items():
        for dtype in DTYPES:
            try:
                errors = list(_errors(op, dtype, backend))
            except Exception:  # the other ops may be right
                wrong += 1
                print(f"WRONG {name}, {dtype}: an error", flush=True)
                traceback.print_exc()
                continue
            # NaN is wrong too.
            bad = [text for text, error in errors if not error <= TOLERANCE[dtype]]
            wrong += len(bad)
            for text in bad:
                print(f"WRONG {name}, {text}", flush=True)
            worst = max(error for _, error in errors)
            print(f"{name}, {dtype}: at most {worst:.2g} of the largest element off", flush=True)
    print(f"{backend}: {wrong} wrong, {time.perf_counter() - started:.1f} s")
    return 1 if wrong else 0


def _errors(op: OpUnderTest, dtype: torch.dtype, backend: str):
    """The error of each result and gradient, relative to its largest element, and a name for it."""
    device = DEVICES[backend]
    for plain in op.launches(dtype, device):
        for keywords in op.variants:
            expected = _pass(op.naive, [t.double() for t in leaves(plain)], keywords)
            for layout in (leaves, misaligned):
                with ops.use_backend(backend):
                    got = _pass(op.results, layout(plain), keywords)
                for place, (one, other) in enumerate(zip(got, expected, strict=True)):
                    shapes = [list(t.shape) for t in plain]
                    text = f"{dtype} {shapes} {keywords} {layout.__name__}, tensor {place}"
                    yield text, _error(one, other.to(dtype))


def _error(one: torch.Tensor, other: torch.Tensor) -> float:
    off = (one.double() - other.double()).abs() / other.double().abs().max().clamp(min=1e-3)
    return torch.where(one == other, 0.0, off).max().item()  # one infinity is like the other


def _pass(call, inputs, keywords):
    """Results, and the gradients of their sum."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    results = [x for x in call(inputs, keywords) if x.is_floating_point()]
    backward(results, [torch.ones_like(x) for x in results])
    return [*(x.detach() for x in results), *(t.grad for t in inputs)]


if __name__ == "__main__":
    raise SystemExit(main())
