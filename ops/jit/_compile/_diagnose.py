"""A build's output, read for the user: the first real error, its cause where known, the fix."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

# "file:line:column: error: text" (gcc, clang), "file(line): error: text" (nvcc).
_COMPILER_ERROR = re.compile(
    r"^(?P<file>[^\s:(][^:(\n]*?)(?::(?P<line>\d+)(?::\d+)?:|\((?P<nvline>\d+)\)\s*:)"
    r"\s*(?:catastrophic |fatal )?error\s*(?:#\S+)?:\s*(?P<text>.+)$"
)
_OTHER_ERROR = re.compile(
    r"undefined reference to|cannot find -l|ld: error|: error:|^error:|fatal error|fatal\s*:"
    r"|ninja: error|Killed|No space left on device|command not found|undefined symbol"
    r"|cannot open shared object|failed to map segment"
)


@dataclass(frozen=True)
class Cause:
    """A kind of failure that is known: how it shows, what it is, what to do."""

    shows: str
    cause: str
    fix: str


# Most telling first: an out-of-memory kill also leaves errors that look like something else.
CAUSES = (
    Cause(
        r"Killed signal terminated program|virtual memory exhausted|out of memory allocating"
        r"|Killed\b.*cc1plus|std::bad_alloc",
        "the compiler ran out of memory and was killed",
        "free memory, or run fewer compilers at once: MAX_JOBS=1",
    ),
    Cause(
        r"No space left on device|Disk quota exceeded",
        "the disk is full",
        "free space, or point JITOPS_CACHE_DIR (and TMPDIR) at another disk",
    ),
    Cause(
        r"fatal error: Python\.h: No such file",
        "Python's headers are not installed",
        "install them (Debian, Ubuntu: apt install python3-dev)",
    ),
    Cause(
        r"fatal error: .+: No such file or directory|cannot open source file|file not found",
        "a header is missing",
        "check the spelling, and add its folder to extra_include_paths",
    ),
    Cause(
        r"cannot find -l(\S+)",
        "a library to link against is missing",
        "install it, or add its folder as extra_ldflags=['-L...']",
    ),
    Cause(
        r"undefined reference to|undefined symbol",
        "something declared is defined nowhere",
        "add the source or library that defines it; check that declaration and definition agree",
    ),
    Cause(
        r"Unsupported gpu architecture|is not defined for option 'gpu-architecture'",
        "this nvcc does not know one of the GPU architectures",
        "name others in TORCH_CUDA_ARCH_LIST, or install a newer CUDA toolkit",
    ),
    Cause(
        r"unsupported GNU version|unsupported clang version",
        "this C++ compiler is too new for this nvcc",
        "set CC to an older g++ (nvcc's message says up to which), or install a newer CUDA toolkit",
    ),
    Cause(
        r"failed to map segment from shared object",
        "the cache is on a file system mounted noexec",
        "point JITOPS_CACHE_DIR at one that allows execution",
    ),
    Cause(
        r"GLIBCXX_[\d.]+' not found|CXXABI_[\d.]+' not found",
        "the process runs with an older libstdc++ than the compiler's",
        "use the compiler of the same environment (conda: conda install cxx-compiler)",
    ),
    Cause(
        r"unrecognized command.line option|unknown argument|Unknown option",
        "the compiler does not know one of the flags",
        "remove it from the flags, or use another compiler through CXX",
    ),
)


@dataclass(frozen=True)
class Diagnosis:
    """What a build's output says."""

    error: str
    where: str | None
    source_line: str | None
    cause: str | None
    fix: str | None
    name: str | None = None
    passing: bool = False

    def __str__(self) -> str:
        lines = [f"  {self.where}: {self.error}" if self.where else f"  {self.error}"]
        if self.source_line is not None:
            lines.append(f"      {self.source_line.strip()}")
        if self.cause:
            lines += [f"  cause: {self.cause}", f"  fix:   {self.fix}"]
        else:
            lines.append("  cause: not one of those jitops knows; this is the first error reported")
        return "\n".join(lines)


def all_of(error: BaseException) -> str:
    """What an error says, and its cause after it: there torch keeps the dynamic linker's words."""
    cause = error.__cause__
    return f"{error}\n{cause}" if isinstance(cause, (OSError, ImportError)) else str(error)


def diagnose(output: str, source_line: Callable[[str, int], str | None]) -> Diagnosis:
    """Read a build's output.

    Args:
        output: everything the build printed.
        source_line: gives a line of a file as shipped, or ``None``.
    """
    known = next((cause for cause in CAUSES if re.search(cause.shows, output)), None)
    cause, fix = (known.cause, known.fix) if known else (None, None)
    lines = output.splitlines()
    # What a known cause shows by is the error to quote, where it is not a compiler's own line.
    for line in lines:
        match = _COMPILER_ERROR.match(line)
        if match and (known is None or re.search(known.shows, line) or _is_compilers(known)):
            number = int(match["line"] or match["nvline"])
            return Diagnosis(
                match["text"],
                f"{match['file']}:{number}",
                source_line(match["file"], number),
                cause,
                fix,
            )
    shown = known.shows if known else _OTHER_ERROR.pattern
    first = next((line for line in lines if re.search(shown, line)), None)
    last = next((line for line in reversed(lines) if line.strip()), "(no output)")
    return Diagnosis((first or last).strip(), None, None, cause, fix)


def _is_compilers(cause: Cause) -> bool:
    return "No such file" in cause.shows
