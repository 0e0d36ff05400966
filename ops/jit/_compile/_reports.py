"""The tools' reports of a build: the headers and files that were read, the folders searched."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from ops._errors import BuildError
from ops.jit._compile._build import LINK_REPORT
from ops.jit._spec import RETIRE, Spec

_WORD = re.compile(r"(?:\\[ \t#]|[^ \t])+")
_SEARCHED = re.compile(r"^ (\S.*)$", re.MULTILINE)
_MISSING = re.compile(r'^ignoring nonexistent directory "(.+)"$', re.MULTILINE)


def searched(spec: Spec, folder: Path) -> list[str]:
    """List the folders in which the compilers of a build search for headers.

    Raises:
        BuildError: a compiler does not report them.
    """
    found: dict[str, None] = {}
    for path in sorted(folder.glob("search*.txt")):
        text = os.fsdecode(path.read_bytes())
        end = text.find("End of search list")
        if end < 0:
            raise BuildError(
                f"{spec.name}: the compiler does not say where it searches for headers (-E -v), so "
                f"that nobody could tell when a new one hides another: {text[-300:]}"
            )
        names = _MISSING.findall(text[:end])
        names += _SEARCHED.findall(text[text.find("search starts here") : end])
        found |= {name: None for name in names if os.path.isabs(name)}
    return list(found)


def headers(spec: Spec, folder: Path, place: Path) -> list[str]:
    """List the headers that the compilers opened.

    Args:
        folder: of the build.
        place: another path of the folder, by which the tools know it.

    Raises:
        BuildError: a compiler does not report them, or a name leads nowhere.
    """
    found: dict[str, None] = {}
    unreported = {f"{path.stem}.o" for path in spec.sources if path.suffix == ".s"}
    for built in folder.glob("*.o"):
        report = folder / f"{built.name}.d"
        if built.name in (*unreported, f"{RETIRE}.o"):
            continue  # nothing can be included there
        if not report.is_file():
            raise BuildError(
                f"{spec.name}: the compiler did not say which headers it read for {built.name}: "
                f"flags must not have the list written elsewhere (-MF)"
            )
        by_nvcc = built.name.endswith(".cuda.o")
        text = os.fsdecode(report.read_bytes()).replace("\\\n", " ")
        for line in text.split("\n"):
            for word in _WORD.findall(re.split(r":(?:[ \t]|$)", line, maxsplit=1)[-1]):
                path = _unescaped(word, by_nvcc)
                # nvcc lists the names in #line too, which are no files.
                if not by_nvcc or os.path.isabs(path) or os.path.isfile(folder / path):
                    found[path] = None
    return _tracked(spec, found, folder, place)


def linked(spec: Spec, folder: Path, place: Path) -> list[str]:
    """List the files that the linker opened and that become part of the result.

    Raises:
        BuildError: the linker does not report them, or a name leads nowhere.
    """
    report = folder / LINK_REPORT
    if sys.platform == "darwin":
        return []  # its linker reports nothing: the files that flags name are in the key
    if not report.is_file():
        raise BuildError(
            f"{spec.name}: the linker did not say which files it read: flags must not have the "
            f"list written elsewhere (--dependency-file)"
        )
    rule = os.fsdecode(report.read_bytes()).partition("\n\n")[0].split("\n")[1:]
    words = [line.strip().removesuffix("\\").rstrip() for line in rule]
    # GNU ld escapes nothing, lld does.
    names = [word if os.path.exists(folder / word) else _unescaped(word, False) for word in words]
    found = _tracked(spec, filter(None, names), folder, place)
    return [path for path in found if not _is_shared(path)]


def _unescaped(word: str, by_nvcc: bool) -> str:
    if by_nvcc:
        return word.replace("\\ ", " ")
    word = re.sub(r"(\\*)\\([ \t])", lambda m: m[1][len(m[1]) // 2 :] + m[2], word)
    return word.replace("\\#", "#").replace("$$", "$")


def _tracked(spec: Spec, paths: Iterable[str], folder: Path, place: Path) -> list[str]:
    """Drop sources and the build's own files; refuse names that lead nowhere."""
    sources = {os.path.realpath(path) for path in spec.sources}
    inner = f"{os.path.realpath(folder)}/"
    found: dict[str, None] = {}
    for path in paths:
        # The other path of the folder is gone by now.
        whole = os.path.join(folder, path.removeprefix(f"{place}/"))
        if not os.path.isfile(whole):
            raise BuildError(
                f"{spec.name}: a file that the build read cannot be tracked, because the compiler "
                f"or linker reports it as {path!r}: name it by an absolute path of ordinary "
                f"characters"
            )
        parent = os.path.realpath(os.path.dirname(whole))
        if not f"{parent}/".startswith(inner) and os.path.realpath(whole) not in sources:
            found[whole] = None
    return list(found)


def _is_shared(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            head = file.read(18)
    except OSError:
        return False
    return head[:4] == b"\x7fELF" and int.from_bytes(head[16:18], "little") == 3
