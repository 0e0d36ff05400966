"""Whether a library would end the process that loads it: tried in a fork of the process first.

A C++ exception in a static initialiser (a schema that does not parse, say) gets past the dynamic
linker as the end of the process, and nothing in the process can help that. Whoever edits and loads
again would lose their session to a typing error.
"""

from __future__ import annotations

import faulthandler
import os
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import NoReturn

import torch

_LONGEST = 60.0  # seconds; a lock that another thread held as we forked is never given back
_RAISED = 3  # exit status: Python said no, and the process went on


def problem(load: Callable[[], object], *, deadly_only: bool) -> str | None:
    """What ``load`` dies of, or raises, in a fork of this process.

    Args:
        load: what to try. What it writes to stdout is dropped.
        deadly_only: an exception is no problem, only the end of the process is.

    Returns:
        ``None`` too where it cannot be tried, or does not end.
    """
    # Elsewhere, system libraries do not survive a fork; nor does CUDA, once initialised.
    if sys.platform != "linux" or torch.cuda.is_initialized():
        return None
    with tempfile.TemporaryFile() as said:
        try:
            with warnings.catch_warnings():  # Python 3.12 warns of threads: see _LONGEST
                warnings.simplefilter("ignore", DeprecationWarning)
                child = os.fork()
        except OSError:
            return None  # too little memory, or too many processes, for a second one
        if child == 0:
            _try(load, said.fileno())
        status = _wait(child)
        said.seek(0)
        text = said.read().decode(errors="replace").strip()
    if status == 0 or status is None or (status == _RAISED and deadly_only):
        return None
    if status == _RAISED:
        return text
    how = f"signal {-status}" if status < 0 else f"status {status}"
    return f"loading it would end the process ({how}): {' '.join(text.split()) or 'nothing said'}"


def _try(load: Callable[[], object], said: int) -> NoReturn:
    status = _RAISED
    try:
        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.dup2(said, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        load()
        status = 0
    except BaseException as error:  # it ends here, whatever it is
        os.write(said, f"{error}\n{error.__cause__ or ''}".encode(errors="replace"))
    finally:
        os._exit(status)  # none of what the parent does when it ends


def _wait(child: int) -> int | None:
    """The exit status, less than 0 for a signal; ``None`` if it had to be ended."""
    deadline, pause = time.monotonic() + _LONGEST, 0.001
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None
