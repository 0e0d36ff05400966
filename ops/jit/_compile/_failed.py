"""A failed build: its error, its log, and a script that repeats the command that failed."""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

from ops._errors import BuildError
from ops.jit._compile._diagnose import Diagnosis, diagnose
from ops.jit._spec import RETIRE, Spec


def label(name: str, suffix: str, index: int) -> str:
    """What compilers call a text."""
    return f"{name}[{index}].{suffix}"


def functions_label(name: str) -> str:
    """What compilers call the lines that bind ``functions``: one a function, from the second on."""
    return f"{name}.functions"


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
    said = _of_functions(spec, said)
    message = f"{spec.name} {what}:\n{said}"
    more = f"{said.further} further error{'s' if said.further > 1 else ''}" if said.further else ""
    if kept:
        message += f"\n  log:   {kept}{f' ({more})' if more else ''}"
    elif more:
        message += f"\n  {more}"
    if script:
        message += f"\n  again: sh {shlex.quote(str(script))}"
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
        if path.name in ("main.cpp", "cuda.cu", "cxx", f"{RETIRE}.cpp"):
            shutil.copy(path, kept)
    script = kept / "again.sh"
    quoted = shlex.quote(str(folder)) != str(folder)  # by ninja, where it stands in the command
    command = failed[1].replace(str(folder), str(kept) if quoted else shlex.quote(str(kept)))
    script.write_text(f'#!/bin/sh\ncd "$(mktemp -d)" || exit\n{command}\n')
    return script


def _of_functions(spec: Spec, said: Diagnosis) -> Diagnosis:
    """An error in the lines that bind ``functions``, which torch writes, told of that argument."""
    label = re.escape(functions_label(spec.name))
    line = re.match(rf"{label}:(\d+)", said.where or "")
    if line is None or not spec.functions or not 2 <= int(line[1]) < len(spec.functions) + 2:
        return said
    name = spec.functions[int(line[1]) - 2][0]
    cause, fix = f"{name!r}, which functions names, cannot be bound", "bind it with PYBIND11_MODULE"
    here = line[0] == said.where  # and not in a header of pybind11, on its way to the function
    if here and re.search(r"not (?:been )?declared|undeclared|not a mem|no member", said.error):
        cause = f"functions names {name!r}, which is not declared in cpp_sources"
        fix = "mend the name, or declare it there: a prototype will do for one of cuda_sources"
    return replace(said, where=f"functions[{int(line[1]) - 2}]", cause=cause, fix=fix)


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
