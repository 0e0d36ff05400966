"""Whether a library would end the process that loads it: tried in another process first.

A C++ exception in a static initialiser (a schema that does not parse, say) gets past the dynamic
linker as the end of the process, and nothing in the process can help that. Whoever edits and loads
again would lose their session to a typing error.

A fork of the process has all that the process has, but for its threads. What waits for one of them
(a pool of OpenMP's or of torch's, a thread that a destructor joins) waits for ever, and that is not
the library's fault. So what does not end there is tried once more in a new Python.
"""

from __future__ import annotations

import faulthandler
import os
import resource
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

import torch

from ops.jit import _watched
from ops.jit._compile import _progress
from ops.jit._watched import Pipes, Seen

_LONGEST = 60.0  # seconds in a new Python
_FORKED = 20.0  # seconds in a fork, after which it is no verdict
_ASLEEP = 5.0  # seconds of them that it may use no processor
_MOST = 2000  # characters of what it prints that are passed on
_DIES_OF = ("terminate called", "terminating ")  # libstdc++, libc++
# What the child says of how far it has got: a word before it ends, in a line of its own. An exit
# status says nothing: an initialiser may end the process with any.
_LOADED = "loaded"
_RAISED = "raised"

At = Callable[[str], None]


def problem(load: Callable[[At], object], anew: str, *, deadly_only: bool) -> str | None:
    """What ``load`` dies of, does not come back from, or raises, in a process of its own.

    Args:
        load: what to try in a fork of this process; it is given a function by which it says what
            comes next. What it writes to stdout is dropped.
        anew: Python text that does the same in a new process, where ``at`` is that function.
        deadly_only: an exception is no problem, only the end of the process is.

    Returns:
        ``None`` too where it cannot be tried.
    """
    # Elsewhere, system libraries do not survive a fork; nor does CUDA, once initialised.
    if sys.platform != "linux" or torch.cuda.is_initialized():
        return None
    seen = _in_fork(load)
    if seen is not None and seen.how is None and seen.step not in (_LOADED, _RAISED):
        _progress.say(
            f"a trial in a fork of this process does not end in {seen.step}: trying it in a new one"
        )
        # What another process raises may be no problem in this one.
        seen, deadly_only = _in_python(anew), True
    if seen is None or seen.step == _LOADED or (seen.step == _RAISED and deadly_only):
        return None
    if seen.step == _RAISED:
        return seen.text[-_MOST:]  # the error comes last
    if seen.how is None:
        return f"loading it would not end: {seen.step} had not ended after {_LONGEST:g} s"
    said = " ".join(_telling(seen.text).split()) or "nothing said"
    where = f" in {seen.step}" if seen.step else ""
    return f"loading it would end the process: {seen.how}{where}: {said}"


# ---- in a fork -----------------------------------------------------------------------------------


def _in_fork(load: Callable[[At], object]) -> Seen | None:
    with _watched.pipes() as ends:
        try:
            with warnings.catch_warnings():  # Python 3.12 warns of threads, which are said above
                warnings.simplefilter("ignore", DeprecationWarning)
                child = os.fork()
        except OSError:
            return None  # too little memory, or too many processes, for a second one
        if child == 0:
            _try(load, ends)
        return _watched.watch(child, ends, longest=_FORKED, asleep=_ASLEEP)


def _try(load: Callable[[At], object], ends: Pipes) -> NoReturn:
    def at(step: str) -> None:
        os.write(ends.steps[1], f"{step}\n".encode())

    try:
        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.dup2(ends.printed[1], 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        load(at)
        at(_LOADED)
    except BaseException as error:  # it ends here, whatever it is
        os.write(2, f"{error}\n{error.__cause__ or ''}".encode(errors="replace"))
        at(_RAISED)
    finally:
        os._exit(0)  # none of what the parent does when it ends


# ---- in a new Python -----------------------------------------------------------------------------

_FRAME = """
import faulthandler, os, resource, sys
sys.path[:] = {path!r}
def at(step):
    os.write({steps}, (step + chr(10)).encode())
try:
    faulthandler.disable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    exec({text!r}, {{"at": at}})
    at({loaded!r})
except BaseException:
    at({raised!r})
finally:
    os._exit(0)
"""


def _in_python(text: str) -> Seen | None:
    """``None`` if it tells nothing: it did not get as far as its first step."""
    with _watched.pipes() as ends:
        steps, printed = ends.steps[1], ends.printed[1]
        frame = _FRAME.format(path=sys.path, steps=steps, text=text, loaded=_LOADED, raised=_RAISED)
        try:
            child = os.posix_spawn(
                sys.executable,
                [sys.executable, "-c", frame],
                os.environ,
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                    (os.POSIX_SPAWN_DUP2, printed, 2),
                    (os.POSIX_SPAWN_DUP2, steps, steps),  # to itself: left open
                ],
            )
        except (OSError, TypeError, ValueError):
            return None  # no memory; or this program is no Python, but has one in it
        seen = _watched.watch(child, ends, longest=_LONGEST, asleep=_LONGEST)
    return seen if seen.step else None


def _telling(text: str) -> str:
    """The part of it that says what the child died of: an exception's text may be long too."""
    start = max(map(text.rfind, _DIES_OF)) if len(text) > _MOST else 0
    return text[start:][:_MOST] if start >= 0 else text[-_MOST:]
