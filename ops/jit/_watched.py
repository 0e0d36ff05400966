"""A child process, watched until it ends or is ended: how it did, what it said, how far it got."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_KEPT = 1 << 16  # bytes of what it prints that are looked at, and what a pipe holds


@dataclass(frozen=True)
class Pipes:
    """Read end and write end: for the steps that the child says it takes, and what it prints."""

    steps: tuple[int, int]
    printed: tuple[int, int]


@dataclass(frozen=True)
class Seen:
    """What was seen of a child.

    Attributes:
        how: it ended; ``None`` if it had to be ended.
        step: the last that it told.
        text: the end of what it printed.
    """

    how: str | None
    step: str
    text: str


@contextlib.contextmanager
def pipes() -> Iterator[Pipes]:
    """Open within the block."""
    with contextlib.ExitStack() as stack:
        yield Pipes(_pipe(stack), _pipe(stack))


def _pipe(stack: contextlib.ExitStack) -> tuple[int, int]:
    ends = os.pipe()
    for end in ends:
        stack.callback(os.close, end)
    os.set_blocking(ends[0], False)
    return ends


def watch(child: int, ends: Pipes, longest: float, asleep: float) -> Seen:
    """What becomes of ``child``, which is ended if it takes too long.

    Args:
        longest: seconds that it may take.
        asleep: seconds that it may use no processor.
    """
    how, text = _follow(child, ends.printed[0], longest, asleep)
    steps = _read(ends.steps[0]).decode(errors="replace")
    return Seen(how, steps.rstrip("\n").rpartition("\n")[2], text)


def _follow(child: int, printed: int, longest: float, asleep: float) -> tuple[str | None, str]:
    text, how, pause = b"", None, 0.001
    started = awake = time.monotonic()
    used = 0
    poll = select.poll()  # select() takes no descriptor above 1023
    poll.register(printed, select.POLLIN)
    try:
        while how is None:
            now = time.monotonic()
            now_used = _processor(child)
            if now_used != used:
                used, awake = now_used, now
            if now - started > longest or now - awake > asleep:
                break
            poll.poll(1000 * pause)
            text = (text + _read(printed))[-_KEPT:]
            how = _ended(child)
            pause = min(2 * pause, 0.05)
    finally:
        if how is None:
            # It may have ended this moment, and somebody else have asked how.
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
    text = (text + _read(printed))[-_KEPT:]  # a pipe holds no more
    return how, text.decode(errors="replace").strip()


def _processor(child: int) -> int:
    """The time that it has used, in ticks of 10 ms."""
    try:
        status = Path(f"/proc/{child}/stat").read_text()
    except OSError:
        return 0
    user, system = status.rpartition(")")[2].split()[11:13]  # before it comes a name of any kind
    return int(user) + int(system)


def _read(pipe: int) -> bytes:
    """What is there to be read; whoever holds the other end is not waited for."""
    try:
        return os.read(pipe, _KEPT)
    except BlockingIOError:
        return b""


def _ended(child: int) -> str | None:
    """How a process ended; ``None`` if it has not."""
    try:
        ended, status = os.waitpid(child, os.WNOHANG)
    except ChildProcessError:  # somebody else has asked: a handler of SIGCHLD
        return "in a way not known"
    if not ended:
        return None
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"exit status {code}"
    with contextlib.suppress(ValueError):  # one without a name
        return f"signal {-code} ({signal.Signals(-code).name})"
    return f"signal {-code}"
