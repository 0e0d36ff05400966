"""The tools a build needs: C++ compiler, ninja, nvcc. Found, identified, checked against torch.

Finding runs no program; only a build asks a compiler who it is.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from ops._errors import ToolchainError
from ops.jit._compile import _behind, _hardware

NO_COMPILER = (
    "no C++ compiler found: neither $CXX nor c++, g++ or clang++ on PATH. "
    "Install one (Debian, Ubuntu: apt install g++; conda: conda install cxx-compiler)"
)
NO_NINJA = "ninja not found: neither the Python package nor on PATH. Install it: pip install ninja"
NO_NVCC = (
    "nvcc not found: neither $PYTORCH_NVCC, $CUDA_HOME, PATH nor /usr/local/cuda has one. "
    "Install the CUDA toolkit, or set CUDA_HOME"
)

# What nvcc, or torch on its behalf, takes from the environment: a command, and flags.
NVCCS_VARIABLES = ("CC", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")


# ---- the tools -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tool:
    """A compiler: the command that runs it, its program, and all programs that this is to run."""

    command: tuple[str, ...]
    path: Path
    programs: tuple[Path, ...]

    def stamp(self) -> str:
        """Changes when the command or one of the files does; costs a ``stat`` each."""
        stamps = [shlex.join(self.command)]
        for path in self.programs:
            stat = path.stat()
            stamps.append(f"{path}:{stat.st_size}:{stat.st_mtime_ns}")
        return "\n".join(stamps)


def words_in(variable: str) -> list[str]:
    """The words of a command, or of flags, in an environment variable, as a shell would split them.

    Raises:
        ToolchainError: they cannot be split.
    """
    text = os.environ.get(variable, "")
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ToolchainError(
            f"${variable} must be words with balanced quotes, as for a shell, got {text!r}, which "
            f"is no command: {error}"
        ) from None


def _tool(words: list[str]) -> Tool | None:
    found = _behind.programs(words)
    return Tool(tuple(words), found[0], found) if found else None


def cxx() -> Tool | None:
    """The C++ compiler: ``$CXX``, and only that when it is set; else the first one on PATH."""
    named = os.environ.get("CXX")
    candidates = [words_in("CXX")] if named else [["c++"], ["g++"], ["clang++"]]
    return next(filter(None, map(_tool, candidates)), None)


def cuda_home() -> Path | None:
    """The CUDA toolkit, looked for where torch does; past an nvcc that is a mere wrapper of it."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        return Path(named)
    on_path = shutil.which("nvcc")
    homes = [Path("/usr/local/cuda")]
    if on_path:
        homes[:0] = [Path(on_path).parent.parent, Path(on_path).resolve().parent.parent]
    with_headers = (home for home in homes if (home / "include" / "cuda_runtime.h").is_file())
    return next(with_headers, homes[0] if on_path else None)


def nvcc() -> Tool | None:
    """nvcc: ``$PYTORCH_NVCC``, else that of :func:`cuda_home`."""
    if os.environ.get("PYTORCH_NVCC"):
        return _tool(words_in("PYTORCH_NVCC"))
    home = cuda_home()
    return _tool([str(home / "bin" / "nvcc")]) if home else None


def ninja_folder() -> Path | None:
    """The folder that holds ninja. A virtual environment need not be activated to be found."""
    on_path = shutil.which("ninja")
    if on_path:
        return Path(on_path).parent
    try:
        import ninja
    except ImportError:
        return None
    return Path(ninja.BIN_DIR) if shutil.which("ninja", path=ninja.BIN_DIR) else None


def environ() -> dict[str, str]:
    """Ours, for tools: not with the runtime of a sanitizer, which would report what they leak."""
    found = dict(os.environ)
    loaded = found.pop("LD_PRELOAD", "").replace(":", " ").split()
    left = [one for one in loaded if not re.match(r"lib[alt]san\.", os.path.basename(one))]
    return {**found, **({"LD_PRELOAD": ":".join(left)} if left else {})}


@functools.cache
def _ask(command: tuple[str, ...], stamp: str) -> str:
    try:
        # -v: version, target and configuration. gcc answers on stderr, nvcc on stdout; lines that
        # hold paths are dropped, so that a compiler that only moved is the same compiler.
        answer = subprocess.run(
            [*command, "-v"] if "nvcc" not in command[-1] else [*command, "--version"],
            stdin=subprocess.DEVNULL,
            env=environ(),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=60,
            check=True,
        )
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise ToolchainError(f"{shlex.join(command)} does not run: {error}") from error
    lines = (answer.stdout + answer.stderr).splitlines()
    return "\n".join(
        line for line in lines if not re.match(r"COLLECT_|InstalledDir|Selected", line)
    )


def identity(tool: Tool) -> tuple[str, str]:
    """Who a compiler is: a readable version line, and a digest of all it says of itself.

    Raises:
        ToolchainError: it does not run.
    """
    text = _ask(tool.command, tool.stamp())
    versions = [line for line in text.splitlines() if re.search(r"version|release", line)]
    return (versions or [text])[-1].strip(), hashlib.sha256(text.encode()).hexdigest()[:16]


def check(with_cuda: bool) -> None:
    """Everything a build needs is here and fits torch.

    Raises:
        ToolchainError: says what is missing and how to get it.
    """
    if with_cuda:
        check_cuda()  # first: where torch has no CUDA, another compiler would not help
    compiler = cxx()
    if compiler is None:
        named = os.environ.get("CXX")
        raise ToolchainError(f"$CXX is {named!r}, which is not found" if named else NO_COMPILER)
    identity(compiler)
    if ninja_folder() is None:
        raise ToolchainError(NO_NINJA)


def check_cuda() -> None:
    """Nvcc is here and fits torch.

    Raises:
        ToolchainError: says what is missing and how to get it.
    """
    torchs_version = _hardware.torchs_cuda()
    for variable in NVCCS_VARIABLES:
        words_in(variable)
    compiler = nvcc()
    if compiler is None:
        raise ToolchainError(NO_NVCC)
    version = re.search(r"release (\d+)\.(\d+)", _ask(compiler.command, compiler.stamp()))
    if version is None:
        raise ToolchainError(f"{compiler.path} does not say which CUDA release it is")
    ours, torchs = int(version[1]), int(torchs_version.split(".")[0])
    if ours != torchs:
        raise ToolchainError(
            f"nvcc is {'newer' if ours > torchs else 'older'} than torch: {compiler.path} is CUDA "
            f"{version[1]}.{version[2]}, torch {torch.__version__} is CUDA {torchs_version}. "
            f"Install the CUDA {torchs} toolkit and point CUDA_HOME at it, or a torch for CUDA "
            f"{ours}"
        )
