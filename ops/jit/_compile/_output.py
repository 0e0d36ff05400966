"""What a build prints, taken apart: the step that failed, what it reports, the user's own place.

Knows the shapes in which ninja, compilers, linkers and shells write, and no causes.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_COLOURS = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\))")
_TORCHS_PREFIX = re.compile(r"Error building extension '[^'\n]*'(?:: )?")
_EDGE = re.compile(r"\[\d+/\d+\] ")
# A place: "file:line:column:" (gcc, clang), "file(line):" (nvcc), after the linker's name if any.
_PLACE = re.compile(
    r"(?:\S*\bld[.\w]*: )?(?P<file>[^\s:<][^:\0]{0,999}?)"
    r"(?::(?P<line>\d{1,9})(?::\d{1,9})?:|\((?P<nvline>\d{1,9})\)\s?:)(?P<rest>.+)"
)
_SEVERITY = re.compile(r"\s*(?:(?:catastrophic|fatal) )?(?:error|Error)\b[^:]{0,40}:\s*")
_OF_SOURCES = re.compile(
    r"\s*(?:(?:catastrophic|fatal|internal compiler) )?[Ee]rror\b[^:]{0,40}:"
    r"|\s*(?:undefined reference to|multiple definition of) "
)
_OF_TOOLS = re.compile(
    r"[^:]{1,300}:\s*(?:[Ff]atal |internal compiler )?[Ee]rror\s*:|\w+ (?:fatal|error)\s*:"
    r"|(?:\S*/)?ld(?:\.\w+)?: ?"
    r"(?!.*(?:: in function [`']|skipping incompatible|generic ELF|warning: ))"
)
_WARNING = re.compile(r"(?:^|\s)[Ww]arning(?: #\S{1,12})?\s?:(?!:)|\[-W(?!error)[^\]]*\]\s*$")
# Where the message is not in English: a place, one to three words, a colon.
_OF_SOURCES_IN_ANY_LANGUAGE = re.compile(r" (?:[^\W\d]+ ){0,2}[^\W\d]+: \S")
_QUOTED = re.compile(r"\s*\d* \|")
_CARET = re.compile(r"[ ~]*\^[ ~^]*$")
_SAYS_NOTHING = re.compile(r"\s*$|compilation terminated|ninja: build stopped|\^*\s*$")
# Searching for words is cheap. A line without any of these is looked at no further.
_WORDS = (
    *("rror", "atal", "ndefined", "annot", "not found", "illed", "No s", "xceeded", "enied"),
    *("emory", "ld:", "not define", "already", "definition of", "mismatch", "is required"),
    *("failed to map", "unavailable", "C++", "installed version", "Unknown CUDA"),
    *("Read-only", "CUDA_HOME", "missing and no", "not recognized", "wrong ELF", "bad_alloc"),
    *("would end the process", "would not end"),
)
_OF_LINKERS = re.compile("undefined reference to |multiple definition of |undefined symbol: ")
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
_MANGLED = re.compile(r"\b_Z\w+")


@dataclass(frozen=True)
class Report:
    """A line that says something: all of it, what it says, and of which source line."""

    index: int
    text: str
    said: str
    file: str | None = None
    number: int = 0
    is_error: bool = False


class Output:
    """A build's output, and in it the first step that failed."""

    def __init__(self, output: str) -> None:
        text = _COLOURS.sub("", output) if "\x1b" in output else output
        lines = text.splitlines()
        if lines:
            lines[0] = _TORCHS_PREFIX.sub("", _short(lines[0]))
        self.failed, self.lines = _first_failure(lines)
        self._all = lines

    def reports(self) -> list[Report]:
        """The lines that may matter, first ones first, without warnings and quoted sources."""
        return [*_reports(self.lines), *([_report(0, self.failed)] if self.failed else [])]

    def errors(self) -> set[str]:
        """All errors reported, of whichever step, but for the sums that tools draw of them."""
        found = _reports(self._all)
        told = (one.text for one in found if one.is_error or _OF_LINKERS.search(one.text))
        return {text for text in told if not _SUM.search(text)}

    def likeliest(self) -> Report | None:
        """The first line of an error's shape, in whatever language it is."""
        for index, line in enumerate(self.lines[:_MOST]):
            match = _PLACE.match(_short(line))
            if match and _OF_SOURCES_IN_ANY_LANGUAGE.match(match["rest"]):
                report = _report(index, _short(line))
                if not _is_warning(report.text):
                    return report
        return None

    def last(self) -> str | None:
        """The last line that says anything."""
        lines = (_short(line).strip() for line in self.lines[: -_MOST - 1 : -1])
        return next((line for line in lines if not _SAYS_NOTHING.match(line)), None)

    def users_place(self, report: Report) -> tuple[str, int] | None:
        """The user's line that led to a report on a header of torch or of the system."""
        if report.file is None or not is_foreign(report.file):
            return None
        return next(self._users_places(report), None)

    def _users_places(self, report: Report) -> Iterator[tuple[str, int]]:
        before = self.lines[max(0, report.index - _CONTEXT) : report.index]
        after = self.lines[report.index + 1 : report.index + 1 + _CONTEXT]
        # What instantiated it tells more than what included it. The user is at the end of the
        # first, and the file nearest to the header is the first of the second.
        yield from _places(_REQUIRER, _until_another_report(before[::-1]))
        yield from _places(_INSTANTIATION, _until_another_report(after))
        included = (i for i in range(len(before) - 1, -1, -1) if before[i].startswith(_INCLUDED))
        for start in included:
            yield from _places(_INCLUDER, before[start:])


