"""A failed build explained: the first real error, its cause where known, and the fix."""

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ops._errors import BuildError, LibraryLoadError, ModuleLoadError
from ops.jit._compile._causes import CAUSES, SOURCE_ERROR, UNKNOWN, Cause
from ops.jit._spec import Spec

_MOST = 2000  # lines looked at, at each end, and characters of a line

# How compilers, linkers, shells and ninja write.
_COLOURS = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\))")
_EDGE = re.compile(r"FAILED: |ninja: |\[\d+/\d+\] ")
# "file:line:column: error:" (gcc, clang), "file(line): error:" (nvcc), after the linker's name.
_ERROR = re.compile(
    r"(?:\S*\bld[.\w]*: )?(?P<file>[^\s:<][^:\0]{0,999}?)"
    r"(?::(?P<line>[1-9]\d{0,8})(?::\d{1,9})?:|\((?P<nvline>[1-9]\d{0,8})\)\s?:)\s*"
    r"(?:(?:(?:catastrophic|fatal) )?[Ee]rror\b[^:]{0,40}:\s*"
    r"|(?=internal compiler error|undefined reference to|multiple definition of))(?P<said>.+)"
)
_OF_TOOLS = re.compile(
    r"[^:]{1,300}:\s*(?:[Ff]atal |internal compiler )?[Ee]rror\s*:|\w+ (?:fatal|error)\s*:"
    r"|(?:\S*/)?ld(?:\.\w+)?: ?"
    r"(?!.*(?:: in function [`']|skipping incompatible|generic ELF|warning: ))"
    r"|.*(?:undefined (?:symbol: |reference to )|multiple definition of )"
)
_WARNING = re.compile(r"(?:^|\s)[Ww]arning(?: #\S{1,12})?\s?:(?!:)")
_QUOTED = re.compile(r"\d* ?\|")
_CARET = re.compile(r"[ ~]*\^[ ~^]*$")
_SUM = re.compile(
    r"ld returned|linker command failed|\d errors? (?:generated|detected)|too many err"
)
_SAYS_NOTHING = re.compile(
    r"$|compilation terminated|ninja: build stopped|Error building extension '[^']*'$|FAILED: |\^*$"
)
_FOREIGN = re.compile(
    r"(?:^|/)(?:(?:site|dist)-packages/(?:torch|pybind11|nvidia|numpy)|usr/(?:local/)?include"
    r"|usr/lib\d*|usr/local/cuda[^/]*|lib/gcc|c\+\+/[\d.]+|include/(?:python3|torch)[^/]*)/"
)
_INCLUDER = re.compile(r"(?:In file included )?from (?P<file>[^:]+):(?P<line>\d{1,9})[:,]")
# What asked for an instance of a template: gcc's "required from", clang's note, nvcc's sentence.
_REQUIRER = re.compile(
    r"(?P<file>[^\s:][^:]*):(?P<line>\d{1,9}):(?:(?:\d{1,9}:)? {2,}\S|\d{1,9}: note: in instant)"
    r"|.* at line (?P<nvline>\d{1,9}) of \"?(?P<nvfile>[^\"]+)"
)


@dataclass(frozen=True)
class Diagnosis:
    """The reading of a build's output: the first real error, in the tool's words, and its cause."""

    error: str
    where: str | None = None  # the user's file and line, where the error has one
    source_line: str | None = None
    cause: Cause = UNKNOWN

    def __str__(self) -> str:
        lines = [f"  {self.where}: {self.error}" if self.where else f"  {self.error}"]
        if self.source_line is not None:
            lines.append(f"      {self.source_line.strip()}")
        lines.append(f"  cause: {self.cause.cause}")
        if self.cause.fix:
            lines.append(f"  fix:   {self.cause.fix}")
        return "\n".join(lines)


