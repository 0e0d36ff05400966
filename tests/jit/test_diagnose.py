"""What is read from the logs of failed builds: real ones, see logs/README.md."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path

import pytest
import torch

import ops
from ops.jit import load, load_inline
from ops.jit._compile._causes import CAUSES
from ops.jit._compile._diagnostics import diagnose

LOGS = Path(__file__).parent / "logs"
USER = "/home/user/project"
TORCH = "/home/user/venv/lib/python3.11/site-packages/torch/include"
GCC = "/usr/include/c++/12/bits"
CUDA = "/usr/local/cuda-13.0/include/cccl"
CLANG = "/usr/lib/gcc/x86_64-linux-gnu/12/../../../../include/c++/12/bits"

# Names are kept by programs: one may be added here, none changed.
PHRASES = {
    "cuda_newer_than_torchs": ("nvcc is newer than the CUDA runtime", "torch.version.cuda"),
    "out_of_memory": ("ran out of memory", "MAX_JOBS=1"),
    "disk_full": ("the disk is full", "JITOPS_CACHE_DIR (and TMPDIR)"),
    "killed_by_signal": ("something outside stopped the compiler", "ulimit -a"),
    "internal_compiler_error": ("the compiler itself crashed", "another version"),
    "cxx_standard": ("a newer C++ standard", "remove -std="),
    "compiler_too_new": ("too new for this nvcc", "set CC to an older g++"),
    "compiler_missing": ("the compiler, or a part of it, is not installed", "apt install g++"),
    "python_headers_missing": ("Python's headers", "apt install python3-dev"),
    "torch_without_cuda": ("is built without CUDA", "a torch with CUDA"),
    "undeclared_function": ("functions names something", "a prototype will do"),
    "linker_too_old": ("cannot report which files it reads", "binutils 2.35"),
    "cuda_headers_missing": ("CUDA's headers", "with_cuda=True"),
    "missing_header": ("a header is missing", "extra_include_paths"),
    "unknown_flag": ("does not know one of the flags", "remove it"),
    "gpu_architecture": ("one of the GPU architectures", "TORCH_CUDA_ARCH_LIST"),
    "permission_denied": ("by this user", "owner and mode"),
    "missing_library": ("a library to link against is missing", "extra_ldflags=['-L...']"),
    "wrong_architecture": ("another kind of processor, or no object", "build it anew"),
    "multiple_definition": ("in more than one place", "inline"),
    "other_torch": ("made for another one", "-D_GLIBCXX_USE_CXX11_ABI"),
    "cuda_library_not_linked": ("is used and not linked", "-lcublas"),
    "undefined_reference": ("defined nowhere", "declaration and definition agree"),
    "system_too_old": ("an older libstdc++, or glibc", "conda install cxx-compiler"),
    "shared_library_missing": ("not found when it is loaded", "-rpath"),
    "no_init_function": ("not a Python module of this name", "TORCH_EXTENSION_NAME"),
    "source_error": ("the source has an error", "mend the line shown"),
}

# log: (name, where, the error's first words or, after an ellipsis, its last).
EXPECTED = {
    "out_of_memory": (
        "out_of_memory",
        None,
        "c++: fatal error: Killed signal terminated program cc1plus",
    ),
    "out_of_memory_cicc": ("out_of_memory", None, "Killed"),
    "out_of_memory_linker": ("out_of_memory", None, "/usr/bin/ld:"),
    "out_of_memory_malloc": (
        "out_of_memory",
        None,
        "cc1plus: out of memory allocating 110414 bytes after a total of 774144 bytes",
    ),
    "out_of_memory_mapped": (
        "out_of_memory",
        None,
        "/usr/lib/gcc/x86_64-linux-gnu/12/cc1plus: error while loading shared",
    ),
    "out_of_memory_nvcc": ("out_of_memory", None, "out of memory"),
    "out_of_memory_virtual": (
        "out_of_memory",
        None,
        "virtual memory exhausted: Cannot allocate memory",
    ),
    "disk_full": (
        "disk_full",
        None,
        "error writing to /home/user/tmp/ccVjQni8.s: No space left on device",
    ),
    "disk_full_assembler": (
        "disk_full",
        None,
        "/tmp/ccD8YUYN.s: Fatal error: big.o: No space left on device",
    ),
    "disk_full_linker": (
        "disk_full",
        None,
        "/usr/bin/ld: final link failed: No space left on device",
    ),
    "quota_exceeded": (
        "disk_full",
        None,
        "error writing to /home/user/tmp/ccnsP0rE.s: Disk quota exceeded",
    ),
    "too_many_processes": ("killed_by_signal", None, "c++: fatal error: cannot execute"),
    "killed_by_signal": (
        "killed_by_signal",
        None,
        "c++: fatal error: Terminated signal terminated program cc1plus",
    ),
    "killed_by_signal_size": (
        "killed_by_signal",
        None,
        "c++: internal compiler error: File size limit exceeded signal terminated program cc1plus",
    ),
    "killed_by_signal_time": (
        "killed_by_signal",
        None,
        "c++: internal compiler error: CPU time limit exceeded signal terminated program cc1plus",
    ),
    "internal_compiler_error": (
        "internal_compiler_error",
        f"{USER}/slow.cpp:2 (reported in {GCC}/regex_automaton.h:243)",
        "internal compiler error: Segmentation fault",
    ),
    "internal_compiler_error_driver": (
        "internal_compiler_error",
        None,
        "c++: internal compiler error: Segmentation fault signal terminated program cc1plus",
    ),
    "cxx_standard": (
        "cxx_standard",
        f"{USER}/std3.cpp:1 (reported in {TORCH}/torch/csrc/api/include/torch/all.h:5)",
        "#error C++17 or later compatible compiler is required to use PyTorch.",
    ),
    "cxx_standard_c10": (
        "cxx_standard",
        f"{USER}/std2.cpp:1 (reported in {TORCH}/c10/util/StringUtil.h:65)",
        "‘is_enum_v’ is not a member of ‘std’; did you mean ‘is_enum’?",
    ),
    "cxx_standard_note": (
        "cxx_standard",
        f"{USER}/opt.cpp:3",
        "‘optional’ is not a member of ‘std’",
    ),
    "cxx_standard_werror": (
        "cxx_standard",
        f"{USER}/ns.cpp:2",
        "‘if constexpr’ only available with ‘-std=c++17’ or ‘-std=gnu++17’",
    ),
    "compiler_too_new": (
        "compiler_too_new",
        "/usr/local/cuda/include/crt/host_config.h:137",
        "#error -- unsupported GNU version! gcc versions later than 15 are not",
    ),
    "nvcc_missing": ("compiler_missing", None, "/bin/sh: 1: /opt/cuda-9/bin/nvcc: not found"),
    "compiler_missing": ("compiler_missing", None, "/bin/sh: 1: c++-99: not found"),
    "compiler_missing_bash": (
        "compiler_missing",
        None,
        "/bin/sh: line 1: c++-99: command not found",
    ),
    "compiler_missing_nvcc": ("compiler_missing", None, "g++-98: No such file or directory"),
    "compiler_incomplete": (
        "compiler_missing",
        None,
        "c++: fatal error: cannot execute ‘cc1plus’: execvp: No such file or directory",
    ),
    "compiler_incomplete_ld": (
        "compiler_missing",
        None,
        "collect2: fatal error: cannot find ‘ld’",
    ),
    "compiler_incomplete_library": (
        "compiler_missing",
        None,
        "/home/user/bin/broken: error while loading shared libraries: libgone.so.1:",
    ),
    "source_missing_gcc": (
        None,
        None,
        "cc1plus: fatal error: /home/user/project/nowhere2.cpp: No such file or directory",
    ),
    "python_headers_missing": (
        "python_headers_missing",
        f"{USER}/python_h.cpp:1",
        "Python.h: No such file or directory",
    ),
    "cuda_headers_missing": (
        "cuda_headers_missing",
        f"{USER}/cudastream.cpp:1 (reported in {TORCH}/c10/cuda/CUDAStream.h:4)",
        "cuda_runtime_api.h: No such file or directory",
    ),
    "missing_header": (
        "missing_header",
        f"{USER}/missing_header.cpp:2",
        "no_such_header.h: No such file or directory",
    ),
    "missing_header_clang": (
        "missing_header",
        f"{USER}/missing_header.cpp:2",
        "'no_such_header.h' file not found",
    ),
    "unknown_flag": (
        "unknown_flag",
        None,
        "c++: error: unrecognized command-line option ‘--no-such-flag’; did you",
    ),
    "unknown_flag_clang": (
        "unknown_flag",
        None,
        "clang: error: unsupported option '--no-such-flag'",
    ),
    "unknown_flag_nvcc": ("unknown_flag", None, "nvcc fatal   : Unknown option '--no-such-flag'"),
    "gpu_architecture": (
        "gpu_architecture",
        None,
        "nvcc fatal   : Unsupported gpu architecture 'compute_52'",
    ),
    "too_much_shared_memory": (
        None,
        None,
        "ptxas error   : Entry function '_Z1kPf' uses too much shared",
    ),
    "undefined_device_function": (
        None,
        None,
        "ptxas fatal   : Unresolved extern function '_Z5otherf'",
    ),
    "unknown_instruction": (
        "source_error",
        f"{USER}/asm.cpp:2",
        "no such instruction: `no_such_instruction'",
    ),
    "read_only": (
        "permission_denied",
        None,
        "[Errno 30] Read-only file system: '/home/user/.cache/jitops/lock'",
    ),
    "permission_denied": (
        "permission_denied",
        f"{USER}/inc.cpp:1",
        "/home/user/project/secret.h: Permission denied",
    ),
    "permission_denied_python": ("permission_denied", None, "[Errno 13] Permission denied:"),
    "german_linker": (
        "missing_library",
        None,
        "/usr/bin/ld: cannot find -lno_such_library: Datei oder Verzeichnis nicht gefunden",
    ),
    "missing_library": (
        "missing_library",
        None,
        "/usr/bin/ld: cannot find -lno_such_library: No such file or directory",
    ),
    "missing_library_file": (
        "missing_library",
        None,
        "/usr/bin/ld: cannot find /home/user/project/no_such.a: No such file or directory",
    ),
    "missing_library_lld": (
        "missing_library",
        None,
        "ld.lld: error: unable to find library -lno_such_library",
    ),
    "missing_library_skipped": (
        "missing_library",
        None,
        "/usr/bin/ld: cannot find -lother: No such file or directory",
    ),
    "not_position_independent": (
        None,
        None,
        "/usr/bin/ld: /home/user/project/libnopic.a(nopic.o): relocation",
    ),
    "not_position_independent_gold": (
        None,
        None,
        "/usr/bin/ld.gold: error: nopic.o: requires dynamic R_X86_64_PC32 reloc",
    ),
    "not_position_independent_lld": (
        None,
        None,
        "ld.lld: error: relocation R_X86_64_32S cannot be used against symbol",
    ),
    "wrong_architecture": (
        "wrong_architecture",
        None,
        "/usr/bin/ld: /home/user/project/arm.o: error adding symbols: file in wrong format",
    ),
    "wrong_architecture_32": (
        "wrong_architecture",
        None,
        "/usr/bin/ld: i386 architecture of input file `/home/user/project/m32.o' is",
    ),
    "wrong_architecture_gold": (
        "wrong_architecture",
        None,
        "/usr/bin/ld.gold: fatal error: /home/user/project/arm.o: unsupported ELF",
    ),
    "wrong_architecture_lld": (
        "wrong_architecture",
        None,
        "ld.lld: error: /home/user/project/arm.o is incompatible with elf64-x86-64",
    ),
    "wrong_architecture_loaded": ("wrong_architecture", None, "... wrong ELF class: ELFCLASS32"),
    "not_an_object": (
        "wrong_architecture",
        None,
        "/usr/bin/ld:/home/user/project/hello.o: file format not recognized;",
    ),
    "multiple_definition": (
        "multiple_definition",
        None,
        "/usr/bin/ld: two.o:(.bss+0x0): multiple definition of `shared_counter';",
    ),
    "multiple_definition_gold": (
        "multiple_definition",
        None,
        "/usr/bin/ld.gold: error: two.o: multiple definition of 'shared_counter'",
    ),
    "multiple_definition_lld": (
        "multiple_definition",
        None,
        "ld.lld: error: duplicate symbol: bump()",
    ),
    "wrong_abi": (
        "other_torch",
        None,
        "... undefined symbol: _ZN3c106detail14torchCheckFailEPKcS2_jRKSs",
    ),
    "wrong_abi_link": ("other_torch", None, "abi.cpp:(.text+0x59): undefined reference to"),
    "other_torch": (
        "other_torch",
        None,
        "... undefined symbol: _ZN3c107Warning4warnEi",
    ),
    "other_python": ("undefined_reference", None, "... undefined symbol: PyDict_GetItemStringRef"),
    "cuda_newer_than_torchs": (
        "cuda_newer_than_torchs",
        None,
        "... undefined symbol: cudaGetDriverEntryPointByVersion2, version libcudart.so.13",
    ),
    "cuda_library_not_linked": (
        "cuda_library_not_linked",
        None,
        "... undefined symbol: cudaRuntimeGetVersion",
    ),
    "undefined_symbol": (
        "undefined_reference",
        None,
        "... undefined symbol: _Z7missingiPf",
    ),
    "undefined_reference": (
        "undefined_reference",
        None,
        "undef.cpp:(.text+0xf): undefined reference to `missing(int, float*)'",
    ),
    "undefined_reference_debug": (
        "undefined_reference",
        f"{USER}/undef.cpp:2",
        "undefined reference to `missing(int, float*)'",
    ),
    "undefined_reference_gold": (
        "undefined_reference",
        None,
        "undef.o:undef.cpp:function answer(): error: undefined reference to",
    ),
    "undefined_reference_lld": (
        "undefined_reference",
        None,
        "ld.lld: error: undefined symbol: missing(int, float*)",
    ),
    "noexec": (None, None, "... failed to map segment from shared object"),
    "noexec_module": (None, None, "... failed to map segment from shared object"),
    "static_tls": (None, None, "... cannot allocate memory in static TLS block"),
    "libstdcxx_too_old": (
        "system_too_old",
        None,
        "/lib/x86_64-linux-gnu/libstdc++.so.6: version `GLIBCXX_3.4.99' not found",
    ),
    "libstdcxx_too_old_cxxabi": (
        "system_too_old",
        None,
        "/lib/x86_64-linux-gnu/libstdc++.so.6: version `CXXABI_9.9' not found",
    ),
    "glibc_too_old": (
        "system_too_old",
        None,
        "/lib/x86_64-linux-gnu/libc.so.6: version `GLIBC_2.9.9' not found (required",
    ),
    "cuda_library_missing": (
        "shared_library_missing",
        None,
        "libcudart.so.13: cannot open shared object file: No such file or directory",
    ),
    "shared_library_missing": (
        "shared_library_missing",
        None,
        "libother.so.1: cannot open shared object file: No such file or directory",
    ),
    "no_init_function": (
        "no_init_function",
        None,
        "dynamic module does not define module export function (PyInit_my_ext)",
    ),
    "encoding_utf16": ("source_error", f"{USER}/utf16.cpp:1", "stray ‘\\377’ in program"),
    "encoding_mark": ("source_error", f"{USER}/mark.cpp:2", "‘\ufeffint’ does not name a type"),
    "colours": ("source_error", f"{USER}/syntax.cpp:6", "‘nowhere’ was not declared in this scope"),
    "misused_header": (
        "source_error",
        f"{USER}/inst.cpp:5 (reported in {GCC}/stl_algo.h:1938)",
        "no match for ‘operator-’ (operand types are ‘std::_List_iterator<int>’ and",
    ),
    "misused_header_after_warnings": (
        "source_error",
        f"{USER}/warn_inst.cpp:7 (reported in {GCC}/stl_algo.h:1938)",
        "no match for ‘operator-’ (operand types are ‘std::_List_iterator<int>’ and",
    ),
    "misused_header_clang": (
        "source_error",
        f"{USER}/inst.cpp:5 (reported in {CLANG}/stl_algo.h:1938)",
        "invalid operands to binary expression ('std::_List_iterator<int>' and",
    ),
    "misused_header_nvcc": (
        "source_error",
        f"{USER}/thr.cu:6 (reported in {CUDA}/cuda/std/__functional/operations.h:352)",
        'no operator "<" matches these operands',
    ),
    "misused_header_torch": (
        "source_error",
        f"{USER}/required.cpp:4 (reported in {GCC}/stl_algobase.h:1161)",
        "no match for ‘operator==’ (operand types are ‘const Opaque’ and ‘const Opaque’)",
    ),
    "own_template_nvcc": (
        "source_error",
        f"{USER}/tmpl.cuh:2",
        'expression must have class type but it has type "float"',
    ),
    "source_error": (
        "source_error",
        f"{USER}/syntax.cpp:6",
        "‘nowhere’ was not declared in this scope",
    ),
    "source_error_clang": (
        "source_error",
        f"{USER}/syntax.cpp:6",
        "use of undeclared identifier 'nowhere'",
    ),
    "source_error_clang_narrowing": (
        "source_error",
        f"{USER}/narrow.cpp:1",
        "type 'double' cannot be narrowed to 'int' in initializer list [-Wc++11-narrowing]",
    ),
    "source_error_incompatible": (
        "source_error",
        f"{USER}/incompat.cu:3",
        'argument of type "float *" is incompatible with parameter of type "int *"',
    ),
    "source_error_misleading": (
        "source_error",
        f"{USER}/clean.cpp:4",
        "‘nowhere’ was not declared in this scope",
    ),
    "source_error_misleading_clang": (
        "source_error",
        f"{USER}/clean.cpp:4",
        "use of undeclared identifier 'nowhere'",
    ),
    "source_error_non_utf8": (
        "source_error",
        f"{USER}/latin.cpp:2",
        "‘nowhere’ was not declared in this scope",
    ),
    "source_error_nvcc": ("source_error", f"{USER}/kernel.cu:6", 'identifier "count" is undefined'),
    "source_error_own_header": (
        "source_error",
        f"{USER}/include/helper.h:2",
        "‘undefined_name’ was not declared in this scope",
    ),
    "two_units": (
        "source_error",
        f"{USER}/syntax.cpp:6",
        "‘nowhere’ was not declared in this scope",
    ),
}


def text_of(log):
    return (LOGS / f"{log}.log").read_bytes().decode(errors="replace")


def no_line(file, number):
    return None


def read(output):
    return diagnose(output, lambda file, number: f"  line {number} of {file}")


@pytest.mark.parametrize("log", EXPECTED)
def test_real_logs(log):
    name, where, error = EXPECTED[log]
    if log == "cuda_headers_missing" and torch.version.cuda is None:
        name = "torch_without_cuda"
    found = read(text_of(log))
    assert found.cause.name == (name or "unknown")
    assert found.where == where
    if error.startswith("... "):
        assert found.error.endswith(error[4:])
    else:
        assert found.error.startswith(error)
    if name:
        cause, fix = PHRASES[name]
        assert cause in found.cause.cause
        assert fix in found.cause.fix


def test_every_log_is_tested_and_every_cause_has_one():
    assert {path.stem for path in LOGS.glob("*.log")} == set(EXPECTED)
    assert {cause.name for cause in CAUSES} | {"source_error"} == set(PHRASES)
    shown_below = {"torch_without_cuda", "linker_too_old", "undeclared_function"}
    assert set(PHRASES) == {name for name, *_ in EXPECTED.values()} - {None} | shown_below
    assert len({cause.name for cause in CAUSES}) == len(CAUSES)


@pytest.mark.parametrize("log", EXPECTED)
def test_logs_name_no_machine(log):
    assert not re.search(r"/root|/work|/tmp/(?!cc)", text_of(log))


# ---- the line shown


@pytest.mark.parametrize("log", ["source_error", "source_error_clang", "colours"])
def test_warnings_are_no_errors(log):
    assert ": warning: " in re.sub(r"\x1b\[[^mK]*[mK]", "", text_of(log)).split("nowhere")[0]
    found = read(text_of(log))
    assert found.where == f"{USER}/syntax.cpp:6"
    assert found.source_line == f"  line 6 of {USER}/syntax.cpp"


def test_colours_change_nothing():
    assert "\x1b[" in text_of("colours")
    assert read(text_of("colours")) == read(text_of("source_error"))


def test_hyperlinks_are_removed():
    """As with -fdiagnostics-urls=always, written here by hand."""
    link = "\x1b]8;;https://gcc.gnu.org/x\x07-Wformat=\x1b]8;;\x07"
    found = read(f"a.cpp:1:2: error: no warning: [{link}], see\n")
    assert (found.where, found.error) == ("a.cpp:1", "no warning: [-Wformat=], see")


@pytest.mark.parametrize(
    ("log", "file", "number"),
    [
        ("misused_header", "inst.cpp", 5),
        ("misused_header_clang", "inst.cpp", 5),
        ("misused_header_nvcc", "thr.cu", 6),
        ("misused_header_torch", "required.cpp", 4),
        ("misused_header_after_warnings", "warn_inst.cpp", 7),
        ("cuda_headers_missing", "cudastream.cpp", 1),
        ("source_error_own_header", "include/helper.h", 2),
        ("undefined_reference_debug", "undef.cpp", 2),
    ],
)
def test_the_line_is_the_users(log, file, number):
    found = read(text_of(log))
    assert found.source_line == f"  line {number} of {USER}/{file}"
    assert found.where.startswith(f"{USER}/{file}:{number}")


def test_headers_that_include_each_other():
    """The user's file next to the header is named, not the one that includes that one."""
    found = read(
        f"In file included from {GCC}/b.h:2,\n"
        f"                 from {USER}/mine.h:3,\n"
        f"                 from {USER}/main.cpp:4:\n"
        f"{GCC}/a.h:1:2: error: what\n"
    )
    assert found.where == f"{USER}/mine.h:3 (reported in {GCC}/a.h:1)"


