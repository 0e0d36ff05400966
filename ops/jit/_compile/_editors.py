"""``compile_commands.json``: clangd and other editors read it to understand the sources."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

NAME = "compile_commands.json"
_HERE = "@ENTRY@"  # stands for the entry's folder, so that a cache can move


def write(folder: Path, commands: list[dict[str, Any]]) -> None:
    """Keep in ``folder`` the commands that compiled the sources in it."""
    kept = [
        {key: value.replace(str(folder), _HERE) for key, value in one.items()} for one in commands
    ]
    (folder / NAME).write_text(json.dumps(kept, indent=1))


def read(content: bytes | None, folder: Path) -> list[dict[str, Any]]:
    """Return the commands that :func:`write` kept, as if they had run in ``folder``."""
    places = {"command": shlex.quote(str(folder))}  # the shell's, where the others are paths
    return [
        {key: value.replace(_HERE, places.get(key, str(folder))) for key, value in one.items()}
        for one in json.loads(content or b"[]")
    ]
