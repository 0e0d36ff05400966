"""Why linking and loading fail, in the same words."""

from __future__ import annotations

import torch

from ops.jit._compile._causes import Cause

_SYMBOL = (
    r"undefined (?:symbol: |reference to )[`'‘]?(?:(?:vtable|VTT|typeinfo|typeinfo name) for )?"
)
_TORCHS = _SYMBOL + r"(?:(?:[\w:<>*&]+ ){0,2}(?:c10|at|torch)::|_ZN[VK]*(?:3c10|2at|5torch))"
# A string as C++ compilers name it, in the ABI that torch is not built with.
_OTHER_STRING = (
    r"(?:.*\bstd::(?:string|basic_string<)|\w*RKSs)"
    if torch.compiled_with_cxx11_abi()
    else r".*(?:__cxx11|\[abi:cxx11\]|B5cxx11)"
)

# Most telling first.
LINKING = (
    Cause(
        "missing_library",
        r"cannot find -l|unable to find library -l"
        r"|^\S*: (?:error: |cannot find )\S+\.(?:a|o|so[.\d]*): No such file",
        "a library to link against is missing",
        "install it, or add its folder as extra_ldflags=['-L...']; one that is named as skipped "
        "is for another architecture",
    ),
    Cause(
        "not_position_independent",
        r"recompile with -fPIC",
        "an object is not compiled for use in a shared library",
        "compile it with -fPIC, and remove -fno-PIC from the flags",
    ),
    Cause(
        "wrong_architecture",
        r"file in wrong format|^\S*\bld\S*: .* is incompatible with|unsupported ELF machine"
        r"|wrong ELF class",
        "an object or library is for another kind of processor",
        "build it anew for this machine, or link the one that is made for it",
    ),
    Cause(
        "not_an_object",
        r"file format not recognized",
        "a file to link is neither an object nor a library",
        "look at what it holds: half a download, or the note that git-lfs keeps in its place?",
    ),
    Cause(
        "multiple_definition",
        r"multiple definition of|duplicate symbol",
        "something is defined in more than one place",
        "keep one definition; in a header, make it inline; do not compile the same file twice",
    ),
    Cause(
        "wrong_abi",
        _TORCHS + _OTHER_STRING,
        "it is compiled for another C++ ABI (of std::string) than torch",
        "remove -D_GLIBCXX_USE_CXX11_ABI from the flags: torch sets it; build the libraries that "
        "it links with torch's",
    ),
    Cause(
        "other_torch",
        _TORCHS,
        "it needs a part of torch that this torch does not have: it is made for another one",
        "let no extra_include_paths lead to another torch, and build the libraries that it links "
        "for this one",
    ),
    Cause(
        "other_python",
        _SYMBOL + r"_?Py[A-Z_]\w+",
        "it needs a part of Python that this Python does not have: it is made for another one",
        "let no extra_include_paths lead to another Python's headers",
    ),
    Cause(
        "cuda_newer_than_torchs",
        r"undefined symbol: \w+, version libcud\w+\.so",
        "nvcc is newer than the CUDA runtime that torch has loaded",
        "build with the nvcc of torch's CUDA release (torch.version.cuda), by CUDA_HOME, or "
        "install a torch for the newer CUDA",
    ),
    Cause(
        "cuda_library_not_linked",
        _SYMBOL + r"_*(?:cuda|cublas|cufft|cusparse|curand|cusolver|cudnn|nvrtc)[A-Z]\w*'?$",
        "a library of CUDA is used and not linked",
        "link it, as in extra_ldflags=['-lcublas']; for cuda... functions, pass with_cuda=True",
    ),
    Cause(
        "undefined_symbol",
        r"\.so\S*: undefined symbol: ",
        "something declared is defined nowhere",
        "add the source or library that defines it; check that declaration and definition agree",
    ),
    Cause(
        "undefined_reference",
        r"undefined reference to|undefined symbol",
        "something declared is defined nowhere",
        "add the source or library that defines it; check that declaration and definition agree",
    ),
)

LOADING = (
    Cause(
        "cannot_be_withdrawn",
        r"^loading it would (?:end the process: .{1,60} in|not end:) the older version's ",
        "code of the version that it replaces, which runs when that is withdrawn or put back, does "
        "not come back",
        "start a new process: in this one, what was loaded before stays in force",
    ),
    Cause(
        "ends_the_process",
        r"^loading it would end the process: .*(?:terminate called after throwing|uncaught exc)",
        "an exception leaves one of its static initialisers: a schema or a registration that torch "
        "refuses, or one of the source's own",
        "mend what it says; what was loaded before is still in force",
    ),
    Cause(
        "dies_while_loading",
        r"^loading it would end the process: ",
        "code that runs when it is loaded ends the process in the way that is said: a static "
        "initialiser, or what one calls",
        "mend that code; what was loaded before is still in force",
    ),
    Cause(
        "hangs_while_loading",
        r"^loading it would not end: ",
        "code that runs when it is loaded goes on for ever, or waits for what does not come",
        "mend that code, or start a new process, where a first load is not tried; what was loaded "
        "before is still in force",
    ),
    Cause(
        "too_many_open_files",
        r"Too many open files",
        "this process has as many files open as it may",
        "close some, or raise the limit (ulimit -n)",
        passing=True,
    ),
    Cause(
        "noexec",
        r"failed to map segment from shared object",
        "the cache is on a file system mounted noexec",
        "point JITOPS_CACHE_DIR at one that allows execution",
        passing=True,
    ),
    Cause(
        "static_tls",
        r"cannot allocate memory in static TLS block",
        "too many thread-local variables of one kind are loaded",
        "load this extension first, or compile it and what it links without initial-exec TLS",
    ),
    Cause(
        "libstdcxx_too_old",
        r"(?:GLIBCXX|CXXABI)_[\d.]+' not found",
        "the process runs with an older libstdc++ than the compiler's",
        "use the compiler of the same environment (conda: conda install cxx-compiler)",
    ),
    Cause(
        "glibc_too_old",
        r"GLIBC_[\d.]+' not found",
        "it is made for a newer system (glibc) than this one",
        "build it, and the libraries that it links, on the oldest system where it shall run",
    ),
    Cause(
        "cuda_library_missing",
        r"lib(?:cu|nv)\w+\.so[.\d]*: cannot open shared object file",
        "a library of CUDA that it links is not found, or not in this version",
        "install the CUDA toolkit it was linked with, or name its folder in LD_LIBRARY_PATH",
    ),
    Cause(
        "shared_library_missing",
        r"cannot open shared object file",
        "a library that it links is not found when it is loaded",
        "install it, or name its folder: extra_ldflags=['-Wl,-rpath,...'] or LD_LIBRARY_PATH",
    ),
    Cause(
        "no_init_function",
        r"does not define module export function",
        "it is not a Python module of this name",
        "name it by the macro, PYBIND11_MODULE(TORCH_EXTENSION_NAME, m), or pass "
        "is_python_module=False",
    ),
    Cause(
        "registered_twice",
        r"type \".*\" is already registered",
        "a C++ class is bound to Python twice in this process",
        "bind it once, or give pybind11::class_ the argument pybind11::module_local()",
    ),
)
