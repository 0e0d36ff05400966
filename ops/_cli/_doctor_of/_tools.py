"""The tools that a build needs, tried out."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ops._cli._doctor_of._finding import BAD, COMPILED, GOOD, NOTE, Finding
from ops._errors import JitopsError
from ops.jit import _admin

_BALANCE = "close its quotes, or unset it"


def tools() -> Iterator[Finding]:
    """The C++ compiler, ninja and nvcc."""
    yield from _cxx()
    ninja = _admin.compilers.ninja()
    if ninja is None:
        yield Finding("ninja", "not found", BAD, "pip install ninja", COMPILED)
    else:
        yield _try("ninja", lambda: f"{ninja}, {_output(str(ninja), '--version')}")
    yield from _cuda()


def _cxx() -> Iterator[Finding]:
    try:
        compiler = _admin.compilers.cxx()
    except JitopsError as error:
        yield Finding("C++ compiler", str(error), BAD, _BALANCE, COMPILED)
        return
    if compiler is None:
        named = os.environ.get("CXX")
        missing = f"$CXX is {named!r}, which is not found" if named else "none found"
        yield Finding("C++ compiler", missing, BAD, _admin.compilers.NO_COMPILER, COMPILED)
    else:
        yield _try("C++ compiler", lambda: f"{compiler.path}, {_admin.compilers.version(compiler)}")
        yield _try("compiling", _compile_and_load)
        yield _libstdcxx(compiler)


def _try(topic: str, find: Callable[[], str], blocks: tuple[str, ...] = COMPILED) -> Finding:
    try:
        return Finding(topic, find())
    except (JitopsError, OSError, subprocess.SubprocessError) as error:
        return Finding(topic, str(error).strip(), BAD, "see above", blocks)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _compile_and_load() -> str:
    """Try the compiler, because its version alone does not show that it works."""
    compiler = _admin.compilers.cxx()
    with tempfile.TemporaryDirectory(prefix="jitops-doctor-") as folder:
        source, library = Path(folder, "answer.cpp"), Path(folder, "answer.so")
        source.write_text(
            "#include <string>\nextern \"C\" int answer() { return std::string(42, 'x').size(); }\n"
        )
        command = [*(compiler.command if compiler else ()), "-std=c++20", "-shared", "-fPIC"]
        done = subprocess.run(
            [*command, str(source), "-o", str(library)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise OSError(f"a small library does not compile: {done.stderr.strip()[-300:]}")
        if ctypes.CDLL(str(library)).answer() != 42:
            raise OSError("a small library gives wrong results")
    return "a small library compiles, loads and runs"


def _libstdcxx(compiler: _admin.compilers.Tool) -> Finding:
    loaded = next((p for p in _mapped() if "libstdc++.so" in p.name), None)
    try:
        its = Path(_output(*compiler.command, "-print-file-name=libstdc++.so.6")).resolve()
        ours, theirs = (_newest(path) for path in (loaded, its))
    except (OSError, subprocess.SubprocessError):
        return Finding("libstdc++", f"{loaded}; that of the compiler is unknown", NOTE)
    if ours and theirs and theirs > ours:
        return Finding(
            "libstdc++",
            f"{loaded} is loaded, which is older than that of the compiler ({its})",
            NOTE,
            "if an extension does not load, use the compiler of the same environment "
            "(conda: conda install cxx-compiler)",
        )
    return Finding("libstdc++", f"{loaded}, GLIBCXX_{'.'.join(map(str, ours))}")


def _mapped() -> list[Path]:
    try:
        lines = Path("/proc/self/maps").read_text(errors="replace").splitlines()
    except OSError:
        return []
    return [Path(line[line.index("/") :]) for line in lines if "/" in line]


def _newest(library: Path | None) -> tuple[int, ...]:
    content = library.read_bytes() if library else b""
    versions = re.findall(rb"GLIBCXX_(\d+)\.(\d+)\.(\d+)", content)
    return max((tuple(map(int, version)) for version in versions), default=())


def _cuda() -> Iterator[Finding]:
    wanted = torch.version.cuda is not None
    for variable in _admin.compilers.NVCC_VARIABLES:
        try:
            _admin.compilers.words_in(variable)
        except JitopsError as error:
            yield Finding(variable, str(error), BAD if wanted else NOTE, _BALANCE, ("cuda",))
    try:
        compiler = _admin.compilers.nvcc()
    except JitopsError as error:
        yield Finding("nvcc", str(error), BAD if wanted else NOTE, _BALANCE, ("cuda",))
        return
    if compiler is None:
        how = "not found", NOTE if wanted else GOOD, _admin.compilers.NO_NVCC if wanted else None
        yield Finding("nvcc", *how, ("cuda",))
    else:
        problem = None
        try:
            _admin.compilers.check_cuda()
        except JitopsError as error:
            problem = str(error)
        found = f"{compiler.path}, {_release(compiler)}"
        status = (NOTE if not wanted else BAD) if problem else GOOD
        yield Finding("nvcc", found, status, problem, ("cuda",) if problem else ())
    if wanted:
        try:
            yield Finding("architectures", " ".join(_admin.gpu_archs.architectures()))
        except JitopsError as error:
            yield Finding("architectures", "none", NOTE, str(error), ("cuda",))


def _release(compiler: _admin.compilers.Tool) -> str:
    try:
        return _admin.compilers.version(compiler)
    except JitopsError as error:
        return str(error)
