"""Libraries of this process: loading them, and putting a newer one in the place of an older.

A library that registers operators cannot be loaded twice, nor beside a newer version of itself:
torch ends the process. So every library that is built here can withdraw what it has registered
(``jitops_retire``), while its code stays in memory for whoever still runs it.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ops._errors import BuildError
from ops.jit import _debug
from ops.jit._cache import _memory, _usage
from ops.jit._cache._store import Entry
from ops.jit._spec import Spec


class Vanished(Exception):  # noqa: N818 - no error: it is looked for again
    """The entry is just being deleted."""


@dataclass
class _Loaded:
    """What was loaded from an entry.

    Attributes:
        result: what the caller has got.
        library: to find ``jitops_retire`` in.
        file: open, so that it can be read whatever has become of its name.
        retired: whether what it had registered with torch was withdrawn.
    """

    result: ModuleType | Path
    library: ctypes.CDLL
    file: int
    retired: bool = False

    @property
    def content(self) -> bytes:
        """Of the library."""
        return os.pread(self.file, os.fstat(self.file).st_size, 0)


# By the entry's folder: a library is initialised once.
_loaded: dict[Path, _Loaded] = {}
_loading = threading.RLock()
# A thread that holds it is not there in a forked child, and would never give it back.
os.register_at_fork(after_in_child=lambda: globals().update(_loading=threading.RLock()))


def load(spec: Spec, entry: Entry) -> ModuleType | Path:
    """Load an entry, once; what it replaces is withdrawn first.

    Raises:
        Vanished: it is being deleted.
        ConfigError: the runtime of a sanitizer is not there.
        OSError, ImportError: the dynamic linker refuses it.
        BuildError: what it would replace cannot be withdrawn.
    """
    with _loading:
        present = _loaded.get(entry.folder)
        if present and not present.retired:
            return present.result
        if spec.is_standalone:
            return entry.library
        _debug.check_runtime()
        if not _usage.hold(entry.folder):
            raise Vanished
        path = str(entry.library)
        if present:  # the dynamic linker would not initialise one file twice
            path = str(_memory.anonymous(entry.library.name, entry.library.read_bytes()))
        for older in _in_its_way(spec, entry):
            _retire(older, spec.name)
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            result = _module(spec, path) if spec.is_python_module else _operators(entry, path)
        except BaseException:
            os.close(file)
            raise
        _loaded[entry.folder] = _Loaded(result, ctypes.CDLL(path), file)
        return result


def _module(spec: Spec, path: str) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader(spec.name, path)
    module_spec = importlib.util.spec_from_file_location(spec.name, path, loader=loader)
    if module_spec is None:
        raise ImportError(f"no import spec for {path}")
    _interpreter_state().get("__pybind11_module_cache", {}).pop(spec.name, None)
    before = sys.modules.get(spec.name)
    module = importlib.util.module_from_spec(module_spec)
    loader.exec_module(module)
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


# ---- replacing -----------------------------------------------------------------------------------


# Symbols that whatever registers with torch needs: by torch's macros, or those of the stable ABI.
_REGISTERS = (b"N5torch7LibraryC", b"torch_library_init_")


def _in_its_way(spec: Spec, entry: Entry) -> list[_Loaded]:
    """Loaded libraries of the same extension that register operators in the same namespace.

    One that has registered none may still own a namespace, and nobody knows which.
    """
    older = [
        loaded
        for folder, loaded in _loaded.items()
        if folder.parent.name.rpartition("-")[0] == spec.name
        and not loaded.retired
        and any(mark in loaded.content for mark in _REGISTERS)
    ]
    new = _namespaces(entry.library.read_bytes()) if older else set()
    return [one for one in older if not (its := _namespaces(one.content)) or its & new]


def _namespaces(library: bytes) -> set[str]:
    """The namespaces of registered operators that a library names."""
    known = {name.partition("::")[0] for name in _registered()}
    return {name for name in known if name.encode() + b"\0" in library}


def _registered() -> list[str]:
    return list(torch._C._dispatch_get_all_op_names())


def _retire(loaded: _Loaded, name: str) -> None:
    retire: Any = getattr(loaded.library, "jitops_retire", None)
    if retire is None:
        raise BuildError(
            f"{name} has changed, and what is loaded of it cannot be withdrawn: start a new process"
        )
    namespaces = _namespaces(loaded.content) - {"aten"}
    for qualified in _registered():
        namespace, _, operator = qualified.partition("::")
        if namespace in namespaces:
            _keep(namespace, operator)
            # Looked up anew, with the schema of what replaces it.
            vars(getattr(torch.ops, namespace)).pop(operator.partition(".")[0], None)
    retire()
    loaded.retired = True


# Operators that somebody may still hold must not go: an implementation on a key that nobody uses
# keeps them, and what replaces them fills them again.
_keepers: dict[str, torch.library.Library] = {}
_kept: set[tuple[str, str]] = set()
_UNUSED_KEY = "PrivateUse3"


def _keep(namespace: str, operator: str) -> None:
    if (namespace, operator) in _kept:
        return
    keeper = _keepers.get(namespace)
    if keeper is None:
        keeper = _keepers[namespace] = torch.library.Library(namespace, "FRAGMENT")
    keeper.impl(operator, _withdrawn, _UNUSED_KEY)
    _kept.add((namespace, operator))


def _withdrawn(*_: object) -> None:
    raise BuildError("this operator has been withdrawn")
