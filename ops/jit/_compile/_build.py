"""Compiles and links an extension in a private folder, and knows of no cache.

torch writes the ninja file. Here it is amended, so that the tools report all files that they read,
and run.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ops._errors import BuildError, ToolchainError
from ops.jit import _flags
from ops.jit._compile import _compilers, _cpu, _progress, _runner, _torch_build
from ops.jit._spec import COMMANDS, HERE, RETIRE, Spec

# Withdraws what a library has registered with torch, while its code stays where it is. Without the
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
# Without the user's flags, but for those that say which machine the code is for.
_RULES = r"""
rule jitops_retire
  command = $cxx -w -O1 -fPIC {machine} -x c++ -c $in -o $out
rule jitops_search
  command = ($cxx $cflags -E -v -x c++ /dev/null || :) > $out 2>&1
rule jitops_search_cuda
  command = ($nvcc $cuda_cflags -E -Xcompiler -v -x cu /dev/null || :) > $out 2>&1
build search.txt: jitops_search
default search.txt
"""
_SEARCH_CUDA = "build search_cuda.txt: jitops_search_cuda\ndefault search_cuda.txt\n"
LINK_REPORT = "link.d"
_TEMPORARY = Path("/tmp")  # whatever TMPDIR says


@dataclass(frozen=True)
class Built:
    """A finished build.

    Attributes:
        library: lies in the private folder.
        place: the path by which the tools know the folder.
        seconds: how long it took.
    """

    library: Path
    place: Path
    seconds: float


def build(
    spec: Spec,
    folder: Path,
    log: Path,
    *,
    include_first: Sequence[Path] = (),
    echo: bool = False,
) -> Built:
    """Compile and link ``spec`` in ``folder``.

    Args:
        folder: private, empty; keeps the library and the tools' reports.
        log: where the whole output goes if it fails.
        include_first: folders below ``folder`` to look for headers in before all others.
        echo: pass the output of ninja and the compilers on to stdout.

    Raises:
        ToolchainError: something the build needs is missing.
        BuildError: the sources do not compile or link; says why.
    """
    _compilers.check(spec.uses_cuda)
    with _plain(folder) as place:
        environ = _environ(place)
        first = [place / path.relative_to(folder) for path in include_first]
        started = time.perf_counter()

        def run(_: str) -> None:
            _amend(place / "build.ninja", spec)
            units = [path.name for path in spec.sources] or ["main.cpp", "cuda.cu"]
            with _progress.watching(spec.name, units[: spec.unit_count], echo) as on_line:
                _run(spec, place, environ, on_line)

        module = _torch_build.module(environ, _compilers.cuda_home(), run)
        try:
            _call(module, spec, place, first)
        except (_runner.NinjaError, RuntimeError, OSError) as error:
            from ops.jit._compile import _diagnostics

            # Not "from error": a page of torch's own frames, of which the log has all that matters.
            raise _diagnostics.failed(spec, place, log, str(error)) from None
        _keep_commands(place, folder)
        return Built(_library(spec, folder), place, time.perf_counter() - started)


def _library(spec: Spec, folder: Path) -> Path:
    library = folder / (spec.name if spec.is_standalone else f"{spec.name}.so")
    if not library.is_file():
        raise BuildError(f"{spec.name}: the build left no {library.name} in {folder}")
    return library


@contextlib.contextmanager
def _plain(folder: Path) -> Iterator[Path]:
    """Yield ``folder``, or a link to it whose path ninja, compilers and shell take as it is."""
    plain = re.compile(r"[\w@%+=./-]+", re.ASCII)
    if plain.fullmatch(str(folder)):
        yield folder
        return
    bases = [Path(tempfile.gettempdir()), _TEMPORARY]
    base = next((one for one in bases if plain.fullmatch(str(one)) and one.is_dir()), None)
    if base is None and re.fullmatch(r"[\w @%+=./-]+", str(folder)):
        yield folder  # spaces and accents are passed on
        return
    if base is None:
        raise BuildError(
            f"{folder}: its path has characters that ninja cannot pass on, and so has the folder "
            f"for temporary files: set JITOPS_CACHE_DIR or TMPDIR to one of letters and digits"
        )
    outer = Path(tempfile.mkdtemp(prefix="jitops-", dir=base))
    try:
        (outer / "build").symlink_to(folder, target_is_directory=True)
        yield outer / "build"
    finally:
        shutil.rmtree(outer, ignore_errors=True)


# torch puts a ccache or sccache that is on PATH before the compiler, unasked. ccache's direct mode
# returns the old object when a new header hides another one, and a user's own $CXX may name ccache.
_WITHOUT_STALE_OBJECTS = {"TORCH_NO_COMPILER_WRAPPER": "1", "CCACHE_NODIRECT": "1"}


def _environ(place: Path) -> dict[str, str]:
    """Return the environment variables that torch, ninja and the compilers see."""
    found = _compilers.environ()
    found.pop("NINJA_STATUS", None)  # the progress is read from ninja's own format
    found.pop("TORCH_EXTENSION_SKIP_NVCC_GEN_DEPENDENCIES", None)  # nvcc shall report its headers
    if "LC_ALL" in found:  # it would have the last word on messages
        found["LC_CTYPE"] = found.pop("LC_ALL")
    compiler = _compilers.cxx()
    return {
        **found,
        "CXX": str(_as_one_word(compiler.command, place)) if compiler else "c++",
        "LC_MESSAGES": "C",  # errors in the language that the diagnosis reads
        **_WITHOUT_STALE_OBJECTS,
    }


def _as_one_word(command: tuple[str, ...], place: Path) -> Path:
    """Return the compiler as torch takes it: ``CXX="ccache g++"`` becomes a script."""
    program, *arguments = command
    found = os.path.abspath(shutil.which(program) or program)
    if not arguments:
        return Path(found)
    script = place / "cxx"
    script.write_text(f'#!/bin/sh\nexec {shlex.join([found, *arguments])} "$@"\n')
    script.chmod(0o755)
    return script


def _run(spec: Spec, place: Path, environ: dict[str, str], on_line: Any) -> None:
    """Run ninja; where several compilers were too much for the memory, one at a time."""
    told = os.environ.get("MAX_JOBS", "")
    jobs = int(told) if told.isdecimal() else _cpu.jobs()
    ninja = _compilers.ninja()
    if ninja is None:
        raise ToolchainError(_compilers.NO_NINJA)
    command = [str(ninja), "-v", "-j"]
    try:
        _runner.run(place, [*command, str(jobs)], environ, on_line)
    except _runner.NinjaError as error:
        from ops.jit._compile import _diagnostics

        if _diagnostics.diagnose(str(error)).name != "out_of_memory" or jobs == 1:
            raise
        _progress.say(f"{spec.name}: out of memory; trying once more with one compiler at a time")
        _runner.run(place, [*command, "1"], environ, on_line)


def _call(cpp_extension: Any, spec: Spec, place: Path, include_first: Sequence[Path]) -> None:
    """Have torch write the sources and the ninja file, and run it."""
    architectures: tuple[str, ...] = ()
    if spec.uses_cuda:
        from ops.jit._compile import _gpu_archs

        architectures = _gpu_archs.gencode_flags(_gpu_archs.architectures_of(spec))
    options: dict[str, Any] = {
        "name": spec.name,
        "extra_cflags": [*spec.extra_cflags, *_in_memory(spec)],
        "extra_cuda_cflags": [*spec.extra_cuda_cflags, *architectures],
        "extra_ldflags": [*spec.extra_ldflags],
        "extra_include_paths": [str(path) for path in (*include_first, *spec.extra_include_paths)],
        "build_directory": str(place),
        "with_cuda": spec.uses_cuda,
        "is_python_module": spec.is_python_module,
    }
    if not spec.inline:
        sources = [str(path) for path in spec.sources]
        cpp_extension.load(sources=sources, is_standalone=spec.is_standalone, **options)
        return
    functions = [f'#line 1 "{spec.functions_label}"'] if spec.functions else []
    cpp_extension.load_inline(
        cpp_sources=[*_numbered(spec, "cpp", spec.cpp_sources), *functions],
        cuda_sources=_numbered(spec, "cu", spec.cuda_sources),
        functions=_quotable(spec.functions),
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


def _quotable(functions: tuple[tuple[str, str], ...] | None) -> dict[str, str] | None:
    """Escape docstrings, which torch writes between quotes as they are."""
    if functions is None:
        return None
    escapes = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "?": "\\?"})
    return {name: doc.translate(escapes) for name, doc in functions}


def _numbered(spec: Spec, suffix: str, texts: tuple[str, ...]) -> list[str]:
    """Have compilers count the lines of each text, not those of the file made of all of them."""
    return [f'#line 1 "{spec.label(suffix, i)}"\n{text}' for i, text in enumerate(texts)]


# ---- the ninja file ------------------------------------------------------------------------------


def _amend(script: Path, spec: Spec) -> None:
    """Have the tools report all that they read, and mend torch's quoting of its own folders."""
    text = script.read_text(encoding="utf-8", errors="surrogateescape")
    for folder in (str(Path(torch.__file__).parent), sysconfig.get_path("include")):
        if "$" in folder:
            text = text.replace(folder, folder.replace("$", "$$"))
    home = _compilers.cuda_home() if spec.uses_cuda else None
    libraries = [
        Path(torch.__file__).parent / "lib",
        *([home / "lib64", home / "lib"] if home else []),
    ]
    for library in map(str, libraries):
        escaped = library.replace("$", "$$")
        for option in ("-L", "-Wl,-rpath,"):
            text = text.replace(f" {option}{escaped}", f" {option}{shlex.quote(escaped)}")
    # torch has g++ leave out the headers that -isystem finds. g++ would also name a header that it
    # finds through a link by what the link leads to now.
    as_found = " -fno-canonical-system-headers" if is_gcc() else ""
    text = text.replace(" -MMD -MF ", f"{as_found} -MD -MF ")
    # ninja would take the lists of headers away.
    text = re.sub(r"^  (depfile = \$out\.d|deps = gcc)\n", "", text, flags=re.MULTILINE)
    if sys.platform != "darwin":
        report = f" -Wl,--dependency-file={LINK_REPORT}"
        text = text.replace("$cxx $in $ldflags -o $out", f"$cxx $in $ldflags{report} -o $out")
    machine = [word for word in _flags.words(spec.extra_cflags) if re.match(r"-m|--target=", word)]
    text += _RULES.replace("{machine}", shlex.join(machine).replace("$", "$$"))
    if "\nnvcc = " in text and any(one.endswith(".cuda.o: cuda_compile") for one in _outputs(text)):
        text += _SEARCH_CUDA
    if not spec.is_python_module and not spec.is_standalone:
        (script.parent / f"{RETIRE}.cpp").write_text(_RETIRE_SOURCE)
        text += f"build {RETIRE}.o: jitops_retire {RETIRE}.cpp\n"
        text = re.sub(r"^(build \S+: link .*)$", rf"\1 {RETIRE}.o", text, flags=re.MULTILINE)
    script.write_text(text, encoding="utf-8", errors="surrogateescape")


def _outputs(text: str) -> list[str]:
    return re.findall(r"^build (\S+: \w+)", text, re.MULTILINE)


def _keep_commands(place: Path, folder: Path) -> None:
    """Write ``compile_commands.json``, by which editors understand the sources."""
    try:
        found = json.loads((place / "compdb.json").read_text(errors="surrogateescape"))
    except (OSError, ValueError):
        found = []  # only editors want it
    kept = [
        {
            key: value.replace(str(place), HERE).replace(str(folder), HERE)
            for key, value in one.items()
        }
        for one in found
        if one.get("output", "").endswith(".o") and Path(one["file"]).stem != RETIRE
    ]
    (folder / COMMANDS).write_text(json.dumps(kept, indent=1))
