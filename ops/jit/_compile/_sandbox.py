"""torch's build in a room of its own: its environment and its programs, without touching ours.

``torch.utils.cpp_extension`` reads ``os.environ``, flushes ``sys.stdout`` and runs ninja through
``subprocess``. Changing the real environment would change it for every thread and every fork of
this process, so the module is given views of those three modules instead. They are the real ones
wherever no build of ours runs in the calling thread.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ops.jit._compile import _toolchain


class Finished(BaseException):
    """Thrown through torch once ninja is done, past the loading, which is ours to do."""


@dataclass(frozen=True)
class Sandbox:
    """What a build sees.

    Attributes:
        environ: its environment variables.
        ninja: the path of ninja.
        build: runs ninja, given its words and the folder, instead of ``subprocess.run``.
    """

    environ: dict[str, str]
    ninja: str
    build: Callable[[list[str], str], None]


class _Current(threading.local):
    sandbox: Sandbox | None = None


_current = _Current()
_installing = threading.Lock()
os.register_at_fork(after_in_child=lambda: globals().update(_installing=threading.Lock()))

# A fork waits until torch's module is imported: in the child, the thread that imports it is gone,
# and an import that has begun never ends.
_importing = threading.RLock()
os.register_at_fork(
    before=_importing.acquire,
    after_in_parent=_importing.release,
    after_in_child=_importing.release,
)


class _View(types.ModuleType):
    def __init__(self, real: types.ModuleType) -> None:
        super().__init__(real.__name__)
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class _Os(_View):
    @property
    def environ(self) -> Any:
        return _current.sandbox.environ if _current.sandbox else os.environ

    def getenv(self, name: str, default: Any = None) -> Any:
        return self.environ.get(name, default)


class _Sys(_View):
    # torch flushes them, and they may be closed, or no streams at all.
    @property
    def stdout(self) -> Any:
        return io.StringIO() if _current.sandbox else sys.stdout

    @property
    def stderr(self) -> Any:
        return io.StringIO() if _current.sandbox else sys.stderr


class _Subprocess(_View):
    def run(self, command: Any, *arguments: Any, **options: Any) -> Any:
        sandbox = _current.sandbox
        if sandbox is None:
            return subprocess.run(command, *arguments, **options)  # noqa: PLW1510 - torch says
        if _is_ninja(command) and "cwd" in options:
            sandbox.build([sandbox.ninja, *command[1:]], options["cwd"])
            raise Finished
        options.setdefault("env", sandbox.environ)
        return subprocess.run(command, *arguments, **options)  # noqa: PLW1510

    def check_output(self, command: Any, *arguments: Any, **options: Any) -> Any:
        sandbox = _current.sandbox
        if sandbox is None:
            return subprocess.check_output(command, *arguments, **options)
        if _is_ninja(command):
            command = [sandbox.ninja, *command[1:]]
        options.setdefault("env", sandbox.environ)
        return subprocess.check_output(command, *arguments, **options)


def _is_ninja(command: Any) -> bool:
    return isinstance(command, list) and command[:1] == ["ninja"]


@contextlib.contextmanager
def entered(sandbox: Sandbox) -> Iterator[Any]:
    """Torch's module, seeing the sandbox for as long as the body runs in this thread."""
    module = _cpp_extension()
    with _installing:
        if not isinstance(module.os, _Os):
            module.os, module.sys, module.subprocess = _Os(os), _Sys(sys), _Subprocess(subprocess)
    with _cuda_home(module):
        before, _current.sandbox = _current.sandbox, sandbox
        try:
            yield module
        finally:
            _current.sandbox = before


def _cpp_extension() -> Any:
    # At its first import torch warns of a CUDA toolkit on a machine without a GPU: no news here.
    def quiet(record: logging.LogRecord) -> bool:
        return "No CUDA runtime is found" not in record.getMessage()

    logger = logging.getLogger("torch.utils.cpp_extension")
    logger.addFilter(quiet)
    try:
        with _importing:
            import torch.utils.cpp_extension as cpp_extension
    finally:
        logger.removeFilter(quiet)
    return cpp_extension


@contextlib.contextmanager
def _cuda_home(module: Any) -> Iterator[None]:
    """Torch reads it from the environment once, at its import: read it again for this build."""
    global _homes
    home: Path | None = _toolchain.cuda_home()
    with _installing:
        if not _homes:
            _homes = [module.CUDA_HOME]
        _homes.append(str(home) if home else _homes[0])
        module.CUDA_HOME = _homes[-1]
    try:
        yield
    finally:
        with _installing:
            _homes.pop()
            module.CUDA_HOME = _homes[-1]


_homes: list[str | None] = []  # torch's own first, then one for each build that is running
