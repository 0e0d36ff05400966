"""Why compiling fails: how each cause shows in a line of the output, what it is, what to do."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

_SHELL = r"^\S+: (?:line )?\d+: (?:exec: )?"
_CUDA = r"(?:cuda|cublas|cufft|cusparse|curand|cusolver|cudnn|nvrtc|nvJitLink|thrust|cub)"


@dataclass(frozen=True)
class Cause:
    """A kind of failure that is known.

    Attributes:
        name: short, and never changed: programs may keep it.
        shows: matches the line of the output that tells.
        cause: what it is.
        fix: what to do.
        passing: it can pass though the sources, flags and tools stay: memory, disks, permissions.
        telling: it counts wherever it shows, also behind errors that come of it.
    """

    name: str
    shows: str
    cause: str
    fix: str
    passing: bool = False
    telling: bool = False

    def shown_by(self, line: str) -> bool:
        """Whether a line of the output tells of it."""
        return _compiled(self.shows).search(line) is not None


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


# Most telling first.
COMPILING = (
    Cause(
        "out_of_memory",
        r"Killed signal terminated program|\bout of memory allocating|error: out of memory$"
        r"|memory exhausted|std::bad_alloc|Cannot allocate memory|^(?:\S+: line \d+: .*)?Killed\b"
        r"|(?:died due to|terminated with) signal 9\b|^FAILED: \[code=137\]"
        r"|error while loading shared libraries: .*failed to map segment",
        "the compiler ran out of memory and was killed",
        "free memory, or run fewer compilers at once: MAX_JOBS=1",
        passing=True,
        telling=True,
    ),
    Cause(
        "disk_full",
        r"No space left on device",
        "the disk is full",
        "free space, or point JITOPS_CACHE_DIR (and TMPDIR) at another disk",
        passing=True,
        telling=True,
    ),
    Cause(
        "quota_exceeded",
        r"Disk quota exceeded",
        "the disk quota is used up",
        "remove files, or point JITOPS_CACHE_DIR (and TMPDIR) at another disk",
        passing=True,
        telling=True,
    ),
    Cause(
        "too_many_processes",
        r"fork: Resource temporarily unavailable",
        "no more processes may be started",
        "end some, run fewer compilers at once (MAX_JOBS=1), or raise the limit (ulimit -u)",
        passing=True,
        telling=True,
    ),
    Cause(
        "killed_by_signal",
        r"(?:Terminated|limit exceeded) signal terminated program",
        "something outside stopped the compiler",
        "try again; look for limits of this shell (ulimit -a) and of the job scheduler",
        passing=True,
        telling=True,
    ),
    Cause(
        "internal_compiler_error",
        r"internal compiler error|died due to signal",
        "the compiler itself crashed",
        "simplify what it was at, lower the -O level, or use another version of it",
        telling=True,
    ),
    Cause(
        "cxx_standard",
        r"#error C\+\+\d\d or later|only available (?:from C\+\+\d\d onwards|with .-std=)"
        r"|/torch/include/.* error: .\w+. is not a member of .std.",
        "the code needs a newer C++ standard than the flags ask for",
        "remove -std=... from the flags: torch names the standard that its headers need",
    ),
    Cause(
        "compiler_too_new",
        r"unsupported (?:GNU|clang) version|installed version of .* is greater than the maximum",
        "this C++ compiler is too new for this nvcc",
        "set CC to an older g++ (the message says up to which), or install a newer CUDA toolkit",
    ),
    Cause(
        "compiler_too_old",
        r"installed version of .* is less than the minimum",
        "this C++ compiler is too old",
        "install a newer one (the message says from which on), and name it in CXX",
    ),
    Cause(
        "cuda_mismatch",
        r"detected CUDA version .*mismatches",
        "nvcc and torch are of different CUDA versions",
        "point CUDA_HOME at the toolkit of torch's CUDA version, or install a torch for this one",
    ),
    Cause(
        "ninja_missing",
        r"Ninja is required",
        "ninja is not installed",
        "install it: pip install ninja",
    ),
    Cause(
        "nvcc_missing",
        _SHELL + r"\S*nvcc: .*not found|CUDA_HOME environment variable is not set",
        "nvcc is not there",
        "install the CUDA toolkit, or point CUDA_HOME at it",
    ),
    Cause(
        "compiler_missing",
        _SHELL + r"\S+: (?:command )?not found|^[^\s/:]+: No such file or directory$",
        "the compiler is not installed",
        "install it (Debian, Ubuntu: apt install g++), or name one that is there in CXX",
    ),
    Cause(
        "compiler_incomplete",
        r"cannot execute .+: (?:execvp|posix_spawnp?): No such file|fatal error: cannot find .ld."
        r"|error while loading shared libraries",
        "a part of the compiler is not installed",
        "install all of it (Debian, Ubuntu: apt install g++ binutils)",
    ),
    Cause(
        "source_missing",
        r"missing and no known rule to make it|^\S*: (?:fatal )?error: \S+\.c\w+: No such file",
        "a source file has disappeared",
        "restore it, or remove it from sources",
    ),
    Cause(
        "python_headers_missing",
        r"Python\.h\b.*(?:: No such file|file not found)",
        "Python's headers are not installed",
        "install them (Debian, Ubuntu: apt install python3-dev)",
    ),
    Cause(
        "cuda_headers_missing",
        rf"fatal error: '?{_CUDA}[\w/]*\.\w+'?(?:: No such file| file not found)",
        "CUDA's headers are not found",
        "pass with_cuda=True, and have the whole CUDA toolkit where CUDA_HOME points",
    ),
    Cause(
        "missing_header",
        r"fatal error: (?:\S+: No such file or directory|'.+' file not found)",
        "a header is missing",
        "check the spelling, and add its folder to extra_include_paths",
    ),
    Cause(
        "unknown_flag",
        r"^[^:]+: error: (?:unrecognized command.line option|unknown argument|unsupported option)"
        r"|^nvcc fatal *: Unknown option",
        "the compiler does not know one of the flags",
        "remove it from the flags, or use another compiler through CXX",
    ),
    Cause(
        "gpu_architecture",
        r"Unsupported gpu architecture|Unknown CUDA arch",
        "this nvcc does not know one of the GPU architectures",
        "name others in TORCH_CUDA_ARCH_LIST, or use a newer CUDA toolkit (for an old GPU, older)",
    ),
    Cause(
        "too_much_shared_memory",
        r"uses too much shared data",
        "a kernel declares more shared memory than a block can have",
        "declare less, or allot it at the launch (extern __shared__, cudaFuncSetAttribute)",
    ),
    Cause(
        "undefined_device_function",
        r"Unresolved extern function",
        "a kernel calls a device function that its own file does not define",
        "define it in that .cu file, or in a header that it includes",
    ),
    Cause(
        "unknown_instruction",
        r"Error: no such instruction",
        "the assembler does not know an instruction",
        "mend the asm statement; without one, lower -march or install newer binutils",
    ),
    Cause(
        "read_only",
        r"Read-only file system",
        "the file system is mounted read-only",
        "point JITOPS_CACHE_DIR (and TMPDIR) at one that can be written",
        passing=True,
    ),
    Cause(
        "permission_denied",
        r"Permission denied",
        "a file may not be read, written or run by this user",
        "look at its owner and mode, and at those of its folders",
        passing=True,
    ),
)

ENCODING = Cause(
    "encoding",
    r"stray .\\37[67]. in program|\ufeff|<U\+FEFF>|byte order mark detected",
    "the file is in UTF-16 or UTF-32, or has a byte-order mark (U+FEFF) where text is",
    "save it as UTF-8 without the mark; read text with encoding='utf-8-sig', which drops it",
)

# Where nothing above fits, and a compiler points at a line of a source.
SOURCE_ERROR = Cause(
    "source_error",
    "",
    "the source has an error",
    "mend the line shown",
)
MISUSED_HEADER = Cause(
    "source_error",
    "",
    "the source has an error, which shows only in a header that it uses",
    "mend the line shown, which is the source's; the header needs no change",
)