def test_a_header_without_a_user():
    found = read(f"{GCC}/a.h:1:2: error: what\n")
    assert found.where == f"{GCC}/a.h:1"
    assert "mend the line shown" in found.cause.fix


def test_the_first_unit_to_fail_is_told():
    output = text_of("two_units")
    assert output.count("FAILED: ") == 2
    assert "no_such_header.h: No such file" in output
    assert read(output).cause.name == "source_error"
    first, second = output.split("[2/4] ")
    swapped = read("FAILED: " + second.split("FAILED: ")[1] + "[2/4] " + first.split("]: ")[-1])
    assert swapped.cause.name == "missing_header"


def test_a_machine_that_fails_is_told_first():
    """g++ goes on to complain of what it could not write."""
    output = text_of("disk_full").replace("compilation", "a.cpp:1:1: error: x\ncompilation")
    assert read("a.cpp:1:1: error: y\n" + output).cause.name == "disk_full"


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        ("_ZN3c106detail14torchCheckFailEPKcS2_jRKSs", "other_torch"),  # the older std::string
        ("_ZN3c1013MessageLogger6streamB5cxx11Ei", "other_torch"),
        ("_ZTIN3c107UnknownE", "other_torch"),
        ("_Z5my_opN2at6TensorE", "undefined_reference"),  # the user's, of a type of torch
        ("_Z5printRKSs", "undefined_reference"),
        ("cublasSgemm_v2", "cuda_library_not_linked"),
        ("__cudaRegisterFatBinary", "cuda_library_not_linked"),
        ("cuda_of_mine", "undefined_reference"),
        ("_Py_Dealloc2", "undefined_reference"),
    ],
)
def test_whose_symbol_is_missing(symbol, name):
    found = read(f"Could not load this library: /x.so\n/x.so: undefined symbol: {symbol}")
    assert found.cause.name == name


