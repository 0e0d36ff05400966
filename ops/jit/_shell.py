"""What becomes of flags on their way to the compilers: first ninja reads them, then the shell.

Both split and replace. What the shell makes of the file system (patterns, ``~``) is done here as
well, so that it is known without a build; what it would take from a program or a variable is not,
and has no place in a flag.
"""

from __future__ import annotations

import functools
import glob
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

# Nothing but words, split where there is space: so are most flags.
_PLAIN = re.compile(r"[\w \t\n@%+=:,./-]*", re.ASCII)
# ninja's: an escaped character, or a variable, none of which is known where flags stand.
_NINJAS = re.compile(r"\$(?:([$ :])|\{[\w.-]+\}|[\w-]+|\n *)", re.ASCII)
_TOKEN = re.compile(
    r"""(?P<space>[ \t\n]+) | '(?P<single>[^']*)' | "(?P<double>(?:[^"\\]|\\.)*)" | \\(?P<escaped>.)
    | (?P<refused>`|\$[\w@*#?!$-]+|\$\{[^}]*\}?|\$\(|[;&|<>()])
    | (?P<pattern>[*?[]) | (?P<plain>[^\s'"\\`$;&|<>()*?[]+|.)""",
    re.VERBOSE | re.DOTALL | re.ASCII,
)
_IN_DOUBLE = re.compile(
    r"\\.|(?P<refused>`|\$[\w@*#?!$-]+|\$\{[^}]*\}?|\$\()", re.DOTALL | re.ASCII
)
_ESCAPED_IN_DOUBLE = re.compile(r"\\([$`\"\\\n])")


@dataclass
class _Word:
    """One word: as it is, and as a pattern of files; whether it is more than its text."""

    text: str = ""
    pattern: str = ""
    is_pattern: bool = False
    begins: bool = False  # any of it has been read, be it empty quotes
    home: bool = False


def split(flags: Sequence[str]) -> list[str]:
    """The words that the compilers are given."""
    return [word for one in _read(flags)[0] for word in _expanded(one)]


def expanded(flags: Sequence[str]) -> list[str]:
    """Those of them that the file system and the home folder decide."""
    words = _read(flags)[0]
    return [word for one in words if one.is_pattern or one.home for word in _expanded(one)]


def refused(flags: Sequence[str]) -> str | None:
    """The first thing in flags by which the shell would run a program or read a variable."""
    return next(iter(_read(flags)[1]), None)


def _read(flags: Sequence[str]) -> tuple[list[_Word], list[str]]:
    try:
        return _lexed(" ".join(flags))  # as torch joins them
    except ValueError:
        pass  # a quote is left open: the shell will refuse it too, and the others are as they are
    words: list[_Word] = []
    refuses: list[str] = []
    for flag in flags:
        try:
            more, live = _lexed(flag)
        except ValueError:
            more, live = [_Word(flag)], []
        words += more
        refuses += live
    return words, refuses


@functools.lru_cache(maxsize=256)
def _lexed(text: str) -> tuple[list[_Word], list[str]]:
    """The words of a text, and what in it is refused.

    Raises:
        ValueError: a quote is left open.
    """
    if _PLAIN.fullmatch(text):
        return [_Word(word) for word in text.split()], []
    text = _NINJAS.sub(lambda found: found[1] or "", text)
    words, word, refuses = [], _Word(), []
    for token in _TOKEN.finditer(text):
        kind, said = token.lastgroup, token[token.lastgroup or 0]
        if kind == "space":
            words += [word] if word.begins else []
            word = _Word()
            continue
        if kind == "plain" and said in ("'", '"', "\\"):
            raise ValueError(f"no closing quotation in {text!r}")
        if kind == "refused":
            refuses.append(said)
        if kind == "double":
            live = (found["refused"] for found in _IN_DOUBLE.finditer(said))
            refuses += filter(None, live)
            said = _ESCAPED_IN_DOUBLE.sub(r"\1", said)
        if kind == "plain" and said.startswith("~") and not word.begins:
            word.home = True
        word.begins = True
        word.is_pattern |= kind == "pattern"
        word.text += said
        word.pattern += said if kind in ("pattern", "plain") else glob.escape(said)
    return [*words, *([word] if word.begins else [])], refuses


def _expanded(word: _Word) -> list[str]:
    """What the shell makes of a word: itself, or the files of a pattern.

    Not those that it would find from the folder of a build.
    """
    pattern = os.path.expanduser(word.pattern) if word.home else word.pattern
    if word.is_pattern and os.path.isabs(pattern):
        # Shells differ in how they say "none of these".
        found = {*glob.glob(pattern), *glob.glob(pattern.replace("[^", "[!"))}
        if found:
            return sorted(found)
    return [os.path.expanduser(word.text) if word.home else word.text]


def quoted(words: Sequence[str]) -> list[str]:
    """Flags that come to these words."""
    return [shlex.quote(word).replace("$", "$$") for word in words]


def in_response(text: str) -> list[str]:
    """The words of a response file, which no shell sees."""
    try:
        return shlex.split(text)
    except ValueError:
        return [text]  # the compilers will refuse it too
