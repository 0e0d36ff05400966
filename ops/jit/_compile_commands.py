"""``compile_commands.json``: what clangd and other editors read to understand the sources."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ops.jit._cache._store import Entry
from ops.jit._spec import RETIRE

NAME = "compile_commands.json"
_HERE = "@ENTRY@"  # stands for the entry's folder, so that a cache can move


def write(folder: Path, commands: list[dict[str, Any]]) -> None:
    """Keep in ``folder`` what compiled what is in it."""
    kept = [
        {key: value.replace(str(folder), _HERE) for key, value in one.items()} for one in commands
    ]
    (folder / NAME).write_text(json.dumps(kept, indent=1))


def read(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """The commands of several entries, as editors want them."""
    found: list[dict[str, Any]] = []
    for entry in entries:
        commands = _in(entry, entry.folder)
        found += [one for one in commands if Path(one["file"]).stem != RETIRE]
    return found


def text(entry: Entry, folder: Path) -> str:
    """The commands of an entry, as if they had run in ``folder``."""
    return json.dumps(_in(entry, folder), indent=1)


def _in(entry: Entry, folder: Path) -> list[dict[str, Any]]:
    places = {"command": shlex.quote(str(folder))}  # the shell's, where the others are paths
    return [
        {key: value.replace(_HERE, places.get(key, str(folder))) for key, value in one.items()}
        for one in json.loads(entry.content(NAME) or b"[]")
    ]
