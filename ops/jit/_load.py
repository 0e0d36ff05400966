"""Libraries of this process: each is loaded once, and a newer version replaces an older one."""

import contextlib
import ctypes
import importlib.machinery
import importlib.util
import os
import re
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ops import _config
from ops._errors import ConfigError
from ops.jit._cache import _entries
from ops.jit._cache._entries import Entry
from ops.jit._spec import Spec

# Symbols of libraries that register with torch, by torch's macros or those of the stable ABI.
_REGISTERS = (b"N5torch7LibraryC", b"torch_library_init_")
# Those of libraries that define operators, of a namespace as a whole or in part.
# These are variables, because optimisation may take away the functions beside them.
_DEFINES = re.compile(rb"TORCH_LIBRARY_(?:static_init_(\w+)|FRAGMENT_static_init_(\w+)_\d+)\0")
# The runtime library of each sanitizer. That of "address" finds leaks too.
_RUNTIMES = {"address": "libasan", "thread": "libtsan", "leak": "liblsan"}


@dataclass
class Loaded:
    """A library that this process has loaded."""

    name: str  # of the extension
    result: ModuleType | Path  # of load
    library: ctypes.CDLL
    content: bytes  # for as long as it has registrations with torch
    retired: bool = False  # it has taken them back, and its code stays in memory


# By the entry's folder: a library is initialised once.
_loaded: dict[Path, Loaded] = {}
# By the extension's name: the folder of the entry that was loaded last, which may not be deleted.
_current: dict[str, Path] = {}
_loading = threading.RLock()
# A thread that holds it is not there in a forked child, and would never give it back.
os.register_at_fork(after_in_child=lambda: globals().update(_loading=threading.RLock()))


def load(spec: Spec, entry: Entry) -> ModuleType | Path | None:
    """Load an entry, once; it replaces older versions. ``None``: it is just being evicted."""
    with _loading:
        present, before = _loaded.get(entry.folder), _current.get(spec.name)
        if before != entry.folder and not _entries.mark_in_use(entry.folder):
            return None
        try:
            if present and not present.retired:
                result = present.result
            else:
                result = entry.library if spec.is_standalone else _load(spec, entry, present)
        except BaseException:
            _entries.release(entry.folder)
            raise
        if before and before != entry.folder:  # its code is mapped, and stays if its file goes
            _entries.release(before)
        _current[spec.name] = entry.folder
        return result


def _load(spec: Spec, entry: Entry, retired: Loaded | None) -> ModuleType | Path:
    check_sanitizer()
    content, path = entry.library.read_bytes(), str(entry.library)
    older = [one for one in _loaded.values() if one.name == spec.name]
    registers = any(mark in content for mark in _REGISTERS)
    withdrawn: list[str] = []
    with contextlib.ExitStack() as copy:
        taken = _taken(content)
        if older or taken:
            from ops.jit import _reload  # most first loads need none of it

            if retired:
                path = copy.enter_context(_reload.copied(entry.library, content))
            if registers or any(one.content for one in older):
                withdrawn = _reload.prepare(spec, path, content, list(_loaded.values()), taken)
        try:
            result: ModuleType | Path = entry.library
            if spec.is_python_module:
                result = _module(spec, path)
            else:
                torch.ops.load_library(path)
        except (OSError, ImportError) as error:
            if withdrawn:
                error.__notes__ = ["the older version is withdrawn: start a new process"]
            raise
        library = ctypes.CDLL(path)
        _loaded[entry.folder] = Loaded(spec.name, result, library, content if registers else b"")
    if withdrawn:
        _reload.renew(withdrawn)
    return result


def check_sanitizer() -> None:
    """Check that a sanitizer's runtime is loaded: else it would end the process."""
    names = _config.settings().sanitize
    runtime = next((its for name, its in _RUNTIMES.items() if name in names), None)
    if runtime is None or sys.platform != "linux":
        return
    if runtime not in Path("/proc/self/maps").read_text(errors="replace"):
        raise ConfigError(
            f"JITOPS_SANITIZE={','.join(names)} needs the sanitizer's runtime in the process from "
            f'its start: run it with LD_PRELOAD="$(${{CXX:-c++}} -print-file-name={runtime}.so)". '
            f'ASAN_OPTIONS="detect_leaks=0" or LSAN_OPTIONS="exitcode=0" silences reports at the '
            f"end, because Python and torch leave much to it"
        )


def _taken(content: bytes) -> dict[str, bool]:
    """Find namespaces of a library that others use too; true: they too define it as a whole."""
    found: dict[str, bool] = {}
    for whole, part in _DEFINES.findall(content):
        namespace = (whole or part).decode()
        is_whole = bool(whole) and _is_whole(namespace)
        every = torch._C._dispatch_get_all_op_names()
        if is_whole or any(name.startswith(f"{namespace}::") for name in every):
            found[namespace] = is_whole or found.get(namespace, False)
    return found


def _is_whole(namespace: str) -> bool:
    """Whether somebody has defined a namespace as a whole, which only one library can do."""
    try:
        torch.library.Library(namespace, "DEF")
    except (RuntimeError, ValueError):
        return True
    return False


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
    # CPython has just put it into sys.modules. An older version of it gives way there; a module
    # that merely has the same name (an extension called "random") does not.
    if before is not None and not any(before is loaded.result for loaded in _loaded.values()):
        sys.modules[spec.name] = before
    return module


def _interpreter_state() -> dict[str, Any]:
    """Return the dictionary where pybind11 keeps modules by name, older versions included."""
    # Prototypes of our own, because those of ctypes.pythonapi are everybody's.
    pointer, api = ctypes.c_void_p, ctypes.pythonapi
    get = ctypes.PYFUNCTYPE(pointer)(("PyInterpreterState_Get", api))
    get_dict = ctypes.PYFUNCTYPE(pointer, pointer)(("PyInterpreterState_GetDict", api))
    state = get_dict(get())  # borrowed, so not a py_object
    return ctypes.cast(state, ctypes.py_object).value if state else {}
