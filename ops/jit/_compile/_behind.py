"""The programs behind a compiler's command: past launchers like ccache, and past wrapper scripts.

Whether a compiler is still the same is told by the files of all of these, without running any.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

# They run the program that is named after them; or, called by its name (a link to them that comes
# first on PATH), the next one of that name.
_LAUNCHER = re.compile(r"(ccache|sccache|distcc|icecc|icecream|buildcache|colorgcc|recc)\b")
_VARIABLE = "CCACHE_COMPILER"  # what ccache runs instead
_SEARCHED = ("CCACHE_PATH", "PATH")  # where ccache looks, and the others
_SCRIPT = b"#!"
_MOST = 1 << 16  # bytes of a script
_SAID = re.compile(r"[^\s\"'`:;|&()<>=${}]+")
_COMPILER = re.compile(r"(.*-)?(cc|c\+\+|gcc|g\+\+|clang|clang\+\+|icpx|icpc|nvcc)(-[\d.]+)?")


def programs(command: Sequence[str]) -> tuple[Path, ...]:
    """The file of each program that a command is known to run, its own first; none if it is none.

    What a wrapper that is no script runs, and what a script finds by other means than naming a
    compiler, its path or its folder, nobody can tell.
    """
    found: dict[Path, None] = {}
    words = [word for word in command if not word.startswith("-")]
    left = words[::-1]
    while left:
        ahead = list(_behind(left.pop()))
        if not ahead and not found:
            return ()  # the command itself is not here
        for path in ahead:
            if path in found:
                continue
            found[path] = None
            if _LAUNCHER.match(path.name):
                left += filter(None, [os.environ.get(_VARIABLE)])
            stat = path.stat()
            said = _named_in(path, stat.st_size, stat.st_mtime_ns)
            # A folder goes before PATH, or before a name that the script makes of its own.
            names = dict.fromkeys(os.path.basename(word) for word in (*words, *said))
            folders = filter(os.path.isdir, said)
            left += [*said, *(os.path.join(one, name) for one in folders for name in names)]
    return tuple(found)


def _behind(word: str) -> Iterator[Path]:
    """A program, and if it is a launcher that goes by another's name, that other one."""
    first = shutil.which(word)
    if first is None:
        return
    path = Path(first).resolve()
    yield path
    name = os.path.basename(word)
    if not _LAUNCHER.match(path.name) or _LAUNCHER.match(name):
        return
    for variable in _SEARCHED:
        for folder in filter(None, os.environ.get(variable, "").split(os.pathsep)):
            there = shutil.which(os.path.join(folder, name))
            if there and not _LAUNCHER.match((path := Path(there).resolve()).name):
                yield path
                return


@functools.lru_cache(maxsize=64)
def _named_in(path: Path, size: int, modified: int) -> tuple[str, ...]:
    """The compilers and the paths that a script names; none if it is no script."""
    try:
        with path.open("rb") as file:
            if file.read(len(_SCRIPT)) != _SCRIPT:
                return ()
            text = file.read(_MOST).decode(errors="surrogateescape")
    except OSError:
        return ()  # to be executed, not read: then it is no script either
    said = _SAID.findall(text.partition("\n")[2])
    return tuple(dict.fromkeys(one for one in said if one[0] == "/" or _COMPILER.fullmatch(one)))
