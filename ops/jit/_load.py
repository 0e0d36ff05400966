"""Libraries of this process: each is loaded once, and a newer version replaces an older one."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.machinery
import importlib.util
import itertools
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ops import _config
from ops.jit._cache import _entries
from ops.jit._cache._entries import Entry
from ops.jit._spec import Spec

# Symbols of libraries that register with torch, by torch's macros or those of the stable ABI.
_REGISTERS = (b"N5torch7LibraryC", b"torch_library_init_")


class EvictedMeanwhile(Exception):  # noqa: N818 - no error: the entry is looked for again
    """The entry is just being deleted."""


class Loaded:
    """A library that this process has loaded."""

    def __init__(self, name: str, result: ModuleType | Path, path: str, content: bytes) -> None:
        self.name = name  # of the extension
        self.result = result  # of load
        self.library = ctypes.CDLL(path)
        self.registers = registers(content)
        # The file can be read by it even after its name is gone.
        self.file = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if self.registers else -1
        self.retired = False

    @property
    def content(self) -> bytes:
        """The content of the file."""
        return os.pread(self.file, os.fstat(self.file).st_size, 0) if self.file >= 0 else b""

    def retire(self) -> None:
        """Have the library take back its registrations; its code stays in memory."""
        self.library.jitops_retire()
        self.retired = True
        os.close(self.file)
        self.file = -1


# By the entry's folder: a library is initialised once.
_loaded: dict[Path, Loaded] = {}
# By the extension's name: the folder of the entry that was loaded last, which may not be deleted.
_current: dict[str, Path] = {}
_copies = itertools.count(1)
_loading = threading.RLock()
# A thread that holds it is not there in a forked child, and would never give it back.
os.register_at_fork(after_in_child=lambda: globals().update(_loading=threading.RLock()))


def load(spec: Spec, entry: Entry) -> ModuleType | Path:
    """Load an entry, once; it replaces older versions of the extension."""
    with _loading:
        present = _loaded.get(entry.folder)
        if present and not present.retired:
            if _current.get(spec.name) != entry.folder:  # it was replaced, and is asked for again
                _entries.mark_in_use(entry.folder)
            _take_over(spec.name, entry.folder)
            return present.result
        if _config.settings().sanitize and not spec.is_standalone:
            from ops.jit import _debug

            _debug.check_runtime()
        if not _entries.mark_in_use(entry.folder):
            raise EvictedMeanwhile
        try:
            result = entry.library if spec.is_standalone else _load(spec, entry, present)
        except BaseException:
            _entries.release(entry.folder)
            raise
        _take_over(spec.name, entry.folder)
        return result


def _take_over(name: str, folder: Path) -> None:
    """Release the entry that was current before: its code is mapped and stays if its file goes."""
    before = _current.get(name, folder)
    if before != folder:
        _entries.release(before)
    _current[name] = folder


def _load(spec: Spec, entry: Entry, retired: Loaded | None) -> ModuleType | Path:
    content = entry.library.read_bytes()
    # The dynamic linker would not initialise one file twice.
    copied = _copied(entry.library.name, content) if retired else None
    with copied or contextlib.nullcontext(str(entry.library)) as path:
        withdrawn: list[str] = []
        if any(one.registers or one.name == spec.name for one in _loaded.values()):
            from ops.jit import _reload  # a first load needs none of it

            present = list(_loaded.values())
            withdrawn = _reload.prepare(spec, path, content, registers(content), present)
        try:
            result = _module(spec, path) if spec.is_python_module else _operators(entry, path)
        except (OSError, ImportError) as error:
            if withdrawn:
                error.__notes__ = ["the older version is withdrawn: start a new process"]
            raise
        if withdrawn:
            _reload.renew(withdrawn)
        _loaded[entry.folder] = Loaded(spec.name, result, path, content)
        return result


def registers(content: bytes) -> bool:
    """Whether a library registers operators with torch."""
    return any(mark in content for mark in _REGISTERS)


@contextlib.contextmanager
def _copied(name: str, content: bytes) -> Iterator[str]:
    """Make a file of this content, and yield a path that no other file ever had.

    The dynamic linker knows a library by the spelling of its path. The kernel gives numbers of
    closed descriptors anew, but dots and slashes lead nowhere else, so they can count.
    """
    if not hasattr(os, "memfd_create"):
        import tempfile

        with tempfile.TemporaryDirectory(prefix="jitops-") as folder:
            Path(folder, name).write_bytes(content)
            yield str(Path(folder, name))
        return
    descriptor = os.memfd_create(name)
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(content)
        spelled = "".join(".//" if bit == "1" else "./" for bit in f"{next(_copies):b}")
        yield f"/proc/self/fd/{spelled}{descriptor}"
    finally:
        os.close(descriptor)


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


def _operators(entry: Entry, path: str) -> Path:
    if path.startswith("/proc/"):  # in memory: torch would resolve the path, and there is no other
        ctypes.CDLL(path)
    else:
        torch.ops.load_library(path)
    return entry.library
