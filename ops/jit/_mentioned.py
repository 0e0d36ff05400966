"""What C++ text says by name: headers that it asks for, files that its assembly reads."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

_NAME = rb"(?:\"([^\"\n]+)\"|<([^>\n]+)>)"
_SPACE = rb"(?:[ \t]|/\*.*?\*/)*"
# Two, since either is found ten times as fast as an alternative of both.
_HEADERS = (
    re.compile(rb"#" + _SPACE + rb"(?:include(?:_next)?|import|embed)\b" + _SPACE + _NAME),
    re.compile(rb"__has_(?:include(?:_next)?|embed)\s*\(" + _SPACE + _NAME),
)
# What is included may also be a macro: then whichever header it is defined as, anywhere.
_COMPUTED = re.compile(
    rb"(?:#[ \t]*include(?:_next)?[ \t]+|\b__has_include(?:_next)?\s*\(\s*)[A-Za-z_]"
)
_DEFINED = re.compile(rb"#[ \t]*define[ \t]+\w+(?:\([^)\n]*\))?[ \t]+" + _NAME)
_READS = re.compile(rb"\.(?:incbin\b|include[ \t]*\\?\")")
# Its literal, and where that is put together by macros, whichever literal it may be.
_FILES = (
    re.compile(rb"\.(?:incbin|include)[ \t]*\\?\"([^\"\\\n]+)\\?\""),
    re.compile(rb"\"([^\"\\\n]+)\""),
    re.compile(rb"#define \w+ (/\S+)"),
)


def text(content: bytes) -> bytes:
    """Text as the preprocessor sees it: lines that go on are one, digraphs are what they mean."""
    content = content.replace(b"\r\n", b"\n").replace(b"\\\n", b"")
    return content.replace(b"%:", b"#") if b"%:" in content else content


def headers(content: bytes) -> set[tuple[str, bool]]:
    """The headers that a text includes or asks for, each with whether it stands in quotes."""
    found = (names for which in _HEADERS for names in which.findall(content))
    return {(os.fsdecode(quoted or angled), bool(quoted)) for quoted, angled in found}


def computes(content: bytes) -> bool:
    """Whether a text includes, or asks for, what a macro says."""
    return bool(_COMPUTED.search(content))


def defined(content: bytes, quoted: bool) -> set[str]:
    """The headers that macros of a text may stand for, those in quotes too if asked for."""
    found = _DEFINED.findall(content)
    return {os.fsdecode(one or other) for one, other in found if other or (quoted and one)}


def files(texts: Iterable[bytes]) -> set[str]:
    """What assembly in the texts may read (``.incbin``, ``.include``), whether it is there or not.

    More than that where it reads anything at all: macros may put the name together.
    """
    all_texts = list(texts)
    if not any(map(_READS.search, all_texts)):
        return set()
    found = {name for one in all_texts for which in _FILES for name in which.findall(one)}
    return {os.fsdecode(name) for name in found}