def is_foreign(file: str) -> bool:
    """Whether it is a header of torch, CUDA, Python or the system."""
    return bool(_FOREIGN.search(file))


def _reports(lines: list[str]) -> list[Report]:
    found = [i for i, line in enumerate(lines) if len(line) > 5 and _has_a_word(line)]
    if len(found) > 2 * _MOST:
        found = found[:_MOST] + found[-_MOST:]
    taken = [_report(i, _short(lines[i])) for i in found if not _is_quoted(lines, i)]
    # Clang's errors may end as warnings do: [-Wc++11-narrowing].
    return [report for report in taken if report.is_error or not _is_warning(report.text)]


def _is_quoted(lines: list[str], index: int) -> bool:
    """Whether a line is the source's: compilers mark what they quote."""
    following = lines[index + 1 : index + 2]
    return bool(_QUOTED.match(_short(lines[index]))) or bool(
        following and _CARET.match(_short(following[0]))
    )


def _has_a_word(line: str) -> bool:
    return any(word in line for word in _WORDS)


def _first_failure(lines: list[str]) -> tuple[str | None, list[str]]:
    """What ninja says of the first step that failed, and all that the step printed."""
    start = next((i for i, line in enumerate(lines) if line.startswith("FAILED: ")), None)
    if start is None:  # no step has failed: not ninja's output, or ninja's own complaint
        return None, [line for line in lines if not _EDGE.match(line)]
    printed = lines[start + 2 :]  # the command stands between
    end = next(
        (
            i
            for i, line in enumerate(printed)
            if line.startswith(("FAILED: ", "ninja: ")) or (line[:1] == "[" and _EDGE.match(line))
        ),
        len(printed),
    )
    return lines[start].strip(), printed[:end]


def _report(index: int, line: str) -> Report:
    text = line.strip()
    match = _PLACE.match(text)
    if match is None or int(match["line"] or match["nvline"]) == 0:
        shown = demangled(text)
        return Report(index, shown, shown, is_error=bool(_OF_TOOLS.match(text)))
    said = demangled(match["rest"][_end(_SEVERITY, match["rest"]) :].strip())
    number = int(match["line"] or match["nvline"])
    is_error = bool(_OF_SOURCES.match(match["rest"]))
    return Report(index, demangled(text), said, match["file"], number, is_error)


def _is_warning(text: str) -> bool:
    return _WARNING.search(text) is not None


def _short(line: str) -> str:
    """A line's two ends: messages about templates are long, and name the place last."""
    return line if len(line) <= 2 * _MOST else line[:_MOST] + line[-_MOST:]


def _end(pattern: re.Pattern[str], text: str) -> int:
    match = pattern.match(text)
    return match.end() if match else 0


def _until_another_report(lines: list[str]) -> Iterator[str]:
    for line in lines:
        text = _short(line)
        match = _PLACE.match(text)
        is_report = match and _OF_SOURCES.match(match["rest"])
        if not text.strip() or is_report or _is_warning(text):
            return
        yield text


def _places(shape: re.Pattern[str], lines: Iterator[str] | list[str]) -> Iterator[tuple[str, int]]:
    for line in lines:
        match = shape.match(_short(line))
        if match:
            groups = {name: text for name, text in match.groupdict().items() if text}
            file = groups.get("file") or groups["nvfile"]
            if not is_foreign(file):
                yield file, int(groups.get("line") or groups["nvline"])


def demangled(text: str) -> str:
    """A text with the names that C++ compilers make spelled out: ``f(int) (_Z1fi)``."""
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
    """The C++ library's own function, which torch has loaded, and what frees its results."""
    try:
        demangle, free = ctypes.CDLL("libstdc++.so.6").__cxa_demangle, ctypes.CDLL(None).free
    except (OSError, AttributeError):
        return None
    demangle.restype = ctypes.c_void_p
    free.argtypes = [ctypes.c_void_p]
    return demangle, free
