"""Fresh processes for tests, forked from one that has imported torch: a second faster than Python.

``start``, ``run`` and ``command`` are those of :mod:`tests.harness.helpers`. Settings that Python
or torch reads when it starts (``LD_PRELOAD``, ``PYTHONPATH``, the locale) need those.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading

from tests.harness.helpers import environment

_SERVER = r"""
import json, os, signal, socket, sys, traceback
import torch

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
    sys.argv, sys.path[0] = ["-c"], ""
    status = 0
    try:
        exec(compile(job["code"], "<string>", "exec"), sys.modules["__main__"].__dict__)
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        status = 1
    raise SystemExit(status)

def keep(job, files):
    # Waits for the one that works, and reports its end.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = os.fork()
    if child == 0:
        server.close()
        work(job, files)
    report = files.pop()
    for file in files:
        os.close(file)
    os.write(report, b"%d\n" % child)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.write(report, b"%d\n" % status)
    os._exit(0)

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
server = socket.socket(fileno=int(sys.argv[1]))
while True:
    message, files, _, _ = socket.recv_fds(server, 1 << 20, 4)
    if not message:
        break
    if os.fork() == 0:
        keep(json.loads(message), list(files))
    for file in files:
        os.close(file)
"""


@functools.cache
def _server():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    process = subprocess.Popen(  # ends when this process does
        [sys.executable, "-c", _SERVER, str(theirs.fileno())],
        env=environment(),
        cwd="/",
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is not for it
    )
    theirs.close()
    atexit.register(_end, ours, process)
    return ours, process


def _end(server, process):
    server.close()
    process.wait()


class Forked:
    """A forked process, in the shape of :class:`subprocess.Popen`."""

    def __init__(self, code, cwd, environ):
        ends = [os.pipe() for _ in range(4)]
        self.stdin = os.fdopen(ends[0][1], "w")
        self.stdout, self.stderr, self._report = (os.fdopen(r) for r, _ in ends[1:])
        theirs = [ends[0][0], *(w for _, w in ends[1:])]
        job = {"code": textwrap.dedent(code), "cwd": str(cwd or "/"), "environ": environ}
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


def start(code, cwd=None, **changes):
    """A process that has imported torch, running ``code``."""
    return Forked(code, cwd, environment(**changes))


def run(code, cwd=None, ok=True, **changes):
    """Its output, and its errors; fails the test if it fails (or, with ``ok=False``, if not)."""
    process = start(code, cwd, **changes)
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
