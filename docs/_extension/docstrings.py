"""Docstrings as napoleon reads them: sections of Google's style, but prose below ``Returns:``."""

from __future__ import annotations

import re
from typing import Any


def prepare(
    app: Any, kind: str, name: str, value: object, options: object, text: list[str]
) -> None:
    """Make ``Returns:`` a field of its own: napoleon takes words before a colon for a type."""
    text[:] = returns_as_a_field("\n".join(text)).split("\n")


def returns_as_a_field(text: str) -> str:
    """A docstring whose section ``Returns:`` is a field of reStructuredText."""

    def field(found: re.Match[str]) -> str:
        return f":returns: {found[1].strip()}\n"

    return re.sub(r"^Returns:\n((?:[ ]{4}.*\n|\n(?=[ ]{4}))+)", field, text, flags=re.MULTILINE)
