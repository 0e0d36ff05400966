"""Compiles and links an extension in a private folder, and knows of no cache.

torch's own ``load`` and ``load_inline`` write the ninja file. They run in a copy of
``torch.utils.cpp_extension`` that only one build uses, and that sees an environment of its own. So
no build changes torch's module, which other threads may use, or in which somebody may have replaced
``load`` by ours. The file is amended, so that the tools report all files that they read, and run.
"""

import builtins
import functools
import importlib.util
import logging
import os
import re
import shlex
import sys
import sysconfig
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ops._errors import BuildError, ToolchainError
from ops.jit import _progress
from ops.jit._compile import _compilers, _cpu, _gpu_archs, _runner, importing
from ops.jit._spec import RETIRE, Spec

# Withdraws a library's registrations with torch, while its code stays in memory. Without the
# compiler's start files there is no handle, and nothing that could be withdrawn.
_RETIRE_SOURCE = """
extern "C" {
extern char jitops_dso __asm__("__dso_handle") __attribute__((weak, visibility("hidden")));
void jitops_finalize(void*) __asm__("__cxa_finalize");
__attribute__((visibility("default"))) void jitops_retire() {
  if (&jitops_dso) jitops_finalize(&jitops_dso);
}
}
"""
# Flags that are made for the user's own text, such as -x c -Werror, are taken back.
_RETIRE = f"""
build {RETIRE}.o: compile {RETIRE}.cpp
  cflags = $cflags -w -std=c++17 -x c++
"""
_SEARCH = """
rule jitops_{name}
  command = ({command} /dev/null || :) > $out 2>&1
build {name}.txt: jitops_{name}
default {name}.txt
"""
LINK_REPORT = "link.d"
_NOT_CALLED = (
    *("_run_ninja_build", "_import_module_from_library", "verify_ninja_availability"),
    "get_compiler_abi_compatibility_and_version",
)


def build(
    spec: Spec, folder: Path, log: Path, *, include_first: Sequence[Path] = (), echo: bool = False
) -> Path:
    """Compile and link ``spec`` in ``folder``; return the library or program."""
    compiler, ninja = _compilers.check(spec.uses_cuda)
    count = len(spec.sources) or 1 + bool(spec.cuda_sources)  # load_inline writes a main.cpp
    files = f"{spec.name} ({count} file{'s' if count > 1 else ''})"
    environ = _compilers.environ()
    cpp_extension = _copy_of_torchs(environ)
    started = time.perf_counter()
    try:
        _call(cpp_extension, spec, folder, include_first)
        _amend(folder / "build.ninja", spec, compiler)
        _progress.say(f"compiling {files}")
        _runner.run(folder, [str(ninja), "-v", "-j", str(_cpu.jobs())], environ, echo)
    except (_runner.NinjaError, RuntimeError, OSError) as error:
        from ops.jit._compile import _diagnostics

        # Not "from error", because the log has all that a page of torch's frames could say.
        raise _diagnostics.failed(spec, log, str(error)) from None
    _progress.say(f"compiled {files} in {time.perf_counter() - started:.1f} s")
    library = folder / (spec.name if spec.is_standalone else f"{spec.name}.so")
    if not library.is_file():
        raise BuildError(f"{spec.name}: the build left no {library.name} in {folder}")
    return library


def _copy_of_torchs(environ: dict[str, str]) -> Any:
    """Make a copy of ``torch.utils.cpp_extension``, which runs and loads nothing."""
    path = Path(torch.__file__).parent / "utils" / "cpp_extension.py"
    spec = importlib.util.spec_from_file_location("torch.utils.cpp_extension", path)
    if spec is None or spec.loader is None:
        raise ToolchainError(f"torch {torch.__version__} has no {path}")
    copy: Any = importlib.util.module_from_spec(spec)
    copy.__builtins__ = {**vars(builtins), "__import__": _import}
    logger = logging.getLogger(copy.__name__)
    with importing:
        logger.disabled = True  # it warns of a CUDA toolkit on a machine without a GPU
        try:
            spec.loader.exec_module(copy)
        finally:
            logger.disabled = False
    for name in _NOT_CALLED:
        if not hasattr(copy, name):
            raise ToolchainError(
                f"torch {torch.__version__} builds extensions in a way that this version of jitops "
                f"does not know: it has no {name}"
            )
        setattr(copy, name, lambda *_, **__: None)
    copy.os = types.SimpleNamespace(**{**vars(os), "environ": environ, "getenv": environ.get})
    copy.open = functools.partial(open, encoding="utf-8", errors="surrogateescape")
    if home := _compilers.cuda_home():
        copy.CUDA_HOME = str(home)
    return copy


class _Setuptools(types.ModuleType):
    """Stands for setuptools, which takes long to import and which only ``setup.py`` needs."""

    def __getattr__(self, name: str) -> Any:
        return type(name, (), {})


def _import(name: str, *arguments: Any) -> Any:
    if name.partition(".")[0] == "setuptools":
        return _Setuptools("setuptools")
    return builtins.__import__(name, *arguments)


