"""A failed build explained: the first real error, its cause where known, the fix, a script."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ops._errors import BuildError, LibraryLoadError, ModuleLoadError
from ops.jit._compile._causes import CAUSES, ENCODING, MISUSED_HEADER, SOURCE_ERROR, Cause
from ops.jit._spec import RETIRE, Spec

_KEPT = ("main.cpp", "cuda.cu", "cxx", f"{RETIRE}.cpp")  # that the failed command may need
SourceLine = Callable[[str, int], str | None]

# How compilers, linkers, shells and ninja write.
_COLOURS = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\))")
_EDGE = re.compile(r"\[\d+/\d+\] ")
# A place: "file:line:column:" (gcc, clang), "file(line):" (nvcc), after the linker's name if any.
_PLACE = re.compile(
    r"(?:\S*\bld[.\w]*: )?(?P<file>[^\s:<][^:\0]{0,999}?)"
    r"(?::(?P<line>[1-9]\d{0,8})(?::\d{1,9})?:|\((?P<nvline>[1-9]\d{0,8})\)\s?:)(?P<rest>.+)"
)
_ERROR = re.compile(
    r"\s*(?:(?:catastrophic|fatal|internal compiler) )?[Ee]rror\b[^:]{0,40}:\s*"
    r"|\s*(?=undefined reference to|multiple definition of)"
)
_OF_TOOLS = re.compile(
    r"[^:]{1,300}:\s*(?:[Ff]atal |internal compiler )?[Ee]rror\s*:|\w+ (?:fatal|error)\s*:"
    r"|(?:\S*/)?ld(?:\.\w+)?: ?"
    r"(?!.*(?:: in function [`']|skipping incompatible|generic ELF|warning: ))"
)
_OF_LINKERS = re.compile(r"undefined (?:symbol: |reference to )|multiple definition of ")
_WARNING = re.compile(r"(?:^|\s)[Ww]arning(?: #\S{1,12})?\s?:(?!:)|\[-W(?!error)[^\]]*\]\s*$")
_QUOTED = re.compile(r"\s*\d* \|")
_CARET = re.compile(r"[ ~]*\^[ ~^]*$")
_SAYS_NOTHING = re.compile(
    r"\s*$|compilation terminated|ninja: build stopped|Error building extension '[^']*'$|\^*\s*$"
)
_SUM = re.compile(
    r"ld returned|linker command failed|\d errors? (?:generated|detected)|too many err"
)
_MOST = 2000  # lines looked at, at each end, and characters of a line
_CONTEXT = 300  # lines of "included from" and "required from" that an error may have
_FOREIGN = re.compile(
    r"(?:^|/)(?:(?:site|dist)-packages/(?:torch|pybind11|nvidia|numpy)|usr/(?:local/)?include"
    r"|usr/lib\d*|usr/local/cuda[^/]*|lib/gcc|c\+\+/[\d.]+|include/(?:python3|torch)[^/]*)/"
)
_INCLUDED = "In file included from "
_INCLUDER = re.compile(r"(?:In file included|\s+) from (?P<file>[^:]+):(?P<line>\d{1,9})[:,]")
_REQUIRER = re.compile(r"(?P<file>[^\s:][^:]*):(?P<line>\d{1,9}):(?:\d{1,9}:)? {2,}\S")
_INSTANTIATION = re.compile(
    r"(?P<file>[^\s:][^:]*):(?P<line>\d{1,9}):\d{1,9}: note: in instantiation of"
    r"|.* at line (?P<nvline>\d{1,9}) of \"?(?P<nvfile>[^\"]+)"
)


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


def _of_report(log: Log, report: Report, cause: Cause | None, source_line: SourceLine) -> Diagnosis:
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
        cause = MISUSED_HEADER if users and _is_foreign(report.file) else SOURCE_ERROR
        if line and "\0" in line:  # as in UTF-16 without a mark, where any error may come first
            cause = ENCODING
    if cause is None:
        return Diagnosis(report.said, where, line)
    return Diagnosis(report.said, where, line, cause.cause, cause.fix, cause.name)


# ---- the output, taken apart ---------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """A line that reports something, perhaps with the place that it is about."""

    index: int
    text: str
    said: str
    file: str | None = None
    number: int = 0
    is_error: bool = False


class Log:
    """The output of a build, and in it the first step that failed."""

    def __init__(self, output: str) -> None:
        self._all = [_ends(line) for line in _COLOURS.sub("", output).splitlines()]
        self.failed, self.lines = _first_failure(self._all)
        self.reports = list(_reports(self.lines))
        if self.failed:
            self.reports.append(_report(0, self.failed))

    def count_errors(self) -> int:
        """Count the errors of all steps, each once, without the tools' own sums."""
        return len({one.text for one in _reports(self._all) if one.is_error})

    def last_line(self) -> str | None:
        """Return the last line that says anything."""
        said = (line.strip() for line in reversed(self.lines) if not _SAYS_NOTHING.match(line))
        return next(said, None)

    def users_place(self, report: Report) -> tuple[str, int] | None:
        """Find the user's line that led to a report on a header of torch or of the system."""
        if report.file is None or not _is_foreign(report.file):
            return None
        before = self.lines[max(0, report.index - _CONTEXT) : report.index]
        after = self.lines[report.index + 1 : report.index + 1 + _CONTEXT]
        included = (i for i in range(len(before) - 1, -1, -1) if before[i].startswith(_INCLUDED))
        # An instantiation tells more than an include. The user is at the end of the first, and the
        # file nearest to the header is the first of the second.
        places = [
            *_places(_REQUIRER, _until_another_report(before[::-1])),
            *_places(_INSTANTIATION, _until_another_report(after)),
            *_places(_INCLUDER, before[next(included, len(before)) :]),
        ]
        return places[0] if places else None


