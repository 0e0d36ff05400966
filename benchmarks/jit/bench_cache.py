"""The cache: the cost of a hit above that of the dynamic linker, contention, and cold builds.

The time of a hit is that of one call in a new process that has imported torch and ``ops.jit``.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common import ROOT, child, table
from ops._core import dispatch
from ops.jit import _pch

ROUNDS = 25

TEXT = 'extern "C" int answer() { return 42; }'
OPTIONS = "is_python_module=False, no_implicit_headers=True"
# The library of a built-in op, and a small one. Each way of loading runs in a process of its own.
FIND = """
    from ops._core import extensions
    print(json.dumps({"path": str(extensions.extension("lltm", "cpp").build())}))
"""
DLOPEN = """
    import ctypes, torch._ops
    started = time.perf_counter()
    torch.ops.load_library({path!r})
    print(json.dumps({{"seconds": elapsed()}}))
"""
EXTENSION = """
    import ops.jit
    from ops._core import extensions
    extension = extensions.extension("lltm", "cpp")
    started = time.perf_counter()
    extension.load()
    print(json.dumps({"seconds": elapsed()}))
"""
INLINE = f"""
    from ops.jit import load_inline
    started = time.perf_counter()
    path = load_inline("answer", {TEXT!r}, {OPTIONS})
    print(json.dumps({{"seconds": elapsed(), "path": path}}))
"""
# Ten look-ups a second in each process, so that sixteen processes leave the cores half idle. The
# control computes without files, so a crowd slows it by contention for cores, not for locks.
PACED = f"""
import hashlib, json, random, sys, time
import ops.jit
extension = ops.jit.text("answer", {TEXT!r}, {OPTIONS})
block = bytes(700_000)
work = {{"look-up": extension.find, "control": lambda: hashlib.sha256(block).digest()}}
times = {{name: [] for name in work}}
extension.find()
print("ready", flush=True)
sys.stdin.readline()
time.sleep(random.random() / 10)
for number in range(400):
    name = ("look-up", "control")[number % 2]
    started = time.perf_counter()
    work[name]()
    times[name].append(time.perf_counter() - started)
    time.sleep(0.05)
print(json.dumps(times))
"""
DEFAULT_HEADERS = """
    from {module} import load_inline
    load_inline("mine", "int f() {{ return {number}; }}", functions="f")
    print(json.dumps({{"seconds": elapsed()}}))
"""
PREBUILD = """
    from ops._cli import main as cli
    import contextlib, os
    with contextlib.redirect_stdout(open(os.devnull, "w")):
        assert cli.main(["build", "--backend=cpp"]) == 0
    print(json.dumps({"seconds": elapsed()}))
"""


def run() -> dict:
    """Run all parts, print the tables and return the figures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        return {
            "warm": _warm(folder / "cache"),
            "crowd": _crowd(folder / "cache"),
            "builds": _builds(folder),
        }


def _warm(cache: Path) -> dict:
    """Compare a hit with dlopen of the same library, in a cache of few and of many entries."""
    own, other = cache / "own", cache / "many"
    paths = {}
    for place in (own, other):
        paths["Extension"] = child(FIND, JITOPS_CACHE_DIR=place)["path"]
        paths["load_inline"] = child(INLINE, JITOPS_CACHE_DIR=place)["path"]
    for number in range(1000):
        _copy(Path(paths["load_inline"]).parent, other, number)
    contenders = {
        ("Extension", "dlopen"): (DLOPEN.format(path=paths["Extension"]), own),
        ("Extension", "few"): (EXTENSION, own),
        ("Extension", "1000"): (EXTENSION, other),
        ("load_inline", "dlopen"): (DLOPEN.format(path=paths["load_inline"]), own),
        ("load_inline", "few"): (INLINE, own),
        ("load_inline", "1000"): (INLINE, other),
    }
    times: dict[tuple[str, str], list[float]] = {one: [] for one in contenders}
    for _ in range(ROUNDS):
        for one, (code, place) in contenders.items():
            times[one].append(child(code, JITOPS_CACHE_DIR=place)["seconds"])
    ms = {one: 1000 * statistics.median(values) for one, values in times.items()}
    rows, figures = [], {}
    for way in ("Extension", "load_inline"):
        bare, few, many = (ms[way, which] for which in ("dlopen", "few", "1000"))
        figures[way] = {"dlopen_ms": bare, "ms": few, "ms_1000": many}
        rows.append(
            [way, f"{bare:.2f}", f"{few:.2f}", f"**{few - bare:.2f}**", f"**{many / few:.2f}x**"]
        )
    table(
        f"A hit in a new process (median of {ROUNDS})",
        ["", "dlopen, ms", "hit, ms", "difference, ms", "among 1,000 entries"],
        rows,
    )
    return figures


