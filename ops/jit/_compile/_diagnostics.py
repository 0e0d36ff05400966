"""A failed build explained: the first real error, its cause where known, the fix, a script."""

from __future__ import annotations

import contextlib
import itertools
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ops._errors import BuildError, LibraryLoadError, ModuleLoadError
from ops.jit._compile._causes import CAUSES, ENCODING, MISUSED_HEADER, SOURCE_ERROR, Cause
from ops.jit._compile._log import Log, Report, is_foreign
from ops.jit._spec import RETIRE, Spec

_KEPT = ("main.cpp", "cuda.cu", "cxx", f"{RETIRE}.cpp")  # that the failed command may need
SourceLine = Callable[[str, int], str | None]


@dataclass(frozen=True)
class Diagnosis:
    """The reading of a build's output: the first real error, in the tool's words, and its cause."""

    error: str
    where: str | None = None  # the user's file and line, where the error has one
    source_line: str | None = None
    cause: str | None = None
    fix: str | None = None
    name: str | None = None  # of the cause: short, and never changed
    further: int = 0  # other errors that were reported

    def __str__(self) -> str:
        lines = [f"  {self.where}: {self.error}" if self.where else f"  {self.error}"]
        if self.source_line is not None:
            lines.append(f"      {self.source_line.strip()}")
        if self.cause:
            lines += [f"  cause: {self.cause}", f"  fix:   {self.fix}"]
        else:
            lines.append("  cause: not one of those that jitops knows")
        return "\n".join(lines)


def diagnose(output: str, source_line: SourceLine = lambda file, line: None) -> Diagnosis:
    """Read a build's output; ``source_line`` returns a line of a file as the user wrote it."""
    log = Log(output)
    report, cause = _decisive(log.reports) or _first(log.reports)
    if report is None:
        return Diagnosis(log.last_line() or log.failed or "(no output)")
    found = _of_report(log, report, cause, source_line)
    return replace(found, further=max(0, log.count_errors() - 1))


def _decisive(reports: list[Report]) -> tuple[Report, Cause] | None:
    decisive = (cause for cause in CAUSES if cause.decisive)
    return next(((r, c) for c in decisive for r in reports if c.matches(r.text)), None)


def _first(reports: list[Report]) -> tuple[Report | None, Cause | None]:
    for index, report in enumerate(reports):
        known = _known(report)
        if known:
            return report, known
        if report.is_error:
            # A note after the error may say more than the error.
            notes = itertools.takewhile(lambda note: not note.is_error, reports[index + 1 :])
            return report, next(filter(None, map(_known, notes)), None)
    return None, None


def _known(report: Report) -> Cause | None:
    return next((cause for cause in CAUSES if cause.matches(report.text)), None)


def _of_report(
    log: Log, report: Report, cause: Cause | None, source_line: SourceLine
) -> Diagnosis:
    where, line, users = None, None, None
    # A machine that fails does so at no line in particular.
    if report.file is not None and not (cause and cause.of_machine):
        where = f"{report.file}:{report.number}"
        users = log.users_place(report)
        if users:
            where = f"{users[0]}:{users[1]} (reported in {where})"
        line = source_line(*(users or (report.file, report.number)))
        if line is not None and line.strip() == report.said:  # an #error says itself
            line = None
    if cause is None and report.is_error and report.file is not None:
        cause = MISUSED_HEADER if users and is_foreign(report.file) else SOURCE_ERROR
        if line and "\0" in line:  # as in UTF-16 without a mark, where any error may come first
            cause = ENCODING
    if cause is None:
        return Diagnosis(report.said, where, line)
    return Diagnosis(report.said, where, line, cause.cause, cause.fix, cause.name)


# ---- the error -----------------------------------------------------------------------------------


def failed(spec: Spec, folder: Path, log: Path, output: str) -> BuildError:
    """Make the error for a build in ``folder`` that failed after printing ``output``."""
    found = diagnose(output, lambda file, line: _source_line(spec, file, line))
    message = f"{spec.name} does not build:\n{_of_functions(spec, found)}"
    further = ""
    if found.further:
        further = f" ({found.further} further error{'s' if found.further > 1 else ''})"
    kept = None
    with contextlib.suppress(OSError):
        log.write_text(f"{output}\n", encoding="utf-8", errors="replace")
        kept = str(log)
    message += f"\n  log:   {kept or 'cannot be written'}{further}"
    with contextlib.suppress(OSError):
        script = _script(folder, log, output)
        message += f"\n  again: sh {shlex.quote(str(script))}" if script else ""
    return BuildError(message, log=kept)


def refused(spec: Spec, place: str, error: Exception) -> BuildError:
    """Make the error for a library that the dynamic linker refuses to load."""
    # The dynamic linker's words are in the cause alone.
    text = f"{error}\n{error.__cause__}" if isinstance(error.__cause__, Exception) else str(error)
    place += "".join(f"\n  {note}" for note in getattr(error, "__notes__", []))
    kind = ModuleLoadError if spec.is_python_module else LibraryLoadError
    return kind(f"{spec.name} was built but does not load:\n{diagnose(text)}\n  library: {place}")


def _script(folder: Path, log: Path, output: str) -> Path | None:
    """Write a script that repeats the first command that failed, and keep the files it needs."""
    command = re.search(r"^FAILED: .*\n(.+)$", output, re.MULTILINE)
    if command is None:
        return None
    kept = log.with_suffix("")
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir()
    for path in folder.iterdir():
        if path.name in _KEPT:
            shutil.copy(path, kept)
    script = kept / "again.sh"
    text = command[1].replace(str(folder), shlex.quote(str(kept)))
    text = f'#!/bin/sh\ncd "$(mktemp -d)" || exit\n{text}\n'
    script.write_text(text, encoding="utf-8", errors="surrogateescape")
    return script


def _of_functions(spec: Spec, found: Diagnosis) -> Diagnosis:
    """Name the item of ``functions`` if the error is in a line that torch writes to bind it."""
    line = re.match(rf"{re.escape(spec.functions_label)}:(\d+)", found.where or "")
    if line is None or not spec.functions or not 2 <= int(line[1]) < len(spec.functions) + 2:
        return found
    name = spec.functions[int(line[1]) - 2][0]
    cause, fix = f"{name!r}, which functions names, cannot be bound", "bind it with PYBIND11_MODULE"
    here = line[0] == found.where  # and not in a header of pybind11, on its way to the function
    if here and re.search(r"not (?:been )?declared|undeclared|not a mem|no member", found.error):
        cause = f"functions names {name!r}, which is not declared in cpp_sources"
        fix = "mend the name, or declare it there: a prototype will do for one of cuda_sources"
    return replace(found, where=f"functions[{int(line[1]) - 2}]", cause=cause, fix=fix)


def _source_line(spec: Spec, file: str, number: int) -> str | None:
    texts = {spec.label("cpp", i): text for i, text in enumerate(spec.cpp_sources)}
    texts |= {spec.label("cu", i): text for i, text in enumerate(spec.cuda_sources)}
    text = texts.get(file)
    if text is None:
        try:
            text = Path(file).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
    lines = text.splitlines()
    return lines[number - 1] if 0 < number <= len(lines) else None