def diagnose(
    output: str, source_line: Callable[[str, int], str | None] = lambda file, line: None
) -> Diagnosis:
    """Read a build's output; ``source_line`` returns a line of a file as the user wrote it."""
    lines = [_ends(line.strip()) for line in _COLOURS.sub("", output).splitlines()]
    step = list(_told(_first_failure(lines)))
    causes = [next((c for c in CAUSES if re.search(c.pattern, line)), UNKNOWN) for line in step]
    # Errors may follow from a failure of the machine.
    index = next((causes.index(one) for one in CAUSES if one.of_machine and one in causes), None)
    if index is None:
        firsts = (i for i, one in enumerate(causes) if one is not UNKNOWN or _is_error(step[i]))
        index = next(firsts, None)
    if index is None:
        said = (line for line in reversed(step) if not _SAYS_NOTHING.match(line))
        return Diagnosis(next(said, next(filter(_EDGE.match, step), "(no output)")))
    cause = causes[index]
    if cause is UNKNOWN:  # a note after the error may say more than the error
        notes = itertools.takewhile(lambda i: not _is_error(step[i]), range(index + 1, len(step)))
        cause = next((causes[i] for i in notes if causes[i] is not UNKNOWN), UNKNOWN)
    error = _ERROR.match(step[index])
    if error is None or cause.of_machine:
        return Diagnosis(error["said"] if error else step[index], cause=cause)
    place = error["file"], int(error["line"] or error["nvline"])
    where = f"{place[0]}:{place[1]}"
    if users := _users_place(step, index) if _FOREIGN.search(place[0]) else None:
        where = f"{users[0]}:{users[1]} (reported in {where})"
    source: str | None = source_line(*(users or place))
    if source is not None and source.strip() == error["said"]:  # an #error says itself
        source = None
    cause = SOURCE_ERROR if cause is UNKNOWN else cause
    return Diagnosis(error["said"], where, source, cause)


def _ends(text: Any) -> Any:
    """Return both ends of a long line, which names the place last, or of a long list of lines."""
    return text if len(text) <= 2 * _MOST else text[:_MOST] + text[-_MOST:]


def _first_failure(lines: list[str]) -> list[str]:
    """Return the output of the first step that failed, and at its end ninja's line about it."""
    start = next((i for i, line in enumerate(lines) if line.startswith("FAILED: ")), None)
    if start is None:  # not ninja's output, or ninja's own complaint
        return _ends([line for line in lines if not re.match(r"\[\d+/\d+\] ", line)])
    printed = itertools.takewhile(lambda line: not _EDGE.match(line), lines[start + 2 :])
    return [*_ends(list(printed)), lines[start]]  # the command stands between


def _told(lines: list[str]) -> Iterator[str]:
    """Yield the lines without those that quote a source, and a blank for a warning."""
    for line, following in itertools.pairwise([*lines, ""]):
        if not _QUOTED.match(line) and not (following and _CARET.match(following)):
            # Clang's errors may end as warnings do: [-Wc++11-narrowing].
            yield "" if _WARNING.search(line) and not _is_error(line) else line


def _is_error(line: str) -> bool:
    return bool(_ERROR.match(line) or _OF_TOOLS.match(line)) and not _SUM.search(line)


def _users_place(step: list[str], index: int) -> tuple[str, int] | None:
    """Find the user's line that led to an error in a header of torch or of the system."""

    def of_it(lines: list[str]) -> list[str]:
        """Return the lines up to the next report."""
        return [*itertools.takewhile(lambda line: line and not _ERROR.match(line), lines)]

    before, after = of_it(step[:index][::-1]), of_it(step[index + 1 :])
    # The user is at the end of the chain of templates. Of the files that include each other, the
    # one nearest to the header comes first.
    chain = [*map(_REQUIRER.match, before + after), *map(_INCLUDER.match, before[::-1])]
    for match in filter(None, chain):
        file = match["file"] or match["nvfile"]
        if not _FOREIGN.search(file):
            return file, int(match["line"] or match["nvline"])
    return None


def failed(spec: Spec, log: Path, output: str) -> BuildError:
    """Make the error for a build that failed after printing ``output``."""
    found = diagnose(output, lambda file, line: _source_line(spec, file, line))
    message = f"{spec.name} does not build:\n{found}\n  log:   "
    try:
        log.write_text(f"{output}\n", encoding="utf-8", errors="replace")
    except OSError as error:
        return BuildError(f"{message}cannot be written: {error}")
    return BuildError(f"{message}{log}", log=str(log))


def refused(spec: Spec, place: str, error: Exception) -> BuildError:
    """Make the error for a library that the dynamic linker refuses to load."""
    # The dynamic linker's words are in the cause alone.
    text = f"{error}\n{error.__cause__}" if isinstance(error.__cause__, Exception) else str(error)
    place += "".join(f"\n  {note}" for note in getattr(error, "__notes__", []))
    kind = ModuleLoadError if spec.is_python_module else LibraryLoadError
    return kind(f"{spec.name} was built but does not load:\n{diagnose(text)}\n  library: {place}")


def _source_line(spec: Spec, file: str, number: int) -> str | None:
    texts = {spec.label("cpp", i): text for i, text in enumerate(spec.cpp_sources)}
    texts |= {spec.label("cu", i): text for i, text in enumerate(spec.cuda_sources)}
    try:
        text = texts.get(file) or Path(file).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return "".join(text.splitlines()[number - 1 : number]) or None