# Wordings of other versions of the tools, which could not be had here: as their documentation and
# sources have them.
@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("nvcc error   : 'cicc' died due to signal 9 (Kill signal)", "out_of_memory"),
        (
            "nvcc error   : 'ptxas' died due to signal 11 (Invalid memory reference)",
            "internal_compiler_error",
        ),
        ("collect2: fatal error: ld terminated with signal 9 [Killed]", "out_of_memory"),
        ("terminate called after throwing an instance of 'std::bad_alloc'", "out_of_memory"),
        ("run.sh: line 3: 4711 Killed                  /usr/bin/c++ -c a.cpp", "out_of_memory"),
        (
            "g++: fatal error: cannot execute 'cc1plus': posix_spawnp: No such file or directory",
            "compiler_missing",
        ),
        ("clang: error: unknown argument: '--no-such-flag'", "unknown_flag"),
        (
            "x.functions:3:7: error: use of undeclared identifier 'wrong'",
            "undeclared_function",
        ),
        ("/usr/bin/ld: unrecognized option '--dependency-file=link.d'", "linker_too_old"),
        ("ld.lld: error: unknown argument '--dependency-file=link.d'", "linker_too_old"),
        (
            "/usr/local/cuda/include/crt/host_config.h:151:2: error: #error -- unsupported clang "
            "version! clang version must be less than 21",
            "compiler_too_new",
        ),
    ],
)
def test_documented_wordings(line, name):
    assert read(f"FAILED: [code=1] a.o \nc++ -c a.cpp\n{line}\n").cause.name == name


