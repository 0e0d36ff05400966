"""The loader: cold build, CUDA compile and warm load of the improved triplet loss.

It is compared with ``torch.utils.cpp_extension.load_inline`` and its default header,
``torch/extension.h``, on the same sources with the same optimisation flags.
"""

from __future__ import annotations

import os
import statistics
import sysconfig
import tempfile
from pathlib import Path

import torch

from benchmarks.common import child, table
from ops._core import extensions
from ops.jit._compile import _compilers

OP = "improved_triplet_loss"

OURS = f"""
    from ops._core import extensions
    extensions.extension("{OP}", "cpp").load()
    print(json.dumps({{"seconds": elapsed()}}))
"""
# torch/extension.h refuses TORCH_TARGET_VERSION, and needs the header that -U__F16C__ excludes.
# The baseline is C++20 or C++17, as torch chooses.
TORCHS = f"""
    from torch.utils.cpp_extension import load_inline
    from ops._core import extensions
    folder = extensions.source_folder()
    ours = ("-DTORCH_TARGET", "-U", "-std")
    flags = [f for f in extensions.cflags() if not f.startswith(ours)]
    load_inline("baseline", (folder / "{OP}.cpp").read_text(), extra_cflags=flags,
                extra_include_paths=[str(folder)], is_python_module=False)
    print(json.dumps({{"seconds": elapsed()}}))
"""
FIRST_CALL = f"""
    x = torch.ones(2, 3)
    started = time.perf_counter()
    import ops
    ops.{OP}(x, x, x, -1.0, 0.0, 1.0)
    print(json.dumps({{"seconds": elapsed()}}))
"""


def run() -> dict:
    """Run all parts, print the tables and return the figures."""
    with tempfile.TemporaryDirectory() as folder:
        # Warm loads use the builds of the last cold round.
        return {
            "cold": _cold(Path(folder)),
            "warm": _warm(Path(folder)),
            "cuda": _cuda(Path(folder)) if _compilers.nvcc() else None,
        }


def _cold(folder: Path) -> dict:
    rounds = 3
    ours, torchs = [], []
    for number in range(rounds):
        ours.append(child(OURS, watched=True, JITOPS_CACHE_DIR=folder / f"ours{number}"))
        torchs.append(child(TORCHS, watched=True, TORCH_EXTENSIONS_DIR=folder / f"torchs{number}"))
    (folder / f"ours{rounds - 1}").rename(folder / "ours")
    (folder / f"torchs{rounds - 1}").rename(folder / "torchs")
    return _report(f"Cold build, C++ (median of {rounds} each)", ours, torchs)


def _report(title: str, ours: list[dict], torchs: list[dict]) -> dict:
    def of(runs: list[dict]) -> dict:
        return {
            "seconds": statistics.median(run["seconds"] for run in runs),
            "peak_mb": max(run["tool_mb"] for run in runs),
        }

    figures = {"ours": of(ours), "torchs": of(torchs)}
    figures["ratio"] = figures["torchs"]["seconds"] / figures["ours"]["seconds"]
    table(
        title,
        ["", "seconds", "largest process, MB"],
        [
            ["jitops", f"{figures['ours']['seconds']:.2f}", f"{figures['ours']['peak_mb']:.0f}"],
            [
                "torch/extension.h",
                f"{figures['torchs']['seconds']:.1f}",
                f"{figures['torchs']['peak_mb']:.0f}",
            ],
            ["ratio", f"**{figures['ratio']:.1f}x**", ""],
        ],
    )
    return figures


def _warm(folder: Path) -> dict:
    """Time new processes, after torch is imported, until they have computed the first loss.

    torch's ``load_inline`` is timed only until it has loaded the library.
    """
    ours = {"JITOPS_CACHE_DIR": folder / "ours"}
    contenders = {
        "pure torch": (FIRST_CALL, {**ours, "JITOPS_BACKEND": "torch"}),
        "cpp": (FIRST_CALL, {**ours, "JITOPS_BACKEND": "cpp"}),
        "load_inline": (TORCHS, {"TORCH_EXTENSIONS_DIR": folder / "torchs"}),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(21):
        for name, (code, variables) in contenders.items():
            times[name].append(child(code, **variables)["seconds"])
    ms = {name: 1000 * statistics.median(values) for name, values in times.items()}
    added = ms["cpp"] - ms["pure torch"]
    table(
        "Warm load in a new process, after `import torch` (median of 21)",
        ["", "ms"],
        [
            ["jitops, pure torch", f"{ms['pure torch']:.1f}"],
            ["jitops, cpp", f"{ms['cpp']:.1f}"],
            ["cpp - pure torch", f"**{added:.1f}**"],
            ["torch's load_inline, warm", f"{ms['load_inline']:.1f}"],
            ["load_inline / cpp", f"**{ms['load_inline'] / ms['cpp']:.1f}x**"],
        ],
    )
    return {"ms": ms, "added_ms": added, "ratio": ms["load_inline"] / ms["cpp"]}


# ---- CUDA: compiling needs no GPU, so this runs the commands of torch's build --------------------


def _cuda(folder: Path) -> dict:
    source = extensions.source_folder()
    include = Path(torch.__file__).parent / "include"
    folders = [
        include,
        include / "torch/csrc/api/include",
        _compilers.cuda_home() / "include",
        sysconfig.get_path("include"),
    ]
    headers = [f"-I{source}", *(word for path in folders for word in ("-isystem", path))]
    compiler, nvcc = _compilers.cxx(), _compilers.nvcc()
    common = ["-std=c++20", *headers, "-c", "-o", os.devnull]
    # The flags that torch passes to nvcc, for one architecture.
    torchs_flags = [
        "-D__CUDA_NO_HALF_OPERATORS__",
        "-D__CUDA_NO_HALF_CONVERSIONS__",
        "-D__CUDA_NO_BFLOAT16_CONVERSIONS__",
        "-D__CUDA_NO_HALF2_OPERATORS__",
        "--expt-relaxed-constexpr",
        "--compiler-options=-fPIC",
        "-gencode=arch=compute_90,code=sm_90",
    ]
    kernels = [*nvcc.command, *common, *torchs_flags, *extensions.cuda_cflags()]
    with_torch = folder / "with_torch.cu"
    text = (source / f"{OP}.cu").read_text()
    with_torch.write_text(f"#include <torch/extension.h>\n{text}")
    host = [*compiler.command, *common, *extensions.cflags(), "-DUSE_CUDA", "-fPIC"]
    ours, torchs = [], []
    for _ in range(2):
        ours.append(_compile([*kernels, source / f"{OP}.cu"], [*host, source / f"{OP}.cpp"]))
        torchs.append(_compile([*kernels, with_torch]))
    return _report("CUDA compile, sm_90, both files at once (median of 2 each)", ours, torchs)


def _compile(*commands: list) -> dict:
    """Time parallel commands until the slowest ends, in a child process that shows the memory."""
    code = f"""
        import subprocess
        commands = {[[str(word) for word in command] for command in commands]!r}
        started = time.perf_counter()
        running = [subprocess.Popen(command, stderr=subprocess.PIPE) for command in commands]
        for process in running:
            if process.wait():
                raise SystemExit(process.stderr.read().decode())
        print(json.dumps({{"seconds": elapsed()}}))
    """
    return child(code, watched=True)
