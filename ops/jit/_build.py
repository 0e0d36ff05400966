"""The one place that runs torch.utils.cpp_extension: always in a private folder, never the cache.

Knows nothing of the cache. torch's own lock file, versioning and module loading only ever see the
folder given, which nobody else uses; a stale ``lock`` in torch's own folders cannot hang anything.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ops._errors import BuildError, ToolchainError
from ops.jit import _hardware, _progress, _toolchain
from ops.jit._diagnose import all_of, diagnose
from ops.jit._spec import Spec

# What torch lets through: of output that is not UTF-8, of a compiler that tells no version.
_FORGOTTEN = (UnicodeDecodeError, subprocess.CalledProcessError)
_environment_lock = threading.RLock()
os.register_at_fork(after_in_child=lambda: globals().update(_environment_lock=threading.RLock()))


@dataclass(frozen=True)
class Built:
    """A finished build: the library is also loaded, since torch loads what it builds."""

    library: Path
    module: ModuleType | None
    headers: list[Path]
    seconds: float


def build(spec: Spec, folder: Path, architectures: tuple[str, ...], log: Path) -> Built:
    """Compile and link ``spec`` in ``folder``, and load it.

    Args:
        folder: private, empty; keeps the library afterwards.
        architectures: GPU architectures to compile for, where the flags name none.
        log: where the whole output goes if it fails.

    Raises:
        ToolchainError: something the build needs is missing.
        BuildError: the sources do not compile, link or load; says why.
    """
    _toolchain.check(spec.with_cuda)
    units = [path.name for path in spec.sources] or ["main.cpp", "cuda.cu"][: spec.unit_count]
    started = time.perf_counter()
    try:
        with _streams(), _environment(folder), _progress.watching(spec.name, units, folder):
            result = _run(spec, folder, architectures)
    except (RuntimeError, ImportError, OSError, *_FORGOTTEN) as error:
        raise _explained(spec, folder, log, error) from error
    libraries = list(folder.glob("*.so"))
    if len(libraries) != 1:
        raise BuildError(f"{spec.name}: the build left {len(libraries)} libraries in {folder}")
    return Built(
        library=libraries[0],
        module=result if isinstance(result, ModuleType) else None,
        headers=_headers(spec, folder),
        seconds=time.perf_counter() - started,
    )


def _run(spec: Spec, folder: Path, architectures: tuple[str, ...]) -> Any:
    cpp_extension = _cpp_extension()
    options: dict[str, Any] = {
        "name": spec.name,
        "extra_cflags": list(spec.extra_cflags),
        "extra_cuda_cflags": [
            *spec.extra_cuda_cflags,
            *_hardware.gencode_flags(architectures),
        ],
        "extra_ldflags": [*spec.extra_ldflags, *_cuda_libraries(spec)],
        "extra_include_paths": [str(path) for path in spec.extra_include_paths],
        "build_directory": str(folder),
        "with_cuda": spec.with_cuda,
        "is_python_module": spec.is_python_module,
    }
    if not spec.inline:
        return cpp_extension.load(sources=[str(path) for path in spec.sources], **options)
    return cpp_extension.load_inline(
        cpp_sources=_numbered(spec.name, "cpp", spec.cpp_sources),
        cuda_sources=_numbered(spec.name, "cu", spec.cuda_sources),
        functions=dict(spec.functions) if spec.functions is not None else None,
        no_implicit_headers=spec.no_implicit_headers,
        **options,
    )


def _cuda_libraries(spec: Spec) -> list[str]:
    """Where toolkits from conda and PyPI have their libraries: torch looks in ``lib64`` only."""
    home = _toolchain.cuda_home() if spec.with_cuda else None
    return [f"-L{home / 'lib'}"] if home and not (home / "lib64").is_dir() else []


def _numbered(name: str, suffix: str, texts: tuple[str, ...]) -> list[str]:
    """Text that compilers report by the lines of the text as given, not of the file made of it."""
    return [f'#line 1 "{_label(name, suffix, i)}"\n{text}' for i, text in enumerate(texts)]


def _label(name: str, suffix: str, index: int) -> str:
    return f"{name}[{index}].{suffix}"


def _cpp_extension() -> Any:
    # At its first import torch warns of a CUDA toolkit on a machine without a GPU: no news here.
    def quiet(record: logging.LogRecord) -> bool:
        return "No CUDA runtime is found" not in record.getMessage()

    logger = logging.getLogger("torch.utils.cpp_extension")
    logger.addFilter(quiet)
    try:
        import torch.utils.cpp_extension as cpp_extension
    finally:
        logger.removeFilter(quiet)
    return cpp_extension


@contextlib.contextmanager
def _environment(folder: Path) -> Iterator[None]:
    """What torch's build reads from the environment, set for its duration only."""
    ninja, compiler = _toolchain.ninja_folder(), _toolchain.cxx()
    if ninja is None or compiler is None:
        raise ToolchainError("ninja or the C++ compiler has just disappeared")
    wanted = {
        "MAX_JOBS": os.environ.get("MAX_JOBS") or str(_hardware.jobs()),
        "CXX": str(_as_one_word(compiler, folder)),
    }
    path = os.environ.get("PATH", "")
    if str(ninja) not in path.split(os.pathsep):  # its virtual environment is not activated
        wanted["PATH"] = f"{path}{os.pathsep}{ninja}"
    cpp_extension, home = _cpp_extension(), _toolchain.cuda_home()
    with _environment_lock:
        before = {name: os.environ.get(name) for name in wanted}
        torchs_home = cpp_extension.CUDA_HOME  # read from the environment once, at its import
        os.environ.update(wanted)
        cpp_extension.CUDA_HOME = str(home) if home else torchs_home
        try:
            yield
        finally:
            cpp_extension.CUDA_HOME = torchs_home
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


