"""A newer version of a library in the place of an older one: withdrawn, and put back if need be.

A library that registers operators cannot be loaded twice, nor beside a newer version of itself:
torch ends the process. So every library that is built here can withdraw what it has registered
(``jitops_retire``), while its code stays in memory for whoever still runs it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ops._errors import BuildError
from ops.jit._cache import _memory

# Symbols that whatever registers with torch needs: by torch's macros, or those of the stable ABI.
_REGISTERS = (b"N5torch7LibraryC", b"torch_library_init_")


@dataclass
class Loaded:
    """What was loaded from an entry.

    Attributes:
        name: of the extension.
        result: what the caller has got.
        library: to find ``jitops_retire`` in.
        file: open, so that it can be read whatever has become of its name; ``None`` once nobody
            will read it again.
        retired: whether what it had registered with torch was withdrawn.
    """

    name: str
    result: ModuleType | Path
    library: ctypes.CDLL
    file: int | None
    retired: bool = False

    @property
    def content(self) -> bytes:
        """Of the library; nothing once nobody needs it."""
        return os.pread(self.file, os.fstat(self.file).st_size, 0) if self.file is not None else b""

    def close(self) -> None:
        """It registers nothing that could be withdrawn or put back."""
        if self.file is not None:
            os.close(self.file)
            self.file = None


def in_the_way(older: Iterable[Loaded], library: Path) -> list[Loaded]:
    """Those that register operators in a namespace of the new ``library``.

    One that has registered none may still own a namespace, and nobody knows which.

    Raises:
        BuildError: one of them cannot be withdrawn.
    """
    register = []
    for loaded in older:
        if not loaded.retired:
            content = loaded.content
            if any(mark in content for mark in _REGISTERS):
                register.append(loaded)
            else:
                loaded.close()
    new = _namespaces(library.read_bytes()) if register else set()
    found = [one for one in register if not (its := _namespaces(one.content)) or its & new]
    for loaded in found:
        if not hasattr(loaded.library, "jitops_retire"):
            raise BuildError(
                f"{loaded.name} has changed, and what is loaded of it cannot be withdrawn: start a "
                f"new process"
            )
    return found


def _namespaces(library: bytes) -> set[str]:
    """The namespaces of registered operators that a library names."""
    known = {name.partition("::")[0] for name in _registered()}
    return {name for name in known if name.encode() + b"\0" in library}


def _registered() -> list[str]:
    return list(torch._C._dispatch_get_all_op_names())


def withdraw(loaded: Loaded) -> None:
    """Take back what a library has registered with torch."""
    namespaces = _namespaces(loaded.content) - {"aten"}
    for qualified in _registered():
        namespace, _, operator = qualified.partition("::")
        if namespace in namespaces:
            _keep(namespace, operator)
            # Looked up anew, with the schema of what replaces it.
            vars(getattr(torch.ops, namespace)).pop(operator.partition(".")[0], None)
    retire: Any = loaded.library.jitops_retire
    retire()
    loaded.retired = True


def put_back(loaded: Loaded) -> None:
    """Have a library that was withdrawn register again."""
    # Under another name: the dynamic linker would not initialise one file twice.
    with _memory.anonymous(f"{loaded.name}.so", loaded.content) as path:
        loaded.library = ctypes.CDLL(path)
    loaded.retired = False


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
