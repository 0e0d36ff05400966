"""The progress of a build: a live line on a terminal, one plain line in a log."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Callable, Iterator

from ops import _config

_FINISHED = re.compile(r"\[\d+/\d+\] .* -c (?:\S*/)?(\S+) -o ")


def say(text: str) -> None:
    """Print a line to stderr, unless ``JITOPS_PROGRESS=0``."""
    if _config.settings().progress:
        _write(f"jitops: {text}\n")


def _write(text: str) -> None:
    # stderr may be closed, full, a broken pipe or no stream at all. That is no reason to fail.
    with contextlib.suppress(AttributeError, OSError, ValueError):
        sys.stderr.write(text)
        sys.stderr.flush()


def _is_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):
        return False


@contextlib.contextmanager
def watching(name: str, units: list[str], echo: bool) -> Iterator[Callable[[str], None]]:
    """Show how far the build of ``name`` is, by the lines of ninja's output.

    Args:
        name: of the extension.
        units: the names of the files to compile.
        echo: pass the lines on to stdout.

    Yields:
        The function that takes each line.
    """
    started = time.perf_counter()
    left = list(units)
    live = _config.settings().progress and _is_terminal() and not echo

    def show() -> None:
        count = min(len(units), len(units) - len(left) + 1)
        what = f"compiling {', '.join(left)}" if left else "linking"
        _write(f"\r\x1b[Kjitops: {name}: {what} [{count}/{len(units)}]")

    def on_line(line: str) -> None:
        if echo:
            with contextlib.suppress(AttributeError, OSError, ValueError):
                sys.stdout.write(f"{line}\n")
                sys.stdout.flush()
        finished = _FINISHED.match(line)
        if live and finished and finished[1] in left:
            left.remove(finished[1])
            show()

    if live:
        show()
    try:
        yield on_line
    finally:
        if live:
            _write("\r\x1b[K")
    files = f"{len(units)} file{'s' if len(units) > 1 else ''}"
    say(f"compiled {name} ({files}) in {time.perf_counter() - started:.1f} s")
