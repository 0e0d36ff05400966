"""Takes a build's output apart: the step that failed, its reports, the user's own line.

Knows how ninja, compilers, linkers and shells write, and no causes.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

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
        if report.file is None or not is_foreign(report.file):
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


def is_foreign(file: str) -> bool:
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
    text = re.sub(r"\b_Z\w+", _demangled, line.strip(), count=8) if "_Z" in line else line.strip()
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
        if not is_foreign(groups["file"]):
            yield groups["file"], int(groups["line"])


def _demangled(match: re.Match[str]) -> str:
    """Spell out a name that a C++ compiler has made: ``f(int) (_Z1fi)``."""
    demangle, free = _demangler()
    found = demangle(match[0].encode(), None, None, None) if demangle else None
    if not found:
        return match[0]
    try:
        return f"{ctypes.string_at(found).decode(errors='replace')} ({match[0]})"
    finally:
        free(found)


@functools.cache
def _demangler() -> tuple[Any, Any]:
    """Find the C++ library's own function, and the one that frees its results."""
    try:
        demangle, free = ctypes.CDLL("libstdc++.so.6").__cxa_demangle, ctypes.CDLL(None).free
    except (OSError, AttributeError):
        return None, None
    demangle.restype = ctypes.c_void_p
    free.argtypes = [ctypes.c_void_p]
    return demangle, free
