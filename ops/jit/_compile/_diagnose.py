"""A build's output, read for the user: the first real error, its cause where known, the fix."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace

from ops.jit._compile._causes import COMPILING, ENCODING, MISUSED_HEADER, SOURCE_ERROR, Cause
from ops.jit._compile._link_causes import LINKING, LOADING
from ops.jit._compile._output import Output, Report, is_foreign

CAUSES = (*COMPILING, ENCODING, *LINKING, *LOADING)  # a line that fits two is the first one's


@dataclass(frozen=True)
class Diagnosis:
    """What a build's output says.

    Attributes:
        error: the first real error, in the tool's words.
        where: the user's file and line, where the error has one.
        source_line: that line.
        cause: what is wrong, or ``None`` if it is not known.
        fix: what to do, or ``None``.
        name: the cause's short name, which never changes, or ``None``.
        passing: the same build may succeed later: the machine failed, not the sources.
        unknown: where the cause is not known, what the error shown is.
        further: how many other errors were reported.
    """

    error: str
    where: str | None
    source_line: str | None
    cause: str | None
    fix: str | None
    name: str | None = None
    passing: bool = False
    unknown: str = "the first error reported"
    further: int = 0

    def __str__(self) -> str:
        lines = [f"  {self.where}: {self.error}" if self.where else f"  {self.error}"]
        if self.source_line is not None:
            lines.append(f"      {self.source_line.strip()}")
        if self.cause:
            lines += [f"  cause: {self.cause}", f"  fix:   {self.fix}"]
        else:
            lines.append(f"  cause: not one of those jitops knows; this is {self.unknown}")
        return "\n".join(lines)


def all_of(error: BaseException) -> str:
    """What an error says, and what torch's message of it leaves out."""
    if isinstance(error, UnicodeDecodeError):  # of the output, which torch takes for UTF-8
        return error.object.decode(errors="replace")
    if isinstance(error, subprocess.CalledProcessError):  # a compiler asked for its version
        printed = error.output or b""
        text = printed.decode(errors="replace") if isinstance(printed, bytes) else str(printed)
        return f"{text}\n{error}"
    # The dynamic linker's words are in the cause alone.
    cause = error.__cause__
    return f"{error}\n{cause}" if isinstance(cause, (OSError, ImportError)) else str(error)


def diagnose(output: str, source_line: Callable[[str, int], str | None]) -> Diagnosis:
    """Read a build's output.

    Args:
        output: everything the build printed.
        source_line: gives a line of a file as shipped, or ``None``.
    """
    read = Output(output)
    found = _diagnose(read, source_line)
    return replace(found, further=max(0, len(read.errors()) - 1))


def _diagnose(read: Output, source_line: Callable[[str, int], str | None]) -> Diagnosis:
    reports = read.reports()
    report, cause = _telling(reports) or _first(reports)
    if report is not None:
        return _of_report(read, report, cause, source_line)
    likeliest = read.likeliest()
    if likeliest is not None:
        unknown = "the first line that looks like an error"
        return _of_report(read, likeliest, None, source_line, unknown)
    error, unknown = _nothing_found(read)
    return Diagnosis(error, None, None, None, None, unknown=unknown)


def _telling(reports: list[Report]) -> tuple[Report, Cause] | None:
    for cause in CAUSES:
        if cause.telling:
            for report in reports:
                if cause.shown_by(report.text):
                    return report, cause
    return None


def _first(reports: list[Report]) -> tuple[Report | None, Cause | None]:
    for index, report in enumerate(reports):
        known = _known(report)
        if known:
            return report, known
        if not report.is_error:
            continue
        # A note after the error may say more than the error.
        notes = itertools.takewhile(lambda note: not note.is_error, reports[index + 1 :])
        return report, next(filter(None, map(_known, notes)), None)
    return None, None


def _known(report: Report) -> Cause | None:
    return next((cause for cause in CAUSES if cause.shown_by(report.text)), None)


def _of_report(
    read: Output,
    report: Report,
    cause: Cause | None,
    source_line: Callable[[str, int], str | None],
    unknown: str = Diagnosis.unknown,
) -> Diagnosis:
    where, line, users = None, None, None
    # A machine that fails does so at no line in particular.
    if report.file is not None and not (cause and cause.telling and cause.passing):
        where, line = f"{report.file}:{report.number}", None
        users = read.users_place(report)
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
        return Diagnosis(report.said, where, line, None, None, unknown=unknown)
    return Diagnosis(
        report.said, where, line, cause.cause, cause.fix, cause.name, cause.passing, unknown
    )


def _nothing_found(read: Output) -> tuple[str, str]:
    last = read.last()
    if last is not None:
        return last, "the last line printed, for none looks like an error"
    if read.failed is not None:
        return read.failed, "all that was printed"
    return "(no output)", "all that is known: nothing was printed"