def _call(cpp_extension: Any, spec: Spec, folder: Path, include_first: Sequence[Path]) -> None:
    """Have torch write the sources and the ninja file, and run it."""
    architectures = _gpu_archs.gencode_flags(_gpu_archs.architectures_of(spec))
    options: dict[str, Any] = {
        "name": spec.name,
        "extra_cflags": [*spec.extra_cflags, *_in_memory(spec)],
        "extra_cuda_cflags": [*spec.extra_cuda_cflags, *architectures],
        "extra_ldflags": [*spec.extra_ldflags],
        "extra_include_paths": [str(path) for path in (*include_first, *spec.extra_include_paths)],
        "build_directory": str(folder),
        "with_cuda": spec.uses_cuda,
        "is_python_module": spec.is_python_module,
    }
    if not spec.inline:
        sources = [str(path) for path in spec.sources]
        cpp_extension.load(sources=sources, is_standalone=spec.is_standalone, **options)
        return
    # torch writes docstrings between quotes as they are.
    escapes = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "?": "\\?"})
    functions = {name: doc.translate(escapes) for name, doc in spec.functions or ()}
    label = [f'#line 1 "{spec.name}.functions"'] if functions else []  # a line for each
    cpp_extension.load_inline(
        cpp_sources=[*_numbered(spec, "cpp", spec.cpp_sources), *label],
        cuda_sources=_numbered(spec, "cu", spec.cuda_sources),
        functions=None if spec.functions is None else functions,
        no_implicit_headers=spec.no_implicit_headers,
        with_pytorch_error_handling=spec.with_pytorch_error_handling,
        **options,
    )


def _in_memory(spec: Spec) -> list[str]:
    """Spare g++ garbage collection over torch's header: a third of its time, for half a GB."""
    if not is_gcc() or spec.no_implicit_headers or _cpu.free_memory() < 8 << 30:
        return []
    return ["--param=ggc-min-expand=500", "--param=ggc-min-heapsize=4000000"]


def is_gcc() -> bool:
    """Whether the C++ compiler is g++."""
    compiler = _compilers.cxx()
    return compiler is not None and _compilers.version(compiler).startswith("gcc version")


def _numbered(spec: Spec, suffix: str, texts: tuple[str, ...]) -> list[str]:
    """Have compilers count the lines of each text, not those of the file made of all of them."""
    return [f'#line 1 "{spec.label(suffix, i)}"\n{text}' for i, text in enumerate(texts)]


def _amend(script: Path, spec: Spec, compiler: _compilers.Tool) -> None:
    """Have the tools report all that they read, and mend torch's quoting."""
    text = script.read_text(encoding="utf-8", errors="surrogateescape")
    torchs = Path(torch.__file__).parent
    for folder in (str(torchs), sysconfig.get_path("include")):
        text = text.replace(folder, folder.replace("$", "$$"))
    home = _compilers.cuda_home() if spec.uses_cuda else None
    for library in (torchs / "lib", *([home / "lib64", home / "lib"] if home else [])):
        escaped = str(library).replace("$", "$$")
        for option in ("-L", "-Wl,-rpath,"):
            text = text.replace(f" {option}{escaped}", f" {option}{shlex.quote(escaped)}")
    # torch takes $CXX for a single word.
    command = f"cxx = {shlex.join(compiler.command)}".replace("$", "$$")
    text = re.sub("^cxx = .*$", lambda _: command, text, count=1, flags=re.MULTILINE)
    # torch has g++ leave out the headers that -isystem finds. g++ would also name a header that it
    # finds through a link by the present target of the link.
    as_found = " -fno-canonical-system-headers" if is_gcc() else ""
    text = text.replace(" -MMD -MF ", f"{as_found} -MD -MF ")
    # ninja would take the lists of headers away.
    text = re.sub(r"^  (depfile = \$out\.d|deps = gcc)\n", "", text, flags=re.MULTILINE)
    link = "$cxx $in $ldflags -o $out"
    if spec.is_header:
        text = text.replace(link, f": > {LINK_REPORT}; ln $in $out || cp $in $out")
        # g++ takes the header only where all macros are those that it was made with.
        text = re.sub(r"-DTORCH_EXTENSION_NAME=\S+", "", text)
    elif sys.platform != "darwin":
        text = text.replace(link, link.replace("-o", f"-Wl,--dependency-file={LINK_REPORT} -o"))
    text += _SEARCH.format(name="search", command="$cxx $cflags -E -v -x c++")
    if re.search(r"^build \S+\.cuda\.o: cuda_compile", text, re.MULTILINE):
        command = "$nvcc $cuda_cflags -E -Xcompiler -v -x cu"
        text += _SEARCH.format(name="search_cuda", command=command)
    if not spec.is_python_module and not spec.is_standalone:
        (script.parent / f"{RETIRE}.cpp").write_text(_RETIRE_SOURCE)
        text = re.sub(r"^(build \S+: link .*)$", rf"\1 {RETIRE}.o", text, flags=re.MULTILINE)
        text += _RETIRE
    script.write_text(text, encoding="utf-8", errors="surrogateescape")
