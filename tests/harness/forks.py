"""Fresh processes for tests, forked from one that has imported torch: a second faster than Python.

``start``, ``run`` and ``command`` are those of :mod:`tests.harness.helpers`. Settings that Python
or torch reads when it starts (``LD_PRELOAD``, ``PYTHONPATH``, the locale) need those.

At its end a fork waits for its threads, calls the functions of ``atexit``, and ends. To free all
that torch has made takes half a second, so only ``whole_end=True`` does it. Tests of libraries
that register something with torch need that.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
from pathlib import Path

from tests.harness.helpers import environment

_SERVER = r"""
import atexit, gc, json, os, select, signal, socket, sys, threading, traceback
import torch

gc.freeze()  # so that collections write to no page that is shared

def work(job, files):
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, file in enumerate(files[:3]):
        os.dup2(file, number)
    for file in files:
        os.close(file)
    # Streams of a file, say, believe that they can seek in a pipe.
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        setattr(sys, name, open(number, "w" if number else "r", closefd=False))
    os.environ.clear()
    os.environ.update(job["environ"])
    os.chdir(job["cwd"])
    sys.argv, sys.path[0], sys.executable = job["argv"], "", job["executable"]
    status = 0
    try:
        exec(compile(job["code"], "<string>", "exec"), sys.modules["__main__"].__dict__)
    except SystemExit as end:
        status = end.code
        if status is not None and not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    if job["whole_end"]:
        raise SystemExit(status)
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if not getattr(stream, "closed", True):
            stream.flush()
    os._exit((status or 0) & 0xFF)

def keep(job, files, report, client=None):
    # Waits for the one that works, and reports its end.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = os.fork()
    if child == 0:
        for one in (server, listener, *([client] if client else [])):
            one.close()
        work(job, files + [report] * (client is None))
    for file in files:
        os.close(file)
    if client is None:
        os.write(report, b"%d\n" % child)
    ended, status = os.waitpid(child, os.WNOHANG if client else 0)
    while not ended:
        if select.select([client], [], [], 0.01)[0]:  # the client has ended before its fork
            os.kill(child, signal.SIGKILL)
            os._exit(0)
        ended, status = os.waitpid(child, os.WNOHANG)
    os.write(report, b"%d\n" % os.waitstatus_to_exitcode(status))
    os._exit(0)

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
server, listener = (socket.socket(fileno=int(number)) for number in sys.argv[1:])
while True:
    ready, _, _ = select.select([server, listener], [], [])
    if listener in ready:
        client, _ = listener.accept()
        if os.fork() == 0:
            message, files, _, _ = socket.recv_fds(client, 1 << 20, 3)
            keep(json.loads(message), list(files), client.fileno(), client)
        client.close()
    if server in ready:
        message, files, _, _ = socket.recv_fds(server, 1 << 20, 4)
        if not message:
            break
        if os.fork() == 0:
            keep(json.loads(message), list(files[:3]), files[3])
        for file in files:
            os.close(file)
"""
_CLIENT = r"""#!{python} -IS
import json, os, signal, socket, sys

server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
server.connect({address!r})
assert sys.argv[1] == "-c"
job = {{
    "code": sys.argv[2],
    "argv": sys.argv[1:2] + sys.argv[3:],
    "executable": sys.argv[0],
    "cwd": os.getcwd(),
    "environ": dict(os.environ),
    "whole_end": True,
}}
socket.send_fds(server, [json.dumps(job).encode()], [0, 1, 2])
status = int(server.recv(100))
if status < 0:
    if -status != signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""


@functools.cache
def _server():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    folder = tempfile.mkdtemp(prefix="jitops-forks-")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(f"{folder}/server")
    listener.listen()
    numbers = theirs.fileno(), listener.fileno()
    process = subprocess.Popen(  # ends when this process does
        [sys.executable, "-c", _SERVER, *map(str, numbers)],
        env=environment(),
        cwd="/",
        pass_fds=numbers,
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is not for it
    )
    python = Path(folder, "python3")
    python.write_text(_CLIENT.format(python=sys.executable, address=f"{folder}/server"))
    python.chmod(0o755)
    theirs.close()
    listener.close()
    atexit.register(_end, ours, process, folder)
    return ours, str(python)


def _end(server, process, folder):
    server.close()
    process.wait()
    shutil.rmtree(folder)


def python():
    """A program that does what ``python -c`` does, in a fork; for ``sys.executable``."""
    return _server()[1]


class Forked:
    """A forked process, in the shape of :class:`subprocess.Popen`."""

    def __init__(self, code, cwd, environ, whole_end=False):
        ends = [os.pipe() for _ in range(4)]
        self.stdin = os.fdopen(ends[0][1], "w")
        self.stdout, self.stderr, self._report = (os.fdopen(r) for r, _ in ends[1:])
        theirs = [ends[0][0], *(w for _, w in ends[1:])]
        job = {
            "code": textwrap.dedent(code),
            "argv": ["-c"],
            "executable": sys.executable,
            "cwd": str(cwd or "/"),
            "environ": environ,
            "whole_end": whole_end,
        }
        socket.send_fds(_server()[0], [json.dumps(job).encode()], theirs)
        for file in theirs:
            os.close(file)
        self.pid = int(self._report.readline())
        self.returncode = None

    def wait(self):
        if self.returncode is None:
            self.returncode = int(self._report.readline())
            self._report.close()
        return self.returncode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, signal.SIGKILL)

    def communicate(self, timeout=300):
        said = {}

        def read(name):
            with getattr(self, name) as stream:
                said[name] = stream.read()

        threads = [
            threading.Thread(target=read, args=(name,), daemon=True)
            for name in ("stdout", "stderr")
        ]
        self.stdin.close()
        for thread in threads:
            thread.start()
        threads[0].join(timeout)
        if threads[0].is_alive():
            self.kill()
            raise subprocess.TimeoutExpired("a fork", timeout)
        threads[1].join()
        self.wait()
        return said["stdout"], said["stderr"]


def start(code, cwd=None, whole_end=False, **changes):
    """A process that has imported torch, running ``code``."""
    return Forked(code, cwd, environment(**changes), whole_end)


def run(code, cwd=None, ok=True, whole_end=False, **changes):
    """Its output, and its errors; fails the test if it fails (or, with ``ok=False``, if not)."""
    process = start(code, cwd, whole_end, **changes)
    out, err = process.communicate(timeout=300)
    assert (process.returncode == 0) is ok, f"exit {process.returncode}\n{out}\n{err}"
    return out, err


def command(*arguments, **changes):
    """The command ``jitops`` in a process of its own: status, output, errors."""
    process = start(
        f"""
        import runpy, sys
        sys.argv = ["jitops", *{[str(one) for one in arguments]!r}]
        runpy.run_module("ops", run_name="__main__", alter_sys=True)
        """,
        **changes,
    )
    out, err = process.communicate()
    assert "Traceback" not in err
    return process.returncode, out, err
