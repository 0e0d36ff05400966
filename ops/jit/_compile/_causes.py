"""Why builds and loads fail: how each cause shows in a line of the output, and what to do."""

from dataclasses import dataclass

import torch

_CUDA = r"(?:cuda|cublas|cufft|cusparse|curand|cusolver|cudnn|nvrtc|nvJitLink|thrust|cub)"
_SYMBOL = (
    r"undefined (?:symbol: |reference to )[`'‘]?(?:(?:vtable|VTT|typeinfo|typeinfo name) for )?"
)


@dataclass(frozen=True)
class Cause:
    """A known kind of failure."""

    name: str  # short, and never changed, because programs may keep it
    pattern: str  # of a line of the output that tells of it
    cause: str
    fix: str
    of_machine: bool = False  # at no line in particular; other errors may follow from it


# The first that matches a line counts.
# fmt: off
CAUSES = (
    Cause("out_of_memory",
        r"Killed signal terminated program|\bout of memory allocating|error: out of memory$"
        r"|memory exhausted|std::bad_alloc|Cannot allocate memory|^(?:\S+: line \d+: .*)?Killed\b"
        r"|(?:died due to|terminated with) signal 9\b|^FAILED: \[code=137\]"
        r"|error while loading shared libraries: .*failed to map segment",
        "the compiler ran out of memory and was killed",
        "free memory, or run fewer compilers at once: MAX_JOBS=1", of_machine=True),
    Cause("disk_full", r"No space left on device|Disk quota exceeded",
        "the disk is full, or the disk quota is used up",
        "free space, or point JITOPS_CACHE_DIR (and TMPDIR) at another disk", of_machine=True),
    Cause("killed_by_signal",
        r"(?:Terminated|limit exceeded) signal terminated program|fork: Resource temporarily",
        "something outside stopped the compiler, or allows no more processes",
        "try again; look for limits of this shell (ulimit -a) and of the job scheduler",
        of_machine=True),
    Cause("internal_compiler_error", r"internal compiler error|died due to signal",
        "the compiler itself crashed",
        "simplify the code there, lower the -O level, or use another version of the compiler"),
    Cause("undeclared_function",
        r"\.functions:\d+:.* (?:not (?:been )?declared|undeclared|not a member|no member)",
        "functions names something that is not declared in cpp_sources",
        "mend the name, or declare it there: a prototype will do for one of cuda_sources"),
    Cause("linker_too_old", r"(?:unrecognized option|unknown (?:option|argument)).*dependency-file",
        "the linker cannot report which files it reads, so that nobody could tell when one changes",
        "install binutils 2.35 or newer, or lld with the flag -fuse-ld=lld in extra_ldflags"),
    Cause("cxx_standard",
        r"#error C\+\+\d\d or later|only available (?:from C\+\+\d\d onwards|with .-std=)"
        r"|/torch/include/.* error: .\w+. is not a member of .std.",
        "the code needs a newer C++ standard than the flags ask for",
        "remove -std=... from the flags: torch names the standard that its headers need"),
    Cause("compiler_too_new", r"unsupported (?:GNU|clang) version",
        "this C++ compiler is too new for this nvcc",
        "set CC to an older g++ (the message says up to which), or install a newer CUDA toolkit"),
    Cause("compiler_missing",
        r"^\S+: (?:line )?\d+: (?:exec: )?\S+: (?:command )?not found"
        r"|^[^\s/:]+: No such file or directory$|CUDA_HOME environment variable is not set"
        r"|cannot execute .+: (?:execvp|posix_spawnp?): No such file|fatal error: cannot find .ld."
        r"|error while loading shared libraries",
        "the compiler, or a part of it, is not installed",
        "install all of it (Debian, Ubuntu: apt install g++ binutils; nvcc: the CUDA toolkit), or "
        "name one that is there in CXX, CC or CUDA_HOME"),
    Cause("python_headers_missing", r"Python\.h\b.*(?:: No such file|file not found)",
        "Python's headers are not installed",
        "install them (Debian, Ubuntu: apt install python3-dev)"),
    Cause("torch_without_cuda", r"(?:c10/cuda|ATen/cuda|torch/csrc/cuda)/\S+: No such file"
        r"|/include/(?:c10|ATen)/cuda/.*error: '?(?:cuda|c10/cuda/impl)[\w/]*\.h"
        if torch.version.cuda is None
        else r"(?!)",
        f"the source needs CUDA, and this torch ({torch.__version__}) is built without CUDA",
        "install a torch with CUDA, or leave its CUDA headers out where it has none"),
    Cause("cuda_headers_missing",
        rf"fatal error: '?{_CUDA}[\w/]*\.\w+'?(?:: No such file| file not found)",
        "CUDA's headers are not found",
        "pass with_cuda=True, and have the whole CUDA toolkit where CUDA_HOME points"),
    Cause("missing_header",
        r"fatal error: (?:(?!\S+\.c\w*:)\S+: No such file or directory|'.+' file not found)",
        "a header is missing",
        "check the spelling, and add its folder to extra_include_paths"),
    Cause("unknown_flag",
        r"^[^:]+: error: (?:unrecognized command.line option|unknown argument|unsupported option)"
        r"|^nvcc fatal *: Unknown option",
        "the compiler does not know one of the flags",
        "remove it from the flags, or use another compiler through CXX"),
    Cause("gpu_architecture", r"Unsupported gpu architecture|Unknown CUDA arch",
        "this nvcc does not know one of the GPU architectures",
        "name others in TORCH_CUDA_ARCH_LIST, or use a newer CUDA toolkit (for an old GPU, older)"),
    Cause("permission_denied", r"Permission denied|Read-only file system",
        "a file or folder may not be read, written or run by this user",
        "look at its owner and mode, or point JITOPS_CACHE_DIR (and TMPDIR) at another folder"),
    Cause("missing_library", r"cannot find -l|unable to find library -l"
        r"|^\S*: (?:error: |cannot find )\S+\.(?:a|o|so[.\d]*): No such file",
        "a library to link against is missing",
        "install it, or add its folder as extra_ldflags=['-L...']; one that is named as skipped "
        "is for another architecture"),
    Cause("wrong_architecture",
        r"file in wrong format|^\S*\bld\S*: .* is incompatible with|unsupported ELF machine"
        r"|wrong ELF class|file format not recognized",
        "a file to link is for another kind of processor, or no object at all",
        "build it anew for this machine, and see that it is neither half a download nor the note "
        "that git-lfs keeps in its place"),
    Cause("multiple_definition", r"multiple definition of|duplicate symbol",
        "something is defined in more than one place",
        "keep one definition; in a header, make it inline; do not compile the same file twice"),
    Cause("other_torch", _SYMBOL
        + r"(?:(?:[\w:<>*&]+ ){0,2}(?:c10|at|torch)::|_Z(?:T[ISTV])?N[VK]*(?:3c10|2at|5torch))",
        "it needs a part of torch that this torch does not have: it is made for another one, or "
        "for another C++ ABI (of std::string)",
        "let no extra_include_paths lead to another torch; remove -D_GLIBCXX_USE_CXX11_ABI from "
        "the flags; build the libraries that it links for this torch"),
    Cause("cuda_newer_than_torchs", r"undefined symbol: \w+, version libcud\w+\.so",
        "nvcc is newer than the CUDA runtime that torch has loaded",
        "build with the nvcc of torch's CUDA release (torch.version.cuda), by CUDA_HOME, or "
        "install a torch for the newer CUDA"),
    Cause("cuda_library_not_linked", rf"{_SYMBOL}_*{_CUDA}[A-Z]\w*'?$",
        "a library of CUDA is used and not linked",
        "link it, as in extra_ldflags=['-lcublas']; for cuda... functions, pass with_cuda=True"),
    Cause("undefined_reference", r"undefined reference to|undefined symbol",
        "something declared is defined nowhere",
        "add the source or library that defines it; check that declaration and definition agree"),
    Cause("system_too_old", r"(?:GLIBCXX|CXXABI|GLIBC)_[\d.]+' not found",
        "this process has an older libstdc++, or glibc, than the one that it was built with",
        "use the compiler of the same environment (conda: conda install cxx-compiler), and build "
        "on the oldest system where it shall run"),
    Cause("shared_library_missing", r"cannot open shared object file: No such",
        "a library that it links is not found when it is loaded",
        "install it, or name its folder: extra_ldflags=['-Wl,-rpath,...'] or LD_LIBRARY_PATH; if "
        "a newer version has replaced it, link anew: jitops cache clean"),
    Cause("no_init_function", r"does not define module export function",
        "it is not a Python module of this name",
        "name it by the macro, PYBIND11_MODULE(TORCH_EXTENSION_NAME, m), or pass "
        "is_python_module=False"),
)
# fmt: on

# Where nothing above fits: a compiler points at a line of a source, or it does not.
SOURCE_ERROR = Cause("source_error", "(?!)", "the source has an error", "mend the line shown")
UNKNOWN = Cause("unknown", "(?!)", "not one of those that jitops knows", "")