@pytest.mark.skipif(torch.version.cuda is not None, reason="of a torch without CUDA")
def test_headers_of_cuda_with_a_torch_that_has_none():
    log = text_of("cuda_headers_missing")
    assert read(log).cause.name == "torch_without_cuda"
    missing = f"{USER}/a.cpp:1:10: fatal error: c10/cuda/CUDAGuard.h: No such file or directory\n"
    assert read(missing).cause.name == "torch_without_cuda"
    own = f"{USER}/a.cpp:1:10: fatal error: cuda_runtime.h: No such file or directory\n"
    assert read(own).cause.name == "cuda_headers_missing"


# ---- what is no log


def test_what_is_unknown_is_said_to_be():
    found = read("FAILED: [code=1] a.o \nc++ -c a.cpp\ncc1plus: error: the moon is full\n")
    assert found.cause.name == "unknown"
    assert str(found) == (
        "  cc1plus: error: the moon is full\n  cause: not one of those that jitops knows"
    )


def test_the_shape_of_what_is_known():
    assert str(read("a.cpp:3:4: fatal error: x.h: No such file or directory\n")) == (
        "  a.cpp:3: x.h: No such file or directory\n"
        "      line 3 of a.cpp\n"
        "  cause: a header is missing\n"
        "  fix:   check the spelling, and add its folder to extra_include_paths"
    )


