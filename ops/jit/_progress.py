"""Lines on stderr about a build. A notebook shows one line for each build, and updates it."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from ops import _config


class Line:
    """One line. Outside a notebook, each text is a line of its own."""

    def __init__(self) -> None:
        self._shown: Any = None  # the output of a notebook's cell

    def say(self, text: str) -> None:
        """Show a text, in place of the one before; ``JITOPS_PROGRESS=0`` shows none."""
        if not _config.settings().progress:
            return
        ipython = sys.modules.get("IPython")
        # A shell in a terminal has no kernel.
        if ipython is None or not hasattr(ipython.get_ipython(), "kernel"):
            write(sys.stderr, f"jitops: {text}\n")
            return
        content = {"text/plain": f"jitops: {text}"}
        if self._shown is None:
            self._shown = ipython.display.display(content, raw=True, display_id=True)
        else:
            self._shown.update(content, raw=True)


def say(text: str) -> None:
    """Say a text that no later one replaces."""
    Line().say(text)


def write(stream: Any, text: str) -> None:
    """Write to a stream. If it is closed, full, a broken pipe or ``None``, nothing fails."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        stream.write(text)
        stream.flush()
