"""``torch.ops.jitops`` finds the operators of ops that are not imported yet.

torch looks up the operators of an exported program by name when it loads the program. So the lookup
of an unknown name imports the modules that may declare it.
"""

from __future__ import annotations

import importlib
import sys

TYPE_CHECKING = False  # that of typing, whose import would take longer than all else here
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

# The operators that imported modules declare, or have begun to declare.
declared: set[str] = set()


def install() -> None:
    """Do so from now on, or as soon as torch is imported: ``import ops`` alone does not."""
    if "torch" in sys.modules:
        _install()
    else:
        sys.meta_path.insert(0, _BeforeTorch())


class _BeforeTorch:
    """Finds torch as it would be found without it, and has it call :func:`_install` at the end."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "torch":
            return None
        from importlib.util import find_spec

        sys.meta_path.remove(self)
        spec = find_spec("torch")
        loader: Any = None if spec is None else spec.loader
        if loader is not None:

            def exec_module(module: Any) -> None:
                del loader.exec_module
                loader.exec_module(module)
                _install()

            loader.exec_module = exec_module
        return spec


def _install() -> None:
    import torch
    from torch._ops import _OpNamespace

    class Operators(_OpNamespace):
        __module__ = _OpNamespace.__module__  # it gets into exported programs

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                if name.startswith("__") or name in declared:
                    raise
            for module in modules_of(name):
                if module not in sys.modules:
                    importlib.import_module(module)
            return super().__getattr__(name)

    torch.ops.jitops.__class__ = Operators


def modules_of(operator: str) -> Iterator[str]:
    """The modules that may declare an operator: of the op that begins its name, and shared ones.

    Importing the module of another op may build its kernels.
    """
    import pkgutil

    for room in ("ops._core", "ops.losses", "ops.layers"):
        package = importlib.import_module(room)
        for module in pkgutil.iter_modules(package.__path__, f"{room}."):
            if room == "ops._core" or operator.startswith(module.name.rpartition(".")[2]):
                yield module.name
