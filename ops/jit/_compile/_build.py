"""The one place that runs torch.utils.cpp_extension: always in a private folder, never the cache.

torch's own lock file, versioning and build folder only ever see the folder given, which nobody else
uses; a stale ``lock`` in torch's own folders cannot hang anything. Loading is not its business.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ops._errors import BuildError
from ops.jit._compile import (
    _failed,
    _hardware,
    _headers,
    _ninja,
    _place,
    _progress,
    _sandbox,
    _seen,
    _toolchain,
)
from ops.jit._compile._diagnose import all_of, diagnose
from ops.jit._spec import RETIRE, Spec

# Withdraws what a library has registered with torch, while its code stays where it is.
_RETIRE = """
extern "C" {
extern char jitops_dso __asm__("__dso_handle") __attribute__((visibility("hidden")));
void jitops_finalize(void*) __asm__("__cxa_finalize");
__attribute__((visibility("default"))) void jitops_retire() { jitops_finalize(&jitops_dso); }
}
"""


@dataclass(frozen=True)
class Built:
    """A finished build.

    Attributes:
        library: in the folder given.
        read: the headers, and the like, that went into it.
        seconds: it took.
        commands: one for each source, as in ``compile_commands.json``.
    """

    library: Path
    read: _headers.Read
    seconds: float
    commands: list[dict[str, Any]]


def build(
    spec: Spec,
    folder: Path,
    architectures: tuple[str, ...],
    log: Path,
    *,
    include_first: Sequence[Path] = (),
    echo: bool = False,
) -> Built:
    """Compile and link ``spec`` in ``folder``.

    Args:
        folder: private, empty; keeps the library afterwards.
        architectures: GPU architectures to compile for, where the flags name none.
        log: where the whole output goes if it fails.
        include_first: folders below ``folder`` to look for headers in before all others.
        echo: pass on to stdout what ninja and the compilers say.

    Raises:
        ToolchainError: something the build needs is missing.
        BuildError: the sources do not compile or link; says why.
    """
    with _place.plain(folder) as place:
        return _build(spec, folder, place, architectures, log, include_first, echo)


def _build(
    spec: Spec,
    folder: Path,
    place: Path,  # where the folder is found by those that take few paths
    architectures: tuple[str, ...],
    log: Path,
    include_first: Sequence[Path],
    echo: bool,
) -> Built:
    _toolchain.check(spec.uses_cuda)
    units = [path.name for path in spec.sources] or ["main.cpp", "cuda.cu"][: spec.unit_count]
    started = time.perf_counter()
    environ = _seen.environ(place)
    include_first = [place / path.relative_to(folder) for path in include_first]

    def run(command: list[str], cwd: str) -> None:
        # g++ names a header that -isystem finds through a link as what the link leads to now.
        as_found = "-fno-canonical-system-headers" if _is_gcc() else ""
        _ninja.see_all_headers(Path(cwd), as_found)
        _patiently(lambda words: _ninja.run(words, cwd, environ, echo), command, spec.name)

    try:
        with (
            _sandbox.entered(_sandbox.Sandbox(environ, _seen.ninja_path(), run)) as cpp_extension,
            _progress.watching(spec.name, units, folder),
            contextlib.suppress(_sandbox.Finished),
        ):
            _call(cpp_extension, spec, place, architectures, include_first)
    except (_ninja.NinjaError, subprocess.SubprocessError, RuntimeError, OSError) as error:
        # Not "from error": a page of torch's own frames, of which the log has all that matters.
        raise _failed.build(spec, place, log, all_of(error)) from None
    except UnicodeEncodeError as error:  # torch writes its files in the encoding of the locale
        raise BuildError(
            f"{spec.name}: {error.object[error.start : error.end]!r}, in a path or in text, cannot "
            f"be written in {error.encoding}, the encoding of this process: set PYTHONUTF8=1"
        ) from error
    library = folder / (spec.name if spec.is_standalone else f"{spec.name}.so")
    if not library.is_file():
        raise BuildError(f"{spec.name}: the build left no {library.name} in {folder}")
    return Built(
        library=library,
        read=_headers.read_by(spec, folder),
        seconds=time.perf_counter() - started,
        commands=[
            {key: value.replace(str(place), str(folder)) for key, value in one.items()}
            for one in _ninja.commands(folder)
        ],
    )


def _patiently(run: Callable[[list[str]], str], command: list[str], name: str) -> None:
    """Once more with a single compiler at a time, where several were too much for the memory."""
    try:
        run(command)
    except _ninja.NinjaError as error:
        cause = diagnose(str(error), lambda file, line: None).name
        if cause != "out_of_memory" or _jobs(command) == 1:
            raise
        _progress.say(f"{name}: out of memory; trying once more with one compiler at a time")
        alone = command[: command.index("-j")] if "-j" in command else command
        run([*alone, "-j", "1"])


def _jobs(command: list[str]) -> int:
    return int(command[command.index("-j") + 1]) if "-j" in command else 0


def _call(
    cpp_extension: Any,
    spec: Spec,
    folder: Path,
    architectures: tuple[str, ...],
    include_first: Sequence[Path],
) -> None:
    options: dict[str, Any] = {
        "name": spec.name,
        "extra_cflags": [*spec.extra_cflags, *_in_memory(spec)],
        "extra_cuda_cflags": [
            *spec.extra_cuda_cflags,
            *_hardware.gencode_flags(architectures),
        ],
        "extra_ldflags": [*spec.extra_ldflags, *_cuda_libraries(spec)],
        "extra_include_paths": [str(path) for path in (*include_first, *spec.extra_include_paths)],
        "build_directory": str(folder),
        "with_cuda": spec.uses_cuda,
        "is_python_module": spec.is_python_module,
    }
    # A name that this process has built before would get a suffix.
    getattr(getattr(cpp_extension, "JIT_EXTENSION_VERSIONER", None), "entries", {}).pop(
        spec.name, None
    )
    retires = not spec.is_python_module and not spec.is_standalone
    if spec.inline:
        cpp_extension.load_inline(
            cpp_sources=[
                *_numbered(spec.name, "cpp", spec.cpp_sources),
                *([f'#line 1 "jitops"{_RETIRE}'] if retires else []),
                *([f'#line 1 "{_failed.functions_label(spec.name)}"'] if spec.functions else []),
            ],
            cuda_sources=_numbered(spec.name, "cu", spec.cuda_sources),
            functions=_quotable(spec.functions),
            no_implicit_headers=spec.no_implicit_headers,
            with_pytorch_error_handling=spec.with_pytorch_error_handling,
            **options,
        )
    else:
        sources = [str(path) for path in spec.sources]
        if retires:
            (folder / f"{RETIRE}.cpp").write_text(_RETIRE)
            sources.append(str(folder / f"{RETIRE}.cpp"))
        cpp_extension.load(sources=sources, is_standalone=spec.is_standalone, **options)


def _in_memory(spec: Spec) -> list[str]:
    """Less garbage collection over torch's header: a third of the time, for half a gigabyte."""
    if not _is_gcc() or spec.no_implicit_headers or _hardware.memory_limit() < 8 << 30:
        return []
    return ["--param=ggc-min-expand=500", "--param=ggc-min-heapsize=4000000"]


def _is_gcc() -> bool:
    compiler = _toolchain.cxx()
    return compiler is not None and _toolchain.identity(compiler)[0].startswith("gcc version")


def _quotable(functions: tuple[tuple[str, str], ...] | None) -> dict[str, str] | None:
    """Torch writes docstrings between quotes as they are."""
    if functions is None:
        return None
    escapes = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "?": "\\?"})
    return {name: doc.translate(escapes) for name, doc in functions}


def _cuda_libraries(spec: Spec) -> list[str]:
    """Where toolkits from conda and PyPI have their libraries: torch looks in ``lib64`` only."""
    home = _toolchain.cuda_home() if spec.uses_cuda else None
    return [f"-L{home / 'lib'}"] if home and not (home / "lib64").is_dir() else []


def _numbered(name: str, suffix: str, texts: tuple[str, ...]) -> list[str]:
    """Text that compilers report by the lines of the text as given, not of the file made of it."""
    return [f'#line 1 "{_failed.label(name, suffix, i)}"\n{text}' for i, text in enumerate(texts)]
