"""The parts that benches share: timing in turns, child processes, the machine, tables."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import ops

ROOT = Path(__file__).resolve().parent.parent
COMPILED = {"cpu": "cpp", "cuda": "cuda"}  # the compiled back end of each kind of device


def benches() -> dict[str, str]:
    """The module of each bench, by name."""
    paths = sorted(Path(__file__).parent.rglob("bench_*.py"), key=lambda path: path.stem)
    return {
        path.stem.removeprefix("bench_"): ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in paths
    }


only: str | None = None  # measure only this kind of device


def devices() -> list[str]:
    """The kinds of devices to measure."""
    here = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return [device for device in here if only in (None, device)]


# ---- contenders ---------------------------------------------------------------------------------


def compiled(module: torch.nn.Module, device: str) -> dict[str, Callable[..., Any]]:
    """A module under ``torch.compile``, by mode; on a GPU also the mode that replays graphs."""
    modes = {"compile": {}, "reduce-overhead": {"mode": "reduce-overhead"}}
    if device == "cpu":
        del modes["reduce-overhead"]
    return {
        name: torch.compile(module, dynamic=False, **options) for name, options in modes.items()
    }


@dataclass
class Kernel:
    """A compiled operator to time by itself: its call, and the least work that it must do.

    Attributes:
        moves: bytes to read and to write.
        multiplies: shapes (rows, inner, cols) of its matrix products.
    """

    name: str
    shape: tuple[int, ...]
    operator: Callable[..., Any]
    arguments: tuple[Any, ...]
    moves: int
    multiplies: tuple[tuple[int, int, int], ...] = ()


# ---- timing -------------------------------------------------------------------------------------


def in_turns(
    contenders: dict[str, Callable[[], object]],
    backends: dict[str, str],
    device: str = "cpu",
) -> dict[str, float]:
    """Median seconds of a call of each contender, timed in alternating blocks of calls.

    ``backends`` maps a contender to the back end that it requests, if any. On a GPU a block is
    timed as a whole, because a call starts before the previous one is done.

    Contenders alternate in blocks, not in single calls. A call then finds the caches and the memory
    allocator as its own predecessor left them, as in a training loop. Warm-up does not count,
    because the first access to fresh memory is slow, most of all on virtual machines. Calls of more
    than a tenth of a second are repeated less.
    """
    calls, blocks = {}, 15
    wait = torch.cuda.synchronize if device == "cuda" else None
    for name, call in contenders.items():
        with ops.use_backend(backends.get(name, "auto")):
            for _ in range(3):
                call()  # compiles and loads, which must not affect the length of the blocks
            (seconds,) = _timed(call, 1, wait)
            if seconds > 0.1:
                calls[name], blocks = 1, 5
                continue
            seconds = statistics.mean(_timed(call, 12, wait))
            calls[name] = max(3, min(50, round(0.04 / seconds)))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(blocks):
        for name, call in contenders.items():
            with ops.use_backend(backends.get(name, "auto")):
                call()  # not timed, because it finds the caches of the other contender
                times[name] += _timed(call, calls[name], wait)
    return {name: statistics.median(values) for name, values in times.items()}


def _timed(
    call: Callable[[], object], count: int, wait: Callable[[], object] | None
) -> list[float]:
    """The seconds of each of ``count`` calls; on a GPU, only their mean."""
    times = []
    if wait:
        wait()
    begin = started = time.perf_counter()
    for _ in range(count):
        call()
        ended = time.perf_counter()
        times.append(ended - started)
        started = ended
    if wait:
        wait()
        return [(time.perf_counter() - begin) / count]
    return times


def child(code: str, watched: bool = False, **variables: object) -> dict:
    """Run ``code`` in a new Python, and return the JSON of the last line that it prints.

    The code may call ``elapsed()``, the seconds since torch was imported, and ``peak_mb()``, the
    peak memory of the process. ``watched`` adds ``tool_mb``, the peak memory of the largest process
    that it ran. This is not ``ru_maxrss``, which also counts memory from before an ``exec``.
    """
    prelude = """
        import json, re, time, torch
        started = time.perf_counter()
        def elapsed():
            return time.perf_counter() - started
        def peak_mb():
            told = open("/proc/self/status").read()
            return int(re.search(r"VmHWM:\\s*(\\d+)", told)[1]) * 1024 / 1e6
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JITOPS_PROGRESS": "0"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # it makes every import compile anew
    environment.update({name: str(value) for name, value in variables.items()})
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(prelude) + textwrap.dedent(code)],
        env=environment,
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    tool_mb = 0.0
    while True:
        try:
            out, err = process.communicate(timeout=0.1 if watched else None)
            break
        except subprocess.TimeoutExpired:
            tool_mb = max(tool_mb, _largest_below(process.pid))
    if process.returncode:
        raise RuntimeError(err)
    told = json.loads(out.splitlines()[-1])
    return {**told, "tool_mb": tool_mb} if watched else told


def _largest_below(pid: int) -> float:
    """The peak memory, in MB, of the largest process now running below this one."""
    parents, peaks = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            told = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        except OSError:
            continue  # the process has just ended
        parents[int(folder.name)] = int(told["PPid"])
        peaks[int(folder.name)] = int(told.get("VmHWM", "0 kB").split()[0]) * 1024 / 1e6
    below = {pid}
    while new := {child for child, parent in parents.items() if parent in below} - below:
        below |= new
    return max((peaks[one] for one in below - {pid}), default=0.0)


# ---- reporting ----------------------------------------------------------------------------------


def machine() -> dict[str, str]:
    """The hardware and the versions that the figures depend on."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    told = {
        "cpu": f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "compiler": _first_line("c++", "--version"),
        "system": platform.platform(terse=True),
    }
    if torch.cuda.is_available():
        told["gpu"] = torch.cuda.get_device_name()
    return told


def _first_line(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0]


def exponents(
    first: Mapping[str, float], last: Mapping[str, float], growth: float, size: str
) -> dict[str, float]:
    """Of the cost of each contender in a size, which is ``growth`` times as large at the last."""
    found = {
        name: math.log(last[name] / first[name]) / math.log(growth)
        for name in first
        if name in last
    }
    shown = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
    print(f"\nExponent of the cost in the {size}: {shown}\n")
    return found


printed: list[str] = []  # the lines of the tables of the running bench


def table(title: str, header: list[str], rows: list[list[object]]) -> None:
    """Print a Markdown table."""
    cells = [header, *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["", f"### {title}", ""]
    for number, row in enumerate(cells):
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("| " + " | ".join(padded) + " |")
        if number == 0:
            lines.append("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    printed.extend(lines)
    print("\n".join(lines), flush=True)


def ratios(title: str, sizes: str, figures: list[dict], ours: str) -> None:
    """Print the milliseconds of contenders by shape, and those of the others divided by ours.

    A contender whose name begins with ``ours`` is one of ours, too.
    """
    names = list(figures[0]["ms"])
    others = [name for name in names if not name.startswith(ours)]
    rows = [
        [
            row["shape"],
            *(f"{ms:.2f}" for ms in row["ms"].values()),
            *(f"**{row['ms'][name] / row['ms'][ours]:.1f}x**" for name in others),
        ]
        for row in figures
    ]
    table(title, [sizes, *names, *(f"{name} / ours" for name in others)], rows)