@contextlib.contextmanager
def _streams() -> Iterator[None]:
    """For torch flushes stdout and stderr, which may be closed, or nothing at all."""
    with contextlib.ExitStack() as stack:
        for name, redirect in (
            ("stdout", contextlib.redirect_stdout),
            ("stderr", contextlib.redirect_stderr),
        ):
            try:
                getattr(sys, name).flush()
            except (AttributeError, OSError, ValueError):
                stack.enter_context(redirect(io.StringIO()))
        yield


def _as_one_word(compiler: _toolchain.Tool, folder: Path) -> Path:
    """The compiler as torch takes it: one word, so ``CXX="ccache g++"`` becomes a script."""
    program, *arguments = compiler.command
    found = shutil.which(program) or program
    if not arguments:
        return Path(found).absolute()
    script = folder / "cxx"
    script.write_text(f'#!/bin/sh\nexec {shlex.join([os.path.abspath(found), *arguments])} "$@"\n')
    script.chmod(0o755)
    return script


def _headers(spec: Spec, folder: Path) -> list[Path]:
    """The headers of the extension that the compilers really read, from ninja's record of them."""
    ninja = _toolchain.ninja_folder()
    command = [str(ninja / "ninja") if ninja else "ninja", "-C", str(folder), "-t", "deps"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    sources = {path.resolve() for path in spec.sources}
    found = {
        (folder / line.strip()).resolve() for line in listed.splitlines() if line.startswith("    ")
    }
    roots = spec.header_roots
    return sorted(
        path
        for path in found - sources
        if not path.is_relative_to(folder.resolve())
        and (any(path.is_relative_to(root) for root in roots) or not _is_systems(path))
    )


def _is_systems(path: Path) -> bool:
    """Headers that the identity of torch, nvcc or the compiler vouches for."""
    import sysconfig

    import torch

    home, compiler = _toolchain.cuda_home(), _toolchain.cxx()
    places = [Path(torch.__file__).parent, Path(sysconfig.get_path("include"))]
    places += [Path("/usr/include"), Path("/usr/lib"), Path("/usr/lib64")]
    if compiler:  # one of conda, say, has its own headers below its prefix, beside users' ones
        prefix = compiler.path.parent.parent
        places += [prefix / "lib", *prefix.glob("*-*-*")]
    return any(
        path.is_relative_to(place.resolve()) for place in [*places, *([home] if home else [])]
    )


def _explained(spec: Spec, folder: Path, log: Path, error: Exception) -> BuildError:
    output = all_of(error)
    try:
        log.write_text(f"{output}\n")
        kept = str(log)
    except OSError:
        kept = None
    compiled = any(folder.glob("*.so"))
    said = "was built but does not load" if compiled else "does not build"
    message = f"{spec.name} {said}:\n{diagnose(output, lambda f, n: _source_line(spec, f, n))}"
    if kept:
        message += f"\n  log:   {kept}"
    return BuildError(message, log=kept)


def _source_line(spec: Spec, file: str, number: int) -> str | None:
    """A line of a source as the user wrote it."""
    for suffix, texts in (("cpp", spec.cpp_sources), ("cu", spec.cuda_sources)):
        for index, text in enumerate(texts):
            if file == _label(spec.name, suffix, index):
                lines = text.splitlines()
                return lines[number - 1] if 0 < number <= len(lines) else None
    try:
        lines = Path(file).read_text(errors="replace").splitlines()
    except OSError:
        return None
    return lines[number - 1] if 0 < number <= len(lines) else None
