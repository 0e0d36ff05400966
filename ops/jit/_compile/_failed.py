"""A failed build: its error, its log, and a script that repeats the command that failed."""

from __future__ import annotations

import contextlib
import re
import shutil
from pathlib import Path

from ops._errors import BuildError
from ops.jit._compile._diagnose import diagnose
from ops.jit._spec import Spec


def label(name: str, suffix: str, index: int) -> str:
    """What compilers call a text."""
    return f"{name}[{index}].{suffix}"


def build(spec: Spec, folder: Path, log: Path, output: str) -> BuildError:
    """The error for a build in ``folder`` that failed saying ``output``."""
    script = None
    with contextlib.suppress(OSError):
        script = _script(folder, log, output)
    return explained(spec, log, output, "does not build", script)


def explained(
    spec: Spec, log: Path, output: str, what: str, script: Path | None = None
) -> BuildError:
    """The error that tells what the compilers, or the dynamic linker, said."""
    kept: str | None = str(log)
    try:
        log.write_text(f"{output}\n", errors="replace")
    except OSError:
        kept = None
    said = diagnose(output, lambda file, line: _source_line(spec, file, line))
    message = f"{spec.name} {what}:\n{said}"
    if kept:
        message += f"\n  log:   {kept}"
    if script:
        message += f"\n  again: sh {script}"
    return BuildError(message, log=kept, passing=said.passing or said.name is None)


def _script(folder: Path, log: Path, output: str) -> Path | None:
    """Repeats the first command that failed. The private folder goes; what it needs of it stays."""
    failed = re.search(r"^FAILED: .*\n(.+)$", output, re.MULTILINE)
    if failed is None:
        return None
    kept = log.with_suffix("")
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir()
    for path in folder.iterdir():
        if path.name in ("main.cpp", "cuda.cu", "cxx", "jitops_retire.cpp"):
            shutil.copy(path, kept)
    script = kept / "again.sh"
    command = failed[1].replace(str(folder), str(kept))
    script.write_text(f'#!/bin/sh\ncd "$(mktemp -d)" || exit\n{command}\n')
    return script


def _source_line(spec: Spec, file: str, number: int) -> str | None:
    """A line of a source as the user wrote it."""
    for suffix, texts in (("cpp", spec.cpp_sources), ("cu", spec.cuda_sources)):
        for index, text in enumerate(texts):
            if file == label(spec.name, suffix, index):
                return _line(text, number)
    try:
        return _line(Path(file).read_text(errors="replace"), number)
    except OSError:
        return None


def _line(text: str, number: int) -> str | None:
    lines = text.splitlines()
    return lines[number - 1] if 0 < number <= len(lines) else None
