"""``jitops demo``: train on real digits, compiled and on pure torch, and draw the result."""

from __future__ import annotations

import functools
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import ops
from ops._config import Backend
from ops._core import extensions, selection
from ops._errors import ArgumentError, JitopsError

OP = "improved_triplet_loss"
CRITERION = ops.ImprovedTripletLoss(t1=-1.0, t2=0.01, beta=0.002)  # the values of the paper
TRAIN = 1200  # of the 1797 digits; the others are held out
BATCH = 256
FRESH = 3  # new processes; the demo prints the median of their times

# Run in a new process: the time that `import ops` and a first call take once the cache is full.
WARM_LOAD = f"""
import time, torch
x = torch.ones(2, 3)
started = time.perf_counter()
import ops
ops.{OP}(x, x, x, -1.0, 0.0, 1.0)
print(1000 * (time.perf_counter() - started))
"""


# Flushed, so that a slow step is announced before it starts, even if stdout is not a terminal.
_say = functools.partial(print, flush=True)


@dataclass
class Run:
    """One training run on one back end."""

    losses: list[float]
    before: Tensor
    after: Tensor
    recalls: tuple[float, float]


def main(steps: int, output: Path) -> None:
    """Run the demo and print its progress.

    Args:
        steps: number of training steps.
        output: file of the picture.

    Raises:
        ArgumentError: scikit-learn or matplotlib is missing, or ``output`` cannot be written.
    """
    try:
        from matplotlib.figure import Figure  # noqa: F401
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ArgumentError(
            f"the demo needs scikit-learn and matplotlib ({error}): pip install scikit-learn "
            f"matplotlib, or jitops with its extra [demo]"
        ) from error
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    _say(
        f"jitops {ops.__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{torch.get_num_threads()} threads, {gpu}"
    )

    compiled: tuple[Backend, ...] = ("cpp", "cuda")
    backends: list[Backend] = [*filter(_prepare, compiled), "torch"]

    pixels, digits = load_digits(return_X_y=True)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    images = (torch.tensor(pixels, dtype=torch.float32) / 16)[order]
    labels = torch.tensor(digits)[order]
    _say(
        f"\nTraining: {TRAIN} handwritten digits to points in the plane, {steps} steps of "
        f"{BATCH} triplets; {len(labels) - TRAIN} digits held out"
    )
    runs = {}
    for name in backends:
        _say(f"  {name:5}  {steps} steps ...", end=" ")
        with ops.use_backend(name):
            runs[name] = _train(images, labels, steps, selection.DEVICE_OF.get(name, "cpu"))
        before, after = runs[name].recalls
        _say(
            f"loss {runs[name].losses[0]:+.6f} -> {runs[name].losses[-1]:+.6f}   "
            f"recall@1 of the held-out digits {before:.1%} -> {after:.1%}"
        )
    for name in backends[:-1]:
        pairs = zip(runs[name].losses, runs["torch"].losses, strict=True)
        apart = max(abs(ours - torchs) for ours, torchs in pairs)
        _say(f"  {name} and torch: the losses of all {steps} steps agree to {apart:.1e}")

    if len(backends) > 1:
        _say(f"\nThe loss forward + backward on {BATCH} x 256, float32:")
    for name in backends[:-1]:
        ours, torchs = _race(name)
        _say(
            f"  {name:5}  {1e6 * ours:.0f} us against {1e6 * torchs:.0f} us of pure torch: "
            f"{torchs / ours:.1f} times as fast"
        )

    _draw(runs[backends[0]], labels[TRAIN:], output)
    _say(f"\nPicture of the embedding before and after: {output}")


# ---- compile ------------------------------------------------------------------------------------