@pytest.mark.parametrize("output", ["", "\n \n", "Error building extension 'x'"])
def test_no_output(output):
    found = read(output)
    assert str(found) == ("  (no output)\n  cause: not one of those that jitops knows")


def test_a_compiler_that_says_nothing():
    found = read("Error building extension 'x': [1/2] cc a\nFAILED: [code=3] a.o \ncc a\n")
    assert found.error == "FAILED: [code=3] a.o"


def test_a_last_line_is_better_than_none():
    found = read("FAILED: [code=1] a.o \ncc a\nodd\nodder\nninja: build stopped: x.\n")
    assert found.error == "odder"


def test_garbage():
    source = random.Random(0)
    for length in (1, 7, 100, 5000, 200_000):
        noise = source.randbytes(length)
        for text in (noise.decode(errors="replace"), noise.decode("latin-1")):
            assert read(text).error
            assert read(f"FAILED: [code=1] {text}\n{text}\n{text}: error: {text}").error
    for line in (
        "a\0b:1:2: error: x",
        f"a:{'9' * 5000}: error: x",
        "a:0: error: x",
        "(1): error: x",
    ):
        assert read(line).error
        assert read(f"In file included from {line}\n{GCC}/a.h:1:1: error: x").error


@pytest.mark.thorough
def test_long_logs():
    """No pattern is catastrophic: a second each, where the square of their size would be days."""
    failed = "FAILED: [code=1] a.o \nc++ -c a.cpp\n"
    warning = f"{USER}/a.cpp:5:12: warning: format of two, a double [-Wformat=]\n    5 |  print\n"
    for text in (
        failed + warning * (50_000_000 // len(warning)) + f"{USER}/a.cpp:7:1: error: late\n",
        failed + f"{USER}/a.cpp:7:1: error: often\n" * 1_000_000,
        failed + "a:1: error" * 5_000_000,
        failed + " " * 50_000_000,
    ):
        started = time.process_time()
        assert diagnose(text, no_line).error
        assert time.process_time() - started < 60


# ---- errors whose text is not the whole story


@pytest.mark.cpp
def test_sources_that_are_not_utf8(cache, tmp_path):
    source = tmp_path / "latin.cpp"
    source.write_bytes(b'const char* x = "caf\xe9" + nowhere;\n')
    with pytest.raises(ops.BuildError, match=r"latin\.cpp:1: .*nowhere"):
        load("latin", source, is_python_module=False)


@pytest.mark.cpp
def test_compilers_that_do_not_tell_their_version(cache, tmp_path, monkeypatch):
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\nexit 3\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(ops.BuildError, match="does not run"):
        load_inline("broken", "int x;\n", is_python_module=False, no_implicit_headers=True)
