"""Whether a library would end the process that loads it: tried in a fork of the process first.

A C++ exception in a static initialiser (a schema that does not parse, say) gets past the dynamic
linker as the end of the process, and nothing in the process can help that. Whoever edits and loads
again would lose their session to a typing error.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import resource
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable
from typing import NoReturn

import torch

_LONGEST = 60.0  # seconds; a lock that another thread held as we forked is never given back
_MOST = 2000  # characters of what it prints that are passed on
_KEPT = 1 << 16  # bytes of it that are looked at, and what a pipe holds
_DIES_OF = ("terminate called", "terminating ")  # libstdc++, libc++
# What the child says of how far it has got: a word before it ends, in a line of its own. An exit
# status says nothing: an initialiser may end the process with any.
_LOADED = "loaded"
_RAISED = "raised"

At = Callable[[str], None]


def problem(load: Callable[[At], object], *, deadly_only: bool) -> str | None:
    """What ``load`` dies of, does not come back from, or raises, in a fork of this process.

    Args:
        load: what to try; it is given a function by which it says what comes next. What it writes
            to stdout is dropped.
        deadly_only: an exception is no problem, only the end of the process is.

    Returns:
        ``None`` too where it cannot be tried.
    """
    # Elsewhere, system libraries do not survive a fork; nor does CUDA, once initialised.
    if sys.platform != "linux" or torch.cuda.is_initialized():
        return None
    with contextlib.ExitStack() as stack:
        steps, printed = _pipe(stack), _pipe(stack)
        try:
            with warnings.catch_warnings():  # Python 3.12 warns of threads: see _LONGEST
                warnings.simplefilter("ignore", DeprecationWarning)
                child = os.fork()
        except OSError:
            return None  # too little memory, or too many processes, for a second one
        if child == 0:
            _try(load, steps[1], printed[1])
        how, text = _watch(child, printed[0])
        last = _read(steps[0], _KEPT).decode().rstrip("\n").rpartition("\n")[2]
    if last == _LOADED or (last == _RAISED and deadly_only):
        return None
    if last == _RAISED:
        return text[-_MOST:]  # the error comes last
    if how is None:
        return f"loading it would not end: {last} had not ended after {_LONGEST:g} s"
    said = " ".join(_telling(text).split()) or "nothing said"
    where = f" in {last}" if last else ""
    return f"loading it would end the process: {how}{where}: {said}"


def _pipe(stack: contextlib.ExitStack) -> tuple[int, int]:
    ends = os.pipe()
    for end in ends:
        stack.callback(os.close, end)
    os.set_blocking(ends[0], False)
    return ends


def _try(load: Callable[[At], object], steps: int, printed: int) -> NoReturn:
    def at(step: str) -> None:
        os.write(steps, f"{step}\n".encode())

    try:
        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.dup2(printed, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        load(at)
        at(_LOADED)
    except BaseException as error:  # it ends here, whatever it is
        os.write(2, f"{error}\n{error.__cause__ or ''}".encode(errors="replace"))
        at(_RAISED)
    finally:
        os._exit(0)  # none of what the parent does when it ends


def _watch(child: int, printed: int) -> tuple[str | None, str]:
    """How the child ended, ``None`` if it had to be ended; and the end of what it printed."""
    text, how, pause = b"", None, 0.001
    deadline = time.monotonic() + _LONGEST
    try:
        while how is None and time.monotonic() < deadline:
            select.select([printed], [], [], pause)
            more = _read(printed, _KEPT)
            text = (text + more)[-_KEPT:]
            how = _ended(child)
            pause = min(2 * pause, 0.05)
    finally:
        if how is None:
            # It may have ended this moment, and somebody else have asked how.
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
    text = (text + _read(printed, _KEPT))[-_KEPT:]  # a pipe holds no more
    return how, text.decode(errors="replace").strip()


def _telling(text: str) -> str:
    """The part of it that says what the child died of: an exception's text may be long too."""
    start = max(map(text.rfind, _DIES_OF)) if len(text) > _MOST else 0
    return text[start:][:_MOST] if start >= 0 else text[-_MOST:]


def _read(pipe: int, most: int) -> bytes:
    """What is there to be read; whoever holds the other end is not waited for."""
    try:
        return os.read(pipe, most)
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
