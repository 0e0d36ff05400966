"""Flags: the words that ninja and the shell make of them, and the files that these words name."""

from __future__ import annotations

import functools
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

# Text that ninja and the shell pass on as it is, split at white space.
_PLAIN = re.compile(r"[\w \t\n@%+=:,./-]*", re.ASCII)
# ninja's escapes, and its variables, none of which is defined where flags stand.
_NINJA = re.compile(r"\$(?:([$ :])|\{[\w.-]+\}|[\w-]+|\n *)", re.ASCII)
_LIVE = r"`|\$[\w@*#?!$({-]"
_TOKEN = re.compile(
    rf"'[^']*' | \"(?P<double>(?:[^\"\\]|\\.)*)\" | \\. | (?P<live>{_LIVE}|[;&|<>()]) | .",
    re.VERBOSE | re.DOTALL | re.ASCII,
)
_LIVE_IN_DOUBLE = re.compile(rf"\\.|(?P<live>{_LIVE})", re.DOTALL | re.ASCII)
_PASSED_ON = re.compile(r"-W[lpa],|(?:-Xcompiler|--compiler-options|--linker-options)=")
_PASS_ON = ("-Xlinker", "-Xpreprocessor", "-Xassembler", "-Xclang", "-Xcompiler",
            "--compiler-options", "--linker-options")  # fmt: skip
# The word after one of these is no file to read: it is a macro, a name, or a file to write.
_NOT_READ = ("-D", "-U", "-o", "-MF", "-MT", "-MQ", "-MJ", "-Map", "--Map", "-soname", "-rpath",
             "-aux-info", "-dumpbase", "--dependency-file", "--out-implib")  # fmt: skip
_DEPTH = 10  # of response files that name response files
_LINKED = (b"\x7fELF", b"!<arch>\n", b"!<thin>\n")  # the linker reports them


def words(flags: Sequence[str]) -> tuple[str, ...]:
    """Split flags into the words that the compilers get, with response files opened.

    Flags for another program (``-Wl,x,y``) come as the words that it gets.
    """
    text = " ".join(flags)  # as torch joins them
    if _PLAIN.fullmatch(text) and "@" not in text and "-W" not in text and "-X" not in text:
        return tuple(text.split())
    return tuple(_opened(_split(_NINJA.sub(lambda found: found[1] or "", text)), 0))


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:
        return text.split()  # a quote is left open, which the shell will report


def _opened(split: Sequence[str], depth: int) -> Iterator[str]:
    for word in split:
        passed_on = _PASSED_ON.match(word)
        if word in _PASS_ON:
            continue
        for part in word[passed_on.end() :].split(",") if passed_on else [word]:
            yield part
            file = re.match(r"@(/.+)|--?(?:options-file|optf)=(/.+)", part)
            if file and depth < _DEPTH:
                try:
                    text = Path(file[1] or file[2]).read_text(errors="surrogateescape")
                except OSError:
                    continue  # the compilers will report it
                yield from _opened(_split(text), depth + 1)


def refused(flags: Sequence[str]) -> str | None:
    """Find the first text in flags by which a shell would run a program, read a variable, or look.

    It would look for files that a pattern fits, and for the home folder.
    """
    text = " ".join(flags)
    if _PLAIN.fullmatch(text):
        return None
    for token in _TOKEN.finditer(_NINJA.sub(lambda found: found[1] or "", text)):
        inner = _LIVE_IN_DOUBLE.finditer(token["double"] or "")
        if live := next(filter(None, [token["live"], *(one["live"] for one in inner)]), None):
            return live
    return next((word for word in words(flags) if re.match(r"~|/.*[*?[]", word)), None)


def files(flags: Sequence[str], linked: bool = False) -> list[Path]:
    """List the files that words name by absolute paths and that no compiler or linker reports.

    Compilers report the headers that they read, linkers report objects, archives and scripts. This
    is for all else, such as response files, plugins and ``-specs=``, by any option. ``linked`` says
    that a linker gets the flags.
    """
    if "/" not in "".join(flags):
        return []
    found: dict[Path, None] = {}
    before = ""
    for word in words(flags):
        path = word[word.find("/") :] if "/" in word else ""
        read = before not in _NOT_READ and not word.startswith(("-D", "-U", "-Map="))
        if path and read and os.path.isfile(path) and not (linked and _is_reported(path)):
            found[Path(path)] = None
        before = word
    return list(found)


def _is_reported(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return sys.platform != "darwin" and file.read(8).startswith(_LINKED)
    except OSError:
        return False


@functools.lru_cache(maxsize=64)
def is_native(flags: tuple[str, ...]) -> bool:
    """Whether the code depends on the CPU that compiles it (``-march=native``)."""
    text = " ".join(flags)
    return ("native" in text or "@" in text) and any("=native" in word for word in words(flags))


def library_names(ldflags: Sequence[str]) -> tuple[list[str], list[str]]:
    """List the folders that ``-L`` names, and the files that ``-l`` may find in folders."""
    folders: list[str] = []
    names: list[str] = []
    text = "\0".join(words(ldflags))
    long = r"(?:--library(?:-path|-directory)?)(?=[\0=])"
    # An option and its value are one word, or two.
    option = rf"(?:^|\0)(-L|-l|{long})[\0=]?([^\0]+)"
    for kind, value in re.findall(option, text):
        (names if kind in ("-l", "--library") else folders).append(value)
    files = [one[1:] if one.startswith(":") else f"lib{one}" for one in names]
    files = [file for one in files for file in ([one] if "." in one else [f"{one}.so", f"{one}.a"])]
    return folders, files