def _prepare(backend: Backend) -> bool:
    """Compile or load a back end and print the time; ``False`` if it cannot run."""
    if backend == "cuda" and not torch.cuda.is_available():
        return False  # the first line of the output says "no GPU"
    _say(f"\nBack end {backend}:")
    device = selection.DEVICE_OF[backend]
    x = torch.ones(2, 3, device=device)
    extension = extensions.extension(OP, backend)
    try:
        cached = extension.find()
        if not cached:
            _say("  not in the cache: compiling ...")
        started = time.perf_counter()
        with ops.use_backend(backend):
            CRITERION(x, x, x)
        seconds = time.perf_counter() - started
    except JitopsError as error:
        _say(f"  cannot run here, so training uses pure torch: {error}")
        return False
    entry = extension.build_entry()  # a cache hit by now
    if cached:
        earlier = entry.manifest["seconds"]
        _say(f"  in the cache already, compiled earlier in {earlier:.1f} s: {entry.library}")
    else:
        _say(f"  cold: compiled and called in {seconds:.1f} s, kept as {entry.library}")
    if backend == "cpp":
        _say(f"  warm: {FRESH} new processes, each of which imports torch first ...", end=" ")
        _say(f"import ops and first loss in {_warm_load(backend):.1f} ms")
    return True


def _warm_load(backend: str) -> float:
    environment = {**os.environ, "JITOPS_BACKEND": backend}
    command = [sys.executable, "-c", WARM_LOAD]
    times = []
    for _ in range(FRESH):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        times.append(float(done.stdout))
    return statistics.median(times)


# ---- train --------------------------------------------------------------------------------------


def _train(images: Tensor, labels: Tensor, steps: int, device: str) -> Run:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 2)).to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    held_out = images[TRAIN:].to(device)
    with torch.no_grad():
        before = net(held_out).cpu()
    losses = []
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        triplet = _sample(labels[:TRAIN], generator)
        anchor, positive, negative = (net(images[chosen].to(device)) for chosen in triplet)
        loss = CRITERION(anchor, positive, negative)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        after = net(held_out).cpu()
    recalls = _recall(before, labels[TRAIN:]), _recall(after, labels[TRAIN:])
    return Run(losses, before, after, recalls)


def _sample(labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Random anchors, each with a positive of its class and a negative of another class."""
    anchor = torch.randint(len(labels), (BATCH,), generator=generator)
    same = labels[anchor, None] == labels
    same_but_itself = same.scatter(1, anchor[:, None], False)
    positive = torch.multinomial(same_but_itself.float(), 1, generator=generator)[:, 0]
    negative = torch.multinomial((~same).float(), 1, generator=generator)[:, 0]
    return anchor, positive, negative


def _recall(embedding: Tensor, labels: Tensor) -> float:
    """Recall@1: the fraction of points whose nearest other point has the same class."""
    distances = torch.cdist(embedding, embedding).fill_diagonal_(torch.inf)
    return (labels[distances.argmin(1)] == labels).float().mean().item()


# ---- race and picture ---------------------------------------------------------------------------


def _race(backend: Backend) -> tuple[float, float]:
    """Median seconds of the loss on ``backend`` and on pure torch, timed alternately."""
    device = selection.DEVICE_OF[backend]
    inputs = [torch.randn(BATCH, 256, device=device, requires_grad=True) for _ in range(3)]
    times: dict[Backend, list[float]] = {backend: [], "torch": []}
    for round_ in range(12):
        for name in times:
            with ops.use_backend(name):
                for call in range(20):
                    started = time.perf_counter()
                    loss = CRITERION(*inputs)
                    torch.autograd.grad(loss, inputs)
                    if device == "cuda":
                        torch.cuda.synchronize()
                    if round_ > 1 and call > 2:  # earlier calls warm up
                        times[name].append(time.perf_counter() - started)
    return statistics.median(times[backend]), statistics.median(times["torch"])


def _draw(run: Run, labels: Tensor, output: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.2), layout="constrained")
    titles = ("before", "after")
    for axes, points, title, recall in zip(
        figure.subplots(1, 2), (run.before, run.after), titles, run.recalls, strict=True
    ):
        dots = axes.scatter(*points.T, c=labels, cmap="tab10", s=9)
        axes.set_title(f"{title} training: recall@1 {recall:.1%}")
        axes.set_aspect("equal", "datalim")
    figure.legend(*dots.legend_elements(), title="digit", loc="outside right upper")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=120)
    except (OSError, ValueError) as error:
        raise ArgumentError(f"output must be a picture that can be written: {error}") from error
