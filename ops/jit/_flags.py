"""Flags: the words that ninja and the shell make of them, and the files that these words name."""

import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

# Text that ninja and the shell pass on as it is, split at white space.
_PLAIN = re.compile(r"[\w \t\n%+=:,./-]*", re.ASCII)
# ninja's escapes, and its variables, none of which is defined where flags stand.
_NINJA = re.compile(r"\$(?:([$ :])|\{[\w.-]+\}|[\w-]+|\n *)", re.ASCII)
_LIVE = r"`|\$[\w@*#?!$({-]"
_TOKEN = re.compile(
    rf"'[^']*' | \"(?P<double>(?:[^\"\\]|\\.)*)\" | \\. | (?P<live>{_LIVE}|[;&|<>()])",
    re.VERBOSE | re.DOTALL | re.ASCII,
)
# Files of flags, which no tool reports, and which may name further ones.
FILE_OF_FLAGS = re.compile(r"@(?!loader_path|executable_path|rpath)|--?(?:options-file|optf)\b")
_READ_UNSEEN = re.compile(rf"{FILE_OF_FLAGS.pattern}|~|/.*[*?[]")
# No file to read: a macro, or a file that the compiler or the linker writes.
_NOT_READ = re.compile(
    r"(?:^|\0)(?:-D\0?|--?Map[\0=]|-f(?:opt-info|dump-|time-trace|optimization-record))[^\0]*"
)
# Flags for another program, in a word of their own or in this one.
_PASSED_ON = re.compile(
    r"-W[lpa],|(?:-X(?:linker|preprocessor|assembler|clang|compiler)"
    r"|--(?:compiler|linker)-options)(?:=|$)"
)


def _ninja(flags: Sequence[str]) -> str:
    return _NINJA.sub(lambda found: found[1] or "", " ".join(flags))  # as torch joins them


def words(flags: Sequence[str]) -> tuple[str, ...]:
    """Split flags into the words that the compilers get.

    Flags for another program (``-Wl,x,y``) come as the words that it gets.
    """
    text = " ".join(flags)
    if _PLAIN.fullmatch(text) and "-W" not in text and "-X" not in text:
        return tuple(text.split())
    try:
        split = shlex.split(_ninja(flags))
    except ValueError:
        split = _ninja(flags).split()  # a quote is left open, which the shell will report
    found: list[str] = []
    for word in split:
        passed_on = _PASSED_ON.match(word)
        found += filter(None, word[passed_on.end() :].split(",")) if passed_on else [word]
    return tuple(found)


def refused(flags: Sequence[str]) -> str | None:
    """Find the first text in flags whose meaning could change without anybody seeing it.

    A shell would run a program, read a variable, or look for files or the home folder. A compiler
    would read further flags from a file.
    """
    for token in _TOKEN.finditer(_ninja(flags)):
        quoted = re.search(_LIVE, re.sub(r"\\.", "", token["double"] or "", flags=re.DOTALL))
        if live := token["live"] or (quoted and quoted[0]):
            return live
    return next(filter(_READ_UNSEEN.match, words(flags)), None)


def files(flags: Sequence[str], linked: bool = False) -> list[Path]:
    """List the files that words name by absolute paths and that no compiler or linker reports.

    Compilers report the headers that they read, linkers report objects, archives and scripts. This
    is for all else, such as plugins and ``-specs=``, by any option. ``linked`` says that a linker
    gets the flags.
    """
    read = _NOT_READ.sub("", "\0".join(words(flags))).split("\0")
    paths = (word[word.find("/") :] for word in read if "/" in word)
    reported = (".a", ".o", ".so") if linked and sys.platform != "darwin" else ()
    found = (path for path in paths if not path.endswith(reported) and os.path.isfile(path))
    return [Path(path) for path in dict.fromkeys(found)]


def is_native(flags: Sequence[str]) -> bool:
    """Whether the code may depend on the CPU that compiles it (``-march=native``)."""
    return any("native" in word for word in words(flags))


def library_names(ldflags: Sequence[str]) -> tuple[list[str], list[str]]:
    """List the folders that ``-L`` names, and the files that ``-l`` may find in folders."""
    # An option and its value are one word, or two.
    text = "".join(f"\0{word}" for word in words(ldflags))
    folders = re.findall(r"\0(?:-L|--library-(?:path|directory)(?=[\0=]))[\0=]?([^\0]+)", text)
    names = re.findall(r"\0(?:-l|--library(?=[\0=]))[\0=]?([^\0]+)", text)
    stems = [one[1:] if one.startswith(":") else f"lib{one}" for one in names]
    files = [[one] if "." in one else [f"{one}.so", f"{one}.a"] for one in stems]
    return folders, [one for its in files for one in its]
