"""Runs ninja, whose compilers end when this process does."""

import contextlib
import os
import re
import signal
import sys
from pathlib import Path

from ops.jit import _progress

# The shell's standard input is a pipe that nobody writes to, and which closes when this process
# ends. The status is printed because a handler of SIGCHLD may take it from us.
_SCRIPT = r"""
trap '' PIPE  # else a SIGPIPE kills ninja when nobody reads its output, and its compilers go on
exec 3<&0 </dev/null
cd "$1" || exit
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


def run(folder: Path, command: list[str], environ: dict[str, str], echo: bool) -> None:
    """Run ninja in ``folder``, where build.ninja lies.

    ``echo`` passes the output on to stdout. Raises NinjaError if the build fails.
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
            setsigdef=[signal.SIGCHLD, signal.SIGINT, signal.SIGTERM],
        )
    except BaseException:
        _close(closes, output)
        raise
    finally:
        _close(reads, written)
    said = b""
    try:
        while block := os.read(output, 1 << 16):
            said += block
            if echo:
                _progress.write(sys.stdout, _STATUS.sub("", block.decode(errors="replace")))
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGTERM)
        while os.read(output, 1 << 16):  # until ninja has ended its compilers
            pass
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
