"""The output of a build, taken apart: the step that failed, its reports, the user's own line.

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
_INTERNAL = "internal compiler error: "
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
# Searching for words is cheap. A line without any of these is looked at no further.
_WORDS = (
    *("rror", "atal", "ndefined", "annot", "not found", "illed", "No s", "xceeded", "enied"),
    *("emory", "ld:", "not define", "definition of", "failed to map", "C++", "Read-only"),
    *("installed version", "not recognized", "wrong ELF", "bad_alloc"),
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
_MANGLED = re.compile(r"\b_Z\w+")


@dataclass(frozen=True)
class Report:
    """A line that reports something.

    Attributes:
        index: of the line.
        text: the whole line.
        said: the message in it.
        file: the file that it is about, if it names one.
        number: the line of that file.
        is_error: whether it is an error rather than a note.
    """

    index: int
    text: str
    said: str
    file: str | None = None
    number: int = 0
    is_error: bool = False


class Log:
    """The output of a build, and in it the first step that failed."""

    def __init__(self, output: str) -> None:
        self._all = (_COLOURS.sub("", output) if "\x1b" in output else output).splitlines()
        self.failed, self.lines = _first_failure(self._all)
        self.reports = list(_reports(self.lines))
        if self.failed:
            self.reports.append(_report(0, self.failed))

    def count_errors(self) -> int:
        """Count the errors of all steps, each once, without the tools' own sums."""
        return len({one.text for one in _reports(self._all) if one.is_error} - {""})

    def last_line(self) -> str | None:
        """Return the last line that says anything."""
        lines = (_short(line).strip() for line in self.lines[: -_MOST - 1 : -1])
        return next((line for line in lines if not _SAYS_NOTHING.match(line)), None)

    def users_place(self, report: Report) -> tuple[str, int] | None:
        """Find the user's line that led to a report on a header of torch or of the system."""
        if report.file is None or not is_foreign(report.file):
            return None
        before = self.lines[max(0, report.index - _CONTEXT) : report.index]
        after = self.lines[report.index + 1 : report.index + 1 + _CONTEXT]
        included = (i for i in range(len(before) - 1, -1, -1) if before[i].startswith(_INCLUDED))
        start = next(included, len(before))
        # An instantiation tells more than an include. The user is at the end of the first, and the
        # file nearest to the header is the first of the second.
        places = [
            *_places(_REQUIRER, _until_another_report(before[::-1])),
            *_places(_INSTANTIATION, _until_another_report(after)),
            *_places(_INCLUDER, before[start:]),
        ]
        return places[0] if places else None


def is_foreign(file: str) -> bool:
    """Whether a file is a header of torch, CUDA, Python or the system."""
    return bool(_FOREIGN.search(file))


def _first_failure(lines: list[str]) -> tuple[str | None, list[str]]:
    """Return ninja's line about the first step that failed, and all that the step printed."""
    start = next((i for i, line in enumerate(lines) if line.startswith("FAILED: ")), None)
    if start is None:  # not ninja's output, or ninja's own complaint
        return None, [line for line in lines if not _EDGE.match(line)]
    printed = lines[start + 2 :]  # the command stands between
    ends = (
        i
        for i, line in enumerate(printed)
        if line.startswith(("FAILED: ", "ninja: ")) or (line[:1] == "[" and _EDGE.match(line))
    )
    return lines[start].strip(), printed[: next(ends, len(printed))]


def _reports(lines: list[str]) -> Iterator[Report]:
    """Yield the lines that may matter, without warnings and quoted sources."""
    found = [i for i, line in enumerate(lines) if any(word in line for word in _WORDS)]
    if len(found) > 2 * _MOST:
        found = found[:_MOST] + found[-_MOST:]
    for i in found:
        following = "".join(map(_short, lines[i + 1 : i + 2]))
        if _QUOTED.match(lines[i][:_MOST]) or (following and _CARET.match(following)):
            continue  # compilers mark the source lines that they quote
        report = _report(i, _short(lines[i]))
        # Clang's errors may end as warnings do: [-Wc++11-narrowing].
        if not _SUM.search(report.text) and (report.is_error or not _WARNING.search(report.text)):
            yield report


def _report(index: int, line: str) -> Report:
    text = demangled(line.strip())
    match = _PLACE.match(text)
    if match is None:
        is_error = bool(_OF_TOOLS.match(text) or _OF_LINKERS.search(text))
        return Report(index, text, text, is_error=is_error)
    error = _ERROR.match(match["rest"])
    said = match["rest"][error.end() if error and _INTERNAL not in error[0] else 0 :].strip()
    number = int(match["line"] or match["nvline"])
    return Report(index, text, said, match["file"], number, is_error=bool(error))


def _short(line: str) -> str:
    """Return a line's two ends: messages about templates are long, and name the place last."""
    return line if len(line) <= 2 * _MOST else line[:_MOST] + line[-_MOST:]


def _until_another_report(lines: list[str]) -> Iterator[str]:
    for line in lines:
        text = _short(line)
        match = _PLACE.match(text)
        is_report = match and _ERROR.match(match["rest"])
        if not text.strip() or is_report or _WARNING.search(text):
            return
        yield text


def _places(shape: re.Pattern[str], lines: Iterable[str]) -> Iterator[tuple[str, int]]:
    for line in lines:
        match = shape.match(_short(line))
        if match:
            groups = {name: text for name, text in match.groupdict().items() if text}
            file = groups.get("file") or groups["nvfile"]
            if not is_foreign(file):
                yield file, int(groups.get("line") or groups["nvline"])


def demangled(text: str) -> str:
    """Spell out the names that C++ compilers make: ``f(int) (_Z1fi)``."""
    return _MANGLED.sub(_spelled_out, text, 8) if "_Z" in text else text


def _spelled_out(match: re.Match[str]) -> str:
    functions = _demangler()
    found = functions[0](match[0].encode(), None, None, None) if functions else None
    if not functions or not found:
        return match[0]
    try:
        return f"{ctypes.string_at(found).decode(errors='replace')} ({match[0]})"
    finally:
        functions[1](found)


@functools.cache
def _demangler() -> tuple[Any, Any] | None:
    """Find the C++ library's own function, which torch has loaded, and what frees its results."""
    try:
        demangle, free = ctypes.CDLL("libstdc++.so.6").__cxa_demangle, ctypes.CDLL(None).free
    except (OSError, AttributeError):
        return None
    demangle.restype = ctypes.c_void_p
    free.argtypes = [ctypes.c_void_p]
    return demangle, free
