"""Lines on stderr about a build."""

import contextlib
import sys
from typing import Any

from ops import _config


def say(text: str) -> None:
    """Print a line on stderr; ``JITOPS_PROGRESS=0`` prints none."""
    if _config.settings().progress:
        write(sys.stderr, f"jitops: {text}\n")


def write(stream: Any, text: str) -> None:
    """Write to a stream. If it is closed, full, a broken pipe or ``None``, nothing fails."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        stream.write(text)
        stream.flush()
