"""Runs ninja, whose compilers end when this process does, whatever ends it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

_TO_END = 5.0  # seconds that ninja has to end its compilers

# The shell's standard input is a pipe that nobody writes to, and which closes when this process
# ends. The status is printed because a handler of SIGCHLD may take it from us.
_SCRIPT = r"""
exec 3<&0 </dev/null
cd "$1" || exit
"$2" -t compdb >compdb.json 2>/dev/null
shift
"$@" &
ninja=$!
{ read -r _ <&3; kill "$ninja"; } 2>/dev/null &
watcher=$!
wait "$ninja"
status=$?
kill "$watcher" 2>/dev/null
printf '\nninja ended with status %s\n' "$status"
"""
_STATUS = re.compile(r"\nninja ended with status (\d+)\n$")


class NinjaError(Exception):
    """A build failed; the text is all that ninja and the compilers printed."""


def run(
    folder: Path,
    command: list[str],
    environ: dict[str, str],
    on_line: Callable[[str], None],
) -> None:
    """Run ninja in ``folder`` to its end, and write ``compdb.json`` there.

    Args:
        folder: holds build.ninja.
        command: ninja and its arguments.
        environ: its environment variables.
        on_line: is called with each line of its output.

    Raises:
        NinjaError: it failed.
    """
    reads, closes = os.pipe()  # first, so that no other pipe gets the number of standard input
    output, written = os.pipe()
    try:
        child = os.posix_spawn(
            "/bin/sh",
            ["sh", "-c", _SCRIPT, "sh", str(folder), *command],
            environ,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, reads, 0),
                (os.POSIX_SPAWN_DUP2, written, 1),
                (os.POSIX_SPAWN_DUP2, written, 2),
            ],
            setpgroup=0,  # Ctrl-C reaches this process alone
            setsigmask=[],
            setsigdef=[signal.SIGCHLD, signal.SIGPIPE, signal.SIGINT, signal.SIGTERM],
        )
    except BaseException:
        _close(closes, output)
        raise
    finally:
        _close(reads, written)
    said = b""
    try:
        while block := os.read(output, 1 << 16):
            lines = (said[said.rfind(b"\n") + 1 :] + block).split(b"\n")
            said += block
            for line in lines[:-1]:
                if line and not line.startswith(b"ninja ended with status "):
                    on_line(line.decode(errors="replace"))
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGTERM)
        _drain(output, child)
        raise
    finally:
        _close(output, closes)
        with contextlib.suppress(ChildProcessError):  # somebody else has asked how it ended
            os.waitpid(child, 0)
    text = said.decode(errors="replace")
    status = _STATUS.search(text)
    if status is None or status[1] != "0":
        raise NinjaError(_STATUS.sub("", text) or "ninja ended without a word")


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _drain(output: int, child: int) -> None:
    """Wait for the end of what was told to end."""
    os.set_blocking(output, False)
    until = time.monotonic() + _TO_END
    while time.monotonic() < until:
        try:
            if not os.read(output, 1 << 16):
                return
        except BlockingIOError:
            time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