def _copy(entry: Path, cache: Path, number: int) -> None:
    """Copy an entry under another name."""
    folder = cache / f"other{number}-0123456789abcdef" / entry.name
    folder.mkdir(parents=True)
    for path in entry.iterdir():
        (folder / path.name).hardlink_to(path)


def _crowd(cache: Path) -> dict:
    """Compare sixteen processes that hit one entry repeatedly with one process."""
    times: dict[tuple[str, int], list[float]] = {}
    for count in (1, 16) * 3:
        for process in _paced(count, cache / "own"):
            for name, values in process.items():
                times.setdefault((name, count), []).extend(values)
    figures, rows = {}, []
    for name in ("look-up", "control"):
        ms = {}
        for count in (1, 16):
            values = sorted(times[name, count])
            ms[count] = [1000 * values[int(q * len(values))] for q in (0.5, 0.99)]
        slower = ms[16][1] / ms[1][1]
        figures[name] = {"alone_ms": ms[1], "crowd_ms": ms[16], "p99_ratio": slower}
        cells = [f"{value:.2f}" for value in (*ms[1], *ms[16])]
        rows.append([name, *cells, f"**{slower:.2f}x**"])
    table(
        "Ten look-ups a second in each process: median and 99th percentile, ms",
        ["", "one process", "99th", "sixteen", "99th", "99th / 99th"],
        rows,
    )
    return figures


def _paced(count: int, cache: Path) -> list[dict[str, list[float]]]:
    environment = {"PYTHONPATH": str(ROOT), "JITOPS_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running = [
        subprocess.Popen([sys.executable, "-c", PACED], env=environment, cwd="/", **pipes)
        for _ in range(count)
    ]
    for process in running:
        process.stdout.readline()
    for process in running:
        process.stdin.write("go\n")
        process.stdin.flush()
    return [json.loads(process.communicate()[0]) for process in running]


def _builds(folder: Path) -> dict:
    """Cold builds with default headers: torch's, our first one, and our second one.

    Our first build starts the precompilation of the headers, which the second one uses.
    """
    torchs, first, second, prebuilt = [], [], [], []
    for number in range(3):
        ours = {"JITOPS_CACHE_DIR": folder / f"ours{number}"}
        torchs.append(
            child(
                DEFAULT_HEADERS.format(module="torch.utils.cpp_extension", number=0),
                TORCH_EXTENSIONS_DIR=folder / f"torchs{number}",
            )["seconds"]
        )
        first.append(child(DEFAULT_HEADERS.format(module="ops.jit", number=0), **ours)["seconds"])
        _until_precompiled(folder / f"ours{number}")
        second.append(child(DEFAULT_HEADERS.format(module="ops.jit", number=1), **ours)["seconds"])
        prebuilt.append(child(PREBUILD, JITOPS_CACHE_DIR=folder / f"ops{number}")["seconds"])
    figures = {
        name: statistics.median(values)
        for name, values in (
            ("torchs", torchs),
            ("first", first),
            ("second", second),
            ("prebuilt", prebuilt),
        )
    }
    table(
        "Cold builds (median of 3 each)",
        ["", "seconds", "torch's load_inline / it"],
        [
            [title, f"{figures[name]:.1f}", f"**{figures['torchs'] / figures[name]:.1f}x**"]
            for title, name in (
                ("torch's load_inline, default headers", "torchs"),
                ("ours, the first", "first"),
                ("ours, the second: headers precompiled", "second"),
                (f"`jitops build` of all {len(dispatch.known())} C++ ops", "prebuilt"),
            )
        ],
    )
    return figures


def _until_precompiled(cache: Path) -> None:
    """Wait for the background process of the first build, which precompiles the headers."""
    waiting = f"""
        from pathlib import Path
        while not list(Path({str(cache)!r}).glob("{_pch.NAME}-*/*/{_pch.NAME}.so")):
            assert elapsed() < 300, "the headers were not precompiled"
            time.sleep(0.2)
        print(json.dumps({{"seconds": elapsed()}}))
    """
    child(waiting)
