"""Flags: the words that ninja and the shell make of them, and the files that these words name."""

from __future__ import annotations

import functools
import glob
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
_TOKEN = re.compile(
    r"'[^']*' | \"(?P<double>(?:[^\"\\]|\\.)*)\" | \\. | (?P<live>`|\$[\w@*#?!$({-]|[;&|<>()]) | .",
    re.VERBOSE | re.DOTALL | re.ASCII,
)
_LIVE_IN_DOUBLE = re.compile(r"\\.|(?P<live>`|\$[\w@*#?!$({-])", re.DOTALL | re.ASCII)
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

    What is passed on to another program (``-Wl,x,y``) comes as the words that it gets.
    """
    return _words(" ".join(flags))  # as torch joins them


def _words(text: str) -> tuple[str, ...]:
    if _PLAIN.fullmatch(text) and "@" not in text and "-W" not in text and "-X" not in text:
        return tuple(text.split())
    return tuple(_opened(_split(text), 0))


def _split(text: str) -> list[str]:
    text = _NINJA.sub(lambda found: found[1] or "", text)
    try:
        split = shlex.split(text)
    except ValueError:
        split = text.split()  # a quote is left open, which the shell will report
    return [one for word in split for one in _expanded(word)]


def _expanded(word: str) -> list[str]:
    """Expand ``~`` and patterns of files, as the shell does with a word that is not quoted."""
    word = os.path.expanduser(word)
    if os.path.isabs(word) and re.search(r"[*?[]", word):
        # Shells differ in how they write a negation.
        found = {*glob.glob(word), *glob.glob(word.replace("[^", "[!"))}
        return sorted(found) or [word]
    return [word]


def _opened(split: Sequence[str], depth: int) -> Iterator[str]:
    for word in split:
        passed_on = _PASSED_ON.match(word)
        if word in _PASS_ON:
            continue
        for part in word[passed_on.end() :].split(",") if passed_on else [word]:
            yield part
            file = re.match(r"@(/.+)|--?(?:options-file|optf)=(/.+)", part)
            if file and depth < _DEPTH:
                yield from _opened(_response(file[1] or file[2]), depth + 1)


def _response(path: str) -> list[str]:
    try:
        text = Path(path).read_text(errors="surrogateescape")
    except OSError:
        return []  # the compilers will report it
    try:
        return shlex.split(text)
    except ValueError:
        return text.split()


def refused(flags: Sequence[str]) -> str | None:
    """Find the first text in flags by which a shell would run a program or read a variable."""
    text = " ".join(flags)
    if _PLAIN.fullmatch(text):
        return None
    for token in _TOKEN.finditer(_NINJA.sub(lambda found: found[1] or "", text)):
        live = [token["live"]]
        if token["double"] is not None:
            live = [inner["live"] for inner in _LIVE_IN_DOUBLE.finditer(token["double"])]
        for found in filter(None, live):
            return found
    return None


def expanded(flags: Sequence[str]) -> list[str]:
    """List the words that depend on the home folder, or on which files there are."""
    text = " ".join(flags)
    return [word for word in words(flags) if word not in text] if re.search(r"[~*?[]", text) else []


def files(flags: Sequence[str]) -> list[Path]:
    """List the files that words name by absolute paths and that no compiler or linker reports.

    Compilers report the headers that they read, linkers report objects, archives and scripts. This
    is for all else, such as response files and ``-specs=``, whatever the option is called.
    """
    if "/" not in "".join(flags):
        return []
    found: dict[Path, None] = {}
    folders: list[str] = []
    before = ""
    for word in words(flags):
        start = word.find("/")
        if start >= 0 and before not in _NOT_READ and not word.startswith(("-D", "-U", "-Map=")):
            if word.startswith("-L") or before == "-L":
                folders.append(word[start:])
            path = Path(word[start:])
            if os.path.isfile(path) and not _is_reported(path):
                found[path] = None
        if word.startswith("-l") and sys.platform == "darwin":  # whose linker reports nothing
            archives = (Path(folder, f"lib{word[2:]}.a") for folder in folders)
            found.update((path, None) for path in archives if path.is_file())
        before = word
    return list(found)


def _is_reported(path: Path) -> bool:
    if sys.platform == "darwin":
        return False
    try:
        with path.open("rb") as file:
            return file.read(8).startswith(_LINKED)
    except OSError:
        return False


@functools.lru_cache(maxsize=64)
def is_native(flags: tuple[str, ...]) -> bool:
    """Whether the code depends on the CPU that compiles it (``-march=native``)."""
    text = " ".join(flags)
    if "native" not in text and "@" not in text:
        return False
    return any("=native" in word for word in words(flags))


def library_names(ldflags: Sequence[str]) -> tuple[list[str], list[str]]:
    """List the folders that ``-L`` names, and the files that ``-l`` may find in folders."""
    folders: list[str] = []
    names: list[str] = []
    before = ""
    for word in words(ldflags):
        option = re.match(r"-L|--library-(?:path|directory)=|-l|--library=", word)
        if option and word != option[0]:
            is_folder = option[0].startswith("-L") or "-library-" in option[0]
            (folders if is_folder else names).append(word[option.end() :])
        elif before in ("-L", "--library-path", "--library-directory"):
            folders.append(word)
        elif before in ("-l", "--library"):
            names.append(word)
        before = word
    files = [one[1:] if one.startswith(":") else f"lib{one}" for one in names]
    files = [file for one in files for file in ([one] if "." in one else [f"{one}.so", f"{one}.a"])]
    return [folder.removeprefix("=") for folder in folders], files
