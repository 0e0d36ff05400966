"""The tools that a build needs: found, identified, and checked against torch.

Finding a tool runs no program. A look-up runs one only where the C++ compiler is a launcher or a
script, which may run a different compiler each time.
"""

import contextlib
import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

from ops._errors import ToolchainError
from ops.jit import _flags

NO_COMPILER = (
    "no C++ compiler found: neither $CXX nor c++, g++ or clang++ on PATH. "
    "Install one (Debian, Ubuntu: apt install g++; conda: conda install cxx-compiler)"
)
NO_NINJA = (
    "ninja not found, or does not run: neither this Python environment nor PATH has one. "
    "Install it: pip install ninja"
)
NO_NVCC = (
    "nvcc not found: neither $PYTORCH_NVCC, $CUDA_HOME, PATH nor /usr/local/cuda has one. "
    "Install the CUDA toolkit, or set CUDA_HOME"
)

# nvcc, or torch for nvcc, takes from the environment: a command, and flags.
NVCC_VARIABLES = ("CC", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")
# Lists of folders of headers.
HEADER_VARIABLES = ("CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH")
# These change output that is read here, or keep nvcc from reporting its headers.
_UNWANTED = (
    *("NINJA_STATUS", "CLICOLOR_FORCE", "LANGUAGE"),
    "TORCH_EXTENSION_SKIP_NVCC_GEN_DEPENDENCIES",
)

_COMPILER_NAME = re.compile(r"(.*-)?(cc|c\+\+|gcc|g\+\+|clang|clang\+\+|nvcc)(-[\d.]+)?")
# Names of temporary files, which differ each time.
_TEMPORARY = re.compile(r"[^\s\"=]*/(?:cc\w{6}\b|tmpxft_[\w-]+|null-[0-9a-f]{6,})[\w.-]*")
_LONGEST = 60  # seconds that a tool may take to say who it is


@dataclass(frozen=True)
class Tool:
    """A compiler: the command that runs it, and the file of the command's program."""

    command: tuple[str, ...]
    path: Path

    @property
    def is_nvcc(self) -> bool:
        """Whether the command runs nvcc, as far as its words tell."""
        return any("nvcc" in os.path.basename(word) for word in self.command)


def words_in(variable: str) -> list[str]:
    """Split the command, or the flags, in an environment variable, as a shell would."""
    text = os.environ.get(variable, "")
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ToolchainError(
            f"${variable} must be words with balanced quotes, got {text!r}, which is no command: "
            f"{error}"
        ) from None
    if file := next(filter(_flags.FILE_OF_FLAGS.match, words), None):
        raise ToolchainError(
            f"${variable} must name no file of flags, which may change unseen, got {file!r}: write "
            f"the flags themselves"
        )
    return words


def _tool(words: list[str]) -> Tool | None:
    found = shutil.which(words[0]) if words else None
    if found is None:
        return None
    return Tool((os.path.abspath(found), *words[1:]), Path(found).resolve())


def cxx() -> Tool | None:
    """Find the C++ compiler: ``$CXX``, and only that when it is set; else the first on PATH."""
    if os.environ.get("CXX"):
        return _tool(words_in("CXX"))
    return next(filter(None, map(_tool, (["c++"], ["g++"], ["clang++"]))), None)


def missing_cxx() -> str | None:
    """Say that ``$CXX`` names a compiler that is not there, if so."""
    named = os.environ.get("CXX")
    return f"$CXX is {named!r}, which is not found" if named and cxx() is None else None


def cuda_home() -> Path | None:
    """Find the CUDA toolkit where torch looks for it, behind an nvcc that is only a wrapper."""
    if named := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return Path(named)
    on_path = shutil.which("nvcc")
    found = [Path(on_path), Path(on_path).resolve()] if on_path else []
    homes = [*(path.parent.parent for path in found), Path("/usr/local/cuda")]
    with_headers = (home for home in homes if (home / "include" / "cuda_runtime.h").is_file())
    return next(with_headers, homes[0] if on_path else None)


def nvcc() -> Tool | None:
    """Find nvcc: ``$PYTORCH_NVCC``, else the one of :func:`cuda_home`."""
    if os.environ.get("PYTORCH_NVCC"):
        return _tool(words_in("PYTORCH_NVCC"))
    home = cuda_home()
    return _tool([str(home / "bin" / "nvcc")]) if home else None


def tools(with_cuda: bool) -> dict[str, Tool | None]:
    """Find the compilers of a build, and the one that nvcc runs for the code of the host."""
    if not with_cuda:
        return {"cxx": cxx()}
    return {"cxx": cxx(), "nvcc": nvcc(), "nvcc_host": _tool(words_in("CC") or ["gcc"])}


def ninja() -> Path | None:
    """Find a ninja that runs: this Python environment's own, else the first on PATH."""
    # Not by importing the package, because the current folder may have another one of that name.
    folders = [sysconfig.get_path("scripts"), os.path.dirname(sys.executable or "")]
    folders.append(os.path.join(sysconfig.get_path("purelib"), "ninja", "data", "bin"))
    folders += os.environ.get("PATH", "").split(os.pathsep)
    for path in (Path(folder, "ninja") for folder in folders if os.path.isabs(folder)):
        with contextlib.suppress(ToolchainError):
            if os.access(path, os.X_OK) and _output((str(path), "--version")):
                return path
    return None


def python() -> str | None:
    """Find the program that runs Python; ``None`` in an application that has Python built in.

    To start ``sys.executable`` there would start the application a second time.
    """
    name = os.path.basename(sys.executable or "")
    if getattr(sys, "frozen", False) or not re.match(r"(python|pypy)[\d.t]*$", name):
        return None
    return sys.executable


def environ() -> dict[str, str]:
    """Return the environment variables that torch, ninja and the compilers see."""
    found = {name: value for name, value in os.environ.items() if name not in _UNWANTED}
    found["LC_ALL"] = "C.UTF-8"  # errors in the language that the diagnosis reads
    # torch puts a ccache that is on PATH before the compiler, unasked. ccache's direct mode returns
    # the old object when a new header hides another, and $CXX may name ccache.
    found |= {"TORCH_NO_COMPILER_WRAPPER": "1", "CCACHE_NODIRECT": "1"}
    if not os.access(os.path.expanduser("~"), os.W_OK):  # ccache fails without a home folder
        found |= {"HOME": "/", "CCACHE_DISABLE": "1"}
    if re.search(r"lib[alt]san\.", found.get("LD_PRELOAD", "")):  # it would report their leaks
        del found["LD_PRELOAD"]
    return found


def identity(tool: Tool) -> str:
    """Identify a compiler: by its file, or by its own words where the file only leads to it."""
    if _is_plain(tool.path):
        return _stamp(tool.path)
    more = ["--dryrun", "-x", "cu", "-c"] if tool.is_nvcc else ["-###", "-shared", "-x", "c++"]
    # The commands that it would run, with all that a wrapper adds.
    text = _output((*tool.command, *more, os.devnull, "-o", "out"))
    text = _TEMPORARY.sub("temporary", f"{version(tool)}\n{text}")
    names = dict.fromkeys(re.findall(r"^(?:#\$)? \"?(/[^\s\"]+)", text, re.MULTILINE))
    stamps = [_stamp(Path(name)) for name in names if os.path.isfile(name)]
    return hashlib.sha256("\n".join([text, *stamps]).encode()).hexdigest()[:32]


def _stamp(path: Path) -> str:
    status = path.stat()
    return f"{status.st_size}:{status.st_mtime_ns}"


def _is_plain(path: Path) -> bool:
    """Whether a file is a compiler itself, rather than a launcher (ccache) or a script."""
    if not _COMPILER_NAME.fullmatch(path.name):
        return False
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(4) == b"\x7fELF"
    return False  # may be run but not read


def version(tool: Tool) -> str:
    """Return the line in which a compiler says its version."""
    ask = _version if _is_plain(tool.path) else _version.__wrapped__
    return ask(tool, _stamp(tool.path))


@functools.cache
def _version(tool: Tool, stamp: str) -> str:
    text = _output((*tool.command, "--version" if tool.is_nvcc else "-v"))
    versions = [line for line in text.splitlines() if re.search(r"version|release", line)]
    return (versions or [text])[-1].strip()


def numbers(text: str) -> tuple[int, ...]:
    """Return the numbers in a version, which compare as versions do."""
    return tuple(map(int, re.findall(r"\d+", text)))


def _output(command: tuple[str, ...]) -> str:
    nothing, both = subprocess.DEVNULL, subprocess.STDOUT
    try:
        said = subprocess.check_output(
            command, stdin=nothing, stderr=both, env=environ(), timeout=_LONGEST
        )
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise ToolchainError(f"{shlex.join(command)} does not run: {error}") from error
    return said.decode(errors="replace")


def check(with_cuda: bool) -> tuple[Tool, Path]:
    """Check that all tools of a build are here and fit torch; return the compiler and ninja."""
    if with_cuda:
        check_cuda()  # first, because another compiler does not help a torch without CUDA
    compiler = cxx()
    if compiler is None:
        raise ToolchainError(missing_cxx() or NO_COMPILER)
    version(compiler)
    runner = ninja()
    if runner is None:
        raise ToolchainError(NO_NINJA)
    check_torch()
    return compiler, runner


def check_torch() -> None:
    """Check that torch's files are those of the torch that this process has imported."""
    file = Path(torch.__file__).parent / "version.py"
    text = file.read_text() if file.is_file() else ""
    if torch.__version__ not in text or str(torch.version.git_version) not in text:
        raise ToolchainError(
            f"torch was replaced while this process runs: {file} is not that of torch "
            f"{torch.__version__}, which this process has imported. Start a new process"
        )


def torch_cuda() -> str:
    """Return the CUDA version that torch is built for."""
    if torch.version.cuda is None:
        raise ToolchainError(f"this torch ({torch.__version__}) is built without CUDA")
    return torch.version.cuda


def check_cuda() -> None:
    """Check that nvcc is here and fits torch."""
    torchs_version = torch_cuda()
    for variable in NVCC_VARIABLES:
        words_in(variable)
    compiler = nvcc()
    if compiler is None:
        raise ToolchainError(NO_NVCC)
    said = version(compiler)
    major = torchs_version.partition(".")[0]
    if not re.search(rf"release {major}\.", said):
        raise ToolchainError(
            f"nvcc must be of CUDA {major}, because torch {torch.__version__} is, got "
            f"{compiler.path}: {said}. Point CUDA_HOME at a CUDA {major} toolkit, or install a "
            f"torch for the other CUDA"
        )