def _is_foreign(file: str) -> bool:
    """Whether a file is a header of torch, CUDA, Python or the system."""
    return bool(_FOREIGN.search(file))


def _ends(text: Any) -> Any:
    """Return both ends of a long line, which names the place last, or of a long list of lines."""
    return text if len(text) <= 2 * _MOST else text[:_MOST] + text[-_MOST:]


def _first_failure(lines: list[str]) -> tuple[str | None, list[str]]:
    """Return ninja's line about the first step that failed, and the step's output."""
    start = next((i for i, line in enumerate(lines) if line.startswith("FAILED: ")), None)
    if start is None:  # not ninja's output, or ninja's own complaint
        return None, _ends([line for line in lines if not _EDGE.match(line)])
    printed = lines[start + 2 :]  # the command stands between
    ends = (
        i
        for i, line in enumerate(printed)
        if line.startswith(("FAILED: ", "ninja: ")) or (line[:1] == "[" and _EDGE.match(line))
    )
    return lines[start].strip(), _ends(printed[: next(ends, len(printed))])


def _reports(lines: list[str]) -> Iterator[Report]:
    """Yield the lines that may matter, without warnings and quoted sources."""
    for i, line in enumerate(_ends(lines)):
        following = lines[i + 1] if i + 1 < len(lines) else ""
        if not line or _QUOTED.match(line) or (following and _CARET.match(following)):
            continue  # compilers mark the source lines that they quote
        report = _report(i, line)
        # Clang's errors may end as warnings do: [-Wc++11-narrowing].
        if not _SUM.search(report.text) and (report.is_error or not _WARNING.search(report.text)):
            yield report


def _report(index: int, line: str) -> Report:
    text = line.strip()
    match = _PLACE.match(text)
    if match is None:
        is_error = bool(_OF_TOOLS.match(text) or _OF_LINKERS.search(text))
        return Report(index, text, text, is_error=is_error)
    error = _ERROR.match(match["rest"])
    start = error.end() if error and "internal" not in error[0] else 0
    number = int(match["line"] or match["nvline"])
    return Report(index, text, match["rest"][start:].strip(), match["file"], number, bool(error))


def _until_another_report(lines: list[str]) -> Iterator[str]:
    for line in lines:
        match = _PLACE.match(line)
        is_report = match and _ERROR.match(match["rest"])
        if not line.strip() or is_report or _WARNING.search(line):
            return
        yield line


def _places(shape: re.Pattern[str], lines: Iterable[str]) -> Iterator[tuple[str, int]]:
    for match in filter(None, map(shape.match, lines)):
        groups = {name.removeprefix("nv"): text for name, text in match.groupdict().items() if text}
        if not _is_foreign(groups["file"]):
            yield groups["file"], int(groups["line"])


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
    # The output is in UTF-8, in every locale.
    before, after = (os.fsencode(path).decode(errors="replace") for path in (folder, kept))
    text = command[1].replace(before, after)
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
