"""Libraries of this process: each is loaded once, and a newer one takes the place of an older."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.machinery
import importlib.util
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ops.jit import _debug, _replacing
from ops.jit._cache import _memory, _usage
from ops.jit._cache._store import Entry
from ops.jit._replacing import Loaded
from ops.jit._spec import Spec


class Vanished(Exception):  # noqa: N818 - no error: it is looked for again
    """The entry is just being deleted."""


# By the entry's folder: a library is initialised once.
_loaded: dict[Path, Loaded] = {}
# By the extension's name: the folder of the entry that was loaded last, which may not be deleted.
_in_force: dict[str, Path] = {}
_loading = threading.RLock()
# A thread that holds it is not there in a forked child, and would never give it back.
os.register_at_fork(after_in_child=lambda: globals().update(_loading=threading.RLock()))


def load(spec: Spec, entry: Entry) -> ModuleType | Path:
    """Load an entry, once; it takes the place of older versions, which stay if it does not load.

    Raises:
        Vanished: it is being deleted.
        ConfigError: the runtime of a sanitizer is not there.
        OSError, ImportError: the dynamic linker refuses it.
        BuildError: what it would replace cannot be withdrawn.
    """
    with _loading:
        present = _loaded.get(entry.folder)
        if present and not present.retired:
            if not _usage.is_held(entry.folder):  # it was replaced, and is asked for again
                _usage.hold(entry.folder)
            _take_over(spec.name, entry.folder)
            return present.result
        if not spec.is_standalone:
            _debug.check_runtime()
        if not _usage.hold(entry.folder):
            raise Vanished
        try:
            result = entry.library if spec.is_standalone else _load(spec, entry, present)
        except BaseException:
            _usage.let_go(entry.folder)
            raise
        _take_over(spec.name, entry.folder)
        return result


def _take_over(name: str, folder: Path) -> None:
    """Let go of the entry that was in force before: what is mapped stays if its file goes."""
    before = _in_force.get(name, folder)
    if before != folder:
        _usage.let_go(before)
    _in_force[name] = folder


def _load(spec: Spec, entry: Entry, retired: Loaded | None) -> ModuleType | Path:
    with contextlib.ExitStack() as stack:
        path = str(entry.library)
        if retired:  # the dynamic linker would not initialise one file twice
            content = entry.library.read_bytes()
            path = stack.enter_context(_memory.anonymous(entry.library.name, content))
        before = [loaded for loaded in _loaded.values() if loaded.name == spec.name]
        older = _replacing.in_the_way(before, entry.library)
        if before:
            from ops.jit import _trial  # a first load needs none of it

            problem = _trial.problem(
                lambda at: _swap(older, spec, entry, path, at),
                _anew(older, spec, path),
                deadly_only=not older,
            )
            if problem is not None:
                raise ImportError(problem)
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            result = _swap(older, spec, entry, path)
        except BaseException:
            os.close(file)
            raise
        for loaded in (*older, *([retired] if retired else [])):
            loaded.close()
        _loaded[entry.folder] = Loaded(spec.name, result, ctypes.CDLL(path), file)
        return result


_ANEW = """
import ctypes, importlib.machinery, importlib.util, torch
older = [ctypes.CDLL(path) for path in {older!r}]
at("the older version's destructors")
for library in older:
    library.jitops_retire()
at("its initialisers")
if {module!r}:
    loader = importlib.machinery.ExtensionFileLoader({name!r}, {path!r})
    spec = importlib.util.spec_from_file_location({name!r}, {path!r}, loader=loader)
    loader.exec_module(importlib.util.module_from_spec(spec))
else:
    ctypes.CDLL({path!r})
"""


def _anew(older: list[Loaded], spec: Spec, path: str) -> str:
    """What :func:`_swap` does, as text for a Python that has loaded nothing."""
    mine = f"/proc/{os.getpid()}/"
    return _ANEW.format(
        older=[f"{mine}fd/{loaded.file}" for loaded in older],
        module=spec.is_python_module,
        name=spec.name,
        path=path.replace("/proc/self/", mine, 1),
    )


def _swap(
    older: list[Loaded],
    spec: Spec,
    entry: Entry,
    path: str,
    at: Callable[[str], None] = lambda step: None,  # is told whose code runs next
) -> ModuleType | Path:
    """Load a library in the place of older ones, which are put back if that fails."""
    for loaded in older:
        at("the older version's destructors")
        _replacing.withdraw(loaded)
    at("its initialisers")
    try:
        return _module(spec, path) if spec.is_python_module else _operators(entry, path)
    except Exception:
        if not _is_in_memory(path):  # else its operators may be registered, in the way of theirs
            for loaded in older:
                at("the older version's initialisers")
                _replacing.put_back(loaded)
        raise


def _is_in_memory(path: str) -> bool:
    try:
        ctypes.CDLL(path, os.RTLD_NOLOAD)
    except OSError:
        return False
    return True


def _module(spec: Spec, path: str) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader(spec.name, path)
    module_spec = importlib.util.spec_from_file_location(spec.name, path, loader=loader)
    if module_spec is None:
        raise ImportError(f"no import spec for {path}")
    known = _interpreter_state().get("__pybind11_module_cache", {})
    older = known.pop(spec.name, None)
    before = sys.modules.get(spec.name)
    try:
        module = importlib.util.module_from_spec(module_spec)
        loader.exec_module(module)
    except BaseException:
        if older is not None:
            known[spec.name] = older
        raise
    # CPython has just made it what `import` of its name finds. An older version of it gives way;
    # what merely has the same name (an extension called "random") does not.
    if before is not None and not any(before is loaded.result for loaded in _loaded.values()):
        sys.modules[spec.name] = before
    return module


def _interpreter_state() -> dict[str, Any]:
    """Where pybind11 keeps modules by name: it would give an older version of one for a new one."""
    # Prototypes of our own: those of ctypes.pythonapi are everybody's.
    get = ctypes.PYFUNCTYPE(ctypes.c_void_p)(("PyInterpreterState_Get", ctypes.pythonapi))
    get_dict = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(
        ("PyInterpreterState_GetDict", ctypes.pythonapi)
    )
    state = get_dict(get())  # borrowed, so not a py_object
    found: dict[str, Any] = ctypes.cast(state, ctypes.py_object).value if state else {}
    return found


def _operators(entry: Entry, path: str) -> Path:
    if path.startswith("/proc/"):  # in memory: torch would resolve the path, and there is no other
        ctypes.CDLL(path)
    else:
        torch.ops.load_library(path)
    return entry.library
